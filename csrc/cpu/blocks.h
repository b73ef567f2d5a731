// The loops: each works on one block of one row, a multiple of kLanes classes that lies in the L1
// cache, and is vectorised by the compiler. Letters as in numerics.h; docs/maths.md derives the
// formulas.
#pragma once
#include "../divergences.h"
#include "../kernels.h"
#include "storage.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// 4 KB of fp32: three blocks stay in L1. Sums are kept in fp32 lanes within a block and in double
// beyond, so the block is also what bounds the rounding error of a sum.
constexpr int64_t kBlock = 1024;
// Blocks are padded with -inf to a multiple of this, so that no loop has a tail.
constexpr int64_t kLanes = 32;
static_assert(kSegment % kBlock == 0 && kBlock % kLanes == 0, "");

FASTKD_HOST_DEVICE void assume_padded(int64_t count) {
  if (count % kLanes != 0 || count <= 0) __builtin_unreachable();
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));

// How exp(z) is had for the hard term: not at all, as a power of exp(z / t), or by an exponential
// of its own.
enum class Hard { kNone, kPower1, kPower2, kPower3, kPower4, kOwn };

template <Hard kHard, class T>
FASTKD_HOST_DEVICE T hard_exponential(T tempered, T logit, const Exponential<T>& own) {
  if constexpr (kHard == Hard::kPower1) return tempered;
  if constexpr (kHard == Hard::kPower2) return tempered * tempered;
  if constexpr (kHard == Hard::kPower3) return tempered * tempered * tempered;
  if constexpr (kHard == Hard::kPower4) return (tempered * tempered) * (tempered * tempered);
  if constexpr (kHard == Hard::kOwn) return own(logit);
  return T(0);
}

// NaN is passed over here; it makes the sums NaN.
template <class T, class S>
T maximum(const S* logits, int64_t count) {
  assume_padded(count);
  T result = -kInfinity<T>;
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < count; ++i) {
    const T x = widen(logits[i]);
    result = x > result ? x : result;
  }
  return result;
}

template <class T>
struct Pair {
  T tempered, hard;
};

template <Hard kHard, class T, class S>
Pair<T> sum_exponentials(const S* logits, int64_t count, const Exponential<T> tempered,
                         const Exponential<T> own) {
  assume_padded(count);
  T sum = 0, hard_sum = 0;
#pragma omp simd reduction(+ : sum, hard_sum)
  for (int64_t i = 0; i < count; ++i) {
    const T logit = widen(logits[i]);
    const T e = tempered(logit);
    sum += e;
    if constexpr (kHard != Hard::kNone) hard_sum += hard_exponential<kHard>(e, logit, own);
  }
  return {sum, hard_sum};
}

// The second sweep's constants of one row.
template <class T>
struct Coefficients {
  Exponential<T> student, teacher;  // q and p themselves
  Exponential<T> own;               // softmax(z), where it is no power of q
  T inverse_temperature;
  T log_ratio;  // d = (w - z) / t - log_ratio
  T soft_gain;  // gradient = soft_gain * gradient(element) + hard_gain * exp(z) + uniform
  T hard_gain;
  T uniform;  // label smoothing's share of the target
};

// Writes the gradient but for the label's share, and returns the sum of the divergence. grad may be
// the student itself.
template <class D, Hard kHard, class T, class S>
T write_gradient(const Coefficients<T> c, const S* student, const S* teacher, S* grad,
                 int64_t count) {
  static_assert(D::kSlopeSumKnown, "a sweep that sums the slopes must come first");
  assume_padded(count);
  T value = 0;
#pragma omp simd reduction(+ : value)
  for (int64_t i = 0; i < count; ++i) {
    const T z = widen(student[i]), w = widen(teacher[i]);
    const T q = c.student(z), p = c.teacher(w);
    const Element<T> e = element<T>(p, q, (w - z) * c.inverse_temperature - c.log_ratio);
    value += D::template value<T>(e);
    T g = c.uniform;
    if constexpr (kHard != Hard::kNone) g += c.hard_gain * hard_exponential<kHard>(q, z, c.own);
    grad[i] = narrow<S>(g + c.soft_gain * D::template gradient<T>(e));
  }
  return value;
}

template <class T>
struct Entropies {
  T student, teacher;
  int agreement;
};

// What only `terms` asks for; a sweep of its own, so that the others need not pay for it.
template <class T>
Entropies<T> sum_entropies(const Coefficients<T> c, T log_student_sum, T log_teacher_sum,
                           T student_max, T teacher_max, const T* student, const T* teacher,
                           int64_t count) {
  assume_padded(count);
  T student_entropy = 0, teacher_entropy = 0;
  int agreement = 0;
#pragma omp simd reduction(+ : student_entropy, teacher_entropy) reduction(| : agreement)
  for (int64_t i = 0; i < count; ++i) {
    const T z = student[i], w = teacher[i];
    const T log_q = (z - student_max) * c.inverse_temperature - log_student_sum;
    const T log_p = (w - teacher_max) * c.inverse_temperature - log_teacher_sum;
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
