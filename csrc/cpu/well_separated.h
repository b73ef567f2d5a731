// The JSD with mix 1/2 of a well-separated row (row.h). Values and slopes need no series for p near
// q, which makes the loop shorter (docs/maths.md, sections 3 and 10).
#pragma once
#include "blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Return 1/2 log(max(p, q) / m) for the even mixture m, given (max - min) / (3 max + min). The
// function is an artanh, so a polynomial suffices. The polynomial is minimax, with a relative error
// of 1.6e-8.
template <class V>
FASTKD_HOST_DEVICE V even_log(V ratio) {
  const V y = ratio * ratio;
  return ratio * polynomial(y, {1.0f, 0.3333332017f, 0.2000378032f, 0.141183099f, 0.1342574901f});
}

// Sum value and slopes of a block that is_comparable(). Replace the teacher's exponentials by the
// slopes, relative to q's scale. With h = d / 2, log(m / q) is h + log cosh h = max(d, 0) -
// log(max(p, q) / m).
template <class S>
__attribute__((noinline)) SlopeSums find_even_slopes(const Coefficients<float>& c,
                                                     const RowBlock<float, S>& b) {
  using V = Register<float>;
  const float p_scale = c.teacher_scale / c.student_scale;
  const float inverse_temperature = 0.5f * c.inverse_temperature, log_ratio = 0.5f * c.log_ratio;
  LaneSums<float> values, sums;
  for_registers(b, [&](const auto& x) FASTKD_INLINE {
    const V q = x.student(), p = x.teacher() * p_scale;
    const V lesser = min(p, q), greater = max(p, q);
    const V log = even_log((greater - lesser) / mul_add(3.0f, greater, lesser + least<float>()));
    // The bounds matter if a logit is -inf: half the log ratio is then infinite or NaN.
    const V half =
        bounded_above(bounded_below(mul_add(x.w() - x.z(), inverse_temperature, -log_ratio)));
    const V slope = q * min(log - half, log);
    values.add(x.index, mul_add(p + q, log, -(lesser * magnitude_of(half))));
    sums.add(x.index, slope);
    x.replace_teacher(slope);
  });
  const double scale = c.student_scale;
  return {scale * values.total(), scale * sums.total(), 0};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
