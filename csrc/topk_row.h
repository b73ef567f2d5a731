// What follows for a row of the sparse loss once the student has been read: the few numbers, all in
// double, that value and gradient are made of. The CPU's and the CUDA kernels share it.
//
// A row's classes are those that the teacher lists and the rest. Sums of exponentials are taken of
// each apart: so the rest's probability is a sum of positive terms, not 1 minus something near 1.
// docs/maths.md, section 13, derives the formulas.
#pragma once
#include "numerics.h"
#include "topk.h"

namespace fastkd::topk {
namespace {

constexpr double kNothing = -__builtin_huge_val();  // the greatest of no logits

// Sums of exponentials, at temperature t and at 1, relative to the greatest logit or one near it.
struct Mass {
  double max = kNothing, tempered = 0, hard = 0;
};

// A maximum to subtract: any finite number where there is nothing to subtract from.
FASTKD_HOST_DEVICE double origin(const Mass& mass) { return mass.max > kNothing ? mass.max : 0.0; }

// What sums relative to one maximum are multiplied by when it becomes another.
FASTKD_HOST_DEVICE double shift(double from, double to, double temperature) {
  return from == to ? 1.0 : std::exp((from - to) / temperature);
}

// What is known of a row once the student has been read.
struct Summary {
  Mass rest, list, all;
  double teacher = 0;  // the teacher's mass on its list
  double offsets = 0;  // sum of z - max z over all classes; for label smoothing alone

  // `logits`: the sum of all logits.
  FASTKD_HOST_DEVICE void complete(const Inputs& in, double logits) {
    const double max = rest.max > list.max ? rest.max : list.max;
    all.max = max;
    all.tempered = rest.tempered * shift(rest.max, max, in.temperature) +
                   list.tempered * shift(list.max, max, in.temperature);
    all.hard = rest.hard * shift(rest.max, max, 1) + list.hard * shift(list.max, max, 1);
    offsets = logits - static_cast<double>(in.classes) * max;
  }
  // Whether the list is of log-probabilities.
  FASTKD_HOST_DEVICE bool listed_well() const { return teacher <= kMostMass; }
  // Not so where a logit is NaN or +inf, or all of them are -inf.
  FASTKD_HOST_DEVICE bool valid() const {
    return all.max - all.max == 0 && all.tempered - all.tempered == 0;
  }
  // log of the share of all student mass that sums relative to `max` have, given their sum.
  FASTKD_HOST_DEVICE double log_share(const Inputs& in, double max, double sum) const {
    return (max - all.max) / in.temperature + std::log(sum / all.tempered);
  }
};

// The soft term. With e = exp((z - max) / t), max that of the listed or of the other classes:
struct Soft {
  double student_scale = 1, student_log_scale = 0;  // q = student_scale * e for a listed class
  double teacher_scale = 1, teacher_log_scale = 0;  // p, likewise, of exp(log_prob)
  double surplus = 0;   // S = -(1 + surplus), the target's mass: gradient = (1 + surplus) q - p
  double rest = 0;      // gradient = rest * e for any other class
  double constant = 0;  // of the value, beside the listed classes
};

FASTKD_HOST_DEVICE Soft soften(const Inputs& in, Tail tail, const Summary& of) {
  Soft soft;
  // Relative to the listed classes' own maximum; nothing underflows where all others are greater.
  if (of.list.max > kNothing) {
    soft.student_log_scale = tail == Tail::kRenormalize ? -std::log(of.list.tempered)
                                                        : of.log_share(in, of.list.max, 1.0);
  }
  const bool has_rest = of.rest.max > kNothing;
  const double log_q = has_rest ? of.log_share(in, of.rest.max, of.rest.tempered) : kNothing;
  const double q = std::exp(log_q);
  soft.surplus = of.teacher - 1;
  switch (tail) {
    case Tail::kGhost:
      if (has_rest) {
        const double p = of.teacher < 1 ? 1 - of.teacher : 0.0;
        if (soft.surplus < 0) soft.surplus = 0;
        const Element<double> ghost = element(p, q, std::log(p) - log_q);
        soft.constant = ghost.excess;
        soft.rest = (ghost.diff + soft.surplus * q) / of.rest.tempered;
      }
      break;
    case Tail::kIgnore:
      // sum of p - q over the list, which the listed classes' values count too little.
      soft.constant = soft.surplus + q;
      if (has_rest) soft.rest = of.teacher * (q / of.rest.tempered);
      break;
    case Tail::kRenormalize:
      soft.surplus = 0;
      soft.teacher_scale = of.teacher > 0 ? 1 / of.teacher : 0.0;
      soft.teacher_log_scale = of.teacher > 0 ? -std::log(of.teacher) : 0.0;
      break;
  }
  soft.student_scale = std::exp(soft.student_log_scale);
  return soft;
}

// One listed class, given p, q and `log_e`, the logarithm of q / student_scale.
FASTKD_HOST_DEVICE Element<double> listed(const Soft& soft, double p, double q, double log_p,
                                          double log_e) {
  return element(p, q, log_p + soft.teacher_log_scale - (log_e + soft.student_log_scale));
}

// Nothing listed has no distribution to renormalise.
FASTKD_HOST_DEVICE bool has_soft(Tail tail, const Summary& of) {
  return tail != Tail::kRenormalize || of.teacher > 0;
}

// Constants of a row's gradient.
struct Gains {
  double soft = 0, hard = 0, onehot = 0, uniform = 0;
  double rest = 0, rest_hard = 0;  // of exponentials relative to the rest's maximum
};

// `gain` multiplies the gradient; `hard`: whether the hard term has one.
FASTKD_HOST_DEVICE Gains gains_of(const Inputs& in, Tail tail, const Summary& of, const Soft& soft,
                                  double gain, bool hard) {
  Gains g;
  g.soft = has_soft(tail, of) ? gain * in.soft_weight * in.temperature : 0.0;
  g.rest = g.soft * soft.rest;
  if (!hard) return g;
  g.hard = gain * in.hard_weight;
  g.onehot = g.hard * (1 - in.label_smoothing);
  g.uniform = -g.hard * in.label_smoothing / static_cast<double>(in.classes);
  g.rest_hard = g.hard * shift(of.rest.max, of.all.max, 1) / of.all.hard;
  return g;
}

// The gradient of a label that is not listed: the one-hot target is taken off before anything is
// rounded.
FASTKD_HOST_DEVICE double label_gradient(const Inputs& in, const Summary& of, const Soft& soft,
                                         const Gains& gains, double z) {
  return gains.soft * soft.rest * std::exp((z - origin(of.rest)) / in.temperature) +
         gains.hard * std::exp(z - of.all.max) / of.all.hard + gains.uniform - gains.onehot;
}

// The row's loss, given the listed classes' share of the divergence; `hard`: whether the hard term
// counts.
FASTKD_HOST_DEVICE double row_loss(const Inputs& in, Tail tail, const Summary& of, const Soft& soft,
                                   double listed_value, bool hard, double label_logit) {
  // In a valid row only 0 * inf makes a NaN: a class that the student masks, and whose teacher
  // probability underflows. That is an infinite divergence.
  double value = listed_value + soft.constant;
  if (value != value) value = -kNothing;
  // With Tail::kIgnore the sum of the terms is not a divergence, and may be negative.
  if (tail != Tail::kIgnore) value = at_least_0(value);
  if (!has_soft(tail, of)) value = 0;
  const double t = in.temperature;
  const double loss = weighted(in.soft_weight * t * t, value);
  if (!hard) return loss;
  const double smoothing = in.label_smoothing;
  double target = weighted(1 - smoothing, label_logit - of.all.max);
  if (smoothing != 0) target += smoothing / static_cast<double>(in.classes) * of.offsets;
  return loss + weighted(in.hard_weight, std::log(of.all.hard) - target);
}

}  // namespace
}  // namespace fastkd::topk
