// The classes of a sparse loss's row that the teacher does not list: their sums of exponentials in
// the first sweep, and their gradient in the second. docs/maths.md, section 13.
#pragma once
#include "../topk_row.h"
#include "sweeps.cuh"

namespace fastkd::cuda {

// Exponents of a row's logits relative to its maximum m (statistics.cuh has the arithmetic):
// (z - origin) * slope + bias, where one of origin and bias is 0.
template <class A>
struct Exponents {
  A origin = 0, bias = 0, own_bias = 0;

  Exponents() = default;
  __device__ __forceinline__ Exponents(A m, const Temperature<A>& t) {
    if (m <= t.limit && m >= -t.limit) {
      bias = -mul_of(m, t.slope);
      own_bias = -mul_of(m, static_cast<A>(kLog2E));
    } else {
      origin = m;
    }
  }
  // 2^ of it at temperature t and at 1.
  __device__ __forceinline__ void at(A z, const Temperature<A>& t, A& tempered, A& hard) const {
    const A offset = z - origin;
    tempered = exp2_of(fma_of(offset, t.slope, bias));
    hard =
        power_of<kAtRunTime>(tempered, fma_of(offset, static_cast<A>(kLog2E), own_bias), t.power);
  }
};

// Sums over the classes that are not listed.
template <class A>
struct Rest {
  A max = kLowest<A>, tempered = 0, hard = 0;
  double logits = 0;  // the sum of all logits, listed ones too; for label smoothing alone
  Exponents<A> exponents;

  __device__ __forceinline__ void raise(A to, const Temperature<A>& t) {
    if (!(to > max)) return;
    const A change = reference_change(max, to, t.slope, t.limit);
    const A hard_change = t.power > 0 ? change * static_cast<A>(t.power)
                                      : reference_change(max, to, static_cast<A>(kLog2E), t.limit);
    tempered = mul_of(tempered, exp2_of(change));
    hard = mul_of(hard, exp2_of(hard_change));
    max = to;
    exponents = Exponents<A>(max, t);
  }
  // Some of the row's classes, of which `bits` tells the listed ones. The maximum follows when it
  // has fallen behind by t.margin.
  template <class C>
  __device__ __forceinline__ void add(const C& chunk, uint32_t bits, const Temperature<A>& t,
                                      bool smoothing) {
    if (smoothing) {
      const A near = max > kLowest<A> ? max : A(0);
      A sum = 0;
      chunk.each(-1, [&](A z, A, int) { sum += z - near; });
      logits += static_cast<double>(sum) + chunk.count * static_cast<double>(near);
    }
    const auto each = [&](auto&& fn) {
      chunk.each(-1, [&](A z, A, int i) { fn(bits >> i & 1 ? A(-INFINITY) : z); });
    };
    A top = A(-INFINITY);
    each([&](A z) { top = max_of(top, z); });
    if (top > max + t.margin) raise(top, t);
    each([&](A z) {
      A e, own;
      exponents.at(z, t, e, own);
      tempered += e;
      hard += own;
    });
  }
  // All lanes get the sums of the warp.
  __device__ __forceinline__ void merge_lanes(const Temperature<A>& t) {
    raise(lanes_max(max), t);
    tempered = lanes_sum(tempered);
    hard = lanes_sum(hard);
    logits = lanes_sum(logits);
  }
  // The factors that make sums relative to the maximum of sums relative to its reference.
  __device__ __forceinline__ double to_max(const Temperature<A>& t) const {
    return exp2_of(-static_cast<double>(reference_error(max, t.slope, t.limit)));
  }
  __device__ __forceinline__ double hard_to_max(const Temperature<A>& t) const {
    const double error =
        t.power > 0 ? t.power * static_cast<double>(reference_error(max, t.slope, t.limit))
                    : static_cast<double>(reference_error(max, static_cast<A>(kLog2E), t.limit));
    return exp2_of(-error);
  }
  // NaN is something.
  __device__ __forceinline__ bool nothing() const { return tempered == A(0); }
  __device__ __forceinline__ topk::Mass mass(const Temperature<A>& t) const {
    if (nothing()) return {};
    return {static_cast<double>(max), tempered * to_max(t), hard * hard_to_max(t)};
  }
};

// The gradient of a class that is neither listed nor the label.
template <class A>
struct RestWriter {
  Exponents<A> exponents;
  A soft, hard, uniform;

  RestWriter() = default;
  __device__ __forceinline__ RestWriter(const topk::Gains& gains, const Rest<A>& rest,
                                        const Temperature<A>& t)
      : soft(0), hard(0), uniform(static_cast<A>(gains.uniform)) {
    if (rest.nothing()) return;
    exponents = Exponents<A>(rest.max, t);
    soft = static_cast<A>(gains.rest * rest.to_max(t));
    hard = static_cast<A>(gains.rest_hard * rest.hard_to_max(t));
  }
  __device__ __forceinline__ A at(A z, const Temperature<A>& t) const {
    A e, own;
    exponents.at(z, t, e, own);
    return fma_of(soft, e, fma_of(hard, own, uniform));
  }
};

}  // namespace fastkd::cuda
