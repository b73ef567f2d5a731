// Storage types of logits, and the copies between tensors and the blocks of row_blocks.h. Rounding
// to a 16-bit type happens once, after the formulas (docs/maths.md, sections 3 and 7).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "../dtypes.h"
#include "exponential.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTKD_HOST_DEVICE float widen(float x) { return x; }
FASTKD_HOST_DEVICE double widen(double x) { return x; }
FASTKD_HOST_DEVICE float widen(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
FASTKD_HOST_DEVICE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // A product corrects the exponent's bias and normalizes fp16's subnormals.
  const float scaled = bits_as<float>(magnitude << 13) * 5.192296858534828e33f;  // 2^112
  const uint32_t finite = bits_as<uint32_t>(scaled);
  const uint32_t result = magnitude >= 0x7c00u ? (finite | 0x7f800000u) : finite;
  return bits_as<float>(result | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

// Return bits whose upper half is x as bf16, rounded to nearest, ties to even. If x is NaN, its
// payload must not overflow, as that of kNaN does not; rows with NaN are filled with kNaN. `V` is
// float or a register of floats, and `Bits` is uint32_t or a register of uint32_t.
template <class Bits = uint32_t, class V>
FASTKD_HOST_DEVICE Bits rounded_bits(const V& x) {
  const Bits bits = bits_as<Bits>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
// Return x as fp16, rounded to nearest, ties to even.
FASTKD_HOST_DEVICE uint16_t half_bits(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // The sum with 1/2 leaves a rounded subnormal, below 2^-14, in the low bits.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t result = magnitude >= 0x47800000u ? special : finite;
  return static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}
// Round to fp32, forced to odd, so that the second rounding to 16 bits is correct. fp64 gradients
// of 16-bit students (with an fp64 teacher) are rounded twice.
FASTKD_HOST_DEVICE float round_to_odd(float x) { return x; }
FASTKD_HOST_DEVICE float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const uint32_t bits = bits_as<uint32_t>(nearest);
  const double back = nearest;
  if (back == x || x != x || (bits & 0x7f800000u) == 0x7f800000u) return nearest;
  const bool away = (back > x) == (x > 0);  // |nearest| > |x|
  return bits_as<float>((away ? bits - 1u : bits) | 1u);
}
// Return x as S, rounded to nearest, ties to even.
template <class S, class T>
FASTKD_HOST_DEVICE S narrow(T x) {
  if constexpr (std::is_same<S, BFloat16>::value) {
    return {static_cast<uint16_t>(rounded_bits(round_to_odd(x)) >> 16)};
  } else if constexpr (std::is_same<S, Float16>::value) {
    return {half_bits(round_to_odd(x))};
  } else {
    return static_cast<S>(x);
  }
}

template <class Fn>
FASTKD_HOST_DEVICE void with_type(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kFloat64:
      return fn(double{});
    case DType::kFloat16:
      return fn(Float16{});
    case DType::kBFloat16:
      return fn(BFloat16{});
  }
}

// Convert full vectors of eight numbers, and return how many numbers were converted. The functions
// use the processor's fp16 instructions, which compilers do not use in the loops below.
#if defined(__F16C__)
inline int64_t convert_vectors(const Float16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  return i;
}
inline int64_t convert_vectors(const float* from, int64_t count, Float16* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  return i;
}
#endif
template <class From, class To>
int64_t convert_vectors(const From*, int64_t, To*) {
  return 0;
}

template <class T>
void read(const void* from, DType dtype, int64_t count, T* to) {
  with_type(dtype, [=](auto type) {
    const auto* source = static_cast<const decltype(type)*>(from);
    const int64_t done = convert_vectors(source, count, to);
#pragma omp simd
    for (int64_t i = done; i < count; ++i) to[i] = static_cast<T>(widen(source[i]));
  });
}

template <class T>
void write(const T* from, DType dtype, int64_t count, void* to) {
  with_type(dtype, [=](auto type) {
    using S = decltype(type);
    auto* target = static_cast<S*>(to);
    const int64_t done = convert_vectors(from, count, target);
#pragma omp simd
    for (int64_t i = done; i < count; ++i) target[i] = narrow<S>(from[i]);
  });
}

// bf16 blocks need no conversion: they hold bf16 tensors only.
inline void read(const void* from, DType, int64_t count, BFloat16* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(BFloat16));
}
inline void write(const BFloat16* from, DType, int64_t count, void* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(BFloat16));
}

// Copy, with AVX by non-temporal stores, which do not read the cache lines that they overwrite.
// Other threads see the copy after store_fence().
inline void store_non_temporal(const void* from, int64_t bytes, void* to) {
  const char* const source = static_cast<const char*>(from);
  char* const target = static_cast<char*>(to);
  int64_t at = 0;
#if defined(__AVX__)
  const int64_t before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(target) % 64);
  if (before < bytes) {
    std::memcpy(target, source, static_cast<size_t>(before));
    for (at = before; at + 64 <= bytes; at += 64) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at));
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at + 32));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at), first);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at + 32), second);
    }
  }
#endif
  std::memcpy(target + at, source + at, static_cast<size_t>(bytes - at));
}
inline void store_fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

template <class T>
T read_one(const void* base, DType dtype, int64_t index) {
  T value{};
  with_type(dtype, [&](auto type) {
    value = static_cast<T>(widen(static_cast<const decltype(type)*>(base)[index]));
  });
  return value;
}

inline const void* at(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
