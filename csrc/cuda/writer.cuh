// The second sweep over a row: value and gradient of the forward KL, and the gradient of the hard
// term. One sweep computes both gradients, because they share the student's exponentials.
// Derivations: docs/maths.md, sections 2, 3 and 7. numerics.h defines the letters.
#pragma once
#include "statistics.cuh"

namespace fastkd::cuda {

// Running sums of the sweeps after scan() (sweeps.cuh).
template <class A>
struct Sums {
  A value = 0;
  A logits = 0;  // the mean over all classes of z - max z
  A student_entropy = 0, teacher_entropy = 0;
  A agreement = 0;
  A slope = 0;    // sum of slopes (kCosine: of values), which centers the gradient in general.cuh
  A classes = 0;  // number of classes in a mean: n of SlopeCentering (divergences.h), or 0

  // Merge the sums of a group of lanes. Without `kAll`, merge only `value`.
  template <int kLanes, bool kAll>
  __device__ __forceinline__ void merge_lanes(std::bool_constant<kAll>) {
    value = lanes_sum<kLanes>(value);
    if (!kAll) return;
    logits = lanes_sum<kLanes>(logits);
    student_entropy = lanes_sum<kLanes>(student_entropy);
    teacher_entropy = lanes_sum<kLanes>(teacher_entropy);
    agreement = lanes_max<kLanes>(agreement);
    slope = lanes_sum<kLanes>(slope);
    classes = lanes_sum<kLanes>(classes);
  }
  template <class Any>
  __device__ __forceinline__ void add(const Sums& other, const Any&) {
    value += other.value;
    logits += other.logits;
    student_entropy += other.student_entropy;
    teacher_entropy += other.teacher_entropy;
    agreement = max_of(agreement, other.agreement);
    slope += other.slope;
    classes += other.classes;
  }
};

// Return element() of numerics.h in fewer instructions. For |d| < 1/8, the series is a polynomial
// of four terms through Chebyshev nodes, whose relative error is at most 9e-8. Every rounding is
// explicit, so that forward and backward kernels compute equal bits. As in element(), `excess` of a
// class that only the student masks is +inf, or NaN if p has underflowed to 0.
__device__ __forceinline__ Element<float> device_element(float p, float q, float d) {
  float s = fma_of(d, -8.336434121e-3f, 4.168837335e-2f);
  s = fma_of(s, d, -1.666666606e-1f);
  s = fma_of(s, d, 0.4999999576f);
  const float f = mul_of(mul_of(d, d), s), direct = add_of(q, -p);
  const bool small = magnitude_of(d) < 0.125f;
  const float diff = small ? mul_of(p, add_of(f, -d)) : direct;
  // -1e30 also replaces a NaN d, so that p d = 0 if the teacher masks the class.
  const float excess = small ? mul_of(p, f) : fma_of(p, max_of(d, -1e30f), direct);
  return {p, q, d, diff, excess};
}
__device__ __forceinline__ Element<double> device_element(double p, double q, double d) {
  return element(p, q, d);
}

// Greatest distances of the two maxima at which d is formed from w - z: divided by t, and in
// logits. Beyond these distances w - z would lose digits, so logits are first taken relative to the
// maxima (docs/maths.md, section 3).
constexpr float kLargestDistance = 11;
constexpr float kApart = 32;

// Constants of a row for the second sweep, and the sweep's step for one class.
template <class A>
struct alignas(16) Writer {
  using Stats = RowStats<A>;
  static constexpr bool kGeneral = false;

  Temperature<A> t;
  RowStats<A> stats;
  bool apart;  // the maxima are far apart, or the temperatures differ
  A shift;     // constant summand of d
  A soft, hard, label,
      uniform;                 // factors of the gradient's parts; label and uniform are subtracted
  A student_log, teacher_log;  // logarithms of the two scales
  A share;                     // 1 / classes

  // Set the constants of row `index`. `scale`: the factor of the gradient, which in backward
  // includes grad_output.
  template <class Call>
  __device__ __forceinline__ Writer(const Call& call, int64_t index,
                                    const Temperature<A>& temperature, const RowStats<A>& row,
                                    A scale)
      : t(temperature), stats(row) {
    const Inputs& in = call.args;
    const A distance = row.student_max - row.teacher_max;
    apart = !(mul_of(magnitude_of(distance), t.inverse) <= A(kLargestDistance)) ||
            magnitude_of(distance) > A(kApart) || !t.same;
    student_log = static_cast<A>(kLn2) * log2_of(row.student_scale);
    teacher_log = static_cast<A>(kLn2) * log2_of(row.teacher_scale);

    soft = mul_of(mul_of(scale, setting_of<A>(in, kSoftWeight, index, in.soft_weight)), t.t);
    const A weight = in.labels == nullptr
                         ? A(0)
                         : mul_of(scale, setting_of<A>(in, kHardWeight, index, in.hard_weight));
    hard = weight == A(0) ? A(0) : mul_of(weight, row.hard_scale);
    const A student_sum = reciprocal_of(row.student_scale);
    const A factor =
        hard == A(0) ? A(1) : student_sum;  // a `hard` of 0 stays 0 if the sum is infinite
#pragma unroll 1
    for (int i = 0; i < t.power; i++) hard = mul_of(hard, factor);
    const A smoothing = static_cast<A>(in.label_smoothing);
    share = quotient_of(A(1), static_cast<A>(in.classes));
    uniform = smoothing == A(0)
                  ? A(0)
                  : mul_of(weight, quotient_of(smoothing, static_cast<A>(in.classes)));
    label = mul_of(weight, A(1) - smoothing);

    // d must match p and q as element() rounds them: the error of the sum of p d + q - p is then of
    // second order. `rest` corrects the rounding of the quotient.
    const A quotient = mul_of(stats.teacher_scale, reciprocal_of(stats.student_scale));
    const A rest = fma_of(-quotient, stats.student_scale, stats.teacher_scale);
    const A log_ratio = fma_of(rest, reciprocal_of(stats.teacher_scale), log_of(quotient));
    shift = apart ? log_ratio : fma_of(distance, t.inverse, log_ratio);
  }

  // Return d of one class. zs, ws: the class's logits relative to the maxima. `is_apart`: the
  // member `apart`, as a constant in the hot loops.
  __device__ __forceinline__ A difference(A z, A w, A zs, A ws, bool is_apart) const {
    if (!t.same) return fma_of(ws, t.teacher_inverse, fma_of(-zs, t.inverse, shift));
    return fma_of(is_apart ? ws - zs : w - z, t.inverse, shift);
  }
  // Return the Element of one class. Set `hard_exponent` to log2 of exp(z - max z), which is read
  // if t.power is 0.
  __device__ __forceinline__ Element<A> element(A z, A w, bool is_apart, A& hard_exponent) const {
    const A zs = z - stats.student_max, ws = w - stats.teacher_max;
    const A q = mul_of(exp2_of(mul_of(zs, t.slope)), stats.student_scale);
    const A p = mul_of(exp2_of(mul_of(ws, t.teacher_slope)), stats.teacher_scale);
    hard_exponent = mul_of(zs, static_cast<A>(kLog2E));
    return device_element(p, q, difference(z, w, zs, ws, is_apart));
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

  // Return the gradient of one class without the label's part, and add the class to `sums`. kApart:
  // the member `apart`, as a constant.
  template <bool kApart, int kPower, bool kExtra, bool kUniform>
  __device__ __forceinline__ A write_as(A z, A w, Sums<A>& sums) const {
    A hard_exponent;
    const Element<A> e = element(z, w, kApart, hard_exponent);
    sums.value += ForwardKL::at(e).value;
    const A softmax = hard_part<kPower, kUniform>(e.q, hard_exponent);
    if (kExtra) add_extra(z, w, e.p, e.q, sums);
    return fma_of(soft, ForwardKL::at(e).slope, softmax);
  }

  // Return the label's gradient, given the result of write_as() for the label's class.
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
