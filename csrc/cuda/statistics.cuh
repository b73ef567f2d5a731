// The temperatures of a row, and its statistics: maxima, sums of exponentials, and moments of
// student and teacher. One sweep computes maxima and sums, because a sweep for the maxima alone
// would read the row once more. Derivations: docs/maths.md, sections 3 and 4. numerics.h defines
// the letters.
#pragma once
#include <type_traits>

#include "../kernels.h"
#include "device.cuh"

namespace fastkd::cuda {

__device__ __forceinline__ int64_t label_of(const Inputs& in, int64_t row) {
  return in.labels == nullptr ? -1 : in.labels[row];
}

template <class A>
__device__ __forceinline__ A setting_of(const Inputs& in, RowSetting which, int64_t row,
                                        double otherwise) {
  return in.row_settings == nullptr ? static_cast<A>(otherwise)
                                    : static_cast<const A*>(in.row_settings)[which * in.rows + row];
}

__device__ __forceinline__ bool is_unit(const Inputs& in) {
  return in.divergence == Divergence::kCosine;
}
__device__ __forceinline__ bool is_centered(const Inputs& in) {
  return in.divergence == Divergence::kCenteredSquaredError;
}
// Return true if the sweeps after the first need Moments of the row.
__device__ __forceinline__ bool has_moments(const Inputs& in) {
  return is_unit(in) || is_centered(in);
}

// The temperatures of a row. softmax(z) is proportional to softmax(z / t) to the `power`, which
// saves the hard term's exponential. `power` is 1, 2 or 4, and 0 for other temperatures. `power` is
// also 0 if t is not 1 and the hard term is the greater part of the gradient: the power multiplies
// the error of exp(z / t) by t. Rows without labels have no hard term, and get the cheapest power,
// 1. `power` is 0 for all rows of a divergence with has_moments().
template <class A>
struct Temperature {
  A t, inverse;
  A slope;  // log2(e) / t
  A teacher_inverse, teacher_slope;
  bool same;  // student and teacher have the same temperature
  A margin;   // most that a logit may exceed a running maximum; keeps exponentials below 2^16
  int power;

  // Read the temperatures of a row. `two`: true if student and teacher may have different
  // temperatures. The hot kernels pass the constant false.
  __device__ __forceinline__ Temperature(const Inputs& in, int64_t row, bool two = false)
      : t(number_of(setting_of<A>(in, kTemperature, row, in.temperature))),
        inverse(quotient_of(A(1), t)),
        slope(quotient_of(static_cast<A>(kLog2E), t)),
        teacher_inverse(inverse),
        teacher_slope(slope),
        same(true) {
    A least = t;
    if (two) {
      const A teacher =
          number_of(setting_of<A>(in, kTeacherTemperature, row, in.teacher_temperature));
      teacher_inverse = quotient_of(A(1), teacher);
      teacher_slope = quotient_of(static_cast<A>(kLog2E), teacher);
      same = teacher_slope == slope;
      least = teacher < t ? teacher : t;
    }
    margin = A(11) * (least < A(1) ? least : A(1));
    const A hard = setting_of<A>(in, kHardWeight, row, in.hard_weight);
    const A soft = setting_of<A>(in, kSoftWeight, row, in.soft_weight);
    const bool is_power = t == A(1) || t == A(2) || t == A(4);
    const bool precise = hard <= soft * t || t == A(1);
    power = in.labels == nullptr ? 1 : is_power && precise ? static_cast<int>(t) : 0;
    if (two && has_moments(in)) power = 0;  // moments replace the scale of q in `stats`
  }

 private:
  // Return `x`, or NaN if `x` is no valid temperature, so that the row becomes NaN.
  static __device__ __forceinline__ A number_of(A x) {
    return x > A(0) && x - x == A(0) ? x : A(NAN);
  }
};

// Value of the template argument kPower in loops that read Temperature::power at run time. The
// values 0, 1, 2 and 4 make copies of the hot loops. A copy without the hard term's exponential
// takes 42.7 instead of 50.5 issue slots a class in bf16 (SASS of sm_90, 2026-12-01).
constexpr int kAtRunTime = -1;

// Return 2^x_times_log2e: a power of e = 2^(slope * x), or an exponential if the power is 0.
template <int kPower, class A>
__device__ __forceinline__ A power_of(A e, A x_times_log2e, int power) {
  if (kPower == 0 || (kPower == kAtRunTime && power == 0)) return exp2_of(x_times_log2e);
  if (kPower != kAtRunTime) power = kPower;
  const A squared = power >= 2 ? e * e : e;
  return power == 4 ? squared * squared : squared;
}

// Call fn with `power` as a compile-time constant.
template <class Fn>
__device__ __forceinline__ void with_power(int power, Fn&& fn) {
  if (power == 2) {
    fn(std::integral_constant<int, 2>());
  } else if (power == 1) {
    fn(std::integral_constant<int, 1>());
  } else if (power == 4) {
    fn(std::integral_constant<int, 4>());
  } else {
    fn(std::integral_constant<int, 0>());
  }
}

// Running sums of the first sweep. The maxima begin at kLowest, so that no exponent is inf - inf. A
// row whose classes are all masked has the sum 0, and so NaN results.
template <class A>
constexpr A kLowest = sizeof(A) == 8 ? A(-1.7976931348623157e308) : A(-3.4028234663852886e38f);
template <class A>
struct Statistics {
  A student_max = kLowest<A>, student_sum = 0, hard_sum = 0;
  A teacher_max = kLowest<A>, teacher_sum = 0;

  // Raise the maxima to (s, w). The products must not be fused into the sums of merge_lanes():
  // lanes would then end with different last bits (seen in November 2026).
  __device__ __forceinline__ void raise(A s, A w, const Temperature<A>& t) {
    if (s > student_max) {
      const A change = student_max - s, exponent = mul_of(change, t.slope);
      student_sum = mul_of(student_sum, exp2_of(exponent));
      hard_sum = mul_of(hard_sum, exp2_of(t.power > 0 ? exponent * static_cast<A>(t.power)
                                                      : mul_of(change, static_cast<A>(kLog2E))));
      student_max = s;
    }
    if (w > teacher_max) {
      teacher_sum = mul_of(teacher_sum, exp2_of(mul_of(teacher_max - w, t.teacher_slope)));
      teacher_max = w;
    }
  }
  // Add one class, whose logits are at most t.margin above the maxima.
  template <int kPower>
  __device__ __forceinline__ void add(A z, A w, const Temperature<A>& t) {
    const A above = z - student_max, e = exp2_of(mul_of(above, t.slope));
    student_sum += e;
    hard_sum += power_of<kPower>(e, mul_of(above, static_cast<A>(kLog2E)), t.power);
    teacher_sum += exp2_of(mul_of(w - teacher_max, t.teacher_slope));
  }
  __device__ __forceinline__ void add(Statistics other, const Temperature<A>& t) {
    raise(other.student_max, other.teacher_max, t);
    other.raise(student_max, teacher_max, t);
    student_sum += other.student_sum;
    hard_sum += other.hard_sum;
    teacher_sum += other.teacher_sum;
  }
  // Merge the statistics of a group of lanes; all lanes get the result.
  template <int kLanes>
  __device__ __forceinline__ void merge_lanes(const Temperature<A>& t) {
    raise(lanes_max<kLanes>(student_max), lanes_max<kLanes>(teacher_max), t);
    student_sum = lanes_sum<kLanes>(student_sum);
    hard_sum = lanes_sum<kLanes>(hard_sum);
    teacher_sum = lanes_sum<kLanes>(teacher_sum);
  }
};

// The moments of cpu::Statistics (kernels.h), in double because logits may be of any size.
struct Moments {
  double student = 0, teacher = 0;
  double student_count = 0, teacher_count = 0;

  template <class A>
  __device__ __forceinline__ void add(A z, A w, bool squared) {
    const bool masks = z == A(-INFINITY), teacher_masks = w == A(-INFINITY);
    if (squared) {
      if (masks && teacher_masks) return;
      student = fma_of(static_cast<double>(z), static_cast<double>(z), student);
      teacher = fma_of(static_cast<double>(w), static_cast<double>(w), teacher);
      return;
    }
    if (!masks) student += static_cast<double>(z), student_count += 1;
    if (!teacher_masks) teacher += static_cast<double>(w), teacher_count += 1;
  }
  template <class Any>
  __device__ __forceinline__ void add(const Moments& other, const Any&) {
    student += other.student;
    teacher += other.teacher;
    student_count += other.student_count;
    teacher_count += other.teacher_count;
  }
  template <int kLanes, class Any>
  __device__ __forceinline__ void merge_lanes(const Any&) {
    student = lanes_sum<kLanes>(student);
    teacher = lanes_sum<kLanes>(teacher);
    student_count = lanes_sum<kLanes>(student_count);
    teacher_count = lanes_sum<kLanes>(teacher_count);
  }
};

// Results of the first sweep, which `stats` holds for each row.
template <class A>
struct RowStats {
  A student_max, student_scale, hard_scale, teacher_max, teacher_scale;

  RowStats() = default;
  // Compute the results of the first sweep. The constructor of GeneralStats (general.cuh) has the
  // same parameters.
  __device__ __forceinline__ RowStats(const Inputs&, int64_t, const Statistics<A>& s,
                                      const Moments&)
      : student_max(s.student_max),
        student_scale(reciprocal_of(s.student_sum)),
        hard_scale(reciprocal_of(s.hard_sum)),
        teacher_max(s.teacher_max),
        teacher_scale(reciprocal_of(s.teacher_sum)) {}

  // Return false if a logit of student or teacher is NaN or +inf, or if all logits of either are
  // -inf.
  __device__ __forceinline__ bool valid() const {
    const A zero(0);
    return student_max * zero + student_scale * zero + teacher_max * zero + teacher_scale * zero ==
           zero;
  }

  // Store the row's entry of `stats`. `slope` and `classes`: the members of Sums (writer.cuh).
  __device__ __forceinline__ void store(A* stats, int64_t rows, int64_t row, A slope,
                                        A classes) const {
    stats[kStudentMax * rows + row] = student_max;
    stats[kStudentScale * rows + row] = student_scale;
    stats[kHardScale * rows + row] = hard_scale;
    stats[kTeacherMax * rows + row] = teacher_max;
    stats[kTeacherScale * rows + row] = teacher_scale;
    stats[kSlopeSum * rows + row] = slope;
    stats[kClassCount * rows + row] = classes;
  }
  __device__ __forceinline__ void load(const A* stats, int64_t rows, int64_t row) {
    student_max = stats[kStudentMax * rows + row];
    student_scale = stats[kStudentScale * rows + row];
    hard_scale = stats[kHardScale * rows + row];
    teacher_max = stats[kTeacherMax * rows + row];
    teacher_scale = stats[kTeacherScale * rows + row];
  }
};

// Return log sum exp(z) - max z.
template <class A>
__device__ __forceinline__ A log_sum_of(const RowStats<A>& stats) {
  return -static_cast<A>(kLn2) * log2_of(stats.hard_scale);
}

}  // namespace fastkd::cuda
