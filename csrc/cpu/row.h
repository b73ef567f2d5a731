// What one row needs beyond its logits: its temperature and label, the merging of statistics, and
// the constants of the second sweep.
#pragma once
#include <cmath>

#include "blocks.h"
#include "formulas.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

enum class State { kNormal, kIgnored, kInvalid };

// The forward KL, and with the teacher's entropy the soft cross entropy, is the teacher's mean of
// log(p / q). All that the mean takes is in the first sweep's sums; and where it is plainly above
// 0, as it stands it will do: no sweep is needed for it, and the gradient is q - p as it stands.
// Near 0 both would cancel, and the second sweep forms them class by class (docs/maths.md, section
// 3).
constexpr bool is_mean_of_gaps(Divergence id) {
  return id == Divergence::kForwardKL || id == Divergence::kSoftCrossEntropy;
}
// The JSD with mix 1/2, in a row whose forward KL is plain, needs no forms for where p is near q.
inline bool is_even_jsd(const Inputs& in) {
  return in.divergence == Divergence::kJensenShannon && in.mix == 0.5;
}
// Plain is what is at least so many nats, and this share of the greater of the two parts of which
// it is the difference: rounding costs up to 4e-7 of a part. What is greater than the last of
// these, or infinite, or NaN, has to do with masks.
constexpr double kPlain = 0.05, kShare = 0.1, kGreatest = 1e4;

template <class T>
struct Row : Settings<double> {
  State state = State::kNormal;
  int64_t label = -1;
  int64_t left_out = -1;    // the label where the sums are of the other classes (kDecoupled)
  Hard hard = Hard::kNone;  // in the sums
  Hard gradient_hard = Hard::kNone;  // in the gradient: not where the hard term weighs nothing
  bool unit = false;                 // the divergence is of unit vectors (kCosine)
  bool centered = false;             // it is of centered logits (kCenteredSquaredError)
  bool of_logits = false;            // it compares logits, of which no softmax is taken
  bool gaps = false;                 // the first sweep sums what shows whether a row is plain
  T factor = 0;                      // of the student's tempered exponential
  T teacher_factor = 0;              // of the teacher's
  T hard_factor = 0;                 // of exp(z)
  int power = 0;  // exp(z) = exp(z / t)^power, or 0: it has an exponential of its own

  // What sums of exponentials, tempered or not, are multiplied by when the maximum they are
  // relative to becomes another. An empty sum, whose maximum is -inf, stays empty.
  static double rescale(double from, double to, double exponent) {
    return from == to ? 1.0 : std::exp2((from - to) * exponent);
  }
  double rescale(double from, double to) const {
    return rescale(from, to, static_cast<double>(factor));
  }
  double teacher_rescale(double from, double to) const {
    return rescale(from, to, static_cast<double>(teacher_factor));
  }
  double hard_rescale(double from, double to) const { return rescale(from, to, hard_exponent()); }
  // log2(exp(z)) / z as the sums have it.
  double hard_exponent() const {
    return power > 0 ? power * static_cast<double>(factor) : static_cast<double>(hard_factor);
  }
};

template <class T>
double row_setting(const Inputs& in, RowSetting which, int64_t index, double otherwise) {
  if (in.row_settings == nullptr) return otherwise;
  return static_cast<double>(static_cast<const T*>(in.row_settings)[which * in.rows + index]);
}

inline bool is_temperature(double t) { return t > 0 && finite(t); }

template <class T>
Row<T> make_row(const Inputs& in, int64_t index, bool terms) {
  Row<T> row;
  row.temperature = row_setting<T>(in, kTemperature, index, in.temperature);
  row.teacher_temperature = row_setting<T>(in, kTeacherTemperature, index, in.teacher_temperature);
  row.hard_weight = row_setting<T>(in, kHardWeight, index, in.hard_weight);
  row.soft_weight = row_setting<T>(in, kSoftWeight, index, in.soft_weight);
  if (!is_temperature(row.temperature) || !is_temperature(row.teacher_temperature)) {
    row.state = State::kInvalid;
  }
  row.factor = static_cast<T>(kLog2E / row.temperature);
  row.teacher_factor = static_cast<T>(kLog2E / row.teacher_temperature);
  row.hard_factor = static_cast<T>(kLog2E);
  row.unit = in.divergence == Divergence::kCosine;
  row.centered = in.divergence == Divergence::kCenteredSquaredError;
  row.of_logits = row.centered || in.divergence == Divergence::kSquaredError;
  row.gaps = sizeof(T) == sizeof(float) && row.temperature == row.teacher_temperature &&
             (is_mean_of_gaps(in.divergence) || is_even_jsd(in));
  const bool decoupled = in.divergence == Divergence::kDecoupled;
  if (in.labels == nullptr) {
    if (decoupled) row.state = State::kInvalid;
    return row;
  }
  row.label = in.labels[index];
  if (row.label == in.ignore_index) {
    row.state = State::kIgnored;
    row.label = -1;
    return row;
  }
  if (row.label < 0 || row.label >= in.classes) row.state = State::kInvalid;
  if (decoupled && row.state == State::kNormal) row.left_out = row.label;
  if (row.hard_weight == 0 && !terms) return row;
  row.hard = Hard::kOwn;
  // Speed is no aim in fp64: one form of the loops is enough there. A power's error is that of
  // exp(z / t) times t: too much where the hard term is the greater part of the gradient.
  const bool precise = row.hard_weight <= row.soft_weight * row.temperature || row.temperature == 1;
  if (sizeof(T) == sizeof(float) && precise && !row.unit) {
    if (row.temperature == 1) row.hard = Hard::kPower1, row.power = 1;
    if (row.temperature == 2) row.hard = Hard::kPower2, row.power = 2;
    if (row.temperature == 3) row.hard = Hard::kPower3, row.power = 3;
    if (row.temperature == 4) row.hard = Hard::kPower4, row.power = 4;
  }
  if (row.hard_weight != 0) row.gradient_hard = row.hard;
  return row;
}

constexpr Statistics kNoStatistics = {kLowest, 0, 0, kLowest, 0};

template <class T>
void merge_student(const Row<T>& row, double max, double sum, double hard_sum, Statistics* into) {
  const double top = max > into->student_max ? max : into->student_max;
  const double mine = into->student_max;
  into->student_sum = into->student_sum * row.rescale(mine, top) + sum * row.rescale(max, top);
  into->hard_sum =
      into->hard_sum * row.hard_rescale(mine, top) + hard_sum * row.hard_rescale(max, top);
  into->student_max = top;
}

template <class T>
void merge_teacher(const Row<T>& row, double max, double sum, Statistics* into) {
  const double top = max > into->teacher_max ? max : into->teacher_max;
  into->teacher_sum = into->teacher_sum * row.teacher_rescale(into->teacher_max, top) +
                      sum * row.teacher_rescale(max, top);
  into->teacher_max = top;
}

// The sum of gaps of some classes, had they other maxima. Not inlined, as merge().
template <class T>
__attribute__((noinline)) double moved_gaps(const Row<T>& row, const Statistics& of,
                                            double student_max, double teacher_max) {
  if (!row.gaps || of.teacher_sum == 0) return 0;
  const double student = student_max - of.student_max, teacher = teacher_max - of.teacher_max;
  return (of.gap_sum + (student - teacher) * of.teacher_sum) *
         row.teacher_rescale(of.teacher_max, teacher_max);
}

// Not inlined: were one of its products fused with the sum in one caller and the other in another,
// a row that threads share would get other bits than a whole one. In fp32, rounding to it hides
// the difference; in fp64 nothing does.
template <class T>
__attribute__((noinline)) void merge(const Row<T>& row, const Statistics& other, Statistics* into) {
  const double student_top = std::fmax(into->student_max, other.student_max);
  const double teacher_top = std::fmax(into->teacher_max, other.teacher_max);
  into->gap_sum = moved_gaps(row, *into, student_top, teacher_top) +
                  moved_gaps(row, other, student_top, teacher_top);
  merge_student(row, other.student_max, other.student_sum, other.hard_sum, into);
  merge_teacher(row, other.teacher_max, other.teacher_sum, into);
  into->student_label += other.student_label;
  into->teacher_label += other.teacher_label;
  into->student_moment += other.student_moment;
  into->teacher_moment += other.teacher_moment;
  into->student_count += other.student_count;
  into->teacher_count += other.teacher_count;
}

inline void add(const Sums& other, Sums* into) {
  into->value += other.value;
  into->slope += other.slope;
  into->classes += other.classes;
  into->student_logits += other.student_logits;
  into->student_entropy += other.student_entropy;
  into->teacher_entropy += other.teacher_entropy;
  into->agreement += other.agreement;
}

// Not inlined, for most divergences need no lengths.
template <class T>
__attribute__((noinline)) void set_inverses(const Row<T>& row, const Statistics& of, Scales<T>* s) {
  const Inverses<T> inverses =
      inverses_of<T>(of.student_moment, of.teacher_moment, row.temperature);
  s->student_inverse = inverses.student;
  s->teacher_inverse = inverses.teacher;
  s->nothing = inverses.nothing;
}
// Not inlined, for the same reason.
template <class T>
__attribute__((noinline)) void set_means(const Statistics& of, Scales<T>* s) {
  s->student_mean = static_cast<T>(of.student_moment / of.student_count);
  s->teacher_mean = static_cast<T>(of.teacher_moment / of.teacher_count);
}

// The forward KL of a row, if it is plain; else 0. In rows whose maxima are far apart it is not.
template <class T>
__attribute__((noinline)) T mean_of(const Row<T>& row, const Statistics& of) {
  if (are_apart(of.student_max, of.teacher_max, row.temperature)) return 0;
  const double inverse = 1 / of.teacher_sum;
  // The exponentials' own temperature, which has been rounded.
  const double factor = static_cast<double>(row.factor) * kLn2;
  const double log_ratio = std::log(of.student_sum * inverse);
  const double mean = of.gap_sum * inverse * factor + log_ratio;
  const bool plain = mean >= kPlain && mean >= kShare * std::fabs(log_ratio) && mean < kGreatest;
  return plain ? static_cast<T>(mean) : T(0);
}

// Not inlined: GCC 12 vectorised the pair of divisions in forward_row and took what follows from
// the unrounded quotients, so that backward arrived at other bits.
template <class T>
__attribute__((noinline)) Scales<T> make_scales(const Row<T>& row, const Statistics& of) {
  Scales<T> s = scales_of<T>(of, row.hard != Hard::kNone, row.left_out >= 0);
  if (row.unit) set_inverses(row, of, &s);
  if (row.centered) set_means(of, &s);
  if (row.gaps) s.mean = mean_of(row, of);
  return s;
}

template <class T>
Gaps<T> make_gaps(const Row<T>& row, const Scales<T>& s) {
  const auto ratio = make_log_ratio<T, double>(row, s.template as<double>(), false);
  const bool same = row.temperature == row.teacher_temperature;
  const bool shifted = ratio.shifted && !(same && row.of_logits);
  return {static_cast<T>(ratio.inverse_temperature), static_cast<T>(1 / row.teacher_temperature),
          static_cast<T>(ratio.log_ratio),
          !same     ? Way::kSeparate
          : shifted ? Way::kApart
                    : Way::kAnew};
}

// Whether the reverse KL is as good as the sum of its slopes: where that is plainly above 0. It has
// the rounding of what all d have in common, which reverse_of() takes off where d is formed from
// the logits themselves; in other rows it is not worth that.
template <class T>
bool is_sum_of_slopes(const Gaps<T>& gaps, T slope) {
  return gaps.way == Way::kAnew && slope >= static_cast<T>(kPlain);
}
// Not inlined, as merge().
template <class T>
__attribute__((noinline)) double reverse_of(const Row<T>& row, const Statistics& of,
                                            const Gaps<T>& gaps, double slope) {
  // The exponentials' own temperature, as in mean_of().
  const double inverse = static_cast<double>(row.factor) * kLn2;
  const double log_ratio =
      (of.teacher_max - of.student_max) * inverse + std::log(of.teacher_sum / of.student_sum);
  return (slope - static_cast<double>(gaps.log_ratio)) *
             (inverse / static_cast<double>(gaps.inverse_temperature)) +
         log_ratio;
}

// `gain` multiplies the gradient of the weighted loss.
template <class S, class T>
Coefficients<T, S> make_coefficients(const Inputs& in, const Row<T>& row, const Scales<T>& s,
                                     double gain) {
  const double student_scale = s.student_scale, teacher_scale = s.teacher_scale;
  const RowGains<double> gains = gains_of<double>(in, row, s.template as<double>(), gain);
  double power = 1;  // of q's scale, in a power of q
  for (int i = 0; i < row.power; ++i) power *= student_scale;
  const double power_gain = gains.hard * static_cast<double>(s.hard_scale) / power;
  const Gaps<T> gaps = make_gaps(row, s);
  return {gaps,
          Exponential<T, S>(row.factor, s.student_max, student_scale),
          Exponential<T, S>(row.teacher_factor, s.teacher_max, teacher_scale),
          s.student_scale,
          s.teacher_scale,
          Exponential<T, S>(row.hard_factor, s.student_max, s.hard_scale),
          static_cast<T>(gains.soft),
          static_cast<T>(row.power > 0 && gaps.way == Way::kAnew ? power_gain : gains.hard),
          0,
          0,
          0,
          static_cast<T>(row.hard == Hard::kNone ? 0.0 : -gains.uniform),
          0,
          0,
          T(-1e30),
          0,
          0,
          s.student_inverse,
          s.teacher_inverse,
          s.student_mean,
          s.teacher_mean,
          s.mean > 0};
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
