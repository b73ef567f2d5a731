// What one row needs beyond its logits: its temperature and label, the merging of statistics, and
// the constants of the second sweep.
#pragma once
#include <cmath>

#include "blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

enum class State { kNormal, kIgnored, kInvalid };

template <class T>
FASTKD_HOST_DEVICE bool finite(T x) {
  return x - x == T(0);
}

// The exponent as the loops form it: rounded once or twice, which only the compiler knows. Not
// inlined, or it would see that `offset` is that product already.
template <class T>
__attribute__((noinline)) T exponent(T logit, T factor, T offset) {
  return logit * factor - offset;
}

template <class T>
struct Row {
  State state = State::kNormal;
  int64_t label = -1;
  Hard hard = Hard::kNone;           // in the sums
  Hard gradient_hard = Hard::kNone;  // in the gradient: not where the hard term weighs nothing
  double temperature = 1;
  T factor = 0;       // of the tempered exponential
  T hard_factor = 0;  // of exp(z)
  int power = 0;      // exp(z) = exp(z / t)^power, or 0: it has an exponential of its own

  // What the exponentials subtract for a maximum. Rounding it shifts all of a row alike, so sums
  // must be compared by these offsets, not by the maxima themselves.
  double offset(double max) const { return static_cast<T>(static_cast<T>(max) * factor); }
  double hard_offset(double max) const {
    return power > 0 ? power * offset(max) : static_cast<T>(static_cast<T>(max) * hard_factor);
  }
  // What is left of the maximum's own exponent, because the offset is rounded.
  double residue(double max) const {
    return exponent(static_cast<T>(max), factor, static_cast<T>(offset(max)));
  }
  double hard_residue(double max) const {
    if (power > 0) return power * residue(max);
    return exponent(static_cast<T>(max), hard_factor, static_cast<T>(hard_offset(max)));
  }
};

template <class T>
Row<T> make_row(const Inputs& in, int64_t index, bool terms) {
  Row<T> row;
  row.temperature = in.row_temperature != nullptr
                        ? static_cast<double>(static_cast<const T*>(in.row_temperature)[index])
                        : in.temperature;
  if (!(row.temperature > 0) || !finite(row.temperature)) row.state = State::kInvalid;
  row.factor = static_cast<T>(kLog2E / row.temperature);
  row.hard_factor = static_cast<T>(kLog2E);
  if (in.labels == nullptr) return row;
  row.label = in.labels[index];
  if (row.label == in.ignore_index) {
    row.state = State::kIgnored;
    row.label = -1;
    return row;
  }
  if (row.label < 0 || row.label >= in.classes) row.state = State::kInvalid;
  if (in.hard_weight == 0 && !terms) return row;
  row.hard = Hard::kOwn;
  // Speed is no aim in fp64: one form of the loops is enough there.
  if (sizeof(T) == sizeof(float)) {
    if (row.temperature == 1) row.hard = Hard::kPower1, row.power = 1;
    if (row.temperature == 2) row.hard = Hard::kPower2, row.power = 2;
    if (row.temperature == 3) row.hard = Hard::kPower3, row.power = 3;
    if (row.temperature == 4) row.hard = Hard::kPower4, row.power = 4;
  }
  if (in.hard_weight != 0) row.gradient_hard = row.hard;
  return row;
}

constexpr double kLowest = -__builtin_huge_val();
constexpr Statistics kNoStatistics = {kLowest, 0, 0, kLowest, 0};

// 2^(from - to); an empty sum, whose maximum is -inf, stays empty.
inline double rescale(double from, double to) { return from == to ? 1.0 : std::exp2(from - to); }

template <class T>
void merge_student(const Row<T>& row, double max, double sum, double hard_sum, Statistics* into) {
  const double top = max > into->student_max ? max : into->student_max;
  const double to = row.offset(top), hard_to = row.hard_offset(top);
  const double mine = row.offset(into->student_max), hard_mine = row.hard_offset(into->student_max);
  const double other = row.offset(max), hard_other = row.hard_offset(max);
  into->student_sum = into->student_sum * rescale(mine, to) + sum * rescale(other, to);
  into->hard_sum =
      into->hard_sum * rescale(hard_mine, hard_to) + hard_sum * rescale(hard_other, hard_to);
  into->student_max = top;
}

template <class T>
void merge_teacher(const Row<T>& row, double max, double sum, Statistics* into) {
  const double top = max > into->teacher_max ? max : into->teacher_max;
  const double to = row.offset(top);
  into->teacher_sum = into->teacher_sum * rescale(row.offset(into->teacher_max), to) +
                      sum * rescale(row.offset(max), to);
  into->teacher_max = top;
}

template <class T>
void merge(const Row<T>& row, const Statistics& other, Statistics* into) {
  merge_student(row, other.student_max, other.student_sum, other.hard_sum, into);
  merge_teacher(row, other.teacher_max, other.teacher_sum, into);
}

inline void add(const Sums& other, Sums* into) {
  into->value += other.value;
  into->slope += other.slope;
  into->student_logits += other.student_logits;
  into->student_entropy += other.student_entropy;
  into->teacher_entropy += other.teacher_entropy;
  into->agreement += other.agreement;
}

// What the gradient is made from. Rounded to the compute type before it is used, because backward
// reads it back from `stats` and has to arrive at the same bits.
template <class T>
struct Scales {
  T student_max, student_scale, hard_scale, teacher_max, teacher_scale;

  // Not so where a logit is NaN or +inf, or all of them are -inf.
  bool valid() const {
    return finite(student_max) && finite(student_scale) && finite(teacher_max) &&
           finite(teacher_scale);
  }
};

// log(q) = (z - max z) / t + this; with the offset's rounding, which is part of the sums, taken
// out.
template <class T>
T log_scale(const Row<T>& row, T max, T scale) {
  return static_cast<T>(std::log(static_cast<double>(scale)) + row.residue(max) * kLn2);
}

template <class T>
Scales<T> make_scales(const Row<T>& row, const Statistics& of) {
  return {static_cast<T>(of.student_max), static_cast<T>(1 / of.student_sum),
          row.hard == Hard::kNone ? T(0) : static_cast<T>(1 / of.hard_sum),
          static_cast<T>(of.teacher_max), static_cast<T>(1 / of.teacher_sum)};
}

// `gain` multiplies the gradient of the weighted loss.
template <class T>
Coefficients<T> make_coefficients(const Inputs& in, const Row<T>& row, const Scales<T>& s,
                                  double gain) {
  const double student_offset = row.offset(s.student_max);
  const double teacher_offset = row.offset(s.teacher_max);
  const double student_scale = s.student_scale, teacher_scale = s.teacher_scale;
  const double hard_gain = gain * in.hard_weight;
  double power_gain = hard_gain * static_cast<double>(s.hard_scale);
  for (int i = 0; i < row.power; ++i) power_gain /= student_scale;
  return {
      Exponential<T>(row.factor, static_cast<T>(student_offset), student_scale),
      Exponential<T>(row.factor, static_cast<T>(teacher_offset), teacher_scale),
      s.student_scale,
      s.teacher_scale,
      Exponential<T>(row.hard_factor, static_cast<T>(row.hard_offset(s.student_max)), s.hard_scale),
      static_cast<T>(row.factor * kLn2),
      static_cast<T>((teacher_offset - student_offset) * kLn2 +
                     std::log(student_scale / teacher_scale)),
      static_cast<T>(gain * in.soft_weight * row.temperature),
      static_cast<T>(row.power > 0 ? power_gain : hard_gain),
      static_cast<T>(row.hard == Hard::kNone
                         ? 0.0
                         : -hard_gain * in.label_smoothing / static_cast<double>(in.classes))};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
