// Sums of exponentials of fp32 and fp16 logits, with a tenth of the rounding error of fp32 sums.
// The sparse loss uses these sums for the classes that are not listed. Near the teacher, the error
// of an fp32 sum is large compared with the difference of student and teacher (docs/maths.md,
// section 13).
#pragma once
#include "scan.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// exp(z / t) as 2^(n + f) for an integer n. A fused product rounds z * factor - n only once.
// Otherwise the rounding of z - max and of the factor would cause the greatest errors. Sums are
// relative to 2^reference, where `reference` is the integer nearest to log2(exp(max / t)).
struct PreciseExponential {
  double exact_factor;       // log2(e) / t
  float factor, factor_low;  // upper and lower part of exact_factor
  float least = 0;           // replaces smaller logits, and has the exponential 2^(reference - 90)
  float round = 0;           // n + f + round ends with the exponent bits of 2^(n - reference)
  double to_max = 0;         // log2 of the factor that makes sums relative to the maximum

  explicit PreciseExponential(double temperature)
      : exact_factor(bounded_above(kLog2E / temperature, 0x1p127)),
        factor(static_cast<float>(exact_factor)),
        factor_low(static_cast<float>(exact_factor - static_cast<double>(factor))) {}

  // Set the maximum. Return true if the sums are precise: the instruction set must have FMA, and
  // the reference must be small enough that `round` is exact.
  bool set_max(double max) {
    const double exponent = max * exact_factor, reference = std::nearbyint(exponent);
    round = Format<float>::kRound + 127 - static_cast<float>(reference);
    least = static_cast<float>((reference - 90) / exact_factor);
    to_max = reference - exponent;
    return kHasFma && std::fabs(exponent) < 0x1p20;
  }
};

// Return the sums of a block relative to the maximum that set_max() has set. Powers 2^n are summed
// apart from the parts 2^n (2^f - 1). A sum of powers is exact unless a power is below an ulp of
// the sum. The parts are small, and so are their rounding errors. A run has only kRun classes,
// because rounding biases a longer sum of powers: a power below half an ulp of the sum is lost, and
// a power of half an ulp is usually lost. A logit of -inf counts as `least`, whose parts are normal
// numbers: one subnormal sum costs some 150 cycles.
template <ExpSource kSource>
__attribute__((noinline)) ExponentialSums sum_precisely(const Vectors<const float>& logits,
                                                        int64_t count,
                                                        const PreciseExponential& tempered_one,
                                                        const Exponential<float>& separate_one,
                                                        int squarings, CacheLevel next) {
  // Coefficients of 2^f - 1 for |f| <= 1/2, each fitted after the coefficients before it were
  // rounded. The error of 2^f is at most 3.0e-9, and -6e-12 on average.
  constexpr float kCoefficients[] = {6.931471824645996e-1f,  2.4022647738456726e-1f,
                                     5.550359934568405e-2f,  9.618505835533142e-3f,
                                     1.3390807434916496e-3f, 1.5326471475418657e-4f};
  const Exponentials<float> separate(separate_one);
  const PreciseExponential tempered = tempered_one;
  const Vectors<const float> vectors = logits;
  const Register<float> least = splat(tempered.least);
  Register<float> powers = {}, parts = {}, hard_sums = {};
  DoubleSums<float> sum, hard_sum;
  const auto end_run = [&]() FASTKD_INLINE {
    sum.add(powers), sum.add(parts);
    if constexpr (kSource != ExpSource::kNone) hard_sum.add(hard_sums);
    powers = parts = hard_sums = Register<float>{};
  };
  for_vectors<float>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, float>;
    next == CacheLevel::kL1 ? prefetch_next<CacheLevel::kL1, kWidth>(vectors.at(at))
                            : prefetch_next<CacheLevel::kL2, kWidth>(vectors.at(at));
    Register<float> z[kMany], e[kMany];
    load<kWidth>(vectors.at(at), -kInfinity<float>, z);
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      const Register<float> x = least > z[i] ? least : z[i];  // NaN stays
      const Register<float> shifted = mul_add(x, tempered.factor, tempered.round);
      Register<float> fraction = mul_add(x, tempered.factor, tempered.round - shifted);
      fraction = mul_add(x, tempered.factor_low, fraction);
      const Register<float> part = fraction * polynomial(fraction, kCoefficients);
      const auto power = bits_as<Register<float>>(bits_as<RegisterBits<float>>(shifted) << 23);
      powers += power;
      parts = mul_add(power, part, parts);
      e[i] = mul_add(power, part, power);
    }
    if constexpr (kSource == ExpSource::kSeparate) {
      FASTKD_UNROLL
      for (int64_t i = 0; i < kMany; ++i) hard_sums += separate(z[i] - separate.max);
    } else if constexpr (kSource == ExpSource::kPower) {
      for (int square = 1; square < squarings; ++square) {
        FASTKD_UNROLL
        for (int64_t i = 0; i < kMany; ++i) e[i] *= e[i];
      }
      FASTKD_UNROLL
      for (int64_t i = 0; i < kMany; ++i) {
        hard_sums = squarings > 0 ? mul_add(e[i], e[i], hard_sums) : hard_sums + e[i];
      }
    }
    if ((at + kWidth) % kRun == 0) end_run();
  });
  end_run();
  const double to_max = tempered.to_max;
  const int hard_power = kSource == ExpSource::kPower ? 1 << squarings : 0;
  return {sum.total() * std::exp2(to_max), hard_sum.total() * std::exp2(to_max * hard_power), 0};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
