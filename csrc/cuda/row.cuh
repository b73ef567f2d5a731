// The arithmetic of one row, shared by every kernel that writes a gradient: the statistics of the
// first sweep, what the second sweep needs of them, and what is left behind when a row is closed.
// Derivations: docs/maths.md. Letters: numerics.h.
#pragma once
#include "../kernels.h"
#include "device.cuh"

namespace fastkd::cuda {

// Where the kernels find the scale that is folded into the gradient and the total.
enum class ScaleSource : int32_t { kArgument, kDenominator, kCount, kStats };

// A forward call as the kernels see it.
struct ForwardCall {
  ForwardArgs args;
  const void* denominator = nullptr;  // acc, one number
  void* total = nullptr;              // acc [1] or [1 + kTerms], or null
  ScaleSource scale_source = ScaleSource::kArgument;
  bool finish_inside = false;  // the grid is one cluster, which also writes the total
};

enum class RowKind : int32_t { kReal, kIgnored, kBad };

__device__ __forceinline__ RowKind kind_of(const Inputs& in, int64_t label) {
  if (in.labels == nullptr) return RowKind::kReal;
  if (label == in.ignore_index) return RowKind::kIgnored;
  return label < 0 || label >= in.classes ? RowKind::kBad : RowKind::kReal;
}
// What loss and gradient of a row that is not real are filled with.
__device__ __forceinline__ float fill_value(RowKind kind) {
  return kind == RowKind::kIgnored ? 0.0f : __int_as_float(0x7fc00000);
}
__device__ __forceinline__ int64_t label_of(const Inputs& in, int64_t row) {
  return in.labels == nullptr ? -1 : in.labels[row];
}

// Sums of exponentials are relative to 2^r, where r belongs to the maximum m. Up to t.limit, r is
// m * slope rounded: 2^(z * slope - r) is then one fused multiply-add and the exponential, and as r
// itself is exact, logits of any offset are as accurate as small ones, as long as sums that change
// their maximum are rescaled by the difference of the r, not of the m. Beyond, where m * slope may
// be off by more than the exponential can take, or overflow, r is m * slope itself, and exponents
// are (z - m) * slope.
constexpr double kLargestReference = 4194304;  // 2^22

// m * factor - r.
template <class A>
__device__ __forceinline__ A reference_error(A m, A factor, A limit) {
  return m <= limit && m >= -limit ? fma_of(m, factor, -mul_of(m, factor)) : A(0);
}
// r of `from` less r of `to`. Never NaN for numbers, and never so low that its powers could be.
template <class A>
__device__ __forceinline__ A reference_change(A from, A to, A factor, A limit) {
  const A errors = reference_error(to, factor, limit) - reference_error(from, factor, limit);
  return max_of(fma_of(from - to, factor, errors), A(-4096));
}
// z * factor - r, for any m.
template <class A>
__device__ __forceinline__ A exponent_of(A z, A m, A factor, A limit) {
  return m <= limit && m >= -limit ? fma_of(z, factor, -mul_of(m, factor)) : mul_of(z - m, factor);
}

// The temperature of a row. `power`: softmax(z) is the power-th power of softmax(z / t) up to its
// scale, which saves the third exponential; 0 where it is none of 1, 2, 3, 4. Without labels there
// is no hard term, and 1 costs least.
template <class A>
struct Temperature {
  A t, inverse;
  A slope;   // log2(e) / t
  A margin;  // how far a logit may lie above a running maximum: its exponentials stay below 2^16
  A limit;   // maxima beyond it have no rounded product as their reference
  int power;
};
template <class A>
__device__ __forceinline__ Temperature<A> temperature_of(const Inputs& in, int64_t row) {
  Temperature<A> r;
  r.t = in.row_settings == nullptr ? static_cast<A>(in.temperature)
                                   : static_cast<const A*>(in.row_settings)[row];
  // A temperature that is none makes its row NaN.
  if (!(r.t > A(0) && r.t - r.t == A(0))) r.t = static_cast<A>(__int_as_float(0x7fc00000));
  r.inverse = quotient_of(A(1), r.t);
  r.slope = quotient_of(static_cast<A>(kLog2E), r.t);
  r.margin = A(11) * (r.t < A(1) ? r.t : A(1));
  r.limit = quotient_of(A(kLargestReference), max_of(r.slope, static_cast<A>(kLog2E)));
  const bool whole = r.t == A(1) || r.t == A(2) || r.t == A(3) || r.t == A(4);
  r.power = in.labels == nullptr ? 1 : whole ? static_cast<int>(r.t) : 0;
  return r;
}

// kPower as a template argument: 1, 2, kThreeOrFour (`four` tells which), or 0 for "by its own
// exponential". Four copies of the hot loops; 3 and 4 share one.
constexpr int kThreeOrFour = 3;
constexpr int kAtRunTime = -1;  // all of them in one copy, for kernels that are not bound by issue

// e = 2^(slope * x), raised such that it is 2^(log2(e) x).
template <int kPower, class A>
__device__ __forceinline__ A power_of(A e, A x_times_log2e, int power) {
  if (kPower == 1) return e;
  if (kPower == 2) return e * e;
  if (kPower == kThreeOrFour) return e * e * (power == 4 ? e * e : e);
  if (kPower == 0) return exp2_of(x_times_log2e);
  if (power == 0) return exp2_of(x_times_log2e);
  const A squared = power >= 2 ? e * e : e;
  return power >= 3 ? squared * (power == 4 ? squared : e) : squared;
}

// Calls fn with the power as a constant.
template <int kPower>
struct PowerConstant {
  static constexpr int value = kPower;
};
template <class Fn>
__device__ __forceinline__ void with_power(int power, Fn&& fn) {
  if (power == 2) {
    fn(PowerConstant<2>());
  } else if (power == 1) {
    fn(PowerConstant<1>());
  } else if (power == 0) {
    fn(PowerConstant<0>());
  } else {
    fn(PowerConstant<kThreeOrFour>());
  }
}

// Running sums of the first sweep. The maxima begin at the least number: no exponent ever becomes
// inf - inf, a row that is masked throughout has the sum 0, and with it NaN results.
template <class A>
constexpr A kLowest = sizeof(A) == 8 ? A(-1.7976931348623157e308) : A(-3.4028234663852886e38f);
template <class A>
struct Statistics {
  A student_max = kLowest<A>, student_sum = 0, hard_sum = 0;
  A teacher_max = kLowest<A>, teacher_sum = 0;

  // Makes (s, w) part of the maxima. The products are rounded for themselves: fused into the sums
  // of a butterfly they would leave the lanes with different last bits (seen 2026-11).
  __device__ __forceinline__ void raise(A s, A w, const Temperature<A>& t) {
    if (s > student_max) {
      const A change = reference_change(student_max, s, t.slope, t.limit);
      const A hard_change = t.power > 0
                                ? change * static_cast<A>(t.power)
                                : reference_change(student_max, s, static_cast<A>(kLog2E), t.limit);
      student_sum = mul_of(student_sum, exp2_of(change));
      hard_sum = mul_of(hard_sum, exp2_of(hard_change));
      student_max = s;
    }
    if (w > teacher_max) {
      teacher_sum =
          mul_of(teacher_sum, exp2_of(reference_change(teacher_max, w, t.slope, t.limit)));
      teacher_max = w;
    }
  }
  // Whether add() would be wrong, for the size of the maxima; add_any() never is.
  __device__ __forceinline__ bool beyond(const Temperature<A>& t) const {
    return max_of(magnitude_of(student_max), magnitude_of(teacher_max)) > t.limit;
  }
  // One class, at most t.margin above the maxima.
  template <int kPower>
  __device__ __forceinline__ void add(A z, A w, const Temperature<A>& t) {
    add_exponents<kPower>(fma_of(z, t.slope, -mul_of(student_max, t.slope)),
                          kPower > 0 ? A(0) : fma_of(z, A(kLog2E), -mul_of(student_max, A(kLog2E))),
                          fma_of(w, t.slope, -mul_of(teacher_max, t.slope)), t);
  }
  template <int kPower>
  __device__ __forceinline__ void add_any(A z, A w, const Temperature<A>& t) {
    add_exponents<kPower>(
        exponent_of(z, student_max, t.slope, t.limit),
        kPower > 0 ? A(0) : exponent_of(z, student_max, static_cast<A>(kLog2E), t.limit),
        exponent_of(w, teacher_max, t.slope, t.limit), t);
  }
  template <int kPower>
  __device__ __forceinline__ void add_exponents(A student, A hard, A teacher,
                                                const Temperature<A>& t) {
    const A e = exp2_of(student);
    student_sum += e;
    hard_sum += power_of<kPower>(e, hard, t.power);
    teacher_sum += exp2_of(teacher);
  }
  // All lanes of a group get the statistics of the group.
  template <int kLanes = 32>
  __device__ __forceinline__ void merge_lanes(const Temperature<A>& t) {
    raise(lanes_max<kLanes>(student_max), lanes_max<kLanes>(teacher_max), t);
    sum_lanes<kLanes>();
  }
  // The same where all lanes have the maxima of the group.
  template <int kLanes>
  __device__ __forceinline__ void sum_lanes() {
    student_sum = lanes_sum<kLanes>(student_sum);
    hard_sum = lanes_sum<kLanes>(hard_sum);
    teacher_sum = lanes_sum<kLanes>(teacher_sum);
  }
};

// Running sums of the second sweep.
template <class A>
struct Sums {
  A value = 0;
  A logits = 0;  // the mean over all classes of z - max z
  A student_entropy = 0, teacher_entropy = 0;
  A agreement = 0;

  template <int kLanes, bool kExtra>
  __device__ __forceinline__ void merge_lanes() {
    value = lanes_sum<kLanes>(value);
    if (!kExtra) return;
    logits = lanes_sum<kLanes>(logits);
    student_entropy = lanes_sum<kLanes>(student_entropy);
    teacher_entropy = lanes_sum<kLanes>(teacher_entropy);
    agreement = lanes_max<kLanes>(agreement);
  }
  __device__ __forceinline__ void add(const Sums& other) {
    value += other.value;
    logits += other.logits;
    student_entropy += other.student_entropy;
    teacher_entropy += other.teacher_entropy;
    agreement = max_of(agreement, other.agreement);
  }
};

// What is left of the first sweep when it is done: the row's entry in `stats`.
template <class A>
struct RowStats {
  A student_max, student_scale, hard_scale, teacher_max, teacher_scale;

  RowStats() = default;
  __device__ __forceinline__ explicit RowStats(const Statistics<A>& s)
      : student_max(s.student_max),
        student_scale(reciprocal_of(s.student_sum)),
        hard_scale(reciprocal_of(s.hard_sum)),
        teacher_max(s.teacher_max),
        teacher_scale(reciprocal_of(s.teacher_sum)) {}

  // Not so where a logit is NaN or +inf, or all of them are -inf.
  __device__ __forceinline__ bool valid() const {
    const A zero(0);
    return student_max * zero + student_scale * zero + teacher_max * zero + teacher_scale * zero ==
           zero;
  }

  __device__ __forceinline__ void store(A* stats, int64_t rows, int64_t row) const {
    stats[kStudentMax * rows + row] = student_max;
    stats[kStudentScale * rows + row] = student_scale;
    stats[kHardScale * rows + row] = hard_scale;
    stats[kTeacherMax * rows + row] = teacher_max;
    stats[kTeacherScale * rows + row] = teacher_scale;
    stats[kSlopeSum * rows + row] = A(0);
  }
  __device__ __forceinline__ void load(const A* stats, int64_t rows, int64_t row) {
    student_max = stats[kStudentMax * rows + row];
    student_scale = stats[kStudentScale * rows + row];
    hard_scale = stats[kHardScale * rows + row];
    teacher_max = stats[kTeacherMax * rows + row];
    teacher_scale = stats[kTeacherScale * rows + row];
  }
};

// element() of numerics.h in fewer instructions: a series of four terms for |d| < 1/8, a polynomial
// through Chebyshev nodes that is off by 9e-8 of the value at most, and predicates instead of
// selects (27 instead of 30 issue slots a class in the second sweep on an H100). Limits as there: a
// class that the student alone masks is +inf, or NaN where its p has underflowed to 0.
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
#else  // for the test of it on the CPU
  const bool small = magnitude_of(d) < 0.125f;
  const float diff = small ? mul_of(p, slope) : q - p;
  const float excess = small ? mul_of(p, f) : fma_of(p, max_of(d, -1e30f), q - p);
#endif
  return {p, q, d, diff, excess};
}
__device__ __forceinline__ Element<double> device_element(double p, double q, double d) {
  return element(p, q, d);
}

// Beyond these, in powers of 2, a row's second sweep goes the longer way. The distance of the two
// references: d would round at its size (docs/maths.md, section 3). And with the scales in the
// exponents, the size of a reference: the exponents would.
constexpr float kLargestDistance = 16;
constexpr float kApart = 32;  // in logits
constexpr float kLargestFolded = 64;

// What the second sweep needs of a row, and the sweep's one step. kFold: the scales of the two
// softmaxes ride in the exponents, which saves two multiplications and costs an error of half a
// unit in the last place of the exponent: for 16-bit gradients.
template <class A, class D, bool kFold>
struct alignas(16) Writer {
  static_assert(D::kBalance == Balance::kNone,
                "a slope sum needs one more sweep of the resident row");

  Temperature<A> t;
  RowStats<A> stats;  // where `apart`, the scales are relative to the maxima themselves
  bool apart;         // logits are taken relative to the maxima before anything else is done
  A student_bias, teacher_bias, hard_bias;  // of the exponents
  A shift;                                  // of d
  A soft, hard, label, uniform;  // factors of the gradient's parts; label and uniform subtract
  A student_log, teacher_log;    // of the two scales, relative to the maxima
  A share;                       // 1 / classes

  // `scale` includes grad_output.
  __device__ __forceinline__ Writer(const Inputs& in, const Temperature<A>& temperature,
                                    const RowStats<A>& row, A scale)
      : t(temperature), stats(row) {
    const A ln_2 = static_cast<A>(kLn2), log2_e = static_cast<A>(kLog2E);
    const A student_error = reference_error(row.student_max, t.slope, t.limit);
    const A teacher_error = reference_error(row.teacher_max, t.slope, t.limit);
    const A student_reference = mul_of(row.student_max, t.slope);
    const A teacher_reference = mul_of(row.teacher_max, t.slope);
    const A distance = student_reference - teacher_reference;
    const A largest = max_of(magnitude_of(student_reference), magnitude_of(teacher_reference));
    apart = max_of(magnitude_of(row.student_max), magnitude_of(row.teacher_max)) > t.limit ||
            !(magnitude_of(distance) <= A(kLargestDistance)) ||
            magnitude_of(row.student_max - row.teacher_max) > A(kApart) ||
            (kFold && largest > A(kLargestFolded));
    student_log = ln_2 * (log2_of(row.student_scale) + student_error);
    teacher_log = ln_2 * (log2_of(row.teacher_scale) + teacher_error);
    student_bias = add_of(-student_reference, kFold ? log2_of(row.student_scale) : A(0));
    teacher_bias = add_of(-teacher_reference, kFold ? log2_of(row.teacher_scale) : A(0));
    hard_bias = -mul_of(row.student_max, log2_e);

    soft = mul_of(mul_of(scale, static_cast<A>(in.soft_weight)), t.t);
    const A weight = in.labels == nullptr ? A(0) : mul_of(scale, static_cast<A>(in.hard_weight));
    hard = weight == A(0) ? A(0) : mul_of(weight, row.hard_scale);
    const A student_sum = reciprocal_of(row.student_scale);
    const A factor = hard == A(0) ? A(1) : student_sum;  // 0 stays 0 where the sum is infinite
    if (t.power >= 1) hard = mul_of(hard, factor);
    if (t.power >= 2) hard = mul_of(hard, factor);
    if (t.power >= 3) hard = mul_of(hard, factor);
    if (t.power >= 4) hard = mul_of(hard, factor);
    const A smoothing = static_cast<A>(in.label_smoothing);
    share = quotient_of(A(1), static_cast<A>(in.classes));
    uniform = smoothing == A(0)
                  ? A(0)
                  : mul_of(weight, quotient_of(smoothing, static_cast<A>(in.classes)));
    label = mul_of(weight, A(1) - smoothing);

    if (apart) {
      stats.student_scale = mul_of(row.student_scale, exp2_of(student_error));
      stats.teacher_scale = mul_of(row.teacher_scale, exp2_of(teacher_error));
      if (t.power == 0)
        hard = mul_of(hard, exp2_of(reference_error(row.student_max, log2_e, t.limit)));
    }
    // d must belong to the very p and q that are formed below: their sum of p d + q - p is then off
    // by the square of what they are off by.
    if (kFold && !apart) {
      shift = mul_of(teacher_bias - student_bias, ln_2);
    } else {  // one logarithm: where the two sums are near, it does not cancel
      const A quotient = mul_of(stats.teacher_scale, reciprocal_of(stats.student_scale));
      const A rest = fma_of(-quotient, stats.student_scale, stats.teacher_scale);
      const A of_sums = fma_of(rest, reciprocal_of(stats.teacher_scale), log_of(quotient));
      const A errors = fma_of(teacher_error - student_error, ln_2, of_sums);
      shift = apart ? of_sums : fma_of(row.student_max - row.teacher_max, t.inverse, errors);
    }
  }

  // The gradient of one class, but for what belongs to the label.
  template <int kPower, bool kExtra, bool kUniform = kExtra>
  __device__ __forceinline__ A write(A z, A w, Sums<A>& sums) const {
    return apart ? write_as<true, kAtRunTime, kExtra, kUniform>(z, w, sums)
                 : write_as<false, kPower, kExtra, kUniform>(z, w, sums);
  }
  // The same where the caller knows `apart`, which the whole row has in common.
  template <bool kApart, int kPower, bool kExtra, bool kUniform>
  __device__ __forceinline__ A write_as(A z, A w, Sums<A>& sums) const {
    A d, q, p, hard_exponent;
    if (kApart) {
      const A zs = z - stats.student_max, ws = w - stats.teacher_max;
      d = fma_of(ws - zs, t.inverse, shift);
      q = exp2_of(mul_of(zs, t.slope));
      p = exp2_of(mul_of(ws, t.slope));
      hard_exponent = mul_of(zs, static_cast<A>(kLog2E));
    } else {
      d = fma_of(w - z, t.inverse, shift);
      q = exp2_of(fma_of(z, t.slope, student_bias));
      p = exp2_of(fma_of(w, t.slope, teacher_bias));
      hard_exponent = fma_of(z, static_cast<A>(kLog2E), hard_bias);
    }
    if (kApart || !kFold) {
      q = mul_of(q, stats.student_scale);
      p = mul_of(p, stats.teacher_scale);
    }
    const Element<A> e = device_element(p, q, d);
    sums.value += D::at(e).value;
    A softmax;
    if (kPower == 0 || (kPower == kAtRunTime && t.power == 0)) {
      softmax = mul_of(hard, exp2_of(hard_exponent));
    } else {
      softmax = mul_of(hard, q);
      if (kPower == 2 || (kPower < 0 && t.power >= 2) || kPower == kThreeOrFour)
        softmax = mul_of(softmax, q);
      if (kPower == kThreeOrFour || (kPower == kAtRunTime && t.power >= 3))
        softmax = mul_of(softmax, t.power == 4 ? mul_of(q, q) : q);
    }
    if (kUniform) softmax = add_of(softmax, -uniform);
    if (kExtra) add_extra(z, w, p, q, sums);
    return fma_of(soft, D::at(e).slope, softmax);
  }

  __device__ __forceinline__ void add_extra(A z, A w, A p, A q, Sums<A>& sums) const {
    const A zs = z - stats.student_max;
    sums.logits = fma_of(zs, share, sums.logits);
    sums.student_entropy -= times_log(q, fma_of(zs, t.inverse, student_log));
    sums.teacher_entropy -= times_log(p, fma_of(w - stats.teacher_max, t.inverse, teacher_log));
    if (z == stats.student_max && w == stats.teacher_max) sums.agreement = A(1);
  }
};

// Closes a row that is ignored (0), or holds no answer (NaN).
template <class A>
__device__ __forceinline__ void close_row_as(const ForwardArgs& args, int64_t row, A value) {
  static_cast<A*>(args.loss)[row] = value;
  if (args.terms != nullptr)
    for (int i = 0; i < kTerms; i++) static_cast<A*>(args.terms)[i * args.rows + row] = value;
  for (int i = 0; i < kStats; i++) static_cast<A*>(args.stats)[i * args.rows + row] = value;
}

// Closes a row: everything but its gradient. One thread.
template <class A>
__device__ __forceinline__ void close_row(const ForwardArgs& args, int64_t row,
                                          const RowStats<A>& stats, const Sums<A>& sums,
                                          A label_logit) {
  const Temperature<A> t = temperature_of<A>(args, row);
  const A ln_2 = static_cast<A>(kLn2);
  A hard = 0;
  if (args.labels != nullptr) {
    // log sum exp(z) - max z
    const A error =
        t.power > 0 ? reference_error(stats.student_max, t.slope, t.limit) * static_cast<A>(t.power)
                    : reference_error(stats.student_max, static_cast<A>(kLog2E), t.limit);
    const A log_sum = -ln_2 * (log2_of(stats.hard_scale) + error);
    hard = log_sum + (stats.student_max - label_logit);
    if (args.label_smoothing != 0) {
      const A eps = static_cast<A>(args.label_smoothing);
      hard = weighted(A(1) - eps, hard) + weighted(eps, log_sum - sums.logits);
    }
  }
  // In a valid row only 0 * inf makes a NaN: a class that the student masks, and whose teacher
  // probability underflows. That is an infinite divergence.
  A soft = sums.value == sums.value ? sums.value : static_cast<A>(__int_as_float(0x7f800000));
  // Added to whatever leaves a row that holds no answer.
  const A nan_or_0 = stats.valid() ? A(0) : static_cast<A>(fill_value(RowKind::kBad));
  soft += nan_or_0;
  static_cast<A*>(args.loss)[row] = weighted(static_cast<A>(args.hard_weight), hard) +
                                    weighted(static_cast<A>(args.soft_weight) * t.t * t.t, soft);
  if (args.terms != nullptr) {
    A* terms = static_cast<A*>(args.terms);
    terms[kHard * args.rows + row] = hard + nan_or_0;
    terms[kSoft * args.rows + row] = soft;
    terms[kStudentEntropy * args.rows + row] = sums.student_entropy + nan_or_0;
    terms[kTeacherEntropy * args.rows + row] = sums.teacher_entropy + nan_or_0;
    terms[kAgreement * args.rows + row] = sums.agreement + nan_or_0;
  }
  stats.store(static_cast<A*>(args.stats), args.rows, row);
}

// Labels that are not ignored among first, first + step, ...
__device__ __forceinline__ int count_labels(const Inputs& in, int64_t first, int64_t step) {
  int count = 0;
#pragma unroll 8
  for (int64_t i = first; i < in.rows; i += step) count += in.labels[i] != in.ignore_index;
  return count;
}
template <class A>
__device__ __forceinline__ A scale_of_count(int64_t count) {
  return quotient_of(A(1), static_cast<A>(count > 0 ? count : 1));
}
// The scale, where it takes no counting.
template <class A>
__device__ __forceinline__ A known_scale(const ForwardCall& call) {
  if (call.scale_source == ScaleSource::kDenominator)
    return A(1) / *static_cast<const A*>(call.denominator);
  if (call.scale_source == ScaleSource::kStats)
    return static_cast<const A*>(call.args.stats)[kStats * call.args.rows];
  return static_cast<A>(call.args.scale);
}
// For all threads of a CTA; `slot` is one int in shared memory. Leaves the scale in `stats`.
template <class A>
__device__ __forceinline__ A block_scale(const ForwardCall& call, int* slot) {
  A scale;
  if (call.scale_source == ScaleSource::kCount) {
    if (threadIdx.x == 0) *slot = 0;
    __syncthreads();
    const int count = __reduce_add_sync(
        0xffffffffu, count_labels(call.args, threadIdx.x, static_cast<int64_t>(blockDim.x)));
    if (threadIdx.x % 32 == 0) atomicAdd(slot, count);  // of integers: any order gives the same
    __syncthreads();
    scale = scale_of_count<A>(*slot);
  } else {
    scale = known_scale<A>(call);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && call.scale_source != ScaleSource::kStats)
    static_cast<A*>(call.args.stats)[kStats * call.args.rows] = scale;
  return scale;
}

// total[i] = scale * (the sum of one quantity over all rows), in fp64 and in an order that depends
// on the number of threads alone. All threads of one CTA; `slots` holds a double per warp.
template <class A>
__device__ __forceinline__ void finish_total(const ForwardCall& call, int quantity, A scale,
                                             double* slots) {
  const ForwardArgs& args = call.args;
  const A* of_rows = quantity == 0 ? static_cast<const A*>(args.loss)
                                   : static_cast<const A*>(args.terms) + (quantity - 1) * args.rows;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < args.rows; i += blockDim.x) sum += __ldcg(of_rows + i);
  sum = lanes_sum(sum);
  __syncthreads();
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; i++) sum += slots[i];
    static_cast<A*>(call.total)[quantity] = static_cast<A>(sum * static_cast<double>(scale));
  }
}
// At the end of a kernel whose grid may be one cluster: its first CTA adds up the total.
template <class A>
__device__ __forceinline__ void finish_inside(const ForwardCall& call, A scale, double* slots) {
  if (!call.finish_inside) return;
  __threadfence();
  if (gridDim.x > 1) {
    __syncwarp();  // the barrier wants whole warps
    cluster_barrier();
  } else {
    __syncthreads();
  }
  if (blockIdx.x != 0 || call.total == nullptr) return;
  const int quantities = call.args.terms == nullptr ? 1 : 1 + kTerms;
  for (int i = 0; i < quantities; i++) finish_total<A>(call, i, scale, slots);
}

}  // namespace fastkd::cuda
