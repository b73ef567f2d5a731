// The arithmetic of one row of the sparse loss, in double, for the CPU and for CUDA. The kernels
// sum the student's exponentials. The functions of this file turn the sums into the value and the
// constants of the gradient.
//
// A row's classes are the listed classes and the rest. The rest has separate sums, so that its
// probability is a sum of positive terms, and not 1 minus a number near 1. docs/maths.md, section
// 13, derives the formulas.
#pragma once
#include "divergences.h"
#include "topk.h"

namespace fastkd::topk {

// The options by which a call compares teacher and student.
struct Comparison {
  Divergence divergence = Divergence::kForwardKL;
  Tail tail = Tail::kGhost;
  Estimator estimator = Estimator::kNone;
  // Least teacher probability of the ghost, which is the rest as one class. Rounding of the list
  // can leave the rest a probability of 0, which would make the reverse KL infinite.
  double least_rest = 0;
  bool wants_entropy = false;  // the teacher's entropy is needed

  Comparison() = default;
  FASTKD_HOST_DEVICE explicit Comparison(const TopkArgs& args)
      : divergence(args.divergence),
        tail(args.tail),
        estimator(args.estimator),
        wants_entropy(args.divergence == Divergence::kSoftCrossEntropy || args.terms != nullptr) {
    const bool may_be_infinite = divergence == Divergence::kReverseKL ||
                                 (divergence == Divergence::kSymmetricKL && args.mix < 1);
    const bool in_double = computes_in_double(args.student_dtype, args.teacher_dtype);
    if (may_be_infinite) least_rest = in_double ? 0x1p-53 : 0x1p-24;
  }
  FASTKD_HOST_DEVICE bool estimates() const { return estimator != Estimator::kNone; }
  FASTKD_HOST_DEVICE bool is_cut_off() const { return !estimates() && tail == Tail::kIgnore; }
};

namespace {

constexpr double kMinusInfinity = -__builtin_huge_val();  // the maximum of no logits
constexpr double kUnknown = __builtin_nan("");

// The sums of exp((z - max) / t) and of exp(z - max) over some of a row's classes.
struct RelativeSums {
  double max = kMinusInfinity, tempered = 0, hard = 0;
};

// Return the maximum, or 0 if there is no class, since -inf must not be subtracted from a logit.
FASTKD_HOST_DEVICE double origin(const RelativeSums& sums) {
  return sums.max > kMinusInfinity ? sums.max : 0.0;
}

// Return the factor that makes sums relative to the maximum `from` relative to `to`.
FASTKD_HOST_DEVICE double rescaling_of(double from, double to, double temperature) {
  return from == to ? 1.0 : std::exp((from - to) / temperature);
}

// The options of one row.
struct RowOptions {
  double temperature, hard_weight, soft_weight, label_smoothing;
  double classes;
  bool hard;  // true if the hard term is computed
};

// The sums of a row over the rest, the listed classes, and all classes.
struct Summary {
  RelativeSums rest, list, all;
  double teacher = 0;  // sum of the listed probabilities
  double count = 0;    // number of listed classes
  double offsets = 0;  // sum of z - max z over all classes; used by label smoothing alone

  // Set `all` and `offsets`. `logits`: the sum of all logits.
  FASTKD_HOST_DEVICE void complete(const RowOptions& row, double logits) {
    const double max = rest.max > list.max ? rest.max : list.max;
    all.max = max;
    all.tempered = rest.tempered * rescaling_of(rest.max, max, row.temperature) +
                   list.tempered * rescaling_of(list.max, max, row.temperature);
    all.hard =
        rest.hard * rescaling_of(rest.max, max, 1) + list.hard * rescaling_of(list.max, max, 1);
    offsets = logits - row.classes * max;
  }
  // Return true if the listed probabilities sum to at most kMostMass; false for NaN.
  FASTKD_HOST_DEVICE bool has_valid_list() const { return teacher <= kMostMass; }
  // Return false if a logit is NaN or +inf, or all logits are -inf.
  FASTKD_HOST_DEVICE bool valid() const {
    return all.max - all.max == 0 && all.tempered - all.tempered == 0;
  }
  // Return log(q) of classes whose exponentials relative to `max` add up to `sum`.
  FASTKD_HOST_DEVICE double log_q(const RowOptions& row, double max, double sum) const {
    return (max - all.max) / row.temperature + std::log(sum / all.tempered);
  }
};

// Return an estimate of KL(q || p) from a sampled class with d = log p - log q, and the slope of
// the estimate: the derivative with respect to log q. The slope of k1 is that of the policy
// gradient, whose expected value is the gradient of KL(q || p) (Schulman 2020). If the student
// masks the class, the estimate is infinite and the slope 0.
FASTKD_HOST_DEVICE Evaluated<double> estimate(Estimator estimator, double d) {
  if (d == -kMinusInfinity)
    return {estimator == Estimator::kK1 ? kMinusInfinity : -kMinusInfinity, 0};
  if (estimator == Estimator::kK1) return {-d, -d};
  if (estimator == Estimator::kK2) return {0.5 * d * d, -d};
  // k3 is r - 1 - log r for the ratio r = p / q. This is f(-d), and f(d) = d + expm1(-d) has a
  // series for small d.
  const double ratio_minus_1 = std::expm1(d);
  return {is_small(d) ? d * d * series_of(-d) : ratio_minus_1 - d, -ratio_minus_1};
}

// The constants of a row's soft term. In these comments, e = exp((z - max) / t). max is the maximum
// of the listed classes for a listed class, and the maximum of the rest for a class of the rest.
struct Soft {
  bool is_present = true;  // false if the list has no probability to compare
  bool has_rest = false;   // true if the rest is compared, as one class: the ghost
  double student_scale = 1, student_log_scale = 0;  // q = student_scale * e for a listed class
  double teacher_scale = 1, teacher_log_scale = 0;  // p = teacher_scale * listed probability
  double rest_p = 0, rest_q = 0, rest_log_q = kMinusInfinity;
  double rest = 0;  // rest * e is D's gradient with respect to z / t for a class of the rest
};

// Sums over the listed classes, to which include_rest() adds the ghost.
struct SoftSums {
  double value = 0;
  double slope = 0;    // S of divergences.h
  double entropy = 0;  // entropy of the teacher, if Comparison::wants_entropy

  FASTKD_HOST_DEVICE void add(const Evaluated<double>& term) {
    value += term.value;
    slope += term.slope;
  }
};

// Return the soft term without the gradient of the rest, which include_rest() sets.
FASTKD_HOST_DEVICE Soft soften(const Comparison& comparison, const RowOptions& row,
                               const Summary& summary) {
  const bool renormalizes = !comparison.estimates() && comparison.tail == Tail::kRenormalize;
  Soft soft;
  // The scale is relative to the maximum of the listed classes, so that nothing underflows if the
  // rest has greater logits.
  if (summary.list.max > kMinusInfinity) {
    soft.student_log_scale =
        renormalizes ? -std::log(summary.list.tempered) : summary.log_q(row, summary.list.max, 1.0);
  }
  soft.student_scale = std::exp(soft.student_log_scale);
  const bool has_others = summary.rest.max > kMinusInfinity && !renormalizes;
  if (has_others) {
    soft.rest_log_q = summary.log_q(row, summary.rest.max, summary.rest.tempered);
    soft.rest_q = std::exp(soft.rest_log_q);
  }
  if (comparison.estimates()) {
    soft.is_present = summary.count > 0;
    return soft;
  }
  soft.has_rest = has_others;
  if (comparison.is_cut_off()) return soft;
  const double remaining = 1 - summary.teacher;
  if (has_others)
    soft.rest_p = remaining > comparison.least_rest ? remaining : comparison.least_rest;
  if (soft.rest_p == remaining) return soft;
  // Scale the listed probabilities, because list and ghost, if there is one, do not add up to 1.
  soft.is_present = summary.teacher > 0;
  if (!soft.is_present) return soft;
  soft.teacher_scale = (1 - soft.rest_p) / summary.teacher;
  soft.teacher_log_scale = std::log(soft.teacher_scale);
  return soft;
}

// Evaluate the divergence D, or the estimator, at a listed class, given p, q, the list's `log_p`,
// and `log_e`, the logarithm of q / student_scale.
template <class D>
FASTKD_HOST_DEVICE Evaluated<double> listed(const Comparison& comparison, const Soft& soft,
                                            const ConstantsOf<double>& constants, double p,
                                            double q, double log_p, double log_e) {
  const double d = log_p + soft.teacher_log_scale - (log_e + soft.student_log_scale);
  if (comparison.estimates()) return estimate(comparison.estimator, d);
  return D::at(element(p, q, d), constants);
}

// Add the ghost to the sums over the listed classes, and set the gradient of the rest.
template <class D>
FASTKD_HOST_DEVICE void include_rest(const Comparison& comparison,
                                     const ConstantsOf<double>& constants, const Summary& summary,
                                     SoftSums* sums, Soft* soft) {
  double ghost_slope = 0;
  if (soft->has_rest) {
    const double log_p = std::log(soft->rest_p);
    const Evaluated<double> ghost =
        D::at(element(soft->rest_p, soft->rest_q, log_p - soft->rest_log_q), constants);
    sums->add(ghost);
    sums->entropy -= times_log(soft->rest_p, log_p);
    ghost_slope = ghost.slope;
  }
  // The forward KL's terms contain q - p, whose sum is 0. With Tail::kIgnore the teacher's rest is
  // 0, and the sum is 1 minus the listed probabilities.
  if (comparison.is_cut_off()) sums->value += summary.teacher - 1;
  if (summary.rest.tempered > 0) {
    soft->rest = (ghost_slope - soft->rest_q * sums->slope) / summary.rest.tempered;
  }
}

// The factors of a row's gradient.
struct Gains {
  double soft = 0, hard = 0, onehot = 0, uniform = 0;
  double rest = 0, rest_hard = 0;  // factors of exponentials relative to the rest's maximum
};

// `gain` multiplies the row's gradient.
FASTKD_HOST_DEVICE Gains gains_of(const RowOptions& row, const Summary& summary, const Soft& soft,
                                  double gain) {
  Gains g;
  g.soft = soft.is_present ? gain * row.soft_weight * row.temperature : 0.0;
  g.rest = g.soft != 0 ? g.soft * soft.rest : 0.0;
  if (!row.hard || row.hard_weight == 0) return g;
  g.hard = gain * row.hard_weight;
  g.onehot = g.hard * (1 - row.label_smoothing);
  g.uniform = -g.hard * row.label_smoothing / row.classes;
  g.rest_hard = g.hard * rescaling_of(summary.rest.max, summary.all.max, 1) / summary.all.hard;
  return g;
}

// Return the gradient of a label that is not listed: the one-hot target is subtracted in double.
FASTKD_HOST_DEVICE double label_gradient(const RowOptions& row, const Summary& summary,
                                         const Gains& gains, double z) {
  return gains.rest * std::exp((z - origin(summary.rest)) / row.temperature) +
         gains.hard * std::exp(z - summary.all.max) / summary.all.hard + gains.uniform -
         gains.onehot;
}

// Return the divergence of a row, or the estimate.
FASTKD_HOST_DEVICE double soft_term(const Comparison& comparison, const Soft& soft,
                                    const SoftSums& sums) {
  double value = sums.value;
  if (comparison.divergence == Divergence::kSoftCrossEntropy) value += sums.entropy;
  // In a valid row, NaN comes only from 0 * inf, for a class that the student masks and whose
  // teacher probability underflows. The divergence is then infinite.
  if (value != value) value = -kMinusInfinity;
  // The sum with Tail::kIgnore is not a divergence, nor is the estimate k1. Both values may be
  // negative.
  if (!comparison.estimates() && !comparison.is_cut_off()) value = at_least_0(value);
  return soft.is_present ? value : 0;
}

// Return the cross entropy of a row with its label, or 0 if the hard term is not computed.
FASTKD_HOST_DEVICE double hard_term(const RowOptions& row, const Summary& summary,
                                    double label_logit) {
  if (!row.hard) return 0;
  const double smoothing = row.label_smoothing;
  double target = weighted(1 - smoothing, label_logit - summary.all.max);
  if (smoothing != 0) target += smoothing / row.classes * summary.offsets;
  return std::log(summary.all.hard) - target;
}

FASTKD_HOST_DEVICE double row_loss(const RowOptions& row, double hard, double soft) {
  return weighted(row.soft_weight * row.temperature * row.temperature, soft) +
         weighted(row.hard_weight, hard);
}

// Call put(term, value) for the terms of a row. `weighted_offsets`: the sum of exp((z - m) / t) (z
// - m) over all classes for m = summary.all.max. `agrees`: true if one class is the greatest of
// both student and teacher. One sampled class determines neither the teacher's entropy nor its
// greatest class.
template <class Put>
FASTKD_HOST_DEVICE void for_terms(const Comparison& comparison, const RowOptions& row,
                                  const Summary& summary, const SoftSums& sums, double hard,
                                  double soft, double weighted_offsets, bool agrees, Put&& put) {
  const RelativeSums &all = summary.all, &list = summary.list;
  const bool is_known = !comparison.estimates();
  const bool has_list = list.max > kMinusInfinity;
  put(kHard, hard);
  put(kSoft, soft);
  put(kStudentEntropy,
      std::log(all.tempered) - weighted_offsets / (all.tempered * row.temperature));
  put(kTeacherEntropy, is_known ? sums.entropy : kUnknown);
  put(kAgreement, is_known ? double(agrees) : kUnknown);
  put(kStudentMass, has_list ? std::exp(summary.log_q(row, list.max, list.tempered)) : 0.0);
  put(kTeacherMass, summary.teacher);
}

}  // namespace
}  // namespace fastkd::topk
