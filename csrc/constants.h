// The names of the divergences, and the constants of the formulas in divergences.h. All rows of a
// call share the constants, so no row computes them (docs/maths.md, sections 3 and 10).
#pragma once
#include <cmath>
#include <cstdint>

#include "numerics.h"

namespace fastkd {

enum class Divergence : int32_t {
  kForwardKL,
  kSoftCrossEntropy,
  kReverseKL,
  kSymmetricKL,
  kJensenShannon,
  kSkewedForwardKL,
  kSkewedReverseKL,
  kTotalVariation,
  kSquaredError,
  kCenteredSquaredError,
  kDecoupled,
  kCosine,
};
constexpr int kDivergences = static_cast<int>(Divergence::kCosine) + 1;
constexpr const char* kDivergenceNames[kDivergences] = {"forward_kl",
                                                        "soft_cross_entropy",
                                                        "reverse_kl",
                                                        "symmetric_kl",
                                                        "jsd",
                                                        "skewed_forward_kl",
                                                        "skewed_reverse_kl",
                                                        "total_variation",
                                                        "mse",
                                                        "centered_mse",
                                                        "dkd",
                                                        "cosine"};

// Constants of a divergence, in the compute type T.
template <class T>
struct ConstantsOf {
  static constexpr bool kIsDouble = sizeof(T) == sizeof(double);
  // mix and 1 - mix, whose sum is exactly 1 in T. An error of this sum would show where log(m / q),
  // for the mixture m of p and q, is close to 0.
  T mix = 0, rest = 1;
  // Series in d = log(p / q) of two quantities of a class, for |d| <= kSeriesLimit. `value`: the
  // divergence's value over q d^2. `log`: (1 - mix) log(m / q) over d, for the mixture m of p and
  // q. fp64 has the Taylor series, and fp32 a series of fewer terms (economize()).
  T value[kIsDouble ? 14 : 6] = {};
  T log[kIsDouble ? 14 : 5] = {};
};
struct Constants {
  ConstantsOf<double> wide;
  ConstantsOf<float> narrow;
};

namespace {

// `T` may be a vector of numbers.
template <class T>
using ConstantsFor = ConstantsOf<Scalar<T>>;

template <class T>
FASTKD_HOST_DEVICE const ConstantsOf<T>& constants_in(const Constants& k) {
  if constexpr (ConstantsOf<T>::kIsDouble) {
    return k.wide;
  } else {
    return k.narrow;
  }
}

// Compute a polynomial `few` that is close to the polynomial `many` for |d| <= kSeriesLimit. Each
// step subtracts the multiple of the Chebyshev polynomial T_n that cancels the highest power d^n
// (economization of power series).
template <int kMany, int kFew>
void economize(const double (&many)[kMany], float (&few)[kFew]) {
  double remaining[kMany];
  for (int i = 0; i < kMany; ++i) remaining[i] = many[i] * std::pow(kSeriesLimit, i);
  for (int n = kMany - 1; n >= kFew; --n) {
    double term = remaining[n];  // times the coefficients of T_n / 2^(n - 1), highest power first
    for (int i = n; i >= 0; i -= 2) {
      remaining[i] -= term;
      const int below = n - i;
      term *= -static_cast<double>(i * (i - 1)) /
              static_cast<double>((below + 2) * (2 * n - below - 2));
    }
  }
  for (int i = 0; i < kFew; ++i)
    few[i] = static_cast<float>(remaining[i] / std::pow(kSeriesLimit, i));
}

inline Constants make_constants(Divergence id, double mix) {
  constexpr int kTerms = 14, kPowers = kTerms + 2;
  Constants both;
  ConstantsOf<double>& k = both.wide;
  k.mix = mix, k.rest = 1 - mix;
  const float greater = static_cast<float>(mix < 0.5 ? k.rest : mix);
  both.narrow.mix = mix < 0.5 ? 1 - greater : greater;
  both.narrow.rest = mix < 0.5 ? greater : 1 - greater;
  if (id != Divergence::kJensenShannon && id != Divergence::kSkewedForwardKL &&
      id != Divergence::kSkewedReverseKL) {
    return both;
  }
  // Coefficients of the powers of d. e: exp(d). m: the mixture over q, 1 - a + a exp(d), where a is
  // the share of p. l: the logarithm of this ratio, which follows from m l' = m'.
  const double a = id == Divergence::kSkewedReverseKL ? 1 - mix : mix;
  double e[kPowers], m[kPowers], l[kPowers];
  e[0] = m[0] = 1, l[0] = 0;
  for (int n = 1; n < kPowers; ++n) {
    e[n] = e[n - 1] / n;
    m[n] = a * e[n];
    l[n] = m[n];
    for (int j = 1; j < n; ++j) l[n] -= j * l[j] * m[n - j] / n;
    if (n <= kTerms) k.log[n - 1] = (1 - mix) * l[n];
  }
  for (int n = 2; n < kPowers; ++n) {
    double e_l = 0, m_l = 0;  // coefficients of the products e l and m l
    for (int j = 1; j <= n; ++j) e_l += e[n - j] * l[j], m_l += m[n - j] * l[j];
    double& value = k.value[n - 2];
    if (id == Divergence::kJensenShannon) value = a * e[n - 1] - m_l;
    if (id == Divergence::kSkewedForwardKL) value = e[n - 1] - e_l - (1 - a) * e[n];
    if (id == Divergence::kSkewedReverseKL) value = a * e[n] - l[n];
  }
  economize(k.value, both.narrow.value);
  economize(k.log, both.narrow.log);
  return both;
}

}  // namespace
}  // namespace fastkd
