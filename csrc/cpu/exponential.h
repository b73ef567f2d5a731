// The exponential of the CPU kernels: scale * 2^((logit - max) * factor), written so that compilers
// vectorize it (docs/maths.md, section 4).
//
// With log2(e) / t as the factor, the exponent x needs no reduction by ln 2. x is n + f with the
// nearest integer n. 2^f is a polynomial, and n is added to the exponent bits of the result. The
// scale is folded into the polynomial's coefficients, which makes normalization free. The maximum
// is subtracted before anything is rounded, so that the result is as accurate for large logits as
// for small logits.
//
// With scale 1, 2^x has an error of at most 1.0 ulp with FMA, and of 1.3 ulp without, for -126 <= x
// < 128. The error is relative to the exact value at the float x (measured, tests/kernels). The
// result is exactly 0 if it would be below 2^-126, scale included, and for x = -inf. x = 0 gives
// exactly 1, and NaN gives NaN. For x >= 128 the result is meaningless. The dense kernels subtract
// the maximum first, so that x is at most 0, or NaN for a logit of +inf.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../numerics.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class T>
struct Format;

template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kMinExponent = -126.0f;
  // Adding this number rounds to the nearest integer, which is then in the low bits. The x86
  // baseline lacks a rounding instruction.
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
};

template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kMinExponent = -1022.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
};

// The polynomial for 2^f, |f| <= 1/2.
template <class T>
struct Polynomial;

template <>
struct Polynomial<float> {
  // The polynomial is minimax with the first coefficient held at 1, with a relative error
  // of 4.2e-9.
  static constexpr int kCoefficients = 7;
  static constexpr double kValues[kCoefficients] = {
      1.0,           6.931472029e-1, 2.402264791e-1, 5.550332471e-2, 9.618437357e-3,
      1.33988744e-3, 1.535336195e-4};
};

template <>
struct Polynomial<double> {
  // Taylor coefficients ln(2)^n / n!. The first omitted term is 4e-18 at |f| = 1/2.
  static constexpr int kCoefficients = 14;
  static constexpr double kValues[kCoefficients] = {1.0,
                                                    0.69314718055994530942,
                                                    0.24022650695910071233,
                                                    0.055504108664821579953,
                                                    0.0096181291076284771619,
                                                    0.0013333558146428443423,
                                                    1.5403530393381609954e-4,
                                                    1.5252733804059840280e-5,
                                                    1.3215486790144309488e-6,
                                                    1.0178086009239699728e-7,
                                                    7.0549116208011233299e-9,
                                                    4.4455382718708114976e-10,
                                                    2.5678435993488205142e-11,
                                                    1.3691488853904128881e-12};
};

// Return std::ilogb(positive) without a call, if the number is normal; -1023 for 0.
inline int exponent_of(double positive) {
  return static_cast<int>(bits_as<uint64_t>(positive) >> Format<double>::kMantissa) - 1023;
}

template <class T>
struct Exponential {
  using F = Format<T>;
  using P = Polynomial<T>;
  T factor;
  T max;
  T least;  // if logit - max < least, the result is 0, because the exponent would wrap around
  T coefficient[P::kCoefficients];

  // `scale` must be at least 0, and at most 1 unless all exponents are at most 0.
  Exponential(T factor, T max, double scale)
      : factor(factor),
        max(max),
        least((F::kMinExponent - static_cast<T>(scale < 1 ? exponent_of(scale) : 0)) / factor) {
    for (int i = 0; i < P::kCoefficients; ++i) {
      coefficient[i] = static_cast<T>(P::kValues[i] * scale);
    }
  }

  FASTKD_HOST_DEVICE T operator()(T logit) const { return power_of(logit - max, factor, least); }

  // Return scale * 2^(offset * factor) for offset = logit - max. V is T, or a register with a
  // factor for each lane.
  template <class V = T, class Bits = typename F::Bits>
  FASTKD_HOST_DEVICE V power_of(V offset, V factor, V least) const {
    const V shifted = mul_add(offset, factor, F::kRound);
    const V fraction = mul_add(offset, factor, F::kRound - shifted);
    const V power = polynomial(fraction, coefficient);
    const Bits exponent = bits_as<Bits>(shifted) << F::kMantissa;
    const V scaled = bits_as<V>(static_cast<Bits>(bits_as<Bits>(power) + exponent));
    return offset < least ? V{} : scaled;
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
