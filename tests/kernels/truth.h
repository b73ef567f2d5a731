// Compute the divergences by definition, in long double, for the tests of the CUDA kernels. The
// direct formulas cancel near the teacher, but long double keeps enough digits for the tests.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "../../csrc/divergences.h"

namespace truth {

using Real = long double;

struct Divergence {
  Real value = 0;
  std::vector<Real> grad;  // derivative of the value with respect to z / t
  Real inverse = 0;        // inverse of the student's norm, for the cosine
};

// Return x log(y / z); 0 if x is 0.
inline Real x_log(Real x, Real y, Real z) {
  return x == 0 ? Real(0) : x * (std::log(y) - std::log(z));
}

// Logarithms of the label's odds against all other classes, and of the probabilities among the
// other classes.
struct Decoupled {
  Real odds;
  std::vector<Real> log;  // -inf for the label

  Decoupled(const std::vector<double>& logits, Real t, int64_t label) {
    const Real infinity = HUGE_VALL;
    Real max = -infinity, sum = 0;
    for (size_t i = 0; i < logits.size(); ++i)
      if (static_cast<int64_t>(i) != label) max = std::fmax(max, Real(logits[i]));
    for (size_t i = 0; i < logits.size(); ++i)
      if (static_cast<int64_t>(i) != label && max > -infinity)
        sum += std::exp((logits[i] - max) / t);
    for (const double x : logits)
      log.push_back(sum == 0 ? -infinity : (x - max) / t - std::log(sum));
    odds = sum == 0 ? infinity : log[static_cast<size_t>(label)];
    log[static_cast<size_t>(label)] = -infinity;
  }
  // Return the probability of the label, and of all other classes together.
  Real label() const { return 1 / (1 + std::exp(-odds)); }
  Real rest() const { return 1 / (1 + std::exp(odds)); }
};

inline Divergence decoupled(Real a, const std::vector<double>& z, const std::vector<double>& w,
                            Real t, Real teacher_t, int64_t label) {
  const Decoupled student(z, t, label), teacher(w, teacher_t, label);
  const auto kl = [](Real p, Real log_p, Real log_q) { return p == 0 ? 0 : p * (log_p - log_q); };
  const auto log_of_label = [](Real odds) {
    return odds < 0 ? odds - std::log1p(std::exp(odds)) : -std::log1p(std::exp(-odds));
  };
  Divergence result;
  result.value = kl(teacher.label(), log_of_label(teacher.odds), log_of_label(student.odds)) +
                 kl(teacher.rest(), log_of_label(-teacher.odds), log_of_label(-student.odds));
  const Real diff =
      student.label() < 0.5 ? student.label() - teacher.label() : teacher.rest() - student.rest();
  for (size_t i = 0; i < z.size(); ++i) {
    const Real p = std::exp(teacher.log[i]), q = std::exp(student.log[i]);
    const bool any = teacher.rest() > 0;  // true if the teacher allows another class
    result.value += a * kl(p, teacher.log[i], student.log[i]);
    result.grad.push_back((any ? a * (q - p) : 0) - diff * q);
  }
  result.grad[static_cast<size_t>(label)] = diff;
  return result;
}

inline Divergence cosine(const std::vector<double>& z, const std::vector<double>& w, Real t) {
  Real zz = 0, ww = 0, zw = 0;
  const auto masked = [&](size_t i) { return z[i] == -HUGE_VAL && w[i] == -HUGE_VAL; };
  for (size_t i = 0; i < z.size(); ++i) {
    if (masked(i)) continue;
    zz += Real(z[i]) * z[i], ww += Real(w[i]) * w[i], zw += Real(z[i]) * w[i];
  }
  const Real length = zz == 0 ? t : std::sqrt(zz), teacher_length = ww == 0 ? 1 : std::sqrt(ww);
  const Real c = zw / (length * teacher_length);
  Divergence result;
  result.value = 1 - c, result.inverse = 1 / length;
  for (size_t i = 0; i < z.size(); ++i)
    result.grad.push_back(
        masked(i) && c == c ? 0 : t * (c * z[i] / length - w[i] / teacher_length) / length);
  return result;
}

// Compute a divergence of student logits z at temperature t and teacher logits w at `teacher_t`.
inline Divergence divergence(fastkd::Divergence id, Real a, const std::vector<double>& z,
                             const std::vector<double>& w, Real t, Real teacher_t, int64_t label) {
  using fastkd::Divergence;
  if (id == Divergence::kDecoupled) return decoupled(a, z, w, t, teacher_t, label);
  if (id == Divergence::kCosine) return cosine(z, w, t);
  const size_t n = z.size();
  const Real infinity = HUGE_VALL;
  Real mz = -infinity, mw = -infinity, student_sum = 0, teacher_sum = 0;
  for (size_t i = 0; i < n; ++i) mz = std::fmax(mz, Real(z[i])), mw = std::fmax(mw, Real(w[i]));
  for (size_t i = 0; i < n; ++i) {
    student_sum += std::exp((z[i] - mz) / t), teacher_sum += std::exp((w[i] - mw) / teacher_t);
  }
  const bool is_mean = id == Divergence::kSquaredError || id == Divergence::kCenteredSquaredError;
  truth::Divergence result;
  std::vector<Real> q(n), slope(n, 0);
  Real counted = 0, mean = 0;
  for (size_t i = 0; i < n; ++i) {
    const Real log_q = (z[i] - mz) / t - std::log(student_sum);
    const Real log_p = (w[i] - mw) / teacher_t - std::log(teacher_sum);
    const Real p = std::exp(log_p);
    q[i] = std::exp(log_q);
    const Real forward = p == 0 ? 0 : p * (log_p - log_q);
    const Real reverse = q[i] == 0 ? 0 : q[i] * (log_q - log_p);
    const Real m = a * p + (1 - a) * q[i], other = a * q[i] + (1 - a) * p;
    const Real gap = z[i] / t - w[i] / teacher_t;
    switch (id) {
      case Divergence::kForwardKL:
        result.value += forward, slope[i] = -p;
        break;
      case Divergence::kSoftCrossEntropy:
        result.value -= p == 0 ? 0 : p * log_q, slope[i] = -p;
        break;
      case Divergence::kReverseKL:
        result.value += reverse, slope[i] = reverse;
        break;
      case Divergence::kSymmetricKL:
        result.value += a * forward + (1 - a) * reverse, slope[i] = (1 - a) * reverse - a * p;
        break;
      case Divergence::kJensenShannon:
        slope[i] = (1 - a) * x_log(q[i], q[i], m);
        result.value += a * x_log(p, p, m) + slope[i];
        break;
      case Divergence::kSkewedForwardKL:
        result.value += x_log(p, p, m), slope[i] = q[i] == 0 ? 0 : -(1 - a) * p * q[i] / m;
        break;
      case Divergence::kSkewedReverseKL:
        result.value += x_log(q[i], q[i], other);
        slope[i] = q[i] == 0 ? 0 : x_log(q[i], q[i], other) - a * q[i] * q[i] / other;
        break;
      case Divergence::kTotalVariation:
        result.value += std::fabs(p - q[i]) / 2, slope[i] = q[i] * ((q[i] > p) - (q[i] < p)) / 2;
        break;
      case Divergence::kSquaredError:
      case Divergence::kCenteredSquaredError:
        if (gap != gap) break;  // both mask the class
        counted += 1, mean += gap, slope[i] = gap;
        break;
      case Divergence::kDecoupled:
      case Divergence::kCosine:
        break;  // computed before the loop
    }
  }
  mean = id == Divergence::kCenteredSquaredError ? mean / counted : 0;
  Real of_all = 0;
  for (size_t i = 0; i < n; ++i) of_all += slope[i];
  for (size_t i = 0; i < n; ++i) {
    const bool masked = std::isinf(z[i]) && std::isinf(w[i]);
    if (is_mean && !masked) result.value += (slope[i] - mean) * (slope[i] - mean) / counted;
    result.grad.push_back(!is_mean ? slope[i] - q[i] * of_all
                          : masked ? Real(0)
                                   : 2 * (slope[i] - mean) / counted);
  }
  return result;
}

}  // namespace truth
