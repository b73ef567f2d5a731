// The loops of well-separated rows (row.h): the gradient is q - p as it stands, or, for the JSD
// with mix 1/2, comes from slopes without forms for where p is near q.
#pragma once
#include "blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Writes a block's gradient but for the label's share. With kSlopes slopes over q's scale have
// replaced the teacher's exponentials.
template <ExpSource kSource, bool kSlopes, class T, class S>
__attribute__((noinline)) void write_well_separated(const Coefficients<T>& coefficients,
                                                    const RowBlock<T>& b,
                                                    const Vectors<const S>& student,
                                                    const Vectors<S>& grad) {
  const T *const exponentials = b.student, *const other = b.teacher;
  const Coefficients<T> c = coefficients;
  const Exponentials<T> separate(c.separate);
  for_vectors<S>(b.classes, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, T>;
    prefetch_next<Into::kL2, kWidth>(grad.at(at));
    Register<T> z[kMany] = {}, e[kMany], o[kMany], g[kMany];
    load<kWidth>(exponentials + at, T(0), e);
    load<kWidth>(other + at, T(0), o);
    if constexpr (kSource == ExpSource::kSeparate) {
      load<kWidth>(student.at(at), -kInfinity<T>, z);
      FASTKD_UNROLL
      for (int64_t i = 0; i < kMany; ++i) z[i] -= separate.max;
    }
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      if constexpr (kSlopes) {
        g[i] = c.uniform + c.student_soft_gain * (o[i] - e[i] * c.student_share);
      } else {
        g[i] = c.uniform + c.student_soft_gain * e[i] - c.teacher_soft_gain * o[i];
      }
    }
    if constexpr (kSource != ExpSource::kNone) {
      add_hard<kSource, kMany>(separate, c.squarings, z, e, splat(c.block_hard_gain), g);
    }
    store<kWidth>(g, grad.at(at));
  });
}

// Return the gradient of one class. Not inlined, for forward and backward need the same bits.
template <class T>
__attribute__((noinline)) T well_separated_gradient(const Coefficients<T>& c, ExpSource source,
                                                    bool slopes, T z, T exponential, T other) {
  T power = source == ExpSource::kSeparate ? c.separate(z) : exponential;
  for (int i = 0; i < c.squarings && source == ExpSource::kPower; ++i) power *= power;
  const T centered = slopes ? other - exponential * c.student_share : exponential;
  const T teacher = slopes ? T(0) : c.teacher_soft_gain * other;
  const T hard = source == ExpSource::kNone ? T(0) : c.block_hard_gain * power;
  return c.uniform + c.student_soft_gain * centered - teacher + hard;
}

// 1/2 log(max(p, q) / m) of an even mixture m from (max - min) / (3 max + min), one artanh without
// an exponent, minimax for the relative error: 1.6e-8.
template <class V>
FASTKD_HOST_DEVICE V even_log(V ratio) {
  const V y = ratio * ratio;
  V log = y * 0.1342574901f + 0.141183099f;
  log = log * y + 0.2000378032f;
  log = log * y + 0.3333332017f;
  log = log * y + 1.0f;
  return log * ratio;
}

// Value and slopes of the JSD with mix 1/2, over q's scale, where a block is_comparable(). With h =
// d / 2 log(m / q) is h + log cosh h = max(d, 0) - log(max(p, q) / m). The next vectors' divisions
// are under way while these are evaluated.
__attribute__((noinline)) inline SlopeSums find_even_slopes(const Coefficients<float>& c,
                                                            const RowBlock<float>& b) {
  const float *const student = b.student, *const teacher = b.teacher;
  constexpr int64_t kMost = kRegisters<kLanes, float>;
  const Register<float> p_scale = splat(c.teacher_scale / c.student_scale);
  const Register<float> inverse_temperature = splat(0.5f * c.inverse_temperature);
  const Register<float> log_ratio = splat(0.5f * c.log_ratio);
  const Register<float> least_half = splat(c.bound), most_half = splat(-c.bound);
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
    load<kWidth>(student + at, 0.0f, q);
    load<kWidth>(teacher + at, 0.0f, p);
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      p[i] *= p_scale;
      const Register<float> lesser = min(p[i], q[i]), greater = max(p[i], q[i]);
      ahead.lesser[i] = lesser;
      ahead.sum[i] = p[i] + q[i];
      ahead.ratio[i] = (greater - lesser) / (3.0f * greater + (lesser + least<float>()));
    }
  };
  const int64_t wide = b.count / kLanes * kLanes;
  if (wide > 0) divide(0, constant<kLanes>);
  const Vectors<const float> logits = b.z, others = b.w;
  for_vectors<float>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, float>;
    if (kWidth < kLanes) divide(at, width);
    const auto here = ahead;
    if (kWidth == kLanes && at + kLanes < wide) divide(at + kLanes, width);
    Register<float> z[kMany], w[kMany], q[kMany];
    load<kWidth>(logits.at(at), -kInfinity<float>, z);
    load<kWidth>(others.at(at), -kInfinity<float>, w);
    load<kWidth>(student + at, 0.0f, q);
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      // Infinite, or NaN, where p or q is 0.
      Register<float> half = (w[i] - z[i]) * inverse_temperature - log_ratio;
      half = min(max(half, least_half), most_half);
      const Register<float> log = even_log(here.ratio[i]);
      value_run += here.sum[i] * log - here.lesser[i] * magnitude_of(half);
      q[i] *= min(log - half, log);
      slope_run += q[i];
    }
    store<kWidth>(q, b.teacher + at);
    if ((at + kWidth) % kRun == 0) end_run();
  });
  end_run();
  const double scale = c.student_scale;
  return {scale * precise_sum_of<float>(values), scale * precise_sum_of<float>(sums), 0};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
