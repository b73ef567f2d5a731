// The loops of plain rows (row.h), after the first sweep and from the exponentials that it kept:
// what is q - p as it stands, and the JSD with mix 1/2 without forms for where p is near q.
#pragma once
#include "blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// The gradient of a class, but for the label's share, from what was kept of the student: q - p
// where `other` is what was kept of the teacher, or, with kSlopes, what balances these slopes over
// q's scale. The logit is read by Hard::kOwn alone.
template <Hard kHard, bool kSlopes, class T, class S>
FASTKD_HOST_DEVICE T plain_gradient(const Coefficients<T, S>& c, T logit, T tempered, T other) {
  const T balanced = kSlopes ? other - tempered * c.student_share : tempered;
  T g = c.uniform + c.kept_student_gain * balanced;
  if constexpr (!kSlopes) g -= c.kept_teacher_gain * other;
  if constexpr (kHard != Hard::kNone) {
    const T hard_gain = kHard == Hard::kOwn ? c.hard_gain : c.kept_hard_gain;
    g += hard_gain * hard_exponential<kHard>(tempered, logit, c.own);
  }
  return g;
}

// The same of one class of a plain row. Not inlined, for forward and backward must arrive at the
// same bits.
template <Hard kHard, class T, class S>
__attribute__((noinline)) T plain_gradient_of(const Coefficients<T, S>& c, T logit, T tempered,
                                              T other) {
  return plain_gradient<kHard, false>(c, logit, tempered, other);
}

// Of a block. Not inlined, for the same reason as write_gradient().
template <Hard kHard, bool kSlopes, class T, class S, class L>
__attribute__((noinline)) void write_plain_gradient(const Coefficients<T, S>& coefficients,
                                                    const Vectors<const L>& student,
                                                    const T* student_kept, const T* other,
                                                    const Vectors<L>& grad, int64_t count) {
  const Coefficients<T, S> c = coefficients;
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_buffer[kWidth], grad_buffer[kWidth];
    const T* z = nullptr;
    if constexpr (kHard == Hard::kOwn) z = unpack<kWidth>(student.at(at), student_buffer);
    T* grad_lanes = unpacked(grad.at(at), grad_buffer);
    prefetch_next<Into::kL2, kWidth>(grad.at(at));
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T logit = kHard == Hard::kOwn ? z[i] : T(0);
      grad_lanes[i] = plain_gradient<kHard, kSlopes>(c, logit, student_kept[at + i], other[at + i]);
    }
    pack<kWidth>(grad_buffer, grad.at(at));
  });
}

// Value and slopes of the JSD, over q's scale, which makes q of what was kept (c.plain_here()). The
// next vectors' divisions are under way while these are evaluated.
template <class S>
__attribute__((noinline)) SlopeSums sum_plain_jsd(const Coefficients<float, S>& c,
                                                  const Vectors<const S>& student,
                                                  const Vectors<const S>& teacher,
                                                  const float* student_kept,
                                                  const float* teacher_kept, float* slopes,
                                                  int64_t count) {
  constexpr int64_t kMost = kRegisters<kLanes, float>;
  const Register<float> p_scale = all(c.teacher_scale / c.student_scale);
  const Register<float> inverse_temperature = all(0.5f * c.inverse_temperature);
  const Register<float> log_ratio = all(0.5f * c.log_ratio);
  const Register<float> least_half = all(c.bound), most_half = all(-c.bound);
  Register<float> values = {}, sums = {}, value_run = {}, slope_run = {};
  const auto end_run = [&]() FASTKD_INLINE {
    values += value_run, sums += slope_run;
    value_run = slope_run = Register<float>{};
  };
  struct {
    Register<float> lesser[kMost], sum[kMost], ratio[kMost];
  } ahead = {};
  const auto divide = [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, float>;
    Register<float> q[kMany], p[kMany];
    load<kWidth>(student_kept + at, 0.0f, q);
    load<kWidth>(teacher_kept + at, 0.0f, p);
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      p[i] *= p_scale;
      const Register<float> lesser = lesser_of(p[i], q[i]), greater = greater_of(p[i], q[i]);
      ahead.lesser[i] = lesser;
      ahead.sum[i] = p[i] + q[i];
      ahead.ratio[i] = (greater - lesser) / (3.0f * greater + (lesser + least<float>()));
    }
  };
  // Classes in steps of kLanes: what is left over is one where there are no shorter ones.
  const int64_t wide = (count + (kStep<S> == kLanes ? kLanes - 1 : 0)) / kLanes * kLanes;
  if (wide > 0) divide(0, constant<kLanes>);
  const Vectors<const S> logits = student, others = teacher;
  for_vectors<S>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, float>;
    if (kWidth < kLanes) divide(at, width);
    const auto here = ahead;
    if (kWidth == kLanes && at + kLanes < wide) divide(at + kLanes, width);
    Register<float> z[kMany], w[kMany], q[kMany];
    load<kWidth>(logits.at(at), -kInfinity<float>, z);
    load<kWidth>(others.at(at), -kInfinity<float>, w);
    load<kWidth>(student_kept + at, 0.0f, q);
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      // Infinite, or NaN, where p or q is 0.
      Register<float> half = (w[i] - z[i]) * inverse_temperature - log_ratio;
      half = lesser_of(greater_of(half, least_half), most_half);
      const Register<float> log = even_log(here.ratio[i]);
      value_run += here.sum[i] * log - here.lesser[i] * magnitude_of(half);
      q[i] *= lesser_of(log - half, log);
      slope_run += q[i];
    }
    store<kWidth>(q, slopes + at);
    if ((at + kWidth) % kRun == 0) end_run();
  });
  end_run();
  const double scale = c.student_scale;
  return {scale * precise_sum_of<float>(values), scale * precise_sum_of<float>(sums), 0};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
