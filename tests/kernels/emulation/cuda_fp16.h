// fp16 for g++: a part of CUDA's header.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float size = exponent == 31  ? fraction == 0 ? HUGE_VALF : NAN
                     : exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                                     : ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  return h.bits >> 15 ? -size : size;
}
// Round to nearest, ties to even: nearbyintf() rounds the significand, scaled to an integer.
inline __half __float2half_rn(float x) {
  const unsigned sign = __float_as_uint(x) >> 31 << 15;
  const float size = fabsf(x);
  unsigned bits = 0x7fff;  // NaN
  if (size >= 65520) {
    bits = 0x7c00;
  } else if (size == size) {
    int exponent = size < ldexpf(1, -14) ? -14 : ilogbf(size);
    const auto units = static_cast<unsigned>(nearbyintf(ldexpf(size, 10 - exponent)));
    bits =
        static_cast<unsigned>(exponent + 14) * 1024 + units;  // 1024 units carry into the exponent
  }
  return {static_cast<uint16_t>(sign | bits)};
}
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(fmaxf(__half2float(a.x), __half2float(b.x)),
                           fmaxf(__half2float(a.y), __half2float(b.y)));
}
