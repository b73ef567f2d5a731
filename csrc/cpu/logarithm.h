// The logarithm of a teacher's probability, written so that compilers vectorize the loop in
// mixture.cpp that calls log_of() (docs/maths.md, section 12).
#pragma once
#include "exponential.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Return the natural logarithm of any number: -inf for 0, NaN for negative numbers.
FASTKD_HOST_DEVICE float log_of(float x) {
  const float infinity = __builtin_huge_valf();
  const bool subnormal = x < 1.17549435e-38f;
  const float normal = subnormal ? x * 4294967296.0f : x;  // 2^32
  const float log = fastkd::log_of(normal) - (subnormal ? static_cast<float>(32 * kLn2) : 0.0f);
  const float at_edge = x == 0.0f ? -infinity : __builtin_nanf("");
  const float inside = x < infinity ? log : x;
  return x > 0.0f ? inside : at_edge;
}
FASTKD_HOST_DEVICE double log_of(double x) { return std::log(x); }

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
