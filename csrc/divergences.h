// A divergence is a few lines of maths; the engines that run it do not change when one is added.
//
// For D = sum_i value(p_i, q_i), let slope_i = q_i * d value / d q_i and S = sum_i slope_i. Then
//   dD/dz_i = (slope_i - q_i * S) / t                                       (docs/maths.md, section
//   2)
// `kSlopeSumKnown` says that S is a constant of the divergence, so that `gradient` = slope - q * S
// can be formed, without cancellation, in the same sweep that sums the value.
//
// To add one: a struct here, a line in Divergence, visit() and kDivergenceNames, and the function
// of the same name in python/fastkd/reference.py. A test fails when the two lists differ.
#pragma once
#include <cstdint>

#include "numerics.h"

namespace fastkd {

enum class Divergence : int32_t { kForwardKL = 0 };

// KL(p || q) = sum p log(p / q) (Hinton et al. 2015, equation 2 at temperature t).
struct ForwardKL {
  static constexpr Divergence kId = Divergence::kForwardKL;
  static constexpr const char* kName = "forward_kl";
  static constexpr bool kSlopeSumKnown = true;  // slope = -p, S = -1

  template <class T>
  static FASTKD_HOST_DEVICE T value(const Element<T>& e) {
    return e.excess;  // sum p d = sum (p d + q - p), and every term of the second sum is >= 0
  }
  template <class T>
  static FASTKD_HOST_DEVICE T gradient(const Element<T>& e) {
    return e.diff;
  }
};

// Calls fn(ForwardKL{}) and so on for the divergence that `id` names; returns fn's answer.
template <class Fn>
auto visit(Divergence id, Fn&& fn) {
  switch (id) {
    case Divergence::kForwardKL:
    default:
      return fn(ForwardKL{});
  }
}

constexpr const char* kDivergenceNames[] = {ForwardKL::kName};

}  // namespace fastkd
