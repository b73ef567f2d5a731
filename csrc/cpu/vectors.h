// Loops over a block of a row: its vectors, its padded last step, and sums over lanes. The order of
// these sums is fixed (docs/maths.md, section 9).
#pragma once
#include <type_traits>

#include "../kernels.h"
#include "registers.h"
#include "storage.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Number of classes of a block: 4 KB of fp32, so that three blocks stay in L1. Sums are fp32 lanes
// within a block and double beyond, so the block bounds the rounding error of a sum.
constexpr int64_t kBlock = 1024;
// The loops take kLanes classes at a time (4 in fp64), and shorter steps at the end of a block. The
// last step is padded with -inf. 16-bit numbers are unpacked in pairs that fill registers, and have
// no shorter steps. fp64 is computed one number at a time (registers.h).
constexpr int64_t kLanes = 32;
template <class S>
constexpr int64_t kWide = sizeof(S) > sizeof(float) ? 4 : kLanes;
template <class S>
constexpr int64_t kStep = sizeof(S) == sizeof(uint16_t) ? kLanes
                          : kPerRegister<S> < 8         ? kPerRegister<S>
                                                        : 8;
static_assert(kSegment % kBlock == 0 && kBlock % kLanes == 0, "");

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));

template <auto kValue>
constexpr std::integral_constant<decltype(kValue), kValue> constant{};

// The steps of a block, in place. `last` is a padded copy of a last step that is not full.
template <class S>
struct Vectors {
  S* block = nullptr;
  S* last = nullptr;
  int64_t full_classes = INT64_MAX;  // number of classes before `last`

  FASTKD_HOST_DEVICE S* at(int64_t index) const {
    return index < full_classes ? block + index : last;
  }
  S* element(int64_t index) const {
    return index < full_classes ? block + index : last + (index - full_classes);
  }
};

// Divide `count` classes into steps, and call fn(at, width) for the `width` classes from `at` on.
// `width` is a compile-time constant; `fn` should be FASTKD_INLINE.
template <class S, class Fn>
FASTKD_HOST_DEVICE void for_vectors(int64_t count, Fn&& fn) {
  int64_t at = 0;
  if constexpr (kStep<S> == kWide<S>) {
    for (; at < count; at += kWide<S>) fn(at, constant<kWide<S>>);
  } else {
    for (; at + kWide<S> <= count; at += kWide<S>) fn(at, constant<kWide<S>>);
    for (; at < count; at += kStep<S>) fn(at, constant<kStep<S>>);
  }
}

inline bool holds(int64_t begin, int64_t count, int64_t index) {
  return begin <= index && index < begin + count;
}

// Reduce over lanes by halving, because a chain of dependent additions would slow down short rows.
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

// A sum in double for each lane of registers.
template <class T>
struct DoubleSums {
  Doubles<T> lanes{};

  FASTKD_HOST_DEVICE void add(const Register<T>& numbers, bool squares = false) {
    Doubles<T> x;
    if constexpr (kIsScalar<Register<T>>) {
      x = numbers;
    } else {
      x = __builtin_convertvector(numbers, Doubles<T>);
    }
    lanes += squares ? x * x : x;
  }
  FASTKD_HOST_DEVICE double total() const {
    double numbers[kPerRegister<T>];
    std::memcpy(numbers, &lanes, sizeof(lanes));
    return tree_reduce<kPerRegister<T>>(numbers, [](double a, double b) { return a + b; });
  }
};

// Return the sum of a register's lanes. 16 lanes are first added in pairs, and 8 or fewer numbers
// are added in double. In a row of one block, rounding these last additions to fp32 would cause
// most of the sum's error.
template <class T>
FASTKD_HOST_DEVICE double precise_sum_of(const Register<T>& sum) {
  constexpr int64_t kCount = kPerRegister<T>, kFew = kCount < 8 ? kCount : 8;
  T lanes[kCount];
  std::memcpy(lanes, &sum, sizeof(sum));
  double few[kFew];
  for (int64_t i = 0; i < kFew; ++i) {
    few[i] = kCount == kFew ? lanes[i] : lanes[i] + lanes[i + kCount - kFew];
  }
  return tree_reduce<kFew>(few, [](double a, double b) { return a + b; });
}

// The sum of the numbers of a block. Each register of a step has separate lanes, so that few
// rounding errors add up.
template <class T>
struct LaneSums {
  static constexpr int64_t kMany = kRegisters<kWide<T>, T>;
  Register<T> sums[kMany] = {};

  FASTKD_HOST_DEVICE void add(int64_t i, Register<T> x) { sums[i] += x; }
  FASTKD_HOST_DEVICE double total() const {
    Register<T> total = sums[0];
    FASTKD_UNROLL
    for (int64_t i = 1; i < kMany; ++i) total += sums[i];
    return precise_sum_of<T>(total);
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
