// The divergences: value and slope of one class, from p, q and d (numerics.h). A new divergence
// needs no change of the engines.
//
// For D = sum_i value(p_i, q_i), let slope_i = q_i * d value / d q_i and S = sum_i slope_i. Then
//   dD/dz_i = (slope_i - q_i * S) / t
// docs/maths.md derives this gradient in section 2, and the formula of each divergence in section
// 10. A multiple of q_i may be added to every slope: S grows by the same multiple, and the gradient
// stays. Each divergence chooses the multiple such that nothing cancels where p is near q. For the
// forward KL the chosen S is 0, so that value and gradient come from one sweep.
//
// To add a divergence, write a struct here, a line in each of Divergence, visit() and
// kDivergenceNames, and a function in python/fastkd/reference/divergences.py. A test fails if C++
// and Python have different divergences.
#pragma once
#include <cmath>

#include "constants.h"

namespace fastkd {

// The formula of the gradient with respect to z / t (with respect to z for kUnit), given the slopes
// and their sum S.
enum class SlopeCentering {
  kNone,     // the slope itself: S is 0
  kStudent,  // slope - q * S
  // kMean: slope / n. kCentered: (slope - S / n) / n. n counts the classes that student and teacher
  // do not both mask. Classes that both mask have a value and slope of NaN, and a gradient of 0.
  // Divergences with kMean or kCentered read only Element::gap.
  kMean,
  kCentered,
  // (slope - u D) / |z| for Cosine, where u is the student's unit vector and D the divergence.
  // Classes that student and teacher both mask have slopes of NaN.
  kUnit,
};

namespace {

template <class T>
struct Evaluated {
  T value, slope;
};

// KL(p || q) = sum p log(p / q) (Hinton et al. 2015). The soft cross entropy adds the teacher's
// entropy, which has no gradient.
struct ForwardKL {
  static constexpr SlopeCentering kCentering = SlopeCentering::kNone;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e) {
    // sum p d = sum (p d + q - p), and no term of the second sum is negative.
    return {e.excess, e.diff};
  }
  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>&) {
    return at(e);
  }
};

// KL(q || p) = sum q log(q / p) (Gu et al. 2024, MiniLLM).
struct ReverseKL {
  static constexpr SlopeCentering kCentering = SlopeCentering::kStudent;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e) {
    const T product = times_log(e.q, bounded_above(e.d));
    // The value is q f(-d), where f(d) = d + expm1(-d).
    return {is_small(e.d) ? product * (e.d * series_of(-e.d)) : (e.p - e.q) - product, -product};
  }
  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>&) {
    return at(e);
  }
};

// mix KL(p || q) + (1 - mix) KL(q || p).
struct SymmetricKL {
  static constexpr SlopeCentering kCentering = SlopeCentering::kStudent;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>& k) {
    const Scalar<T> a = k.mix, b = k.rest;
    const T slope = -times_log(e.q, bounded_above(e.d));
    // p f(d) + q f(-d) = (p - q) d for f(d) = d + expm1(-d), so that one series serves both terms.
    const T reverse = is_small(e.d) ? mul_add(-e.diff, e.d, -e.excess) : (e.p - e.q) + slope;
    // A KL of weight 0 is left out of value and slope, either of which may be infinite.
    return {weighted_part(a, e.excess, weighted_part(b, reverse)),
            mul_add(a, e.diff, weighted_part(b, slope))};
  }
};

// Return the least normal number. Added to a denominator that may be 0, this number prevents 0 / 0.
template <class T>
FASTKD_HOST_DEVICE constexpr T least() {
  static_assert(kIsScalar<T>, "");
  return sizeof(T) == sizeof(float) ? T(1.17549435e-38) : T(2.2250738585072014e-308);
}

// log(m / q) and log(m / p) of the mixture m = (1 - a) q + a p, 0 < a < 1.
template <class T>
struct Mixture {
  T log_over_q, log_over_p;
};

template <class T>
FASTKD_HOST_DEVICE Mixture<T> mixture(const Element<T>& e, Scalar<T> a) {
  // The logarithm is relative to q, or to p if d > 1/4, so that nothing overflows. The argument of
  // log1p_of() is m / q - 1, or m / p - 1.
  const auto above = e.d > static_cast<Scalar<T>>(kSeriesLimit);
  // p may have underflowed to 0 although d > 0.
  const T greater = (above ? e.p : e.q) + least<Scalar<T>>();
  const T log = log1p_of((above ? (1 - a) * e.diff : -a * e.diff) / greater);
  return {above ? log + e.d : log, above ? log : log - e.d};
}

template <class T>
FASTKD_HOST_DEVICE T near_teacher(const Element<T>& e, const ConstantsFor<T>& k) {
  return e.q * (e.d * e.d) * polynomial(e.d, k.value);
}

// mix KL(p || m) + (1 - mix) KL(q || m), m = mix p + (1 - mix) q (Agarwal et al. 2024, GKD).
struct JensenShannon {
  static constexpr SlopeCentering kCentering = SlopeCentering::kStudent;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>& k) {
    const T p = k.mix * e.p, q = k.rest * e.q, m = p + q;
    // `log` is log(m / max(e.p, e.q)), so that nothing overflows. log(m / e.q) is log + d if e.p is
    // greater, and log if e.q is greater.
    const T log = log_of(m / (e.p > e.q ? e.p : e.q));
    const auto above = e.d > 0;
    const T product = (above ? q : p) * bounded_above(bounded_below(e.d));
    const T slope = mul_add(-q, log, -(above ? product : T{}));
    const T direct = mul_add(-m, log, -magnitude_of(product));
    const T near = e.q * e.d;
    const auto small = is_small(e.d);
    return {small ? near * e.d * polynomial(e.d, k.value) : direct,
            small ? -near * polynomial(e.d, k.log) : slope};
  }
};

// Return q (q - p) / (a q + b p). If q is so small that a q underflows, the result is negligible.
template <class T>
FASTKD_HOST_DEVICE T share_of_mixture(const Element<T>& e, Scalar<T> a, Scalar<T> b) {
  return e.q * (e.diff / mul_add(a, e.q, mul_add(b, e.p, least<Scalar<T>>())));
}

// KL(p || m), m = mix p + (1 - mix) q (Ko et al. 2024, DistiLLM).
struct SkewedForwardKL {
  static constexpr SlopeCentering kCentering = SlopeCentering::kStudent;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>& k) {
    const Scalar<T> a = k.mix, b = k.rest;
    const Mixture<T> mixed = mixture(e, a);
    const T direct = mul_add(b, e.diff, -times_log(e.p, mixed.log_over_p));
    return {is_small(e.d) ? near_teacher(e, k) : direct, b * b * share_of_mixture(e, b, a)};
  }
};

// KL(q || m), m = mix q + (1 - mix) p (Ko et al. 2024, DistiLLM).
struct SkewedReverseKL {
  static constexpr SlopeCentering kCentering = SlopeCentering::kStudent;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>& k) {
    const Scalar<T> b = k.mix, a = k.rest;
    const Mixture<T> mixed = mixture(e, a);
    const T entropy = times_log(e.q, mixed.log_over_q);
    return {is_small(e.d) ? near_teacher(e, k) : mul_add(-a, e.diff, -entropy),
            mul_add(-a * b, share_of_mixture(e, b, a), -entropy)};
  }
};

// 1/2 sum |p - q|; the subgradient at p = q is 0.
struct TotalVariation {
  static constexpr SlopeCentering kCentering = SlopeCentering::kStudent;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>&) {
    const Scalar<T> half = Scalar<T>(0.5);
    const T below = e.diff < 0 ? -half * e.q : T{};
    return {half * magnitude_of(e.diff), e.diff > 0 ? half * e.q : below};
  }
};

// mean (z / t - w / t)^2 over classes (Bucila et al. 2006; Ba and Caruana 2014).
struct SquaredError {
  static constexpr SlopeCentering kCentering = SlopeCentering::kMean;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>&) {
    return {e.gap * e.gap, Scalar<T>(-2) * e.gap};
  }
};

// mean (z / t - w / t)^2 over classes, of logits minus the mean of the row. The engines subtract
// the means first. S = -2 n mean(gap) would be 0 but for the rounding of the means.
struct CenteredSquaredError {
  static constexpr SlopeCentering kCentering = SlopeCentering::kCentered;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>& k) {
    return SquaredError::at(e, k);
  }
};

// 1 - z.w / (|z| |w|) = 1/2 |u - v|^2 with u = z / |z| and v = w / |w| (Sanh et al. 2019). Nothing
// cancels in the second form if u is near v. p and q are the elements of v and u.
struct Cosine {
  static constexpr SlopeCentering kCentering = SlopeCentering::kUnit;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsFor<T>&) {
    const T residual = e.q - e.p;
    return {Scalar<T>(0.5) * residual * residual, residual};
  }
};

// Return true if a row's norm has no inverse in T.
template <class T>
FASTKD_HOST_DEVICE bool has_no_inverse(double squares) {
  // Greatest norm without an inverse. In fp64 only a norm whose square is 0 has no inverse.
  constexpr double kGreatest = sizeof(T) == sizeof(double) ? 0 : 1 / 3.4028234663852886e38;
  return squares <= kGreatest * kGreatest;
}

// Inverse norms of a row for Cosine, 1 / |z| and 1 / |w|, from sums of squares. A student row of
// zeros has the inverse 1 / t, so that u is z / t in the gradient. A row of zeros counts as
// orthogonal to every row. 1/2 |u - v|^2 then lacks 1/2 for each row of zeros.
template <class T>
struct Inverses {
  T student, teacher;
  double zero_row_value;  // what rows of zeros add to the divergence
};
template <class T>
FASTKD_HOST_DEVICE Inverses<T> inverses_of(double student_squares, double teacher_squares,
                                           double temperature) {
  const bool no_student = has_no_inverse<T>(student_squares);
  const bool no_teacher = has_no_inverse<T>(teacher_squares);
  return {static_cast<T>(1 / (no_student ? temperature : std::sqrt(student_squares))),
          static_cast<T>(no_teacher ? 1 : 1 / std::sqrt(teacher_squares)),
          0.5 * (no_student + no_teacher)};
}

// The two outcomes "the label" and "another class" of decoupled distillation (Zhao et al. 2022):
// the logarithm of their odds, and exp(-|log|).
template <class T>
struct Odds {
  T log, minor;

  FASTKD_HOST_DEVICE T label() const { return (log > 0 ? broadcast<T>(1) : minor) / (1 + minor); }
  FASTKD_HOST_DEVICE T rest() const { return (log > 0 ? minor : broadcast<T>(1)) / (1 + minor); }
  FASTKD_HOST_DEVICE T log_label() const { return bounded_above<T>(log, 0) - log1p_of(minor); }
  FASTKD_HOST_DEVICE T log_rest() const { return bounded_above<T>(-log, 0) - log1p_of(minor); }
  FASTKD_HOST_DEVICE T entropy() const {
    return -times_log(label(), log_label()) - times_log(rest(), log_rest());
  }
};

// Return exp(x) - 1 if is_small(x).
template <class T>
FASTKD_HOST_DEVICE T expm1_of_small(T x) {
  return mul_add(x * x, series_of(-x), x);
}

template <class T>
struct BinaryKL {
  T value;
  T diff;  // q - p of the label
};

// Return the KL divergence of the two outcomes of Odds. `difference`: the teacher's log odds minus
// the student's, which may be known more accurately than each logarithm. With this difference
// nothing cancels if the label's p is near its q.
template <class T>
FASTKD_HOST_DEVICE BinaryKL<T> binary_kl(const Odds<T>& teacher, const Odds<T>& student,
                                         T difference) {
  const T p = teacher.label(), q = student.label(), p_rest = teacher.rest(),
          q_rest = student.rest();
  const auto small = is_small(difference), likely = teacher.log > 0;
  // Compute log(p / q) and log(p_rest / q_rest). If the logarithms of the odds are far apart, the
  // log ratio of the teacher's likelier outcome gives the other log ratio.
  const T of_likely =
      likely ? teacher.log_label() - student.log_label() : teacher.log_rest() - student.log_rest();
  const T apart = likely ? of_likely : of_likely + difference;
  const T rest_apart = likely ? of_likely - difference : of_likely;
  const T d = small ? log1p_of(p_rest * expm1_of_small(difference)) : apart;
  const T d_rest = small ? log1p_of(p * expm1_of_small<T>(-difference)) : rest_apart;
  const Element<T> label = element(p, q, d), rest = element(p_rest, q_rest, d_rest);
  return {label.excess + rest.excess, likely ? -rest.diff : label.diff};
}

// Call fn with the struct of the divergence that `id` names, and return fn's result. Callers handle
// Cosine, because its p and q are no probabilities.
template <class Fn>
FASTKD_HOST_DEVICE auto visit(Divergence id, Fn&& fn) {
  switch (id) {
    case Divergence::kReverseKL:
      return fn(ReverseKL{});
    case Divergence::kSymmetricKL:
      return fn(SymmetricKL{});
    case Divergence::kJensenShannon:
      return fn(JensenShannon{});
    case Divergence::kSkewedForwardKL:
      return fn(SkewedForwardKL{});
    case Divergence::kSkewedReverseKL:
      return fn(SkewedReverseKL{});
    case Divergence::kTotalVariation:
      return fn(TotalVariation{});
    case Divergence::kSquaredError:
      return fn(SquaredError{});
    case Divergence::kCenteredSquaredError:
      return fn(CenteredSquaredError{});
    case Divergence::kForwardKL:
    case Divergence::kSoftCrossEntropy:
    case Divergence::kDecoupled:  // among the classes that are not the label
    case Divergence::kCosine:     // handled by callers
      break;
  }
  return fn(ForwardKL{});
}

// Return true if value and gradient come from one sweep after the softmax sums, as for the forward
// KL. If false, another sweep before the last adds up slopes or counts classes.
FASTKD_HOST_DEVICE bool is_one_sweep(Divergence id) {
  return id == Divergence::kForwardKL || id == Divergence::kSoftCrossEntropy ||
         id == Divergence::kDecoupled;
}

// Return true for the reverse KL, whose value is the sum of its slopes. If the sum is near 0, the
// slopes cancel, and the CPU kernels sum the classes' values while they write the gradient.
FASTKD_HOST_DEVICE bool is_reverse(Divergence id) { return id == Divergence::kReverseKL; }

FASTKD_HOST_DEVICE SlopeCentering centering_of(Divergence id) {
  if (id == Divergence::kCosine) return Cosine::kCentering;
  return visit(id, [](auto divergence) { return decltype(divergence)::kCentering; });
}

FASTKD_HOST_DEVICE constexpr bool is_mean(SlopeCentering centering) {
  return centering == SlopeCentering::kMean || centering == SlopeCentering::kCentered;
}

// Return true if classes that student and teacher both mask have slopes of NaN.
FASTKD_HOST_DEVICE constexpr bool leaves_out_masked(SlopeCentering centering) {
  return is_mean(centering) || centering == SlopeCentering::kUnit;
}

// Return 0 instead of a negative number, and NaN for NaN. A divergence is never negative, but its
// terms may round to a negative number if the terms are differences of subnormal numbers.
template <class T>
FASTKD_HOST_DEVICE T at_least_0(T value) {
  return value < T{} ? T{} : value;
}

// Return the divergence of a row from the sums over its classes; `classes` is n of SlopeCentering.
template <class T>
FASTKD_HOST_DEVICE T divergence_of(Divergence id, T value, T slope, T classes, T teacher_entropy) {
  if (id == Divergence::kSoftCrossEntropy) return at_least_0(value + teacher_entropy);
  const SlopeCentering centering = centering_of(id);
  if (!is_mean(centering)) return at_least_0(value);
  const T mean = centering == SlopeCentering::kCentered ? slope / classes / 2 : T{};
  return at_least_0<T>(value / classes - mean * mean);
}

}  // namespace
}  // namespace fastkd
