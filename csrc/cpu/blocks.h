// The loops of the sweeps after the first (scan.h): each works on one block of one row, which lies
// in the L1 cache, and is vectorised by the compiler. Letters as in numerics.h; docs/maths.md
// derives the formulas.
#pragma once
#include "../divergences.h"
#include "formulas.h"
#include "scan.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// The constants of one row for the sweeps after the first, and those of one of its blocks, whose
// exponentials are relative to the greatest logit before its end (set_block(), row.h).
template <class T>
struct Coefficients : LogRatio<T> {
  Exponential<T> separate;  // exp(z - max z) where it is no power of exp(z / t)
  int squarings = 0;        // that make a power of exp((z - max z) / t)
  T soft_gain = 0;  // gradient = soft_gain * (slope - ...) + hard_gain * exp(z - max z) + uniform
  T hard_gain = 0;
  T uniform = 0;         // label smoothing's share of the target
  T student_share = 0;   // of q, and
  T constant_share = 0;  // of 1, which center the slopes (divergences.h)
  T bound = T(-1e30);    // of log(p / q), from below; as a literal it is compiled to more
  // Gradient of a row whose sums leave its label out (decoupled.h): other classes get rest_gain
  // times q, and the label gets label_gradient.
  T rest_gain = 0, label_gradient = 0;
  T student_inverse = 1, teacher_inverse = 1;  // 1 / |z|, 1 / |w|
  T teacher_inverse_temperature = 1;
  bool well_separated = false;  // the row is (row.h)
  // Factors of a block's exponentials:
  T student_scale = 0, teacher_scale = 0;          // q and p
  T student_soft_gain = 0, teacher_soft_gain = 0;  // soft_gain times these
  T block_hard_gain = 0, block_rest_gain = 0;

  // Return true if the exponentials of the block can be compared over q's scale. In a block far
  // below the row's maximum the scale is too close to 0.
  bool is_comparable() const { return well_separated && student_scale > T(1e-15); }
};

// d of one class, or, of divergences that compare logits, their difference: `log_ratio` is 0 then.
template <bool kShifted, class T>
FASTKD_HOST_DEVICE T log_ratio_of(const Coefficients<T>& c, T z, T w) {
  if constexpr (!kShifted) return (w - z) * c.inverse_temperature - c.log_ratio;
  return c.of(z, w);
}

template <bool kShifted, class T>
FASTKD_HOST_DEVICE Element<T> element_of(const Coefficients<T>& c, T z, T w, T student_exponential,
                                         T teacher_exponential) {
  return element<T>(teacher_exponential * c.teacher_scale, student_exponential * c.student_scale,
                    log_ratio_of<kShifted>(c, z, w), c.bound);
}

// Return the quantities of one class that the divergence D reads.
template <class D, bool kShifted, class T>
FASTKD_HOST_DEVICE Element<T> element_for(const Coefficients<T>& c, T z, T w, T student_exponential,
                                          T teacher_exponential) {
  if constexpr (D::kBalance == Balance::kUnit) {
    return {w * c.teacher_inverse, z * c.student_inverse, T(0), T(0), T(0)};
  } else if constexpr (is_mean(D::kBalance)) {
    return {T(0), T(0), T(0), T(0), T(0), log_ratio_of<true>(c, z, w)};
  } else {
    return element_of<kShifted>(c, z, w, student_exponential, teacher_exponential);
  }
}

// A block of a row in the sweeps after the first.
template <class T>
struct RowBlock {
  int64_t at, classes;   // of the row
  int64_t count;         // of numbers: the classes, or, of pairs, what they are padded to
  T *student, *teacher;  // exponentials; slopes may replace the teacher's
  Vectors<const T> z = {}, w = {};  // logits, for loops that read them
};

struct SlopeSums {
  double value = 0, slope = 0, classes = 0;
};

// Write the gradient of the hard term, of label smoothing, and of q's share where the label is left
// out. The loops below add it to the divergence's gradient.
template <ExpSource kSource, class T>
__attribute__((noinline)) void write_hard_part(const Coefficients<T>& coefficients,
                                               const RowBlock<T>& block, T* hard_part) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  const Exponentials<T> separate(c.separate);
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, T>;
    Register<T> z[kMany] = {}, e[kMany], result[kMany];
    load<kWidth>(b.student + at, T(0), e);
    if constexpr (kSource == ExpSource::kSeparate) {
      load<kWidth>(b.z.at(at), -kInfinity<T>, z);
      FASTKD_UNROLL
      for (int64_t i = 0; i < kMany; ++i) z[i] -= separate.max;
    }
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) result[i] = e[i] * c.block_rest_gain + c.uniform;
    if constexpr (kSource != ExpSource::kNone) {
      add_hard<kSource, kMany>(separate, c.squarings, z, e, splat(c.block_hard_gain), result);
    }
    store<kWidth>(result, hard_part + at);
  });
}

// Writes the forward KL's gradient but for the label's share, and returns its sum; with kDecoupled
// that of q - p, too. `grad` may be the student itself.
template <bool kShifted, bool kDecoupled, class T>
__attribute__((noinline)) SlopeSums write_gradient(const Coefficients<T>& coefficients,
                                                   const RowBlock<T>& block, const T* hard_part,
                                                   const Vectors<T>& grad) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  T values[kLanes] = {}, diffs[kLanes] = {};
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    const T *z = b.z.at(at), *w = b.w.at(at);
    T* const g = grad.at(at);
    prefetch_next<Into::kL2, kWidth>(g);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const Element<T> e =
          element_of<kShifted>(c, z[i], w[i], b.student[at + i], b.teacher[at + i]);
      const Evaluated<T> kl = ForwardKL::at(e);
      values[i] += kl.value;
      if constexpr (kDecoupled) diffs[i] += kl.slope;
      g[i] = hard_part[at + i] + c.soft_gain * kl.slope;
    }
  });
  return {sum_of(values), kDecoupled ? sum_of(diffs) : 0.0, 0.0};
}

// For the divergences whose slopes have a sum: sums value and slopes, and replaces the teacher's
// exponentials by slopes.
template <class D, bool kShifted, class T>
__attribute__((noinline)) SlopeSums find_slopes(const Coefficients<T>& coefficients,
                                                const ConstantsOf<T>& constants,
                                                const RowBlock<T>& block) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  const ConstantsOf<T> k = constants;
  T values[kLanes] = {}, sums[kLanes] = {}, classes[kLanes] = {};
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    const T *z = b.z.at(at), *w = b.w.at(at);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const Element<T> e =
          element_for<D, kShifted>(c, z[i], w[i], b.student[at + i], b.teacher[at + i]);
      const Evaluated<T> here = D::at(e, k);
      const bool counts = !leaves_out_masked(D::kBalance) || here.slope == here.slope;
      const T summed = D::kBalance == Balance::kUnit ? here.value : here.slope;
      values[i] += counts ? here.value : T(0);
      if constexpr (D::kBalance != Balance::kMean) sums[i] += counts ? summed : T(0);
      if constexpr (is_mean(D::kBalance)) classes[i] += counts ? T(1) : T(0);
      b.teacher[at + i] = here.slope;
    }
  });
  return {sum_of(values), sum_of(sums), is_mean(D::kBalance) ? sum_of(classes) : 0.0};
}

// Makes the gradient of slopes; `q` times q_scale is what they are centered by. With kAnySlope
// slopes may be NaN, where the gradient is 0, a constant may center them, and the gain may be 0.
template <bool kAnySlope, class T>
__attribute__((noinline)) void center_gradient(const Coefficients<T>& coefficients,
                                               const RowBlock<T>& block, const Vectors<const T>& q,
                                               T q_scale, const T* hard_part,
                                               const Vectors<T>& grad) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    const T* const shares = q.at(at);
    T* const g = grad.at(at);
    prefetch_next<Into::kL2, kWidth>(g);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T share = shares[i] * q_scale * c.student_share, slope = b.teacher[at + i];
      if constexpr (kAnySlope) {
        const T centered = slope == slope ? slope - share - c.constant_share : T(0);
        g[i] = hard_part[at + i] + weighted_part(c.soft_gain, centered);
      } else {
        g[i] = hard_part[at + i] + c.soft_gain * (slope - share);
      }
    }
  });
}

// The reverse KL's slopes -q d are formed twice, which costs less than to cache them: first they
// are summed, without the teacher's exponentials, and then centered.
template <bool kShifted, class T>
__attribute__((noinline)) double sum_reverse(const Coefficients<T>& coefficients,
                                             const RowBlock<T>& block) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  // Over kLanes sums GCC 12 makes a branch of times_log().
  constexpr int64_t kFewLanes = kPerRegister<float> < 8 ? 8 : kPerRegister<float>;
  T sums[kFewLanes] = {};
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    constexpr int64_t kPart = kWidth < kFewLanes ? kWidth : kFewLanes;
    for (int64_t part = 0; part < kWidth; part += kPart) {
      const T *z = b.z.at(at) + part, *w = b.w.at(at) + part;
#pragma omp simd
      for (int64_t i = 0; i < kPart; ++i) {
        const T q = b.student[at + part + i] * c.student_scale;
        const T d = log_ratio_of<kShifted>(c, z[i], w[i]);
        sums[i] += times_log(q, bounded_above(d, -c.bound));
      }
    }
  });
  return -precise_sum_of(sums);
}

// With kValue the reverse KL is summed, too, class by class.
template <bool kShifted, bool kValue, class T>
__attribute__((noinline)) double write_reverse_kl(const Coefficients<T>& coefficients,
                                                  const RowBlock<T>& block, const T* hard_part,
                                                  const Vectors<T>& grad) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  T values[kLanes] = {};
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    const T *z = b.z.at(at), *w = b.w.at(at);
    T* const g = grad.at(at);
    prefetch_next<Into::kL2, kWidth>(g);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T teacher_exponential = kValue ? b.teacher[at + i] : T(0);
      const Element<T> e =
          element_of<kShifted>(c, z[i], w[i], b.student[at + i], teacher_exponential);
      const Evaluated<T> here = ReverseKL::at(e);
      if constexpr (kValue) values[i] += here.value;
      g[i] = hard_part[at + i] + weighted_part(c.soft_gain, here.slope - e.q * c.student_share);
    }
  });
  return kValue ? sum_of(values) : 0.0;
}

// The entropies of a block, for `terms`, and whether one of its classes is the greatest of both.
template <class T>
struct Entropies {
  T student = 0, teacher = 0;
  bool agreement = false;
};
template <class T>
__attribute__((noinline)) Entropies<T> sum_entropies(const Coefficients<T>& coefficients,
                                                     T student_log_scale, T teacher_log_scale,
                                                     T student_max, T teacher_max,
                                                     const RowBlock<T>& block) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  T student_sums[kLanes] = {}, teacher_sums[kLanes] = {}, agreements[kLanes] = {};
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    const T *z = b.z.at(at), *w = b.w.at(at);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T log_q = (z[i] - student_max) * c.inverse_temperature + student_log_scale;
      const T log_p = (w[i] - teacher_max) * c.teacher_inverse_temperature + teacher_log_scale;
      student_sums[i] -= times_log(b.student[at + i] * c.student_scale, log_q);
      teacher_sums[i] -= times_log(b.teacher[at + i] * c.teacher_scale, log_p);
      const bool greatest = (z[i] == student_max) & (w[i] == teacher_max);
      agreements[i] = greatest ? T(1) : agreements[i];
    }
  });
  return {sum_of(student_sums), sum_of(teacher_sums), sum_of(agreements) > T(0)};
}

// The teacher's alone, which the soft cross entropy asks for.
template <class T>
__attribute__((noinline)) double sum_teacher_entropy(const Coefficients<T>& coefficients,
                                                     T log_scale, T max, const RowBlock<T>& block) {
  const Coefficients<T> c = coefficients;
  const RowBlock<T> b = block;
  T sums[kLanes] = {};
  for_vectors<T>(b.count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    const T* w = b.w.at(at);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T p = b.teacher[at + i] * c.teacher_scale;
      const T log_p = (w[i] - max) * c.teacher_inverse_temperature + log_scale;
      sums[i] += p * bounded_below(log_p, c.bound);
    }
  });
  return -sum_of(sums);
}

// The moments of Statistics (kernels.h).
struct Moments {
  double student = 0, teacher = 0, student_count = 0, teacher_count = 0;
};

// Sums squares over the classes that student and teacher do not both mask. In double: logits may be
// of any size. The masks have a loop of their own in T: in one loop with the conversion to double
// GCC 12's code takes four times as long.
template <class T>
Moments sum_squares(const Vectors<const T>& student, const Vectors<const T>& teacher,
                    int64_t count) {
  double of_student[kLanes] = {}, of_teacher[kLanes] = {};
  for_vectors<T>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_counted[kWidth], teacher_counted[kWidth];
    const T *z = student.at(at), *w = teacher.at(at);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const bool masked = z[i] == -kInfinity<T> && w[i] == -kInfinity<T>;
      student_counted[i] = masked ? T(0) : z[i], teacher_counted[i] = masked ? T(0) : w[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const double x = student_counted[i], y = teacher_counted[i];
      of_student[i] += x * x, of_teacher[i] += y * y;
    }
  });
  return {sum_of(of_student), sum_of(of_teacher), 0, 0};
}

// Sums and counts the classes that are not masked, in double. One call a tensor: in one loop for
// both GCC 12's code takes five times as long.
template <class T>
void sum_logits(const Vectors<const T>& logits, int64_t count, double* sum, double* classes) {
  double sums[kLanes] = {};
  T counts[kLanes] = {};
  for_vectors<T>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    const T* lanes = logits.at(at);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const bool masked = lanes[i] == -kInfinity<T>;
      counts[i] += masked ? T(0) : T(1);
      sums[i] += static_cast<double>(masked ? T(0) : lanes[i]);
    }
  });
  *sum = sum_of(sums), *classes = static_cast<double>(sum_of(counts));
}

template <class T>
Moments sum_moments(const Vectors<const T>& student, const Vectors<const T>& teacher,
                    int64_t count) {
  Moments moments;
  sum_logits(student, count, &moments.student, &moments.student_count);
  sum_logits(teacher, count, &moments.teacher, &moments.teacher_count);
  return moments;
}

template <class T>
T sum_offsets(const T* logits, T max, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += logits[i] - max;
  return sum;
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
