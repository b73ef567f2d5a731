// The loops of the sweeps after the first (scan.h): each works on one block of one row, which lies
// in the L1 cache, and is vectorised by the compiler. Letters as in numerics.h; docs/maths.md
// derives the formulas.
#pragma once
#include "../divergences.h"
#include "scan.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// How the second sweep has its exponentials and d: exponentials kept by the first, or computed
// anew; and then d from logits relative to the maxima, in rows where these are far apart, and in
// rows whose student and teacher have temperatures of their own. kUnit has none: p and q are those
// of Cosine.
enum class Way { kKept, kAnew, kApart, kSeparate, kUnit };

// How the sweeps form d from two logits.
template <class T>
struct Gaps {
  T inverse_temperature, teacher_inverse_temperature;
  T log_ratio;  // d = (w - z) / t - log_ratio
  Way way;      // for rows that are not kept
};

// The constants of one row for the sweeps after the first.
template <class T, class S>
struct Coefficients : Gaps<T> {
  Exponential<T, S> student, teacher;  // q and p themselves, or for kept rows
  T student_scale, teacher_scale;      // q and p over the kept exponentials
  Exponential<T, S> own;               // softmax(z), where it is no power of q
  T soft_gain;  // gradient = soft_gain * (slope - ...) + hard_gain * exp(z) + uniform
  T hard_gain;
  T kept_hard_gain;                        // for powers of kept exponentials
  T kept_student_gain, kept_teacher_gain;  // soft_gain times the scales above
  T uniform;                               // label smoothing's share of the target
  T student_share;                         // of q, and
  T constant_share;                        // of 1, which balance the slopes (divergences.h)
  T bound;  // what log(p / q) is bounded by from below; as a literal it is compiled to more
  // Of a row whose sums leave its label out (label.h): adds rest_gain * q to other classes'
  // gradient
  T rest_gain;
  T label_gradient;                    // the label's
  T student_inverse, teacher_inverse;  // 1 / |z|, 1 / |w|
  T student_mean, teacher_mean;        // what divergences of logits take off these, or 0
  bool plain;                          // the row is (row.h)

  bool apart() const { return this->way != Way::kAnew; }
  // Whether what was kept of the block can be compared over q's scale: not so where the block lies
  // so far below the row's maximum that next to nothing is left of it.
  bool plain_here() const { return plain && student_scale > T(1e-15); }
};

// One class, from its logits and, with Way::kKept, its exponentials.
template <Way kWay, class T, class S>
FASTKD_HOST_DEVICE Element<T> element_of(const Coefficients<T, S>& c, T z, T w, T student_kept,
                                         T teacher_kept) {
  if constexpr (kWay == Way::kUnit) {
    return {w * c.teacher_inverse, z * c.student_inverse, T(0), T(0), T(0)};
  }
  const T q = kWay == Way::kKept ? student_kept * c.student_scale : c.student(z);
  const T p = kWay == Way::kKept ? teacher_kept * c.teacher_scale : c.teacher(w);
  T gap;
  if constexpr (kWay == Way::kSeparate) {
    gap = (w - c.teacher.max) * c.teacher_inverse_temperature -
          (z - c.student.max) * c.inverse_temperature;
  } else if constexpr (kWay == Way::kApart) {
    gap = ((w - c.teacher.max) - (z - c.student.max)) * c.inverse_temperature;
  } else {
    gap = (w - z) * c.inverse_temperature;
  }
  return element<T>(p, q, gap - c.log_ratio, c.bound);
}

// The gap of two logits, of which one may lie far above its row's others: nothing but their means
// is taken off first.
template <Way kWay, class T, class S>
FASTKD_HOST_DEVICE T logit_gap(const Coefficients<T, S>& c, T z, T w) {
  const T from_z = z - c.student_mean, from_w = w - c.teacher_mean;
  if constexpr (kWay == Way::kSeparate) {
    return from_w * c.teacher_inverse_temperature - from_z * c.inverse_temperature;
  }
  return (from_w - from_z) * c.inverse_temperature;
}

struct SlopeSums {
  double value, slope, classes;
};

// Writes the forward KL's gradient but for the label's share, and returns its sum; and that of q -
// p with kDecoupled, where it is of the classes other than the label. grad may be the student
// itself. student_kept and teacher_kept are read by Way::kKept alone. Not inlined: a function of
// all its forms saves more registers than a row of few blocks has time for.
template <Hard kHard, Way kWay, bool kDecoupled, class T, class S, class L>
__attribute__((noinline)) SlopeSums write_gradient(const Coefficients<T, S>& coefficients,
                                                   const Vectors<const L>& student,
                                                   const Vectors<const L>& teacher,
                                                   const T* student_kept, const T* teacher_kept,
                                                   const Vectors<L>& grad, int64_t count) {
  const Coefficients<T, S> c = coefficients;
  T values[kLanes] = {}, diffs[kLanes] = {};
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_buffer[kWidth], teacher_buffer[kWidth], grad_buffer[kWidth];
    const T* student_lanes = unpack<kWidth>(student.at(at), student_buffer);
    const T* teacher_lanes = unpack<kWidth>(teacher.at(at), teacher_buffer);
    T* grad_lanes = unpacked(grad.at(at), grad_buffer);
    prefetch_next<Into::kL2, kWidth>(grad.at(at));
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T z = student_lanes[i], w = teacher_lanes[i];
      T student_power = 0, teacher_power = 0;
      if constexpr (kWay == Way::kKept) {
        student_power = student_kept[at + i], teacher_power = teacher_kept[at + i];
      }
      const Element<T> e = element_of<kWay>(c, z, w, student_power, teacher_power);
      const Evaluated<T> kl = ForwardKL::at(e);
      values[i] += kl.value;
      if constexpr (kDecoupled) diffs[i] += kl.slope;
      T g = c.uniform;
      if constexpr (kDecoupled) g += c.rest_gain * e.q;
      // A power of what was kept, not of q: then q is used only for q - p, and costs no product.
      constexpr bool kOfKept = kWay == Way::kKept && kHard != Hard::kOwn;
      const T hard_gain = kOfKept ? c.kept_hard_gain : c.hard_gain;
      const T tempered = kOfKept ? student_power : e.q;
      if constexpr (kHard != Hard::kNone) {
        g += hard_gain * hard_exponential<kHard>(tempered, z, c.own);
      }
      grad_lanes[i] = g + c.soft_gain * kl.slope;
    }
    pack<kWidth>(grad_buffer, grad.at(at));
  });
  return {sum_of(values), kDecoupled ? sum_of(diffs) : 0.0, 0.0};
}

// JensenShannon where mix is 1/2, in fp32. With h = d / 2 it is 1/2 (p + q) (h tanh h - log cosh
// h), and log(m / q) is h + log cosh h = max(d, 0) - log(max(p, q) / m): one artanh without an
// exponent. Its element has h for d, and the rest of what is made of d is not used.
template <class T>
FASTKD_HOST_DEVICE T even_ratio(T p, T q) {
  // Of the greater over m: (m - max) / (m + max) but for its sign, at most 1/3.
  const T apart = std::fabs(p - q);
  const T sum = p + q + least<T>();
  return apart / (T(2) * sum + apart);
}
// 1/2 log(max(p, q) / m), minimax for the relative error: 1.6e-8.
template <class V>
FASTKD_HOST_DEVICE V even_log(V ratio) {
  const V y = ratio * ratio;
  V log = y * 0.1342574901f + 0.141183099f;
  log = log * y + 0.2000378032f;
  log = log * y + 0.3333332017f;
  log = log * y + 1.0f;
  return log * ratio;
}

struct EvenJensenShannon {
  static constexpr Balance kBalance = Balance::kStudent;

  template <class T>
  static FASTKD_HOST_DEVICE Evaluated<T> at(const Element<T>& e, const ConstantsOf<T>& k, T ratio) {
    const T half = e.d, square = half * half;
    const T size = bounded_above(std::fabs(half), k.bound);
    const bool small = size < T(kSeriesLimit / 2);
    const T log = even_log(ratio);
    // Near d = 0: 1/2 (h tanh h - log cosh h) / h^2 within 5e-8 of itself, and h + log cosh h
    // within 9e-8.
    T near = square * T(0.05518872271) - T(0.1249992841);
    near = (near * square + T(0.25)) * square;
    const T near_slope = half * (half * (square * T(0.0415164371) - T(0.25)) - T(0.5));
    const T slope = log - (half > 0 ? size : T(0));
    const T lesser = e.p < e.q ? e.p : e.q;
    return {(e.p + e.q) * (small ? near : log) - (small ? T(0) : lesser * size),
            e.q * (small ? near_slope : slope)};
  }
};

template <class D>
constexpr bool kIsEven = std::is_same<D, EvenJensenShannon>::value;
// Its division has a loop of its own: what follows waits for it, and a processor looks ahead some
// 128 operations, which are three vectors' otherwise.
template <class D, Way kWay>
constexpr bool kDividesFirst = kWay == Way::kKept && kIsEven<D>;
// Computes D at one class; only EvenJensenShannon reads `ratio`. A function, because GCC 12 keeps
// an Evaluated that is declared first and assigned later in memory, and does not vectorise the
// loop.
template <class D, class T>
FASTKD_HOST_DEVICE Evaluated<T> evaluate(const Element<T>& e, const ConstantsOf<T>& k, T ratio) {
  if constexpr (kIsEven<D>) {
    return D::at(e, k, ratio);
  } else {
    return D::at(e, k);
  }
}
// For the other divergences: sums value and slopes, and leaves the slopes for balance_gradient,
// perhaps in the place of the teacher's kept exponentials; and q, unless the student's are kept.
template <class D, Way kWay, class T, class S, class L>
SlopeSums sum_slopes(const Coefficients<T, S>& coefficients, const Constants& constants,
                     const Vectors<const L>& student, const Vectors<const L>& teacher,
                     const T* student_kept, const T* teacher_kept, T* q, T* slopes, int64_t count) {
  Coefficients<T, S> c = coefficients;
  const ConstantsOf<T> k = constants_in<T>(constants);
  if constexpr (kIsEven<D>) {
    c.inverse_temperature *= T(0.5), c.teacher_inverse_temperature *= T(0.5);
    c.log_ratio *= T(0.5);
  }
  T values[kLanes] = {}, sums[kLanes] = {}, classes[kLanes] = {};
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_buffer[kWidth], teacher_buffer[kWidth];
    const T* student_lanes = unpack<kWidth>(student.at(at), student_buffer);
    const T* teacher_lanes = unpack<kWidth>(teacher.at(at), teacher_buffer);
    constexpr bool kDivided = kDividesFirst<D, kWay>;
    T ratios[kWidth];
    if constexpr (kDivided) {
#pragma omp simd
      for (int64_t i = 0; i < kWidth; ++i) {
        ratios[i] = even_ratio(teacher_kept[at + i] * c.teacher_scale,
                               student_kept[at + i] * c.student_scale);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      T student_power = 0, teacher_power = 0;
      if constexpr (kWay == Way::kKept) {
        student_power = student_kept[at + i], teacher_power = teacher_kept[at + i];
      }
      Element<T> e =
          element_of<kWay>(c, student_lanes[i], teacher_lanes[i], student_power, teacher_power);
      if constexpr (is_mean(D::kBalance)) {
        e.gap = logit_gap<kWay>(c, student_lanes[i], teacher_lanes[i]);
      }
      const Evaluated<T> here = evaluate<D>(e, k, kDivided ? ratios[i] : even_ratio(e.p, e.q));
      const bool counts = !leaves_out_masked(D::kBalance) || here.slope == here.slope;
      const T summed = D::kBalance == Balance::kUnit ? here.value : here.slope;
      values[i] += counts ? here.value : T(0);
      if constexpr (D::kBalance != Balance::kMean) sums[i] += counts ? summed : T(0);
      if constexpr (is_mean(D::kBalance)) classes[i] += counts ? T(1) : T(0);
      if constexpr (kWay != Way::kKept) q[at + i] = e.q;
      slopes[at + i] = here.slope;
    }
  });
  return {sum_of(values), sum_of(sums), is_mean(D::kBalance) ? sum_of(classes) : 0.0};
}

// The reverse KL's slopes -q d are formed twice, which costs less than to keep them: in the first
// loop they are summed, without the teacher's exponentials, and in the second balanced. With kValue
// that one also sums its value, class by class. Hard and Way as in write_gradient().
template <Way kWay, class T, class S, class L>
__attribute__((noinline)) double sum_reverse(const Coefficients<T, S>& coefficients,
                                             const Vectors<const L>& student,
                                             const Vectors<const L>& teacher, const T* student_kept,
                                             int64_t count) {
  const Coefficients<T, S> c = coefficients;
  // Over kLanes sums GCC 12 makes a branch of times_log().
  constexpr int64_t kFewLanes = kPerRegister<float> < 8 ? 8 : kPerRegister<float>;
  T sums[kFewLanes] = {};
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_buffer[kWidth], teacher_buffer[kWidth];
    const T* z = unpack<kWidth>(student.at(at), student_buffer);
    const T* w = unpack<kWidth>(teacher.at(at), teacher_buffer);
    constexpr int64_t kPart = kWidth < kFewLanes ? kWidth : kFewLanes;
    for (int64_t part = 0; part < kWidth; part += kPart) {
#pragma omp simd
      for (int64_t i = 0; i < kPart; ++i) {
        T power = 0;
        if constexpr (kWay == Way::kKept) power = student_kept[at + part + i];
        const Element<T> e = element_of<kWay>(c, z[part + i], w[part + i], power, T(0));
        sums[i] += times_log(e.q, bounded_above(e.d, -c.bound));
      }
    }
  });
  return -precise_sum_of(sums);
}

template <Hard kHard, Way kWay, bool kValue, class T, class S, class L>
__attribute__((noinline)) double write_reverse(const Coefficients<T, S>& coefficients,
                                               const Vectors<const L>& student,
                                               const Vectors<const L>& teacher,
                                               const T* student_kept, const T* teacher_kept,
                                               const Vectors<L>& grad, int64_t count) {
  const Coefficients<T, S> c = coefficients;
  T values[kLanes] = {};
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_buffer[kWidth], teacher_buffer[kWidth], grad_buffer[kWidth];
    const T* z = unpack<kWidth>(student.at(at), student_buffer);
    const T* w = unpack<kWidth>(teacher.at(at), teacher_buffer);
    T* grad_lanes = unpacked(grad.at(at), grad_buffer);
    prefetch_next<Into::kL2, kWidth>(grad.at(at));
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      T student_power = 0, teacher_power = 0;
      if constexpr (kWay == Way::kKept) {
        student_power = student_kept[at + i], teacher_power = teacher_kept[at + i];
      }
      const Element<T> e = element_of<kWay>(c, z[i], w[i], student_power, teacher_power);
      const Evaluated<T> here = ReverseKL::at(e);
      if constexpr (kValue) values[i] += here.value;
      T g = c.uniform;
      if constexpr (kHard != Hard::kNone) {
        g += c.hard_gain * hard_exponential<kHard>(e.q, z[i], c.own);
      }
      grad_lanes[i] = g + weighted_part(c.soft_gain, here.slope - e.q * c.student_share);
    }
    pack<kWidth>(grad_buffer, grad.at(at));
  });
  return kValue ? sum_of(values) : 0.0;
}

// `q_scale` makes q of what is given for it. With kAnySlope slopes may be NaN, where the gradient
// is 0, a constant may balance them, and the gain may be 0.
template <Hard kHard, bool kAnySlope, class T, class S, class L>
void balance_gradient(const Coefficients<T, S>& coefficients, const Vectors<const L>& student,
                      const T* q, T q_scale, const T* slopes, const Vectors<L>& grad,
                      int64_t count) {
  const Coefficients<T, S> c = coefficients;
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_buffer[kWidth], grad_buffer[kWidth];
    const T* student_lanes = unpack<kWidth>(student.at(at), student_buffer);
    T* grad_lanes = unpacked(grad.at(at), grad_buffer);
    prefetch_next<Into::kL2, kWidth>(grad.at(at));
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T here = q[at + i] * q_scale;
      T g = c.uniform;
      if constexpr (kHard != Hard::kNone) {
        g += c.hard_gain * hard_exponential<kHard>(here, student_lanes[i], c.own);
      }
      const T unbalanced = slopes[at + i];
      if constexpr (kAnySlope) {
        const T slope = unbalanced - here * c.student_share - c.constant_share;
        grad_lanes[i] = g + weighted_part(c.soft_gain, unbalanced == unbalanced ? slope : T(0));
      } else {
        grad_lanes[i] = g + c.soft_gain * (unbalanced - here * c.student_share);
      }
    }
    pack<kWidth>(grad_buffer, grad.at(at));
  });
}

// The sum of p log p alone, which the soft cross entropy asks for.
template <bool kKept, class T, class S, class L>
double sum_p_log_p(const Coefficients<T, S>& coefficients, T log_scale,
                   const Vectors<const L>& teacher, const T* teacher_kept, int64_t count) {
  const Coefficients<T, S> c = coefficients;
  T sums[kLanes] = {};
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T buffer[kWidth];
    const T* w = unpack<kWidth>(teacher.at(at), buffer);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const T p = kKept ? teacher_kept[at + i] * c.teacher_scale : c.teacher(w[i]);
      const T log_p = (w[i] - c.teacher.max) * c.teacher_inverse_temperature + log_scale;
      sums[i] += p * bounded_below(log_p, c.bound);
    }
  });
  return sum_of(sums);
}

template <class T>
struct Entropies {
  T student, teacher;
  int agreement;
};

// The moments of Statistics (kernels.h).
struct Moments {
  double student = 0, teacher = 0, student_count = 0, teacher_count = 0;
};

// Sums squares over the classes that student and teacher do not both mask. In double: logits may be
// of any size. The masks have a loop of their own in T: in one loop with the conversion to double
// GCC 12's code takes four times as long.
template <class T, class L>
Moments sum_squares(const Vectors<const L>& student, const Vectors<const L>& teacher,
                    int64_t count) {
  double of_student[kLanes] = {}, of_teacher[kLanes] = {};
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T student_buffer[kWidth], teacher_buffer[kWidth], student_counted[kWidth],
        teacher_counted[kWidth];
    const T* z = unpack<kWidth>(student.at(at), student_buffer);
    const T* w = unpack<kWidth>(teacher.at(at), teacher_buffer);
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
template <class T, class L>
void sum_logits(const Vectors<const L>& logits, int64_t count, double* sum, double* classes) {
  double sums[kLanes] = {};
  T counts[kLanes] = {};
  for_vectors<L>(count, [&](int64_t at, auto width) FASTKD_INLINE {
    constexpr int64_t kWidth = decltype(width)::value;
    T buffer[kWidth];
    const T* lanes = unpack<kWidth>(logits.at(at), buffer);
#pragma omp simd
    for (int64_t i = 0; i < kWidth; ++i) {
      const bool masked = lanes[i] == -kInfinity<T>;
      counts[i] += masked ? T(0) : T(1);
      sums[i] += static_cast<double>(masked ? T(0) : lanes[i]);
    }
  });
  *sum = sum_of(sums), *classes = static_cast<double>(sum_of(counts));
}

template <bool kSquares, class T, class L>
Moments sum_moments(const Vectors<const L>& student, const Vectors<const L>& teacher,
                    int64_t count) {
  if constexpr (kSquares) return sum_squares<T>(student, teacher, count);
  Moments moments;
  sum_logits<T>(student, count, &moments.student, &moments.student_count);
  sum_logits<T>(teacher, count, &moments.teacher, &moments.teacher_count);
  return moments;
}

// What only `terms` asks for; a sweep of its own, so that the others need not pay for it.
template <class T, class S>
Entropies<T> sum_entropies(const Coefficients<T, S> c, T student_log_scale, T teacher_log_scale,
                           T student_max, T teacher_max, const T* student, const T* teacher,
                           int64_t count) {
  T student_entropy = 0, teacher_entropy = 0;
  int agreement = 0;
#pragma omp simd reduction(+ : student_entropy, teacher_entropy) reduction(| : agreement)
  for (int64_t i = 0; i < count; ++i) {
    const T z = student[i], w = teacher[i];
    const T log_q = (z - student_max) * c.inverse_temperature + student_log_scale;
    const T log_p = (w - teacher_max) * c.teacher_inverse_temperature + teacher_log_scale;
    student_entropy -= times_log(c.student(z), log_q);
    teacher_entropy -= times_log(c.teacher(w), log_p);
    agreement |= (z == student_max) & (w == teacher_max);
  }
  return {student_entropy, teacher_entropy, agreement};
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
