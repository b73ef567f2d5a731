// The loops of the first sweep over a block: its maximum and its sums of exponentials
// (docs/maths.md, sections 3 and 4).
#pragma once
#include "vectors.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// The source of exp(z) in the hard term. kNone: no hard term. kPower: exp(z / t), squared log2(t)
// times. kSeparate: a separate exponential.
enum class ExpSource { kNone, kPower, kSeparate };

// Add gain times exp(z - max z) to `sums`, given exp((z - max z) / t) and the offset z - max z.
template <ExpSource kSource, int64_t kMany, class T>
FASTKD_HOST_DEVICE void add_hard(const Exponentials<T>& separate, int squarings,
                                 const Register<T>* offset, const Register<T>* tempered,
                                 Register<T> gain, Register<T>* sums) {
  Register<T> power[kMany];
  FASTKD_UNROLL
  for (int64_t i = 0; i < kMany; ++i) {
    power[i] = kSource == ExpSource::kSeparate ? separate(offset[i]) : tempered[i];
  }
  if constexpr (kSource == ExpSource::kPower) {
    for (int square = 0; square < squarings; ++square) {
      FASTKD_UNROLL
      for (int64_t i = 0; i < kMany; ++i) power[i] *= power[i];
    }
  }
  FASTKD_UNROLL
  for (int64_t i = 0; i < kMany; ++i) sums[i] = mul_add(gain, power[i], sums[i]);
}

// Return the maximum of a block. NaN is dropped here, and makes the sums of exponentials NaN.
template <class S>
auto maximum(const Vectors<const S>& logits, int64_t count) {
  using T = decltype(widen(S{}));
  constexpr int64_t kMany = kRegisters<kWide<T>, T>;
  Register<T> top[kMany];
  for (Register<T>& lanes : top) lanes = splat(-kInfinity<T>);
  for_vectors<S>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    FASTKD_UNROLL
    for (int64_t i = 0; i < kRegisters<kWidth, T>; ++i) {
      top[i] = max(load_register<kWidth>(logits.at(at), i, -kInfinity<T>), top[i]);
    }
  });
  T lanes[kWide<T>];
  store<kWide<T>>(top, lanes);
  return tree_reduce<kWide<T>>(lanes, [](T a, T b) { return a > b ? a : b; });
}

// The kind of sum of the tempered exponentials, each times the log ratio of the class. A log ratio
// is the difference of the two logits' distances from the two maxima. kBounded: log ratios are at
// most kMostLogRatio, so that a log ratio above 1000 does not hide log ratios near 0.
enum class LogRatioSum { kNone, kUnbounded, kBounded };
constexpr double kMostLogRatio = 8;  // in nats

// Sums over the student's or the teacher's logits, relative to the maximum.
struct ExponentialSums {
  double tempered, hard, log_ratios;
};

// The cache level of a prefetch. The loop over exponentials is bound by arithmetic, and prefetches
// the next block's logits for maximum(), which is bound by memory. Each store of a gradient
// prefetches as well. A row's last block prefetches the next row's logits. The second sweep fills
// L1 before these logits are read, so fp32 and fp64 logits go to L2. A prefetch beyond the last row
// is harmless.
enum class CacheLevel { kL1, kL2 };
template <class S>
FASTKD_HOST_DEVICE CacheLevel next_of(int64_t at, int64_t classes) {
  return sizeof(S) > 2 && classes - at < kBlock + kLanes ? CacheLevel::kL2 : CacheLevel::kL1;
}
template <CacheLevel kLevel, class S>
FASTKD_HOST_DEVICE void prefetch(const S* base, uintptr_t ahead) {
  // The address is an integer, because it may be beyond the array.
  const uintptr_t address = reinterpret_cast<uintptr_t>(base) + ahead;
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, kLevel == CacheLevel::kL1 ? 3 : 2);
}
template <CacheLevel kLevel, int64_t kWidth, class S>
FASTKD_HOST_DEVICE void prefetch_next(const S* block) {
  for (uintptr_t i = 0; i < kWidth * sizeof(S); i += 64) {
    prefetch<kLevel>(block, kBlock * sizeof(S) + i);
  }
}

// A register sums at most kRun classes at a time, so that rounding errors add up no more than if
// kLanes lanes summed the block.
constexpr int64_t kRun = kRegisterBytes < 32 ? 64 : 128;
static_assert(kRun % kLanes == 0, "");

// Sum the exponentials of a block, and write the tempered exponentials to `cache` unless `cache` is
// null. `separate_one` is used only with ExpSource::kSeparate, `squarings` only with kPower, and
// the other logits only with log ratios. The function is not inlined: a caller of all instances
// would save and restore so many registers that rows of few blocks slow down.
template <ExpSource kSource, LogRatioSum kLogRatios, class T, class S>
__attribute__((noinline)) ExponentialSums
sum_exponentials(const Vectors<const S>& vectors, int64_t count, const Exponential<T>& tempered_one,
                 const Exponential<T>& separate_one, int squarings, T* cache, CacheLevel next,
                 const Vectors<const S>& other_vectors = {}, T other_max = 0) {
  const Exponentials<T> tempered(tempered_one), separate(separate_one);
  const Register<T> other_top = splat(other_max);
  const Register<T> most_log_ratio =
      splat(static_cast<T>(kMostLogRatio * kLog2E) / tempered_one.factor);
  Register<T> sums = {}, hard_sums = {}, log_ratios = {};
  Register<T> run = {}, hard_run = {}, log_ratio_run = {};
  const auto end_run = [&]() FASTKD_INLINE {
    sums += run, hard_sums += hard_run, log_ratios += log_ratio_run;
    run = hard_run = log_ratio_run = Register<T>{};
  };
  const Vectors<const S> logits = vectors, others = other_vectors;
  for_vectors<S>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, T>;
    next == CacheLevel::kL1 ? prefetch_next<CacheLevel::kL1, kWidth>(logits.at(at))
                            : prefetch_next<CacheLevel::kL2, kWidth>(logits.at(at));
    Register<T> x[kMany], y[kMany], e[kMany];
    load<kWidth>(logits.at(at), -kInfinity<T>, x);
    if constexpr (kLogRatios != LogRatioSum::kNone) load<kWidth>(others.at(at), -kInfinity<T>, y);
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      x[i] -= tempered.max;
      e[i] = tempered(x[i]);
      run += e[i];
      if constexpr (kLogRatios != LogRatioSum::kNone) {
        Register<T> log_ratio = x[i] - (y[i] - other_top);
        if constexpr (kLogRatios == LogRatioSum::kBounded)
          log_ratio = min(log_ratio, most_log_ratio);
        // The lower bound prevents 0 * -inf; the bound never applies if the exponential is not 0.
        log_ratio_run = mul_add(e[i], max(log_ratio, tempered.least), log_ratio_run);
      }
    }
    if (cache != nullptr) store<kWidth>(e, cache + at);
    if constexpr (kSource == ExpSource::kSeparate) {
      FASTKD_UNROLL
      for (int64_t i = 0; i < kMany; ++i) hard_run += separate(x[i]);
    } else if constexpr (kSource == ExpSource::kPower) {
      // The last squaring and its addition are one instruction.
      for (int square = 1; square < squarings; ++square) {
        FASTKD_UNROLL
        for (int64_t i = 0; i < kMany; ++i) e[i] *= e[i];
      }
      FASTKD_UNROLL
      for (int64_t i = 0; i < kMany; ++i) {
        hard_run = squarings > 0 ? mul_add(e[i], e[i], hard_run) : hard_run + e[i];
      }
    }
    if ((at + kWidth) % kRun == 0) end_run();
  });
  end_run();
  return {precise_sum_of<T>(sums), kSource == ExpSource::kNone ? 0.0 : precise_sum_of<T>(hard_sums),
          kLogRatios == LogRatioSum::kNone ? 0.0 : precise_sum_of<T>(log_ratios)};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
