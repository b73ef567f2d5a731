// The loops of the sweeps after the first sweep, and the moments of the first sweep, whose other
// loops are in scan.h. A loop takes one block of a row, a register of classes at a time. A block
// fits in the L1 cache, so that several loops over the block read memory once. numerics.h defines
// the letters. Derivations: docs/maths.md, sections 2, 3 and 10.
#pragma once
#include "../divergences.h"
#include "formulas.h"
#include "scan.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// The constants of one row, and of one block of that row, for the sweeps after the first. A block's
// exponentials are relative to the greatest logit of the segment up to the block's end
// (set_block(), row.h).
template <class T>
struct Coefficients : LogRatio<T> {
  Exponential<T> separate;  // exp(z - max z) if it is not a power of exp(z / t)
  int squarings = 0;        // number of squarings from exp((z - max z) / t) to exp(z - max z)
  T soft_gain = 0;  // gradient = soft_gain * (slope - ...) + hard_gain * exp(z - max z) + uniform
  T hard_gain = 0;
  T uniform = 0;  // minus label smoothing's part of the target, times the gain
  T student_share =
      0;  // factor of q, or of u with kUnit, in the centering of slopes (divergences.h)
  T constant_share = 0;  // subtracted from each slope with kCentered
  // Gradient of a row whose sums leave the label out (decoupled.h): rest_gain times q is added to
  // the gradient of the classes other than the label, and the label gets label_gradient.
  T rest_gain = 0, label_gradient = 0;
  T student_inverse = 1, teacher_inverse = 1;  // 1 / |z|, 1 / |w|
  T teacher_inverse_temperature = 1;
  bool well_separated = false;  // the row is well separated (row.h)
  // Factors of a block's exponentials:
  T student_scale = 0, teacher_scale = 0;  // factors that give q and p
  T student_soft_gain = 0,
    teacher_soft_gain = 0;  // soft_gain times student_scale and teacher_scale
  T block_hard_gain = 0, block_rest_gain = 0;

  // Return true if find_even_slopes() (well_separated.h) can divide by the student's scale. In a
  // block far below the row's maximum this scale is too close to 0.
  bool is_comparable() const { return well_separated && student_scale > T(1e-15); }
};

// A block of a row, whose logits have the storage type S.
template <class T, class S>
struct RowBlock {
  int64_t at, classes;              // first class in the row, and number of classes
  T *student, *teacher;             // exponentials; slopes may replace the teacher's
  Vectors<const S> z = {}, w = {};  // logits, for loops that read them
  Vectors<S> grad = {};
};

// The numbers of one register of classes: register `index` of the step at `at`.
template <class T, class S, int64_t kWidth>
struct Classes {
  const RowBlock<T, S>& block;
  int64_t at, index;

  FASTKD_HOST_DEVICE Register<T> z() const {
    return load_register<kWidth>(block.z.at(at), index, -kInfinity<T>);
  }
  FASTKD_HOST_DEVICE Register<T> w() const {
    return load_register<kWidth>(block.w.at(at), index, -kInfinity<T>);
  }
  FASTKD_HOST_DEVICE Register<T> student() const {
    return load_register<kWidth>(block.student + at, index, T(0));
  }
  FASTKD_HOST_DEVICE Register<T> teacher() const {
    return load_register<kWidth>(block.teacher + at, index, T(0));
  }
  FASTKD_HOST_DEVICE void replace_teacher(Register<T> slopes) const {
    T* const to = block.teacher + at + index * kPerRegister<T>;
    std::memcpy(to, &slopes, kBytesOfEach<kWidth, T>);
  }
};

// Call fn(classes) for each register of a block.
template <class T, class S, class Fn>
FASTKD_HOST_DEVICE void for_registers(const RowBlock<T, S>& block, Fn&& fn) {
  const RowBlock<T, S> b = block;
  for_vectors<S>(b.classes, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    FASTKD_UNROLL
    for (int64_t i = 0; i < kRegisters<kWidth, T>; ++i) fn(Classes<T, S, kWidth>{b, at, i});
  });
}

// Return the quantities that the divergence D reads, for some classes of one row or of several
// rows, from their logits and their unscaled exponentials.
template <class D, class V, class R, class Scales>
FASTKD_HOST_DEVICE Element<V> element_of(const LogRatio<R>& ratio, const Scales& s, V z, V w,
                                         V student, V teacher) {
  if constexpr (D::kCentering == SlopeCentering::kUnit) {
    return {w * s.teacher_inverse, z * s.student_inverse, V{}, V{}, V{}};
  } else if constexpr (is_mean(D::kCentering)) {
    return {V{}, V{}, V{}, V{}, V{}, ratio.at(z, w)};
  } else {
    const V p = teacher * s.teacher_scale, q = student * s.student_scale;
    return element(p, q, ratio.at(z, w), mul_add(student, s.student_scale, -p));
  }
}
template <class D, class T, class Classes>
FASTKD_HOST_DEVICE Element<Register<T>> element_of(const Coefficients<T>& c, const Classes& x) {
  return element_of<D, Register<T>>(c, c, x.z(), x.w(), x.student(), x.teacher());
}

// Add value and slope of some classes to the sums; with kUnit, add the value in place of the slope.
// If leaves_out_masked(), skip classes that student and teacher both mask, and count the remaining
// classes.
template <class D, class V, class Values, class Sums>
FASTKD_HOST_DEVICE void add_classes(const Evaluated<V>& here, int64_t index, Values* values,
                                    Sums* slopes, Sums* classes) {
  const V summed = D::kCentering == SlopeCentering::kUnit ? here.value : here.slope;
  if constexpr (leaves_out_masked(D::kCentering)) {
    const auto counts = here.slope == here.slope;
    values->add(index, counts ? here.value : V{});
    slopes->add(index, counts ? summed : V{});
    classes->add(index, counts ? V{} + 1 : V{});
  } else {
    values->add(index, here.value), slopes->add(index, summed);
  }
}

struct SlopeSums {
  double value = 0, slope = 0, classes = 0;
};

// Sum value and slopes, and count the classes of a mean, for divergences that are not
// is_one_sweep(). Replace the teacher's exponentials by the slopes.
template <class D, class T, class S>
__attribute__((noinline)) SlopeSums find_slopes(const Coefficients<T>& coefficients,
                                                const ConstantsOf<T>& constants,
                                                const RowBlock<T, S>& b) {
  using V = Register<T>;
  const Coefficients<T> c = coefficients;
  const ConstantsOf<T> k = constants;
  LaneSums<T> values, sums, classes;
  for_registers(b, [&](const auto& x) FASTKD_INLINE {
    const Evaluated<V> here = D::at(element_of<D>(c, x), k);
    x.replace_teacher(here.slope);
    add_classes<D>(here, x.index, &values, &sums, &classes);
  });
  return {values.total(), sums.total(), is_mean(D::kCentering) ? classes.total() : 0.0};
}

// Sum the reverse KL's slopes -q d. The sum needs no exponentials of the teacher. The sweep that
// writes the gradient forms the slopes again, which costs less than caching them.
template <class T, class S>
__attribute__((noinline)) double sum_reverse(const Coefficients<T>& coefficients,
                                             const RowBlock<T, S>& b) {
  const Coefficients<T> c = coefficients;
  LaneSums<T> sums;
  for_registers(b, [&](const auto& x) FASTKD_INLINE {
    const Register<T> q = x.student() * c.student_scale;
    sums.add(x.index, times_log(q, bounded_above(c.at(x.z(), x.w()))));
  });
  return -sums.total();
}

// The change of the gradient at the label: an amount to subtract (the one-hot target), or a value
// that replaces the gradient.
template <class T>
struct Label {
  int64_t index = -1;  // position of the label in the row, or -1
  bool replaces = false;
  T value = 0;

  FASTKD_HOST_DEVICE void change(T* gradient) const {
    *gradient = replaces ? value : *gradient - value;
  }
  // Change the gradient of a step that contains the label.
  template <class S, int64_t kWidth>
  FASTKD_HOST_DEVICE void change(int64_t step, Register<T>* gradient) const {
    T numbers[kWidth];
    store<kWidth>(gradient, numbers);
    change(&numbers[place_of<S>(index - step, kWidth)]);
    load<kWidth>(numbers, T(0), gradient);
  }
};

// Write a block's gradient: fn(classes) is the gradient without the hard term's exponentials and
// one-hot target. `grad` may be the student itself.
template <ExpSource kSource, class T, class S, class Fn>
FASTKD_HOST_DEVICE void write_gradient(const Coefficients<T>& c, const RowBlock<T, S>& block,
                                       const Label<T>& label, Fn&& fn) {
  constexpr bool kIsExact = std::is_same<S, T>::value;
  const RowBlock<T, S> b = block;
  const Exponentials<T> separate(c.separate);
  for_vectors<S>(b.classes, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, T>;
    prefetch_next<CacheLevel::kL2, kWidth>(b.grad.at(at));
    Register<T> z[kMany] = {}, e[kMany], g[kMany];
    FASTKD_UNROLL
    for (int64_t i = 0; i < kMany; ++i) {
      const Classes<T, S, kWidth> x{b, at, i};
      e[i] = x.student();
      if constexpr (kSource == ExpSource::kSeparate) z[i] = x.z() - separate.max;
      g[i] = fn(x);
    }
    if constexpr (kSource != ExpSource::kNone) {
      add_hard<kSource, kMany>(separate, c.squarings, z, e, splat(c.block_hard_gain), g);
    }
    // The label changes the gradient before it is rounded to S.
    if (!kIsExact && holds(b.at + at, kWidth, label.index)) {
      label.template change<S, kWidth>(b.at + at, g);
    }
    store<kWidth>(g, b.grad.at(at));
  });
  // Change the label's gradient after the loop, because a branch in the loop could be mispredicted.
  if constexpr (kIsExact) {
    const int64_t i = label.index - b.at;
    if (holds(0, b.classes, i)) label.change(b.grad.element(i));
  }
}

// Write the forward KL's gradient for a well-separated row (row.h): q - p from the exponentials,
// without d.
template <ExpSource kSource, class T, class S>
__attribute__((noinline)) void write_difference(const Coefficients<T>& coefficients,
                                                const RowBlock<T, S>& b, const Label<T>& label) {
  const Coefficients<T> c = coefficients;
  write_gradient<kSource>(c, b, label, [&](const auto& x) FASTKD_INLINE {
    const Register<T> gradient = mul_add(c.student_soft_gain, x.student(), c.uniform);
    return mul_add(-c.teacher_soft_gain, x.teacher(), gradient);
  });
}

// Write the forward KL's gradient, and return the sum of the values. With kDecoupled, also return
// the sum of q - p.
template <ExpSource kSource, bool kDecoupled, class T, class S>
__attribute__((noinline)) SlopeSums write_forward_kl(const Coefficients<T>& coefficients,
                                                     const RowBlock<T, S>& b,
                                                     const Label<T>& label) {
  using V = Register<T>;
  const Coefficients<T> c = coefficients;
  LaneSums<T> values, diffs;
  write_gradient<kSource>(c, b, label, [&](const auto& x) FASTKD_INLINE {
    const Evaluated<V> kl = ForwardKL::at(element_of<ForwardKL>(c, x));
    values.add(x.index, kl.value);
    const V gradient = mul_add(c.soft_gain, kl.slope, c.uniform);
    if constexpr (!kDecoupled) return gradient;
    diffs.add(x.index, kl.slope);
    return mul_add(c.block_rest_gain, x.student(), gradient);
  });
  return {values.total(), kDecoupled ? diffs.total() : 0.0, 0.0};
}

// Write the reverse KL's gradient. With kValue, also sum the value class by class.
template <ExpSource kSource, bool kValue, class T, class S>
__attribute__((noinline)) SlopeSums write_reverse_kl(const Coefficients<T>& coefficients,
                                                     const RowBlock<T, S>& b,
                                                     const Label<T>& label) {
  using V = Register<T>;
  const Coefficients<T> c = coefficients;
  const V uniform = splat(c.uniform);
  LaneSums<T> values;
  write_gradient<kSource>(c, b, label, [&](const auto& x) FASTKD_INLINE {
    const Element<V> e = element_of<ReverseKL>(c, x);
    const Evaluated<V> here = ReverseKL::at(e);
    if constexpr (kValue) values.add(x.index, here.value);
    return weighted_part(c.soft_gain, mul_add(e.q, -c.student_share, here.slope), uniform);
  });
  return {kValue ? values.total() : 0.0, 0.0, 0.0};
}

// Write the gradient from the slopes that replaced the teacher's exponentials. The slopes are
// relative to q's scale if the block is_comparable(). With kMasked, slopes may be NaN (the soft
// term's gradient is then 0), and a constant or a multiple of z is subtracted from the slopes.
template <ExpSource kSource, bool kMasked, class T, class S>
__attribute__((noinline)) void center_slopes(const Coefficients<T>& coefficients, bool unit,
                                             const RowBlock<T, S>& b, const Label<T>& label) {
  using V = Register<T>;
  const Coefficients<T> c = coefficients;
  const T gain = c.is_comparable() ? c.student_soft_gain : c.soft_gain;
  const T share = c.is_comparable() ? c.student_share : c.student_scale * c.student_share;
  const V uniform = splat(c.uniform);
  write_gradient<kSource>(c, b, label, [&](const auto& x) FASTKD_INLINE {
    const V slope = x.teacher();
    if constexpr (!kMasked) {
      return weighted_part(gain, mul_add(x.student(), -share, slope), uniform);
    }
    const V center = unit ? x.z() * (c.student_inverse * c.student_share) : V{} + c.constant_share;
    return slope == slope ? weighted_part(gain, slope - center, uniform) : uniform;
  });
}

// The sums of a block for `terms`: the entropies, and whether one class is the greatest of both
// student and teacher. The soft cross entropy needs only the teacher's entropy.
struct Entropies {
  double student = 0, teacher = 0;
  bool agreement = false;
};
template <bool kBoth, class T, class S>
__attribute__((noinline)) Entropies sum_entropies(const Coefficients<T>& coefficients,
                                                  const Scales<T>& scales,
                                                  const RowBlock<T, S>& b) {
  using V = Register<T>;
  const Coefficients<T> c = coefficients;
  const T student_max = scales.student_max, teacher_max = scales.teacher_max;
  const T student_log_scale = std::log(scales.student_scale);
  const T teacher_log_scale = std::log(scales.teacher_scale);
  LaneSums<T> student, teacher, agreements;
  for_registers(b, [&](const auto& x) FASTKD_INLINE {
    const V w = x.w() - teacher_max;
    const V log_p = mul_add(w, c.teacher_inverse_temperature, teacher_log_scale);
    teacher.add(x.index, times_log<V>(x.teacher() * c.teacher_scale, log_p));
    if constexpr (!kBoth) return;
    const V z = x.z() - student_max;
    const V log_q = mul_add(z, c.inverse_temperature, student_log_scale);
    student.add(x.index, times_log<V>(x.student() * c.student_scale, log_q));
    const auto greatest = (z == 0) & (w == 0);
    agreements.add(x.index, greatest ? V{} + 1 : V{});
  });
  return {-student.total(), -teacher.total(), agreements.total() > 0};
}

// The moments of Statistics (kernels.h), for one row per lane, or for parts of one row in all
// lanes. Moments are doubles, because logits may be of any size.
template <class T>
struct Moments {
  DoubleSums<T> student, teacher;
  Register<T> student_count{}, teacher_count{};

  // Sum squares over the classes that student and teacher do not both mask, or sum the logits that
  // are not masked.
  FASTKD_HOST_DEVICE void add(Register<T> z, Register<T> w, bool squares) {
    using V = Register<T>;
    auto masked = z == -kInfinity<T>, teacher_masked = w == -kInfinity<T>;
    if (squares) masked = teacher_masked = masked & teacher_masked;
    student_count += masked ? V{} : V{} + 1;
    teacher_count += teacher_masked ? V{} : V{} + 1;
    student.add(masked ? V{} : z, squares);
    teacher.add(teacher_masked ? V{} : w, squares);
  }
};

// Add the moments of a block. The function is not inlined, because most divergences need no
// moments.
template <class T, class S>
__attribute__((noinline)) void add_moments(const RowBlock<T, S>& b, bool squares, Statistics* to) {
  Moments<T> sums;
  for_registers(b, [&](const auto& x) FASTKD_INLINE { sums.add(x.z(), x.w(), squares); });
  to->student_moment += sums.student.total(), to->teacher_moment += sums.teacher.total();
  to->student_count += precise_sum_of<T>(sums.student_count);
  to->teacher_count += precise_sum_of<T>(sums.teacher_count);
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
