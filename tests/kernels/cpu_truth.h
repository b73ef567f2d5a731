// Compute the loss and its gradient by definition, in long double, for the tests of the CPU
// kernels.
#pragma once
#include "matrix.h"

namespace {

#if !defined(FASTKD_TRUTH)  // a build may choose a faster type (Makefile)
#define FASTKD_TRUTH long double
#endif
using Real = FASTKD_TRUTH;

struct Truth {
  Real loss, hard, soft, student_entropy, teacher_entropy;
  bool agreement, nan, ignored;
  std::vector<Real> grad, teacher;  // teacher: probabilities
  Real soft_size;                   // magnitude of the soft term's gradient, without its weight
};

std::vector<Real> log_softmax(const std::vector<Real>& x, Real t) {
  Real max = -kInf, sum = 0;
  for (Real v : x) max = std::max(max, v);
  for (Real v : x) sum += std::exp((v - max) / t);
  std::vector<Real> result;
  for (Real v : x) result.push_back((v - max) / t - std::log(sum));
  return result;
}

struct Soft {
  Real value = 0;
  std::vector<Real> grad;  // derivative with respect to z / t
  Real size = 1;           // magnitude of `grad`
};

Soft forward_kl(const std::vector<Real>& log_p, const std::vector<Real>& log_q) {
  Soft soft;
  for (size_t i = 0; i < log_p.size(); ++i) {
    const Real p = std::exp(log_p[i]), q = std::exp(log_q[i]);
    if (p > 0) soft.value += p * (log_p[i] - log_q[i]);
    soft.grad.push_back(q - p);
  }
  return soft;
}

std::vector<Real> over(std::vector<Real> logits, Real t) {
  for (Real& x : logits) x /= t;
  return logits;
}

// Compute decoupled distillation: the forward KL of the label against all other classes, plus mix
// times the forward KL among the other classes.
Soft decoupled(const std::vector<Real>& log_p, const std::vector<Real>& log_q, size_t label,
               Real mix) {
  const auto parts = [=](std::vector<Real> logs, Real* of_label, Real* of_rest) {
    *of_label = logs[label];
    logs[label] = -kInf;
    Real sum = 0;
    for (Real v : logs) sum += std::exp(v);
    *of_rest = std::log(sum);
    for (Real& v : logs) v = sum > 0 ? v - *of_rest : -kInf;
    return logs;
  };
  std::vector<Real> p(2), q(2);
  const std::vector<Real> others_p = parts(log_p, &p[0], &p[1]),
                          others_q = parts(log_q, &q[0], &q[1]);
  const Soft binary = forward_kl(p, q), others = forward_kl(others_p, others_q);
  const Real weight = p[1] > -kInf ? mix : 0;
  Soft soft;
  soft.value = binary.value + (weight > 0 ? weight * others.value : 0);
  for (size_t i = 0; i < others_q.size(); ++i) {
    soft.grad.push_back(weight * others.grad[i] - binary.grad[0] * std::exp(others_q[i]));
  }
  soft.grad[label] = binary.grad[0];
  return soft;
}

// Compute 1 minus the cosine of the tempered logits, without the classes that student and teacher
// both mask.
Soft cosine(std::vector<Real> w, std::vector<Real> z) {
  Real dot = 0, student = 0, teacher = 0;
  for (size_t i = 0; i < z.size(); ++i) {
    if (z[i] == -kInf && w[i] == -kInf) z[i] = w[i] = 0;
    dot += z[i] * w[i], student += z[i] * z[i], teacher += w[i] * w[i];
  }
  const Real length = student > 0 ? std::sqrt(student) : 1;
  const Real teacher_length = teacher > 0 ? std::sqrt(teacher) : 1;
  const Real c = dot / (length * teacher_length);
  Soft soft;
  soft.value = 1 - c, soft.size = 1 / length;
  for (size_t i = 0; i < z.size(); ++i) {
    soft.grad.push_back((c * z[i] / length - w[i] / teacher_length) / length);
  }
  return soft;
}

Truth reference(const ForwardArgs& args, const std::vector<Real>& z, const std::vector<Real>& w,
                Real t, int64_t label, bool labelled) {
  Truth truth = {};
  const size_t n = z.size();
  truth.grad.assign(n, 0);
  truth.ignored = labelled && label == args.ignore_index;
  if (truth.ignored) return truth;
  bool any_z = false, any_w = false;
  for (size_t i = 0; i < n; ++i) {
    // Compare as doubles: under valgrind the greatest long double is an infinity.
    const double student = static_cast<double>(z[i]), teacher = static_cast<double>(w[i]);
    truth.nan |= std::isnan(student) || std::isnan(teacher) || student == kInf || teacher == kInf;
    truth.nan |=
        args.divergence == Divergence::kCosine && std::isinf(student) != std::isinf(teacher);
    any_z |= student > -kInf;
    any_w |= teacher > -kInf;
  }
  truth.nan |= !any_z || !any_w || !(t > 0) || std::isinf(static_cast<double>(t));
  truth.nan |= labelled && (label < 0 || label >= static_cast<int64_t>(n));
  truth.nan |= !labelled && args.divergence == Divergence::kDecoupled;
  if (truth.nan) return truth;
  const auto log_q = log_softmax(z, t), log_p = log_softmax(w, t), log_1 = log_softmax(z, 1);
  const Real max_z = *std::max_element(z.begin(), z.end());
  const Real max_w = *std::max_element(w.begin(), w.end());
  const Real eps = args.label_smoothing;
  const Soft soft = args.divergence == Divergence::kDecoupled
                        ? decoupled(log_p, log_q, static_cast<size_t>(label), args.mix)
                    : args.divergence == Divergence::kCosine ? cosine(over(w, t), over(z, t))
                                                             : forward_kl(log_p, log_q);
  truth.soft = soft.value, truth.soft_size = t * soft.size;
  for (size_t i = 0; i < n; ++i) {
    const Real p = std::exp(log_p[i]), q = std::exp(log_q[i]);
    if (q > 0) truth.student_entropy -= q * log_q[i];
    if (p > 0) truth.teacher_entropy -= p * log_p[i];
    truth.teacher.push_back(p);
    truth.agreement |= z[i] == max_z && w[i] == max_w;
    truth.grad[i] = args.soft_weight * t * soft.grad[i];
    if (!labelled) continue;
    const bool hit = static_cast<int64_t>(i) == label;
    const Real target = (hit ? 1 - eps : Real(0)) + eps / static_cast<Real>(n);
    if (target > 0) truth.hard -= target * log_1[i];
    truth.grad[i] += args.hard_weight * (std::exp(log_1[i]) - target);
  }
  truth.loss = 0;
  if (args.soft_weight != 0) truth.loss += args.soft_weight * t * t * truth.soft;
  if (args.hard_weight != 0) truth.loss += args.hard_weight * truth.hard;
  for (Real& g : truth.grad) g *= args.scale;
  return truth;
}

}  // namespace
