// Explicit SIMD registers, for the loop that decides the speed. Compilers keep its sums over lanes
// in memory, and see no lookup in a table that fits a register (docs/performance-log.md).
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "exponential.h"
#include "storage.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

template <class T>
struct RegisterOf;
template <>
struct RegisterOf<float> {
  typedef float Type __attribute__((vector_size(kRegisterBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct RegisterOf<double> {
  typedef double Type __attribute__((vector_size(kRegisterBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kRegisterBytes)));
};
template <class T>
using Register = typename RegisterOf<T>::Type;
template <class T>
using RegisterBits = typename RegisterOf<T>::Bits;

template <class T>
constexpr int64_t kPerRegister = kRegisterBytes / static_cast<int64_t>(sizeof(T));
// A step of kWidth numbers takes so many registers, the last perhaps in part.
template <int64_t kWidth, class T>
constexpr int64_t kRegisters = (kWidth + kPerRegister<T> - 1) / kPerRegister<T>;
template <int64_t kWidth, class T>
constexpr size_t kBytesOfEach = sizeof(T) * (kWidth < kPerRegister<T> ? kWidth : kPerRegister<T>);

// In front of loops over registers: left as loops, GCC would make copies of memory of some of them.
#if defined(__clang__)
#define FASTKD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTKD_UNROLL _Pragma("GCC unroll 16")
#endif

template <class T>
FASTKD_HOST_DEVICE Register<T> splat(T x) {
  return Register<T>{} + x;
}

// A step in registers; lanes beyond it are `otherwise`.
template <int64_t kWidth, class T>
FASTKD_HOST_DEVICE void load(const T* step, T otherwise, Register<T>* to) {
#if defined(__AVX512F__)
  // memcpy() would go through memory, where half a register waits for its other half.
  if constexpr (2 * kWidth == kPerRegister<T>) {
    const __m256 half = _mm256_loadu_ps(step);
    to[0] = (Register<T>)_mm512_insertf32x8((__m512)splat(otherwise), half, 0);
    return;
  }
#endif
  FASTKD_UNROLL
  for (int64_t i = 0; i < kRegisters<kWidth, T>; ++i) {
    to[i] = splat(otherwise);
    std::memcpy(&to[i], step + i * kPerRegister<T>, kBytesOfEach<kWidth, T>);
  }
}
// In the order of unpack() (vectors.h): all the first ones of their pairs, then the second ones.
template <int64_t kWidth>
FASTKD_HOST_DEVICE void load(const BFloat16* step, float, Register<float>* to) {
  constexpr int64_t kHalf = kRegisters<kWidth, float> / 2;
  static_assert(kWidth == 2 * kHalf * kPerRegister<float>, "whole registers");
  FASTKD_UNROLL
  for (int64_t i = 0; i < kHalf; ++i) {
    RegisterBits<float> pairs;
    std::memcpy(&pairs, step + 2 * i * kPerRegister<float>, sizeof(pairs));
    to[i] = bits_as<Register<float>>(pairs << 16);
    to[i + kHalf] = bits_as<Register<float>>(pairs & 0xffff0000u);
  }
}
template <int64_t kWidth, class T>
FASTKD_HOST_DEVICE void store(const Register<T>* from, T* step) {
  FASTKD_UNROLL
  for (int64_t i = 0; i < kRegisters<kWidth, T>; ++i) {
    std::memcpy(step + i * kPerRegister<T>, &from[i], kBytesOfEach<kWidth, T>);
  }
}
template <int64_t kWidth>
FASTKD_HOST_DEVICE void store(const Register<float>* from, BFloat16* step) {
  constexpr int64_t kHalf = kRegisters<kWidth, float> / 2;
  FASTKD_UNROLL
  for (int64_t i = 0; i < kHalf; ++i) {
    const auto first = rounded_bits<RegisterBits<float>>(from[i]) >> 16;
    const auto second = rounded_bits<RegisterBits<float>>(from[i + kHalf]) & 0xffff0000u;
    const RegisterBits<float> pairs = first | second;
    std::memcpy(step + 2 * i * kPerRegister<float>, &pairs, sizeof(pairs));
  }
}

// b where a is NaN.
template <class V>
FASTKD_HOST_DEVICE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
FASTKD_HOST_DEVICE V max(V a, V b) {
  return a > b ? a : b;
}

// exp(x t) of a register's numbers, x relative to their maximum: Exponential with scale 1.
template <class T>
struct Exponentials {
  Exponential<T> one;
  Register<T> factor, max, least;

  explicit Exponentials(const Exponential<T>& one)
      : one(one), factor(splat(one.factor)), max(splat(one.max)), least(splat(one.least)) {}
  // Each lane has a factor of its own.
  explicit Exponentials(Register<T> factor)
      : one(1, 0, 1), factor(factor), max{}, least(Format<T>::kMinExponent / factor) {}

  // Return the exponentials of offset = logit - max.
  FASTKD_HOST_DEVICE Register<T> operator()(Register<T> offset) const {
    return one.template of<Register<T>, RegisterBits<T>>(offset, factor, least);
  }
};

#if defined(__AVX2__)
#if defined(__AVX512F__)
constexpr int kRootBits = 4;
#else
constexpr int kRootBits = 3;
#endif
constexpr int kRoots = 1 << kRootBits;
constexpr int kRootShift = Format<float>::kMantissa - kRootBits;
static_assert(kRoots == kPerRegister<float>, "the table of roots is a register");

// The bits of 2^(i / kRoots), less what i adds once all of n is added to the exponent.
struct RootTable {
  alignas(kRegisterBytes) uint32_t entry[kRoots] = {};
  constexpr RootTable() {
    constexpr double kPowers[16] = {1.0,           1.04427378243, 1.09050773267, 1.13878863476,
                                    1.189207115,   1.24185781207, 1.29683955465, 1.35425554694,
                                    1.41421356237, 1.47682614594, 1.54221082541, 1.61049033195,
                                    1.68179283051, 1.75625216037, 1.83400808641, 1.9152065614};
    for (uint32_t i = 0; i < kRoots; ++i) {
      const double mantissa = (kPowers[i * (16 / kRoots)] - 1) * (1 << Format<float>::kMantissa);
      entry[i] = 0x3f800000u + static_cast<uint32_t>(mantissa + 0.5) - (i << kRootShift);
    }
  }
};
constexpr RootTable kRootTable{};

// 2^x as 2^(n / kRoots) 2^(f / kRoots) with |f| <= 1/2: the first is looked up by the low bits of n
// in a table that is a register, and for the second a polynomial of degree 3 is enough. Six
// products instead of eight; what there is more of goes through other pipes. Error at most 1.0 ulp,
// with 8 roots 1.2 (measured, tests/kernels), and what Exponential says of the rest.
template <>
struct Exponentials<float> {
#if defined(__AVX512F__)
  // Minimax for the relative error: 1.6e-9.
  static constexpr float kFirst = 4.33216989e-2f, kSecond = 9.38415188e-4f, kThird = 1.35503263e-5f;
#else
  // The same: 2.5e-8.
  static constexpr float kFirst = 8.66434e-2f, kSecond = 3.75403e-3f, kThird = 1.08391e-4f;
#endif

  Register<float> factor, max, least;
  RegisterBits<float> table;

  explicit Exponentials(const Exponential<float>& one)
      // No temperature is so small that the product should be infinite.
      : factor(splat(bounded_above(one.factor * kRoots, std::numeric_limits<float>::max()))),
        max(splat(one.max)),
        least(splat(one.least)) {
    std::memcpy(&table, kRootTable.entry, sizeof(table));
  }
  explicit Exponentials(Register<float> factor)
      : factor(bounded_above<Register<float>>(factor * kRoots, std::numeric_limits<float>::max())),
        max{},
        least(Format<float>::kMinExponent / factor) {
    std::memcpy(&table, kRootTable.entry, sizeof(table));
  }

  FASTKD_HOST_DEVICE RegisterBits<float> look_up(RegisterBits<float> index) const {
#if defined(__AVX512F__)
    // GCC 12 warns that the form without a mask reads what is not initialised.
    constexpr __mmask16 kAll = 0xffff;
    return (RegisterBits<float>)_mm512_maskz_permutexvar_epi32(kAll, (__m512i)index,
                                                               (__m512i)table);
#else
    return (RegisterBits<float>)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
#endif
  }

  FASTKD_HOST_DEVICE Register<float> operator()(Register<float> offset) const {
    const Register<float> shifted = offset * factor + Format<float>::kRound;
    const Register<float> fraction = offset * factor - (shifted - Format<float>::kRound);
    const auto n = bits_as<RegisterBits<float>>(shifted);
    const auto root = bits_as<Register<float>>(look_up(n) + (n << kRootShift));
    const Register<float> rest = ((fraction * kThird + kSecond) * fraction + kFirst) * fraction;
    return offset < least ? Register<float>{} : root * rest + root;
  }
};
#endif

// exp(x) for x <= 0.
template <class V>
FASTKD_HOST_DEVICE V exp_of(V x) {
  if constexpr (kIsScalar<V>) {
    return std::exp(x);
  } else {
    return Exponentials<float>(splat(static_cast<float>(kLog2E)))(x);
  }
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
