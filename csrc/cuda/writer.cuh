// The second sweep over a row: value and gradient of the forward KL and of the hard term, fused
// because both need the same exponentials. Derivations: docs/maths.md, sections 2, 3 and 7.
// Letters: numerics.h.
#pragma once
#include "statistics.cuh"

namespace fastkd::cuda {

// The sums that a kernel needs. Each includes those before it.
enum class SumKind { kValue, kTerms, kSlopes };
template <SumKind kKind_>
struct SumKindOf {
  static constexpr SumKind kKind = kKind_;
};

// Running sums of the second sweep.
template <class A>
struct Sums {
  A value = 0;
  A logits = 0;  // the mean over all classes of z - max z
  A student_entropy = 0, teacher_entropy = 0;
  A agreement = 0;
  A slope = 0;    // centers the gradient of the divergences in general.cuh
  A classes = 0;  // that count for a mean: n of SlopeCentering (divergences.h), or 0

  template <int kLanes, class Kind>
  __device__ __forceinline__ void merge_lanes(Kind) {
    value = lanes_sum<kLanes>(value);
    if (Kind::kKind == SumKind::kValue) return;
    logits = lanes_sum<kLanes>(logits);
    student_entropy = lanes_sum<kLanes>(student_entropy);
    teacher_entropy = lanes_sum<kLanes>(teacher_entropy);
    agreement = lanes_max<kLanes>(agreement);
    if (Kind::kKind == SumKind::kTerms) return;
    slope = lanes_sum<kLanes>(slope);
    classes = lanes_sum<kLanes>(classes);
  }
  template <class Kind>
  __device__ __forceinline__ void add(const Sums& other, Kind) {
    value += other.value;
    logits += other.logits;
    student_entropy += other.student_entropy;
    teacher_entropy += other.teacher_entropy;
    agreement = max_of(agreement, other.agreement);
    slope += other.slope;
    classes += other.classes;
  }
};

// Return element() of numerics.h in fewer instructions: a series of four terms for |d| < 1/8, a
// polynomial through Chebyshev nodes whose relative error is at most 9e-8, and predicates instead
// of selects (27 instead of 30 issue slots a class in the second sweep on an H100). Special values
// are those of element(): a class that the student alone masks is +inf, or NaN if its p has
// underflowed to 0.
__device__ __forceinline__ Element<float> device_element(float p, float q, float d) {
  float s = fma_of(d, -8.336434121e-3f, 4.168837335e-2f);
  s = fma_of(s, d, -1.666666606e-1f);
  s = fma_of(s, d, 0.4999999576f);
  const float f = mul_of(mul_of(d, d), s);
  const float slope = add_of(f, -d);
#if defined(__CUDACC__)
  float diff, excess;
  asm("{\n"
      ".reg .pred small;\n"
      ".reg .f32 size, bounded;\n"
      "abs.f32 size, %4;\n"
      "setp.lt.f32 small, size, 0f3E000000;\n"  // 1/8
      "max.f32 bounded, %4, 0fF149F2CA;\n"      // -1e30, also for NaN: p d = 0 where p is masked
      "sub.rn.f32 %0, %3, %2;\n"
      "sub.rn.f32 %1, %3, %2;\n"
      "@small mul.rn.f32 %0, %2, %6;\n"
      "@small mul.rn.f32 %1, %2, %5;\n"
      "@!small fma.rn.f32 %1, %2, bounded, %1;\n"
      "}"
      : "=&f"(diff), "=&f"(excess)
      : "f"(p), "f"(q), "f"(d), "f"(f), "f"(slope));
#else  // for the test of this function on the CPU
  const bool small = magnitude_of(d) < 0.125f;
  const float diff = small ? mul_of(p, slope) : q - p;
  const float excess = small ? mul_of(p, f) : fma_of(p, max_of(d, -1e30f), q - p);
#endif
  return {p, q, d, diff, excess};
}
__device__ __forceinline__ Element<double> device_element(double p, double q, double d) {
  return element(p, q, d);
}

// Above these distances (of the two references, in powers of 2; of the two maxima, in logits), d
// would be rounded at their size (docs/maths.md, section 3): the second sweep then subtracts the
// maxima from the logits first. Up to t = 2.88 the first limit is the stricter one.
constexpr float kLargestDistance = 16;
constexpr float kApart = 32;

// Constants of a row for the second sweep, and the sweep's step for one class.
template <class A>
struct alignas(16) Writer {
  using Stats = RowStats<A>;
  static constexpr bool kGeneral = false;

  Temperature<A> t;
  RowStats<A> stats;  // if `apart`, the scales are relative to the maxima themselves
  bool apart;         // the maxima are subtracted from the logits first
  A student_bias, teacher_bias, hard_bias;  // of the exponents
  A shift;                                  // of d
  A soft, hard, label, uniform;  // factors of the gradient's parts; label and uniform subtract
  A student_log, teacher_log;    // of the two scales, relative to the maxima
  A share;                       // 1 / classes

  // `scale` includes grad_output.
  template <class Call>
  __device__ __forceinline__ Writer(const Call& call, int64_t index,
                                    const Temperature<A>& temperature, const RowStats<A>& row,
                                    A scale)
      : t(temperature), stats(row) {
    const Inputs& in = call.args;
    const A ln_2 = static_cast<A>(kLn2), log2_e = static_cast<A>(kLog2E);
    const A student_error = reference_error(row.student_max, t.slope, t.limit);
    const A teacher_error = reference_error(row.teacher_max, t.teacher_slope, t.limit);
    const A student_reference = mul_of(row.student_max, t.slope);
    const A teacher_reference = mul_of(row.teacher_max, t.teacher_slope);
    const A distance = student_reference - teacher_reference;
    apart = max_of(magnitude_of(row.student_max), magnitude_of(row.teacher_max)) > t.limit ||
            !(magnitude_of(distance) <= A(kLargestDistance)) ||
            magnitude_of(row.student_max - row.teacher_max) > A(kApart) || !t.same;
    student_log = ln_2 * (log2_of(row.student_scale) + student_error);
    teacher_log = ln_2 * (log2_of(row.teacher_scale) + teacher_error);
    student_bias = -student_reference, teacher_bias = -teacher_reference;
    hard_bias = -mul_of(row.student_max, log2_e);

    soft = mul_of(mul_of(scale, setting_of<A>(in, kSoftWeight, index, in.soft_weight)), t.t);
    const A weight = in.labels == nullptr
                         ? A(0)
                         : mul_of(scale, setting_of<A>(in, kHardWeight, index, in.hard_weight));
    hard = weight == A(0) ? A(0) : mul_of(weight, row.hard_scale);
    const A student_sum = reciprocal_of(row.student_scale);
    const A factor = hard == A(0) ? A(1) : student_sum;  // 0 stays 0 where the sum is infinite
#pragma unroll 1
    for (int i = 0; i < t.power; i++) hard = mul_of(hard, factor);
    const A smoothing = static_cast<A>(in.label_smoothing);
    share = quotient_of(A(1), static_cast<A>(in.classes));
    uniform = smoothing == A(0)
                  ? A(0)
                  : mul_of(weight, quotient_of(smoothing, static_cast<A>(in.classes)));
    label = mul_of(weight, A(1) - smoothing);

    if (apart) {
      student_bias = teacher_bias = hard_bias = A(0);
      stats.student_scale = mul_of(row.student_scale, exp2_of(student_error));
      stats.teacher_scale = mul_of(row.teacher_scale, exp2_of(teacher_error));
      if (t.power == 0)
        hard = mul_of(hard, exp2_of(reference_error(row.student_max, log2_e, t.limit)));
    }
    // d must match the p and q that are formed below: the error of their sum of p d + q - p is then
    // the square of their own errors. One logarithm does not cancel where the two sums are close to
    // each other.
    const A quotient = mul_of(stats.teacher_scale, reciprocal_of(stats.student_scale));
    const A rest = fma_of(-quotient, stats.student_scale, stats.teacher_scale);
    const A log_ratio = fma_of(rest, reciprocal_of(stats.teacher_scale), log_of(quotient));
    const A errors = fma_of(teacher_error - student_error, ln_2, log_ratio);
    shift = apart ? log_ratio : fma_of(row.student_max - row.teacher_max, t.inverse, errors);
  }

  // Return d of one class. The logits are relative to the maxima if the row is `apart`.
  __device__ __forceinline__ A difference(A z, A w) const {
    const A far = fma_of(w, t.teacher_inverse, fma_of(-z, t.inverse, shift));
    return t.same ? fma_of(w - z, t.inverse, shift) : far;
  }
  // Return p, q and d of one class. `hard_exponent`: the exponent of its exp(z), if that is no
  // power of q. The logits are as in difference().
  __device__ __forceinline__ Element<A> element(A z, A w, A& hard_exponent) const {
    const A q = exp2_of(fma_of(z, t.slope, student_bias));
    const A p = exp2_of(fma_of(w, t.teacher_slope, teacher_bias));
    hard_exponent = fma_of(z, static_cast<A>(kLog2E), hard_bias);
    return device_element(mul_of(p, stats.teacher_scale), mul_of(q, stats.student_scale),
                          difference(z, w));
  }

  // Return the hard term's gradient of one class without the label's part.
  template <int kPower, bool kUniform>
  __device__ __forceinline__ A hard_part(A q, A hard_exponent) const {
    A softmax;
    const int power = kPower == kAtRunTime ? t.power : kPower;
    if (power == 0) {
      softmax = mul_of(hard, exp2_of(hard_exponent));
    } else {
      softmax = mul_of(hard, q);
      if (power >= 2) softmax = mul_of(softmax, q);
      if (power == 4) softmax = mul_of(softmax, mul_of(q, q));
    }
    return kUniform ? add_of(softmax, -uniform) : softmax;
  }

  // Return the gradient of one class without the label's part. kApart: `apart`, which is the same
  // for the whole row.
  template <bool kApart, int kPower, bool kExtra, bool kUniform>
  __device__ __forceinline__ A write_as(A z, A w, Sums<A>& sums) const {
    A hard_exponent;
    const Element<A> e = kApart
                             ? element(z - stats.student_max, w - stats.teacher_max, hard_exponent)
                             : element(z, w, hard_exponent);
    sums.value += ForwardKL::at(e).value;
    const A softmax = hard_part<kPower, kUniform>(e.q, hard_exponent);
    if (kExtra) add_extra(z, w, e.p, e.q, sums);
    return fma_of(soft, ForwardKL::at(e).slope, softmax);
  }

  // Return the label's gradient, from the result of write_as() for its class.
  __device__ __forceinline__ A at_label(A g) const { return g - label; }

  __device__ __forceinline__ void add_extra(A z, A w, A p, A q, Sums<A>& sums) const {
    const A zs = z - stats.student_max;
    sums.logits = fma_of(zs, share, sums.logits);
    sums.student_entropy -= times_log(q, fma_of(zs, t.inverse, student_log));
    sums.teacher_entropy -=
        times_log(p, fma_of(w - stats.teacher_max, t.teacher_inverse, teacher_log));
    if (z == stats.student_max && w == stats.teacher_max) sums.agreement = A(1);
  }
};

}  // namespace fastkd::cuda
