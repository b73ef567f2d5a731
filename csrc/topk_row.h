// The arithmetic of one row of the sparse loss after the sums of the student's exponentials: a few
// numbers, all in double, from which value and gradient are made. The CPU's and the CUDA kernels
// share it.
//
// A row's classes are those that the teacher lists and the rest. Sums of exponentials are taken of
// each apart, so that the probability of the rest is a sum of positive terms, and not 1 minus
// something near 1. docs/maths.md, section 13, derives the formulas.
#pragma once
#include "divergences.h"
#include "topk.h"

namespace fastkd::topk {

// The options by which a call compares teacher and student.
struct Comparison {
  Divergence divergence = Divergence::kForwardKL;
  Tail tail = Tail::kGhost;
  Estimator estimator = Estimator::kNone;
  // The least p of the ghost. The reverse KL is infinite where the teacher leaves nothing to the
  // rest, and a list in floating point tells 1 - sum p no more finely than the rounding of 1.
  double least_rest = 0;

  Comparison() = default;
  FASTKD_HOST_DEVICE explicit Comparison(const TopkArgs& args)
      : divergence(args.divergence), tail(args.tail), estimator(args.estimator) {
    const bool may_be_infinite = divergence == Divergence::kReverseKL ||
                                 (divergence == Divergence::kSymmetricKL && args.mix < 1);
    const bool in_double = computes_in_double(args.student_dtype, args.teacher_dtype);
    if (may_be_infinite) least_rest = in_double ? 0x1p-53 : 0x1p-24;
  }
  FASTKD_HOST_DEVICE bool estimates() const { return estimator != Estimator::kNone; }
  FASTKD_HOST_DEVICE bool is_cut_off() const { return !estimates() && tail == Tail::kIgnore; }
};

namespace {

constexpr double kNothing = -__builtin_huge_val();  // the greatest of no logits

// Sums of exponentials, at temperature t and at 1, relative to the greatest logit or one near it.
struct Mass {
  double max = kNothing, tempered = 0, hard = 0;
};

// A maximum to subtract: any finite number where there is nothing to subtract from.
FASTKD_HOST_DEVICE double origin(const Mass& mass) { return mass.max > kNothing ? mass.max : 0.0; }

// Return the factor for sums whose maximum changes from `from` to `to`.
FASTKD_HOST_DEVICE double shift(double from, double to, double temperature) {
  return from == to ? 1.0 : std::exp((from - to) / temperature);
}

// The options of one row.
struct RowOptions {
  double temperature, hard_weight, soft_weight, label_smoothing;
  double classes;
  bool hard;  // true if the hard term counts
};

// The sums of a row's exponentials, and the teacher's.
struct Summary {
  Mass rest, list, all;
  double teacher = 0;  // sum of the listed probabilities
  double count = 0;    // of listed classes
  double offsets = 0;  // sum of z - max z over all classes; for label smoothing alone

  // Set `all` and `offsets`. `logits`: the sum of all logits.
  FASTKD_HOST_DEVICE void complete(const RowOptions& row, double logits) {
    const double max = rest.max > list.max ? rest.max : list.max;
    all.max = max;
    all.tempered = rest.tempered * shift(rest.max, max, row.temperature) +
                   list.tempered * shift(list.max, max, row.temperature);
    all.hard = rest.hard * shift(rest.max, max, 1) + list.hard * shift(list.max, max, 1);
    offsets = logits - row.classes * max;
  }
  // Return true if the listed probabilities sum to at most kMostMass; false for NaN.
  FASTKD_HOST_DEVICE bool listed_well() const { return teacher <= kMostMass; }
  // Return false if a logit is NaN or +inf, or all of them are -inf.
  FASTKD_HOST_DEVICE bool valid() const {
    return all.max - all.max == 0 && all.tempered - all.tempered == 0;
  }
  // Return log(q) of classes whose exponentials relative to `max` add up to `sum`.
  FASTKD_HOST_DEVICE double log_q(const RowOptions& row, double max, double sum) const {
    return (max - all.max) / row.temperature + std::log(sum / all.tempered);
  }
};

// An estimate of KL(q || p) from a sampled class, and its slope: the derivative by log q. k1 has
// the slope of the policy gradient, whose expected value is the gradient of KL(q || p). (Schulman
// 2020.)
FASTKD_HOST_DEVICE Evaluated<double> estimate(Estimator estimator, double d) {
  if (estimator == Estimator::kK1) return {-d, -d};
  if (estimator == Estimator::kK2) return {0.5 * d * d, -d};
  // r - 1 - log r for the ratio r = p / q, which is the series' f(-d)
  const double ratio_minus_1 = std::expm1(d);
  return {is_small(d) ? d * d * series_of(-d) : ratio_minus_1 - d, -ratio_minus_1};
}

// The soft term of a row. e = exp((z - max) / t), where max is that of the listed classes for a
// listed class, and that of the rest for another.
struct Soft {
  bool exists = true;     // false if the list has no probability to compare
  bool has_rest = false;  // true if the rest is compared, as one class: the ghost
  double student_scale = 1, student_log_scale = 0;  // q = student_scale * e for a listed class
  double teacher_scale = 1, teacher_log_scale = 0;  // p = teacher_scale * exp(log_prob)
  double rest_p = 0, rest_q = 0, rest_log_q = kNothing;
  double rest = 0;  // gradient = rest * e for a class of the rest
};

// Sums over the listed classes, and later the ghost.
struct SoftSums {
  double value = 0;
  double slope = 0;    // S of divergences.h
  double entropy = 0;  // of the teacher, for the soft cross entropy alone

  FASTKD_HOST_DEVICE void add(const Evaluated<double>& of) {
    value += of.value;
    slope += of.slope;
  }
};

// Return the soft term before its sums over classes are known.
FASTKD_HOST_DEVICE Soft soften(const Comparison& how, const RowOptions& row, const Summary& of) {
  const bool renormalizes = !how.estimates() && how.tail == Tail::kRenormalize;
  Soft soft;
  // Relative to the listed classes' own maximum, so that nothing underflows where the rest is
  // greater.
  if (of.list.max > kNothing) {
    soft.student_log_scale =
        renormalizes ? -std::log(of.list.tempered) : of.log_q(row, of.list.max, 1.0);
  }
  soft.student_scale = std::exp(soft.student_log_scale);
  const bool has_others = of.rest.max > kNothing && !renormalizes;
  if (has_others) {
    soft.rest_log_q = of.log_q(row, of.rest.max, of.rest.tempered);
    soft.rest_q = std::exp(soft.rest_log_q);
  }
  if (how.estimates()) {
    soft.exists = of.count > 0;
    return soft;
  }
  soft.has_rest = has_others;
  if (how.is_cut_off()) return soft;
  const double remaining = 1 - of.teacher;
  if (has_others) soft.rest_p = remaining > how.least_rest ? remaining : how.least_rest;
  if (soft.rest_p == remaining) return soft;
  // The probabilities of list and ghost do not add up to 1: scale those of the list.
  soft.exists = of.teacher > 0;
  if (!soft.exists) return soft;
  soft.teacher_scale = (1 - soft.rest_p) / of.teacher;
  soft.teacher_log_scale = std::log(soft.teacher_scale);
  return soft;
}

// Evaluate the divergence D, or the estimator, at a listed class, given p, q and `log_e`, the
// logarithm of q / student_scale.
template <class D>
FASTKD_HOST_DEVICE Evaluated<double> listed(const Comparison& how, const Soft& soft,
                                            const ConstantsOf<double>& constants, double p,
                                            double q, double log_p, double log_e) {
  const double d = log_p + soft.teacher_log_scale - (log_e + soft.student_log_scale);
  if (how.estimates()) return estimate(how.estimator, d);
  return D::at(element(p, q, d), constants);
}

// Add what is not of the listed classes to their sums, and set the gradient of the rest.
template <class D>
FASTKD_HOST_DEVICE void include_rest(const Comparison& how, const ConstantsOf<double>& constants,
                                     const Summary& of, SoftSums* sums, Soft* soft) {
  double ghost_slope = 0;
  if (soft->has_rest) {
    const double log_p = std::log(soft->rest_p);
    const Evaluated<double> ghost =
        D::at(element(soft->rest_p, soft->rest_q, log_p - soft->rest_log_q), constants);
    sums->add(ghost);
    sums->entropy -= times_log(soft->rest_p, log_p);
    ghost_slope = ghost.slope;
  }
  // The forward KL's terms contain q - p, whose sum is 0 unless the teacher's list is cut off.
  if (how.is_cut_off()) sums->value += of.teacher - 1;
  if (of.rest.tempered > 0) {
    soft->rest = (ghost_slope - soft->rest_q * sums->slope) / of.rest.tempered;
  }
}

// Constants of a row's gradient.
struct Gains {
  double soft = 0, hard = 0, onehot = 0, uniform = 0;
  double rest = 0, rest_hard = 0;  // of exponentials relative to the rest's maximum
};

// `gain` multiplies the gradient.
FASTKD_HOST_DEVICE Gains gains_of(const RowOptions& row, const Summary& of, const Soft& soft,
                                  double gain) {
  Gains g;
  g.soft = soft.exists ? gain * row.soft_weight * row.temperature : 0.0;
  g.rest = soft.exists ? g.soft * soft.rest : 0.0;
  if (!row.hard || row.hard_weight == 0) return g;
  g.hard = gain * row.hard_weight;
  g.onehot = g.hard * (1 - row.label_smoothing);
  g.uniform = -g.hard * row.label_smoothing / row.classes;
  g.rest_hard = g.hard * shift(of.rest.max, of.all.max, 1) / of.all.hard;
  return g;
}

// The gradient of a label that is not listed: the one-hot target is taken off before anything is
// rounded.
FASTKD_HOST_DEVICE double label_gradient(const RowOptions& row, const Summary& of,
                                         const Gains& gains, double z) {
  return gains.rest * std::exp((z - origin(of.rest)) / row.temperature) +
         gains.hard * std::exp(z - of.all.max) / of.all.hard + gains.uniform - gains.onehot;
}

// Return the row's loss.
FASTKD_HOST_DEVICE double row_loss(const Comparison& how, const RowOptions& row, const Summary& of,
                                   const Soft& soft, const SoftSums& sums, double label_logit) {
  double value = sums.value;
  if (how.divergence == Divergence::kSoftCrossEntropy) value += sums.entropy;
  // In a valid row only 0 * inf makes a NaN: a class that the student masks, and whose teacher
  // probability underflows. The divergence is then infinite.
  if (value != value) value = -kNothing;
  // The sum with Tail::kIgnore is not a divergence, nor is k1: both may be negative.
  if (!how.estimates() && !how.is_cut_off()) value = at_least_0(value);
  if (!soft.exists) value = 0;
  const double t = row.temperature;
  const double loss = weighted(row.soft_weight * t * t, value);
  if (!row.hard) return loss;
  const double smoothing = row.label_smoothing;
  double target = weighted(1 - smoothing, label_logit - of.all.max);
  if (smoothing != 0) target += smoothing / row.classes * of.offsets;
  return loss + weighted(row.hard_weight, std::log(of.all.hard) - target);
}

}  // namespace
}  // namespace fastkd::topk
