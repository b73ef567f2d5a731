// Numbers computed once for each row, not for each class: temperatures and label, merged
// statistics, and the constants of the later sweeps (docs/maths.md, sections 3, 4 and 9).
#pragma once
#include <cmath>

#include "blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

enum class State { kNormal, kIgnored, kInvalid };

// Return true if the divergence's value is the teacher's mean of log(p / q), plus the teacher's
// entropy for the soft cross entropy. The first sweep sums the exponentials and log ratios of that
// mean. In a well-separated row the forward KL is clearly above 0, so that the mean loses no
// digits. The value then needs no further sweep, and the gradient is q - p. Near 0 the mean and q -
// p would cancel, and the second sweep computes value and gradient class by class (docs/maths.md,
// section 3).
constexpr bool is_mean_log_ratio(Divergence id) {
  return id == Divergence::kForwardKL || id == Divergence::kSoftCrossEntropy;
}
// Return true for the JSD with mix 1/2, whose sweep has a shorter form in a well-separated row.
inline bool is_even_jsd(const Inputs& in) {
  return in.divergence == Divergence::kJensenShannon && in.mix == 0.5;
}
inline bool may_be_well_separated(const Inputs& in) {
  return is_mean_log_ratio(in.divergence) || is_even_jsd(in);
}
// A row is well separated if its forward KL is at least kWellSeparated nats and below kGreatest
// nats. The forward KL must also be at least kShare of the logarithm in mean_of(), because rounding
// costs up to 4e-7 of that logarithm. kGreatest excludes rows whose forward KL is infinite or huge
// because the student masks a class.
constexpr double kWellSeparated = 0.05, kShare = 0.1, kGreatest = 1e4;

template <class T>
struct Row : Settings<double> {
  State state = State::kNormal;
  int64_t label = -1;
  int64_t left_out = -1;  // the label, if the sums are over the other classes (kDecoupled); else -1
  ExpSource hard = ExpSource::kNone;  // source of exp(z) in the sums
  ExpSource gradient_hard =
      ExpSource::kNone;     // source of exp(z) in the gradient; kNone if hard_weight is 0
  bool unit = false;        // the divergence is of unit vectors (kCosine)
  bool centered = false;    // the divergence is of centered logits (kCenteredSquaredError)
  bool of_logits = false;   // kSquaredError or kCenteredSquaredError, which take no softmax
  bool log_ratios = false;  // the first sweep sums log ratios to find well-separated rows
  T factor = 0;             // log2(e) / t, the factor of the student's exponents
  T teacher_factor = 0;     // log2(e) over the teacher's temperature
  T hard_factor = 0;        // log2(e), the factor of exponents at temperature 1
  int power = 0;            // exp(z) is this power of exp(z / t); 0 unless `hard` is kPower

  // Return the factor for a sum of 2^((z - max) * exponent), whose maximum changes from `from` to
  // `to`. An empty sum, whose maximum is -inf, stays empty.
  static double rescale(double from, double to, double exponent) {
    if (from == to) return 1;
    return from > kLowest ? std::exp2((from - to) * exponent) : 0;
  }
  double rescale(double from, double to) const {
    return rescale(from, to, static_cast<double>(factor));
  }
  double teacher_rescale(double from, double to) const {
    return rescale(from, to, static_cast<double>(teacher_factor));
  }
  double hard_rescale(double from, double to) const { return rescale(from, to, hard_exponent()); }
  int squarings() const { return power == 4 ? 2 : power == 2 ? 1 : 0; }
  // Return log2(exp(z)) / z, as rounded in the sums.
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
  row.log_ratios = sizeof(T) == sizeof(float) && row.temperature == row.teacher_temperature &&
                   may_be_well_separated(in);
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
  row.hard = ExpSource::kSeparate;
  // A power multiplies the error of exp(z / t) by t. This error is too great in fp64, and if the
  // hard term is the greater part of the gradient.
  const double t = row.temperature;
  const bool precise = row.hard_weight <= row.soft_weight * t || t == 1;
  if (sizeof(T) == sizeof(float) && precise && (t == 1 || t == 2 || t == 4)) {
    row.hard = ExpSource::kPower;
    row.power = static_cast<int>(t);
  }
  if (row.hard_weight != 0) row.gradient_hard = row.hard;
  return row;
}

// Return the logit that exponentials are relative to: 0 while all classes are masked.
template <class T>
T origin_of(double max) {
  return max > kLowest ? static_cast<T>(max) : T(0);
}

constexpr Statistics kNoStatistics = {kLowest, 0, 0, kLowest, 0};

// Return the sum of log ratios of some classes, relative to the maxima `student_max` and
// `teacher_max`.
template <class T>
double moved_log_ratios(const Row<T>& row, const Statistics& sums, double student_max,
                        double teacher_max) {
  if (!row.log_ratios || sums.teacher_sum == 0) return 0;
  const double student = student_max - sums.student_max, teacher = teacher_max - sums.teacher_max;
  return (sums.log_ratio_sum + (student - teacher) * sums.teacher_sum) *
         row.teacher_rescale(sums.teacher_max, teacher_max);
}

template <class T>
void merge(const Row<T>& row, const Statistics& other, Statistics* result) {
  const double student_top = std::fmax(result->student_max, other.student_max);
  const double teacher_top = std::fmax(result->teacher_max, other.teacher_max);
  result->log_ratio_sum = moved_log_ratios(row, *result, student_top, teacher_top) +
                          moved_log_ratios(row, other, student_top, teacher_top);
  const auto student = [&](const Statistics& sums) {
    return row.rescale(sums.student_max, student_top);
  };
  const auto hard = [&](const Statistics& sums) {
    return row.hard_rescale(sums.student_max, student_top);
  };
  const auto teacher = [&](const Statistics& sums) {
    return row.teacher_rescale(sums.teacher_max, teacher_top);
  };
  result->student_sum = result->student_sum * student(*result) + other.student_sum * student(other);
  result->hard_sum = result->hard_sum * hard(*result) + other.hard_sum * hard(other);
  result->teacher_sum = result->teacher_sum * teacher(*result) + other.teacher_sum * teacher(other);
  result->student_max = student_top, result->teacher_max = teacher_top;
  result->student_label += other.student_label;
  result->teacher_label += other.teacher_label;
  result->student_moment += other.student_moment;
  result->teacher_moment += other.teacher_moment;
  result->student_count += other.student_count;
  result->teacher_count += other.teacher_count;
}

inline void add(const Sums& other, Sums* result) {
  result->value += other.value;
  result->slope += other.slope;
  result->classes += other.classes;
  result->student_logits += other.student_logits;
  result->student_entropy += other.student_entropy;
  result->teacher_entropy += other.teacher_entropy;
  result->agreement += other.agreement;
}

// The function is not inlined, because most divergences need no norms.
template <class T>
__attribute__((noinline)) void set_inverses(const Row<T>& row, const Statistics& sums,
                                            Scales<T>* s) {
  const Inverses<T> inverses =
      inverses_of<T>(sums.student_moment, sums.teacher_moment, row.temperature);
  s->student_inverse = inverses.student;
  s->teacher_inverse = inverses.teacher;
  s->zero_row_value = inverses.zero_row_value;
}
// The function is not inlined, because most divergences need no means.
template <class T>
__attribute__((noinline)) void set_means(const Statistics& sums, Scales<T>* s) {
  s->student_mean = static_cast<T>(sums.student_moment / sums.student_count);
  s->teacher_mean = static_cast<T>(sums.teacher_moment / sums.teacher_count);
}

// Return the forward KL of a well-separated row; for the JSD, with bounded log ratios (scan.h).
// Return 0 if the row is not well separated, or if the maxima are far apart.
template <class T>
T mean_of(const Row<T>& row, const Statistics& sums) {
  if (are_apart(sums.student_max, sums.teacher_max, row.temperature)) return 0;
  const double inverse = 1 / sums.teacher_sum;
  // Use the rounded factor, which the exponentials have used.
  const double factor = static_cast<double>(row.factor) * kLn2;
  const double log_ratio = std::log(sums.student_sum * inverse);
  const double mean = sums.log_ratio_sum * inverse * factor + log_ratio;
  const bool is_separated =
      mean >= kWellSeparated && mean >= kShare * std::fabs(log_ratio) && mean < kGreatest;
  return is_separated ? static_cast<T>(mean) : T(0);
}

// Return the scales of a row. The function is not inlined, because GCC 12 vectorizes the callers'
// conversions to fp32 and back, and then omits the rounding. Backward reads rounded numbers.
template <class T>
__attribute__((noinline)) Scales<T> make_scales(const Row<T>& row, const Statistics& sums) {
  Scales<T> s = scales_of<T>(sums, row.hard != ExpSource::kNone, row.left_out >= 0);
  if (row.unit) set_inverses(row, sums, &s);
  if (row.centered) set_means(sums, &s);
  if (row.log_ratios) s.mean = mean_of(row, sums);
  return s;
}

template <class T>
LogRatio<T> make_log_ratio(const Row<T>& row, const Scales<T>& s) {
  const auto r = make_log_ratio<T, double>(row, s.template as<double>(), row.of_logits);
  return {static_cast<T>(r.inverse_temperature), static_cast<T>(r.temperature_ratio),
          static_cast<T>(r.student_base),        static_cast<T>(r.teacher_base),
          static_cast<T>(r.log_ratio),           r.shifted};
}

// Return true if reverse_of() can form the reverse KL from the sum of its slopes: the sum is well
// above 0, and `ratio` is not shifted. The sum contains the rounding error of log_ratio, which
// reverse_of() subtracts.
template <class T>
bool is_sum_of_slopes(const LogRatio<T>& ratio, T slope) {
  return !ratio.shifted && slope >= static_cast<T>(kWellSeparated);
}
// Return the reverse KL from the sum of its slopes.
template <class T>
double reverse_of(const Row<T>& row, const Statistics& sums, const LogRatio<T>& ratio,
                  double slope) {
  // Use the rounded factor, which the exponentials have used.
  const double inverse = static_cast<double>(row.factor) * kLn2;
  const double log_ratio = (sums.teacher_max - sums.student_max) * inverse +
                           std::log(sums.teacher_sum / sums.student_sum);
  return (slope - static_cast<double>(ratio.log_ratio)) *
             (inverse / static_cast<double>(ratio.inverse_temperature)) +
         log_ratio;
}

// Return the constants of a row. `gain` multiplies the gradient of the weighted loss.
template <class T>
Coefficients<T> make_coefficients(const Inputs& in, const Row<T>& row, const Scales<T>& s,
                                  double gain) {
  const bool hard = row.gradient_hard != ExpSource::kNone;
  const RowGains<double> gains = gains_of<double>(in, row, s.template as<double>(), gain, hard);
  Coefficients<T> c{make_log_ratio(row, s), Exponential<T>(row.hard_factor, s.student_max, 1)};
  c.soft_gain = static_cast<T>(gains.soft);
  c.hard_gain = static_cast<T>(gains.hard * static_cast<double>(s.hard_scale));
  c.uniform = static_cast<T>(-gains.uniform);
  c.student_inverse = s.student_inverse, c.teacher_inverse = s.teacher_inverse;
  c.teacher_inverse_temperature = static_cast<T>(1 / row.teacher_temperature);
  c.squarings = row.squarings();
  c.well_separated = s.mean > 0;
  return c;
}

// Set the constants of a block whose exponentials are relative to `student_max` and `teacher_max`.
template <class T>
void set_block(const Row<T>& row, const Scales<T>& s, double student_max, double teacher_max,
               Coefficients<T>* c) {
  const double student_shift = row.rescale(student_max, s.student_max);
  const double student = student_shift * static_cast<double>(s.student_scale);
  const double teacher =
      row.teacher_rescale(teacher_max, s.teacher_max) * static_cast<double>(s.teacher_scale);
  double hard_gain = c->hard_gain;
  for (int i = 0; i < row.power; ++i) hard_gain *= student_shift;
  c->student_scale = static_cast<T>(student), c->teacher_scale = static_cast<T>(teacher);
  c->student_soft_gain = static_cast<T>(static_cast<double>(c->soft_gain) * student);
  c->teacher_soft_gain = static_cast<T>(static_cast<double>(c->soft_gain) * teacher);
  c->block_hard_gain = static_cast<T>(hard_gain);
  c->block_rest_gain = static_cast<T>(static_cast<double>(c->rest_gain) * student);
}

// A row in the sweeps after the first.
template <class T>
struct ActiveRow {
  int64_t index;
  Row<T> row;
  Scales<T> scales;
  double gain;
  Coefficients<T> c;

  bool has_gradient() const { return row.state == State::kNormal && scales.valid(); }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
