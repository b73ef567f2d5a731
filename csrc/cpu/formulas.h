// The formulas that are computed once per row, between or after the sweeps over the classes:
// scales, constants of log(p / q), factors of the gradient's terms, loss and terms (docs/maths.md,
// sections 1 to 3, 7 and 10).
//
// The row engine (rows.h) and the transposed engine (transposed_engine.h) share the formulas. In
// the row engine V is double or the compute type T, and results are rounded to T. In the transposed
// engine V is a vector of floats, one for each row.
#pragma once
#include <cmath>

#include "vectors.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class V>
FASTKD_HOST_DEVICE auto finite(V x) {
  return x - x == V{};
}

template <class T, class V>
FASTKD_HOST_DEVICE V rounded(V x) {
  return static_cast<V>(static_cast<T>(x));
}

template <class V>
struct Settings {
  V temperature = broadcast<V>(1), teacher_temperature = broadcast<V>(1);
  V hard_weight{}, soft_weight{};
};

constexpr double kLowest = -__builtin_huge_val();

// Statistics of a row for the gradient. The statistics are rounded to the compute type before use,
// because backward reads the rounded numbers from `stats` and must compute equal bits.
template <class V>
struct Scales {
  V student_max, student_scale, hard_scale, teacher_max, teacher_scale;
  V student_label{}, teacher_label{};  // the label's logits if the sums omit the label, or with a
                                       // hard term in the transposed engine; else 0
  V student_inverse = broadcast<V>(1),
    teacher_inverse = broadcast<V>(1);  // 1 / |z|, 1 / |w| (kCosine)
  V student_mean{}, teacher_mean{};     // means of the logits (kCenteredSquaredError)
  V zero_row_value{};  // what a student or teacher of zeros adds to the divergence (kCosine)
  V mean{};            // the forward KL of a well-separated row; else 0

  // Return false if a logit is NaN or +inf, or all logits are -inf. With kCosine, also return false
  // if only one of student and teacher masks a class.
  FASTKD_HOST_DEVICE auto valid() const {
    return finite(student_max) & finite(student_scale) & finite(teacher_max) &
           finite(teacher_scale) & valid_label(student_label, student_scale) &
           valid_label(teacher_label, teacher_scale) & (student_inverse > 0) &
           (teacher_inverse > 0) & finite(student_inverse) & finite(teacher_inverse) &
           finite(student_mean) & finite(teacher_mean);
  }

  template <class W>
  Scales<W> as() const {
    const auto to = [](V x) { return static_cast<W>(x); };
    return {to(student_max),   to(student_scale),   to(hard_scale),
            to(teacher_max),   to(teacher_scale),   to(student_label),
            to(teacher_label), to(student_inverse), to(teacher_inverse),
            to(student_mean),  to(teacher_mean),    to(zero_row_value),
            to(mean)};
  }

 private:
  static FASTKD_HOST_DEVICE auto valid_label(V logit, V scale_of_others) {
    constexpr Scalar<V> kInf = kInfinity<Scalar<V>>;
    return (logit < kInf) & ((scale_of_others > 0) | (logit > -kInf));
  }
};

// Return the scales of one row, or of several rows, from the first sweep's sums.
template <class V, class Sums>
FASTKD_HOST_DEVICE Scales<V> scales_of(const Sums& sums, bool hard, bool decoupled) {
  Scales<V> s = {static_cast<V>(sums.student_max),
                 static_cast<V>(1 / sums.student_sum),
                 hard ? static_cast<V>(1 / sums.hard_sum) : V{},
                 static_cast<V>(sums.teacher_max),
                 static_cast<V>(1 / sums.teacher_sum),
                 static_cast<V>(sums.student_label),
                 static_cast<V>(sums.teacher_label)};
  if (!decoupled) return s;
  // The label may be the only class that is not masked.
  const auto no_student = sums.student_sum == 0, no_teacher = sums.teacher_sum == 0;
  s.student_max = no_student ? V{} : s.student_max;
  s.student_scale = no_student ? V{} : s.student_scale;
  s.hard_scale = no_student ? V{} : s.hard_scale;
  s.teacher_max = no_teacher ? V{} : s.teacher_max;
  s.teacher_scale = no_teacher ? V{} : s.teacher_scale;
  return s;
}

// Call fn(which, number) for the numbers of `stats` (kernels.h).
template <class V, class Fn>
FASTKD_HOST_DEVICE void for_stats(Divergence id, Scales<V>& s, V& slope, V& classes, Fn&& fn) {
  const bool unit = id == Divergence::kCosine, centered = id == Divergence::kCenteredSquaredError;
  fn(kStudentMax, s.student_max);
  fn(kHardScale, s.hard_scale);
  fn(kTeacherMax, s.teacher_max);
  fn(kSlopeSum, slope);
  fn(kClassCount, classes);
  if (unit) {
    fn(kStudentInverseNorm, s.student_inverse), fn(kTeacherInverseNorm, s.teacher_inverse);
  } else if (centered) {
    fn(kStudentMean, s.student_mean), fn(kTeacherMean, s.teacher_mean);
  } else {
    fn(kStudentScale, s.student_scale), fn(kTeacherScale, s.teacher_scale);
  }
}

// Greatest distance of the two maxima at which d is formed from w - z directly. Beyond this
// distance w - z would lose digits, so logits are first taken relative to the maxima
// (docs/maths.md, section 3).
constexpr double kApart = 32;
// Return true if the maxima differ by more than kApart, or at a temperature below 1 by more than
// kApart times the temperature.
template <class V>
FASTKD_HOST_DEVICE auto are_apart(V student_max, V teacher_max, V temperature) {
  const V limit = static_cast<Scalar<V>>(kApart) * bounded_above<V>(temperature, 1);
  return magnitude_of<V>(teacher_max - student_max) > limit;
}

// Constants from which the sweeps after the first form d = log p - log q of a class:
//   d = ((w - teacher_base) * temperature_ratio - (z - student_base)) * inverse_temperature
//       - log_ratio
// For divergences that compare logits, d is the difference of the tempered logits: log_ratio is 0.
template <class V>
struct LogRatio {
  V inverse_temperature;                  // reciprocal of the temperature of the student
  V temperature_ratio = broadcast<V>(1);  // the student's temperature over the teacher's
  V student_base{}, teacher_base{};
  V log_ratio{};
  Mask<V> shifted{};  // true if a base may not be 0, or the ratio may not be 1

  template <class W = V>
  FASTKD_HOST_DEVICE W at(W z, W w) const {
    const W difference = mul_add(w - teacher_base, temperature_ratio, student_base - z);
    return mul_add(difference, inverse_temperature, -log_ratio);
  }
};

// Return the constants, rounded to the type T in which the classes are computed. All d of a row
// share the rounding error of log_ratio. include_label() (decoupled.h) and reverse_of() (row.h)
// correct their results for that error.
template <class T, class V>
FASTKD_HOST_DEVICE LogRatio<V> make_log_ratio(const Settings<V>& row, const Scales<V>& s,
                                              bool of_logits) {
  LogRatio<V> r;
  r.inverse_temperature = rounded<T, V>(1 / row.temperature);
  r.temperature_ratio = rounded<T, V>(row.temperature / row.teacher_temperature);
  if (of_logits) {
    // With kCenteredSquaredError, subtract the means first, so that the variance of the differences
    // does not cancel (docs/maths.md, section 10).
    r.student_base = s.student_mean, r.teacher_base = s.teacher_mean;
    r.shifted = r.inverse_temperature > 0;
    return r;
  }
  r.shifted = (row.temperature != row.teacher_temperature) |
              are_apart(s.student_max, s.teacher_max, row.temperature);
  r.student_base = r.shifted ? s.student_max : V{};
  r.teacher_base = r.shifted ? s.teacher_max : V{};
  const V between = (s.teacher_max - s.student_max) * r.inverse_temperature;
  const V log_of_scales = log_of(s.student_scale / s.teacher_scale);
  r.log_ratio = rounded<T, V>((r.shifted ? V{} : between) + log_of_scales);
  return r;
}

// Factors of slopes (`soft`) and of probabilities (`hard`) in the gradient of the weighted loss.
// The gradient of the label is less by `onehot`, and that of every class less by `uniform`.
template <class V>
struct RowGains {
  V soft, hard, onehot, uniform;
};
template <class V>
FASTKD_HOST_DEVICE RowGains<V> gains_of(const Inputs& in, const Settings<V>& row,
                                        const Scales<V>& s, V gain, bool has_hard) {
  const Scalar<V> smoothing = static_cast<Scalar<V>>(in.label_smoothing);
  const V soft = gain * row.soft_weight * row.temperature;
  const V hard = has_hard ? gain * row.hard_weight : V{};
  const bool unit = in.divergence == Divergence::kCosine;
  return {unit ? soft * (row.temperature * s.student_inverse) : soft, hard, hard * (1 - smoothing),
          hard * smoothing / static_cast<Scalar<V>>(in.classes)};
}

template <class V>
struct Results {
  V loss, terms[kTerms];
};
template <class V, class Sums>
FASTKD_HOST_DEVICE Results<V> results_of(Divergence id, const Settings<V>& row, V hard,
                                         const Sums& sums) {
  const V value = divergence_of(id, sums.value, sums.slope, sums.classes, sums.teacher_entropy);
  // In a valid row, NaN comes only from infinite terms: from 0 * inf, if the student masks a class
  // whose teacher probability underflows, or from inf - inf (kCenteredSquaredError). The divergence
  // is then infinite.
  const V soft = value == value ? value : broadcast<V>(kInfinity<Scalar<V>>);
  const V weight = row.soft_weight * row.temperature * row.temperature;
  return {weighted(weight, soft) + weighted(row.hard_weight, hard),
          {hard, soft, sums.student_entropy, sums.teacher_entropy,
           sums.agreement > 0 ? broadcast<V>(1) : V{}}};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
