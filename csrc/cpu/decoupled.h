// Decoupled knowledge distillation (DKD). The sweeps leave the label out, and compute the forward
// KL among the other classes. This file computes the few numbers of each row that follow from the
// label's two logits and the sweeps' sums (docs/maths.md, section 10). `V` is as in formulas.h.
#pragma once
#include "row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class V>
FASTKD_HOST_DEVICE Odds<V> odds_of(V log) {
  return {log, exp_of<V>(-magnitude_of(log))};
}

// Return the label's odds against classes whose exponentials relative to `max` sum to 1 / scale. A
// scale of 0 stands for no classes.
template <class V>
FASTKD_HOST_DEVICE Odds<V> odds_of(V label, V max, V scale, V temperature) {
  const V log = (label - max) / temperature + log_of(scale);
  return odds_of<V>(scale == 0 ? broadcast<V>(kInfinity<Scalar<V>>) : log);
}

template <class V>
struct LabelOdds {
  Odds<V> student, teacher;
  V difference;  // teacher's log odds minus the student's, with LogRatio's rounding error
};
template <class V>
FASTKD_HOST_DEVICE LabelOdds<V> label_odds(const Settings<V>& row, const Scales<V>& s,
                                           const LogRatio<V>& ratio) {
  const V z = s.student_label, w = s.teacher_label;
  const Odds<V> student = odds_of(z, s.student_max, s.student_scale, row.temperature);
  const Odds<V> teacher = odds_of(w, s.teacher_max, s.teacher_scale, row.teacher_temperature);
  const auto both = (s.student_scale > 0) & (s.teacher_scale > 0);
  return {student, teacher, both ? ratio.at(z, w) : teacher.log - student.log};
}

// Return the weight of the KL among the classes other than the label: 0 if the teacher gives these
// classes probability 0.
template <class V>
FASTKD_HOST_DEVICE V mix_of(const Inputs& in, const Scales<V>& s) {
  return s.teacher_scale > 0 ? broadcast<V>(static_cast<Scalar<V>>(in.mix)) : V{};
}

// Factors of the gradient of a row whose sums leave the label out.
template <class V>
struct LabelGains {
  V soft, rest;  // factors of slopes and of q, for classes other than the label
  V hard_share;  // factor of the hard gain: 1 - the label's probability at temperature 1
  V label;       // the label's gradient
};
template <class V>
FASTKD_HOST_DEVICE LabelGains<V> label_gains(const Inputs& in, const Settings<V>& row,
                                             const Scales<V>& s, const LogRatio<V>& ratio,
                                             const RowGains<V>& gains, bool hard) {
  const LabelOdds<V> odds = label_odds(row, s, ratio);
  const V diff = gains.soft * binary_kl(odds.teacher, odds.student, odds.difference).diff;
  const V soft = gains.soft * mix_of(in, s);
  if (!hard) return {soft, -diff, V{}, diff};
  const V rest = odds_of(s.student_label, s.student_max, s.hard_scale, broadcast<V>(1)).rest();
  const Scalar<V> smoothing = static_cast<Scalar<V>>(in.label_smoothing);
  const V over_target = smoothing - smoothing / static_cast<Scalar<V>>(in.classes) - rest;
  return {soft, -diff, s.student_scale > 0 ? rest : V{}, diff + gains.hard * over_target};
}

// Set the label's gradient, and the factors of the other classes' gradient. The function is not
// inlined, because only kDecoupled calls it.
template <class T>
__attribute__((noinline)) void decouple(const Inputs& in, const Row<T>& row, const Scales<T>& s,
                                        double gain, Coefficients<T>* c) {
  const Scales<double> scales = s.template as<double>();
  const bool hard = row.gradient_hard != ExpSource::kNone;
  const LabelGains<double> gains =
      label_gains<double>(in, row, scales, make_log_ratio<T, double>(row, scales, false),
                          gains_of<double>(in, row, scales, gain, hard), hard);
  c->soft_gain = static_cast<T>(gains.soft);
  c->rest_gain = static_cast<T>(gains.rest);
  c->label_gradient = static_cast<T>(gains.label);
  if (hard) c->hard_gain = static_cast<T>(static_cast<double>(c->hard_gain) * gains.hard_share);
}

// Return log(sum exp z) over all classes, minus the maximum of the classes other than the label.
// `others`: log(sum exp z) over these other classes, minus the same maximum; -inf if there is no
// other class.
template <class V>
FASTKD_HOST_DEVICE V log_sum(const Scales<V>& s, V others) {
  const V label = s.student_label - s.student_max;
  const Odds<V> odds = odds_of<V>(label - others);
  return (odds.log > 0 ? label : others) + log1p_of(odds.minor);
}

// Add the label to `sums`, which cover the classes other than the label. sums->value becomes the
// divergence.
template <class V, class Sums>
FASTKD_HOST_DEVICE void include_label(const Inputs& in, const Settings<V>& row, const Scales<V>& s,
                                      const LogRatio<V>& ratio, Sums* sums) {
  const LabelOdds<V> odds = label_odds(row, s, ratio);
  // The exact sum of q - p is 0. The computed sum is exp(e) - 1 for the rounding error e of the
  // constant log_ratio (docs/maths.md, section 10).
  const V difference = odds.difference + log1p_of(sums->slope);
  // NaN comes from 0 * inf, and means an infinite divergence, as in results_of() (formulas.h).
  const V within = sums->value == sums->value ? sums->value : broadcast<V>(kInfinity<Scalar<V>>);
  sums->value =
      binary_kl(odds.teacher, odds.student, difference).value + weighted(mix_of(in, s), within);
  sums->student_entropy = odds.student.entropy() + odds.student.rest() * sums->student_entropy;
  sums->teacher_entropy = odds.teacher.entropy() + odds.teacher.rest() * sums->teacher_entropy;
  const auto student_others = s.student_scale > 0, teacher_others = s.teacher_scale > 0;
  const auto no_student = s.student_scale <= 0, no_teacher = s.teacher_scale <= 0;
  const auto label_is_greatest = (no_student | (s.student_label >= s.student_max)) &
                                 (no_teacher | (s.teacher_label >= s.teacher_max));
  const auto others_are = student_others & teacher_others & (s.student_max >= s.student_label) &
                          (s.teacher_max >= s.teacher_label) & (sums->agreement > 0);
  sums->agreement = (label_is_greatest | others_are) ? broadcast<V>(1) : V{};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
