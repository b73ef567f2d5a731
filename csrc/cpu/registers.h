// Explicit SIMD registers for the loops over classes, where most of the time is spent. Compilers
// would keep sums over lanes in memory, and would not use a register as a lookup table
// (docs/performance-log.md). Exponentials are computed as in docs/maths.md, section 4.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "exponential.h"
#include "storage.h"

namespace fastkd {
namespace {

template <class V>
FASTKD_HOST_DEVICE V mul_add_vectors(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

}  // namespace
}  // namespace fastkd

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
// fp64 is for correctness and not for speed: one number per register.
template <>
struct RegisterOf<double> {
  using Type = double;
  using Bits = uint64_t;
};
template <class T>
using Register = typename RegisterOf<T>::Type;
template <class T>
using RegisterBits = typename RegisterOf<T>::Bits;

// A double for each lane of a register.
template <class T>
struct DoublesOf {
  using Type = double;
};
template <>
struct DoublesOf<float> {
  typedef double Type __attribute__((vector_size(2 * kRegisterBytes)));
};
template <class T>
using Doubles = typename DoublesOf<T>::Type;

template <class T>
constexpr int64_t kPerRegister = sizeof(Register<T>) / static_cast<int64_t>(sizeof(T));
template <>
inline constexpr int64_t kPerRegister<BFloat16> = 2 * kPerRegister<float>;
// Number of registers of a step of kWidth numbers; the last register may be partly filled.
template <int64_t kWidth, class T>
constexpr int64_t kRegisters = (kWidth + kPerRegister<T> - 1) / kPerRegister<T>;
template <int64_t kWidth, class T>
constexpr size_t kBytesOfEach = sizeof(T) * (kWidth < kPerRegister<T> ? kWidth : kPerRegister<T>);

#if defined(__GNUC__)
#define FASTKD_INLINE __attribute__((always_inline))
#else
#define FASTKD_INLINE
#endif
// A pragma for loops over registers: GCC copies some registers to memory if such a loop is not
// unrolled.
#if defined(__clang__)
#define FASTKD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTKD_UNROLL _Pragma("GCC unroll 16")
#endif

template <class T>
FASTKD_HOST_DEVICE Register<T> splat(T x) {
  return broadcast<Register<T>>(x);
}

// Return register `index` of a step of kWidth numbers; lanes beyond these numbers are `otherwise`.
// For 16-bit numbers, registers hold all first elements of adjacent pairs, then all second
// elements: one shift or mask extracts the elements, and their order in memory would cost a
// permutation.
template <int64_t kWidth, class T>
FASTKD_HOST_DEVICE Register<T> load_register(const T* step, int64_t index, T otherwise) {
  Register<T> numbers = splat(otherwise);
#if defined(__AVX512F__)
  // memcpy() of half a register would go through memory, and the load of the full register would
  // wait for the store.
  if constexpr (2 * kWidth == kPerRegister<T>) {
    return (Register<T>)_mm512_insertf32x8((__m512)numbers, _mm256_loadu_ps(step), 0);
  }
#endif
  std::memcpy(&numbers, step + index * kPerRegister<T>, kBytesOfEach<kWidth, T>);
  return numbers;
}
template <int64_t kWidth>
FASTKD_HOST_DEVICE Register<float> load_register(const BFloat16* step, int64_t index, float) {
  constexpr int64_t kHalf = kRegisters<kWidth, float> / 2;
  static_assert(kWidth == 2 * kHalf * kPerRegister<float>, "whole registers");
  const bool second = index >= kHalf;
  RegisterBits<float> pairs;
  std::memcpy(&pairs, step + 2 * (second ? index - kHalf : index) * kPerRegister<float>,
              sizeof(pairs));
  return bits_as<Register<float>>(second ? pairs & 0xffff0000u : pairs << 16);
}
// Return the position of number `index` of a step in the registers that hold the step.
template <class S>
FASTKD_HOST_DEVICE int64_t place_of(int64_t index, int64_t width) {
  return sizeof(S) == sizeof(BFloat16) ? index / 2 + index % 2 * (width / 2) : index;
}

template <int64_t kWidth, class S, class T>
FASTKD_HOST_DEVICE void load(const S* step, T otherwise, Register<T>* to) {
  FASTKD_UNROLL
  for (int64_t i = 0; i < kRegisters<kWidth, T>; ++i) {
    to[i] = load_register<kWidth>(step, i, otherwise);
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

template <class V>
FASTKD_HOST_DEVICE Scalar<V> lane_of(const V& numbers, int64_t lane) {
  if constexpr (kIsScalar<V>) {
    return numbers;
  } else {
    return numbers[lane];
  }
}

// Return the lesser number (min) or the greater number (max); b if a or b is NaN.
template <class V>
FASTKD_HOST_DEVICE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
FASTKD_HOST_DEVICE V max(V a, V b) {
  return a > b ? a : b;
}

#if defined(__AVX512F__)
// The unmasked intrinsics make GCC 12 warn about reads of uninitialized memory.
constexpr __mmask16 kAllLanes = 0xffff;
// GCC 12 merges the comparison of the template above with the preceding operation, so that a
// maximum waits for a comparison and a masked shift. The kernel then took 0.85 instead of 0.80 ns
// per class for bf16 rows of 4,096 classes (Xeon, December 2026).
FASTKD_HOST_DEVICE Register<float> max(Register<float> a, Register<float> b) {
  return (Register<float>)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
}
#endif

// The exponential with scale 1, of a register of numbers at a time.
template <class T>
struct Exponentials {
  Exponential<T> one;
  Register<T> factor, max, least;

  explicit Exponentials(const Exponential<T>& one)
      : one(one), factor(splat(one.factor)), max(splat(one.max)), least(splat(one.least)) {}
  // Set a factor for each lane, and the maximum 0.
  explicit Exponentials(Register<T> factor)
      : one(1, 0, 1), factor(factor), max{}, least(Format<T>::kMinExponent / factor) {}

  // Return the exponentials of offset = logit - max.
  FASTKD_HOST_DEVICE Register<T> operator()(Register<T> offset) const {
    return one.template power_of<Register<T>, RegisterBits<T>>(offset, factor, least);
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

// A table to compute 2^(n / kRoots) for an integer n, whose low kRootBits bits are i. Entry i has
// the bits of 2^(i / kRoots), minus i << kRootShift. Entry i plus n << kRootShift is the result's
// bits.
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

// The exponential 2^x, computed as 2^(n / kRoots) 2^(f / kRoots) with |f| <= 1/2. The low bits of n
// select the first factor from a table that is one register. A polynomial of degree 3 is enough for
// the second factor. Six products are needed instead of eight, and one table lookup in addition.
// The error is at most 1.0 ulp, or 1.2 ulp with 8 roots (measured, tests/kernels). Special values
// are handled as in Exponential.
template <>
struct Exponentials<float> {
#if defined(__AVX512F__)
  // The polynomial is minimax, with a relative error of 1.6e-9.
  static constexpr float kFirst = 4.33216989e-2f, kSecond = 9.38415188e-4f, kThird = 1.35503263e-5f;
#else
  // The polynomial is minimax, with a relative error of 2.7e-8.
  static constexpr float kFirst = 8.66434e-2f, kSecond = 3.75403e-3f, kThird = 1.08391e-4f;
#endif

  Register<float> factor, max, least;
  RegisterBits<float> table;

  explicit Exponentials(const Exponential<float>& one)
      // The bound keeps the product finite at any valid temperature.
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
    return (RegisterBits<float>)_mm512_maskz_permutexvar_epi32(kAllLanes, (__m512i)index,
                                                               (__m512i)table);
#else
    return (RegisterBits<float>)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
#endif
  }

  FASTKD_HOST_DEVICE Register<float> operator()(Register<float> offset) const {
    const Register<float> shifted = mul_add(offset, factor, Format<float>::kRound);
    const Register<float> fraction = mul_add(offset, factor, Format<float>::kRound - shifted);
    const auto n = bits_as<RegisterBits<float>>(shifted);
    const auto root = bits_as<Register<float>>(look_up(n) + (n << kRootShift));
    const Register<float> rest = fraction * polynomial(fraction, {kFirst, kSecond, kThird});
    return offset < least ? Register<float>{} : mul_add(root, rest, root);
  }
};
#endif

// Return exp(x) for x <= 0.
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
