// Decoupled distillation: the sweeps are those of the forward KL among the classes other than the
// label, which they leave out. What follows from the label's own two logits and their sums is here
// (docs/maths.md, section 10), a few numbers for each row, in double.
#pragma once
#include "row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

inline Odds<double> odds_of(double log) { return {log, std::exp(-std::fabs(log))}; }

// Of the label against classes whose sum of exponentials relative to `max` is 1 / scale, 0: none.
inline Odds<double> odds_of(double label, double max, double scale, double temperature) {
  if (scale == 0) return odds_of(-kLowest);
  return odds_of((label - max) / temperature + std::log(scale));
}

struct LabelOdds {
  Odds<double> student, teacher;
  double difference;  // of their logarithms, within what rounding did to the sums
};

// d as log_ratio_of() forms it, in double.
template <class T>
double difference_of(const LogRatio<T>& ratio, double z, double w) {
  const double from_z = z - static_cast<double>(ratio.student_base);
  const double from_w = w - static_cast<double>(ratio.teacher_base);
  return (from_w * static_cast<double>(ratio.temperature_ratio) - from_z) *
             static_cast<double>(ratio.inverse_temperature) -
         static_cast<double>(ratio.log_ratio);
}

template <class T>
LabelOdds label_odds(const Row<T>& row, const Scales<T>& s, const LogRatio<T>& ratio) {
  const double z = s.student_label, w = s.teacher_label;
  const Odds<double> student = odds_of(z, s.student_max, s.student_scale, row.temperature);
  const Odds<double> teacher = odds_of(w, s.teacher_max, s.teacher_scale, row.teacher_temperature);
  const bool both = s.student_scale > 0 && s.teacher_scale > 0;
  return {student, teacher, both ? difference_of(ratio, z, w) : teacher.log - student.log};
}

// The weight of the KL among the other classes: none where the teacher allows none of them.
template <class T>
double mix_of(const Inputs& in, const Scales<T>& s) {
  return s.teacher_scale > 0 ? in.mix : 0;
}

// The label's part in a row's gradient, and what it changes in the other classes'. Not inlined, for
// forward and backward must arrive at the same bits.
template <class T>
__attribute__((noinline)) void decouple(const Inputs& in, const Row<T>& row, const Scales<T>& s,
                                        double gain, Coefficients<T>* c) {
  const LabelOdds odds = label_odds(row, s, *c);
  const double soft = gain * row.soft_weight * row.temperature;
  const double diff = soft * binary_kl(odds.teacher, odds.student, odds.difference).diff;
  c->soft_gain = static_cast<T>(soft * mix_of(in, s));
  c->rest_gain = static_cast<T>(-diff);
  c->label_gradient = static_cast<T>(diff);
  if (row.gradient_hard == ExpSource::kNone) return;
  const double rest = odds_of(s.student_label, s.student_max, s.hard_scale, 1).rest();
  const double smoothing = in.label_smoothing;
  const double over_target = smoothing - smoothing / static_cast<double>(in.classes) - rest;
  c->label_gradient = static_cast<T>(diff + gain * row.hard_weight * over_target);
  c->hard_gain =
      s.student_scale > 0 ? static_cast<T>(static_cast<double>(c->hard_gain) * rest) : T(0);
}

// log(sum exp z) - max z, of all classes, from the other classes' sum.
template <class T>
__attribute__((noinline)) double log_sum(const Row<T>& row, const Scales<T>& s,
                                         const Statistics& of) {
  const double label = static_cast<double>(s.student_label) - static_cast<double>(s.student_max);
  if (of.hard_sum == 0) return label;
  const double others = std::log2(of.hard_sum) / row.hard_exponent();
  const Odds<double> odds = odds_of(label - others);
  return (odds.log > 0 ? label : others) + std::log1p(odds.minor);
}

// Makes of the other classes' sums those of all classes, with the divergence as their value.
template <class T>
__attribute__((noinline)) void include_label(const ForwardArgs& args, const Row<T>& row,
                                             const Scales<T>& s, Sums* sums) {
  const LabelOdds odds = label_odds(row, s, make_log_ratio(row, s));
  // The sum of q - p should be 0 and shows what rounding did to the difference of the two sums of
  // exponentials, and so to that of the odds.
  const double difference = odds.difference + std::log1p(sums->slope);
  // NaN as in put_loss (rows.cpp).
  const double within = sums->value == sums->value ? sums->value : -kLowest;
  sums->value =
      binary_kl(odds.teacher, odds.student, difference).value + weighted(mix_of(args, s), within);
  if (args.terms == nullptr) return;
  sums->student_entropy = odds.student.entropy() + odds.student.rest() * sums->student_entropy;
  sums->teacher_entropy = odds.teacher.entropy() + odds.teacher.rest() * sums->teacher_entropy;
  const bool student_others = s.student_scale > 0, teacher_others = s.teacher_scale > 0;
  const bool label_is_greatest = (!student_others || s.student_label >= s.student_max) &&
                                 (!teacher_others || s.teacher_label >= s.teacher_max);
  const bool others_are = student_others && teacher_others && s.student_max >= s.student_label &&
                          s.teacher_max >= s.teacher_label;
  sums->agreement = label_is_greatest || (others_are && sums->agreement > 0) ? 1 : 0;
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
