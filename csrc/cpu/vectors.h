// Building blocks of the loops over a block: its vectors, the padded last vector, sums over lanes,
// and the unpacking and packing of 16-bit numbers. The compiler vectorises all of them.
#pragma once
#include <type_traits>

#include "../kernels.h"
#include "registers.h"
#include "storage.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// 4 KB of fp32: three blocks stay in L1. Sums are kept in fp32 lanes within a block and in double
// beyond, so the block is also what bounds the rounding error of a sum.
constexpr int64_t kBlock = 1024;
// The loops take so many classes at a time, and what is left at the end of a row in steps of fewer,
// of which the last is padded with -inf. 16 bits are unpacked in pairs that fill vectors: they have
// no shorter steps.
constexpr int64_t kLanes = 32;
template <class S>
constexpr int64_t kStep = sizeof(S) == sizeof(uint16_t) ? kLanes : 8;
static_assert(kSegment % kBlock == 0 && kBlock % kLanes == 0, "");

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));

template <auto kValue>
constexpr std::integral_constant<decltype(kValue), kValue> constant{};

// The steps of a block where they lie, but for the last where it is not a whole one: that is
// padded, elsewhere.
template <class S>
struct Vectors {
  S* block = nullptr;
  S* last = nullptr;
  int64_t whole = INT64_MAX;  // classes before the last

  FASTKD_HOST_DEVICE S* at(int64_t index) const { return index < whole ? block + index : last; }
  S* element(int64_t index) const { return index < whole ? block + index : last + (index - whole); }
};

#if defined(__GNUC__)
#define FASTKD_INLINE __attribute__((always_inline))
#else
#define FASTKD_INLINE
#endif
// Calls fn(at, width), which should be FASTKD_INLINE, for all of `count` classes. The width is a
// compile-time constant.
template <class S, class Fn>
FASTKD_HOST_DEVICE void for_vectors(int64_t count, Fn&& fn) {
  if constexpr (kStep<S> == kLanes) {
    for (int64_t at = 0; at < count; at += kLanes) fn(at, constant<kLanes>);
  } else {
    int64_t at = 0;
    for (; at + kLanes <= count; at += kLanes) fn(at, constant<kLanes>);
    for (; at < count; at += kStep<S>) fn(at, constant<kStep<S>>);
  }
}

inline bool holds(int64_t begin, int64_t count, int64_t index) {
  return begin <= index && index < begin + count;
}

// Reductions are written over kLanes accumulators and folded in halves: the compiler's own epilogue
// for a simd reduction adds lane after lane, 50 cycles that rows of 10 classes would feel.
template <int64_t kWidth, class T, class Join>
FASTKD_HOST_DEVICE T tree_reduce(const T* lanes, Join&& join) {
  if constexpr (kWidth == 1) {
    return lanes[0];
  } else {
    T half[kWidth / 2];
    for (int64_t i = 0; i < kWidth / 2; ++i) half[i] = join(lanes[i], lanes[i + kWidth / 2]);
    return tree_reduce<kWidth / 2>(half, join);
  }
}

template <class T>
FASTKD_HOST_DEVICE T sum_of(const T (&lanes)[kLanes]) {
  return tree_reduce<kLanes>(lanes, [](T a, T b) { return a + b; });
}

// Sums in a register are short ones, over kRun classes, so that rounding adds up no more than in
// kLanes.
constexpr int64_t kRun = kRegisterBytes < 32 ? 64 : 128;
static_assert(kRun % kLanes == 0, "");

// The last of it in double: in a row of one block its rounding is most of a sum's error.
template <class T, int64_t kCount>
FASTKD_HOST_DEVICE double precise_sum_of(const T (&lanes)[kCount]) {
  constexpr int64_t kFew = kCount < 8 ? kCount : 8;
  double few[kFew];
  for (int64_t i = 0; i < kFew; ++i) {
    few[i] = kCount == kFew ? lanes[i] : lanes[i] + lanes[i + kCount - kFew];
  }
  return tree_reduce<kFew>(few, [](double a, double b) { return a + b; });
}
template <class T>
FASTKD_HOST_DEVICE double precise_sum_of(const Register<T>& sum) {
  T lanes[kPerRegister<T>];
  std::memcpy(lanes, &sum, sizeof(sum));
  return precise_sum_of(lanes);
}

// Classes of 16 bits come in pairs, all the first ones, then all the second ones: one shift or mask
// takes each out of its pair, where keeping their order would cost a permutation.
template <int64_t kWidth>
FASTKD_HOST_DEVICE void unpack(const BFloat16* from, float* to) {
  Register<float> numbers[kRegisters<kWidth, float>];
  load<kWidth>(from, 0.0f, numbers);
  store<kWidth>(numbers, to);
}
template <int64_t kWidth>
FASTKD_HOST_DEVICE void pack(const float* from, BFloat16* to) {
  Register<float> numbers[kRegisters<kWidth, float>];
  load<kWidth>(from, 0.0f, numbers);
  store<kWidth>(numbers, to);
}
// Return the position at which unpack() leaves a class of a block.
FASTKD_HOST_DEVICE int64_t unpacked_place(int64_t index) {
  const int64_t of_step = index % kLanes;
  return index - of_step + of_step / 2 + of_step % 2 * (kLanes / 2);
}

// True if bf16 is read and written in place. The x86 baseline, which is for old processors alone,
// copies bf16 like fp16.
#if defined(__x86_64__) && !defined(__AVX2__)
constexpr bool kHasPairs = false;
#else
constexpr bool kHasPairs = true;
#endif

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
