// The classes of a sparse loss's row that the teacher does not list (the rest): their sums of
// exponentials in the first sweep, and their gradient in the second. They have their own sums, so
// that the probability of the rest is a sum of positive terms (docs/maths.md, section 13).
#pragma once
#include "../topk_row.h"
#include "sweeps.cuh"

namespace fastkd::cuda {

// Sums over the classes that are not listed: statistics of the student alone.
template <class A>
struct Rest : Statistics<A> {
  double logits = 0;  // the sum of all logits, listed ones too; for label smoothing alone

  // Add a chunk without the listed classes, which have a 1 in `bits`. The maximum is raised as in
  // scan().
  template <class C>
  __device__ __forceinline__ void include(const C& chunk, uint32_t bits, const Temperature<A>& t,
                                          bool smoothing) {
    const A near = this->student_max > kLowest<A> ? this->student_max : A(0);
    A sum = 0, top = A(-INFINITY);
    const auto each = [&](auto&& fn) {
      chunk.each(-1, [&](A z, A, int i) { fn(bits >> i & 1 ? A(-INFINITY) : z); });
    };
    if (smoothing) chunk.each(-1, [&](A z, A, int) { sum += z - near; });
    logits += static_cast<double>(sum) + (smoothing ? chunk.count * static_cast<double>(near) : 0);
    each([&](A z) { top = max_of(top, z); });
    if (top > this->student_max + t.margin) this->raise(top, A(0), t);
    if (this->beyond(t)) {
      each([&](A z) { this->template add_any<kAtRunTime>(z, A(0), t); });
    } else {
      each([&](A z) { this->template add<kAtRunTime>(z, A(0), t); });
    }
  }
  // Merge the sums of a warp; all lanes get the result.
  __device__ __forceinline__ void merge_lanes(const Temperature<A>& t) {
    Statistics<A>::template merge_lanes<32>(t);
    logits = lanes_sum(logits);
  }
  // Return the factor that makes sums relative to their reference relative to the maximum.
  __device__ __forceinline__ double to_max(const Temperature<A>& t) const {
    return exp2_of(-static_cast<double>(reference_error(this->student_max, t.slope, t.limit)));
  }
  __device__ __forceinline__ double hard_to_max(const Temperature<A>& t) const {
    return exp2_of(-static_cast<double>(hard_reference_error(this->student_max, t)));
  }
  // Return true if the sums are empty. NaN is not empty.
  __device__ __forceinline__ bool nothing() const { return this->student_sum == A(0); }
  __device__ __forceinline__ topk::RelativeSums mass(const Temperature<A>& t) const {
    if (nothing()) return {};
    return {static_cast<double>(this->student_max), this->student_sum * to_max(t),
            this->hard_sum * hard_to_max(t)};
  }
};

// The gradient of a class that is neither listed nor the label. Exponents are (z - origin) * slope
// + bias, where one of origin and bias is 0 (statistics.cuh).
template <class A>
struct RestWriter {
  A origin, bias, hard_bias;
  A soft, hard, uniform;

  RestWriter() = default;
  __device__ __forceinline__ RestWriter(const topk::Gains& gains, const Rest<A>& rest,
                                        const Temperature<A>& t)
      : origin(0), bias(0), hard_bias(0), soft(0), hard(0), uniform(static_cast<A>(gains.uniform)) {
    if (rest.nothing()) return;
    const A max = rest.student_max;
    if (max <= t.limit && max >= -t.limit) {
      bias = -mul_of(max, t.slope), hard_bias = -mul_of(max, static_cast<A>(kLog2E));
    } else {
      origin = max;
    }
    soft = static_cast<A>(gains.rest * rest.to_max(t));
    hard = static_cast<A>(gains.rest_hard * rest.hard_to_max(t));
  }
  __device__ __forceinline__ A at(A z, const Temperature<A>& t) const {
    const A offset = z - origin, e = exp2_of(fma_of(offset, t.slope, bias));
    const A hard_exponent = fma_of(offset, static_cast<A>(kLog2E), hard_bias);
    return fma_of(soft, e, fma_of(hard, power_of<kAtRunTime>(e, hard_exponent, t.power), uniform));
  }
};

}  // namespace fastkd::cuda
