// The rest: the classes of a row that the sparse teacher does not list. This file sums the
// exponentials of the rest in the first sweep, and writes the gradient of the rest in the second.
// The rest has separate sums, so that its probability is a sum of positive terms (docs/maths.md,
// section 13).
#pragma once
#include "../topk_row.h"
#include "sweeps.cuh"

namespace fastkd::cuda {

// Sums over the classes that are not listed: statistics of the student alone.
template <class A>
struct Rest : Statistics<A> {
  double logits = 0;  // sum of all logits, listed classes included; 0 without label smoothing

  // Add a chunk without the listed classes, which have a 1 in `bits`. As in the loop of scan()
  // (sweeps.cuh), the maximum is raised only if a logit exceeds it by more than t.margin.
  template <class C>
  __device__ __forceinline__ void include(const C& chunk, uint32_t bits, const Temperature<A>& t,
                                          bool smoothing) {
    const A near = this->student_max > kLowest<A> ? this->student_max : A(0);
    A sum = 0, top = A(-INFINITY);
    const auto for_each = [&](auto&& fn) {
      chunk.for_each(-1, [&](A z, A, int i) { fn(bits >> i & 1 ? A(-INFINITY) : z); });
    };
    if (smoothing) chunk.for_each(-1, [&](A z, A, int) { sum += z - near; });
    logits += static_cast<double>(sum) + (smoothing ? chunk.count * static_cast<double>(near) : 0);
    for_each([&](A z) { top = max_of(top, z); });
    if (top > this->student_max + t.margin) this->raise(top, A(0), t);
    for_each([&](A z) { this->template add<kAtRunTime>(z, A(0), t); });
  }
  // Merge the sums of a warp; all lanes get the result.
  __device__ __forceinline__ void merge_lanes(const Temperature<A>& t) {
    Statistics<A>::template merge_lanes<32>(t);
    logits = lanes_sum(logits);
  }
  // Return true if the sums are empty. A sum of NaN is not empty.
  __device__ __forceinline__ bool is_empty() const { return this->student_sum == A(0); }
  __device__ __forceinline__ topk::RelativeSums mass() const {
    if (is_empty()) return {};
    return {static_cast<double>(this->student_max), static_cast<double>(this->student_sum),
            static_cast<double>(this->hard_sum)};
  }
};

// The gradient of classes that are neither listed nor the label.
template <class A>
struct RestWriter {
  A max, soft, hard, uniform;

  RestWriter() = default;
  __device__ __forceinline__ RestWriter(const topk::Gains& gains, const Rest<A>& rest)
      : max(rest.is_empty() ? A(0) : rest.student_max),
        soft(static_cast<A>(gains.rest)),
        hard(static_cast<A>(gains.rest_hard)),
        uniform(static_cast<A>(gains.uniform)) {
    if (rest.is_empty()) soft = hard = A(0);
  }
  __device__ __forceinline__ A at(A z, const Temperature<A>& t) const {
    const A above = z - max, e = exp2_of(mul_of(above, t.slope));
    const A hard_exponent = mul_of(above, static_cast<A>(kLog2E));
    return fma_of(soft, e, fma_of(hard, power_of<kAtRunTime>(e, hard_exponent, t.power), uniform));
  }
};

}  // namespace fastkd::cuda
