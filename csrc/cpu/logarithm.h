// The logarithms of the loops, shaped so that compilers vectorise them.
#pragma once
#include "exponential.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// log2 of a positive normal number, within 2 ulp or 1e-7, whichever is more.
FASTKD_HOST_DEVICE float log2_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  // x = 2^n m with m in [1/sqrt 2, sqrt 2)
  const uint32_t shifted = bits - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float m = bits_as<float>(bits - (shifted & 0xff800000u));
  // log m = 2 artanh s, s = (m - 1) / (m + 1), |s| <= 0.172: five terms of the series suffice.
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  float series = s2 * (1.0f / 9.0f) + 1.0f / 7.0f;
  series = series * s2 + 1.0f / 5.0f;
  series = series * s2 + 1.0f / 3.0f;
  series = series * s2 + 1.0f;
  return n + series * s * static_cast<float>(2.0 * kLog2E);
}
FASTKD_HOST_DEVICE double log2_of(double x) { return std::log2(x); }

// The natural logarithm of any number: -inf of 0, NaN of what is below.
FASTKD_HOST_DEVICE float log_of(float x) {
  const float infinity = __builtin_huge_valf();
  const bool subnormal = x < 1.17549435e-38f;
  const float normal = subnormal ? x * 4294967296.0f : x;  // 2^32
  const float log = (log2_of(normal) - (subnormal ? 32.0f : 0.0f)) * static_cast<float>(kLn2);
  const float at_edge = x == 0.0f ? -infinity : __builtin_nanf("");
  const float inside = x < infinity ? log : x;
  return x > 0.0f ? inside : at_edge;
}
FASTKD_HOST_DEVICE double log_of(double x) { return std::log(x); }

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
