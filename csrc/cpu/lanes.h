// Many rows at a time, a row in each vector lane: rows of few classes, and rows whose classes are
// not adjacent.
//
// A row of ten classes fills less than one vector, and what a row costs besides its classes (three
// logarithms, scales, coefficients) would be most of its time. The pixels of (N, C, H, W) logits
// are adjacent, their classes are not. Either way every step, logarithms included, runs over the
// rows of a tile (tile.h), and no lane knows of another: the bits do not depend on which rows share
// a tile.
#pragma once
#include "logarithm.h"
#include "tile.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Adjacent rows that are fetched while others are computed with, a part with each class: all of
// them at once would be more than a processor fetches at a time.
struct Ahead {
  uintptr_t from = 0, of_class = 0;  // bytes; none where rows are not adjacent

  Ahead() = default;
  Ahead(const void* base, DType dtype, const RowStrides& stride, const Inputs& in, int64_t first) {
    if (base == nullptr || stride.classes != 1 || stride.row != in.classes) return;
    from = reinterpret_cast<uintptr_t>(at(base, dtype, row_offset(first, in.group_rows, stride)));
    of_class = static_cast<uintptr_t>(kTileRows * size_of(dtype));
  }

  FASTKD_HOST_DEVICE void fetch(int64_t c) const {
    const uintptr_t part = from + static_cast<uintptr_t>(c) * of_class;
    for (uintptr_t byte = 0; byte < of_class; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(part + byte));
    }
  }
};

// Classes [begin, begin + count), which lie from `at` on in the tile.
struct Block {
  int64_t begin, count, at;
};

template <class T>
struct LaneEngine {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  bool hard;       // the hard term is wanted
  bool unit;       // the divergence is of unit vectors (kCosine)
  bool centered;   // it is of centered logits (kCenteredSquaredError)
  bool decoupled;  // the sums are of the classes other than the label (kDecoupled; label.h)
  const Constants constants;
  Row<T> shared;      // what rows have in common that have no settings of their own
  int64_t first = 0;  // row in lane 0
  int64_t count = 0;  // rows, at most kTileRows
  Tile<T> tile;
  Ahead ahead[3];  // the next tile's logits, and the gradient of this one

  // Of each row: what it is given,
  alignas(64) Lanes<T> temperature, teacher_temperature, factor, teacher_factor, least,
      teacher_least, hard_weight, soft_weight, gain;
  alignas(64) int32_t label[kTileRows];  // -1: none
  alignas(64) int32_t computed[kTileRows];
  alignas(64) Lanes<T> otherwise;  // what a row gets that is not computed: 0, or NaN
  // what the first sweep finds,
  alignas(64) Lanes<T> student_max, teacher_max, student_scale, hard_scale, teacher_scale;
  alignas(64) Lanes<double> student_sum, hard_sum, teacher_sum, offsets, label_logit;
  alignas(64) Lanes<double> student_moment, teacher_moment;  // as in Statistics (kernels.h),
  alignas(64) Lanes<T> student_count, teacher_count;
  alignas(64) Lanes<T> student_inverse, teacher_inverse;  // and as in Scales (row.h):
  alignas(64) Lanes<T> student_mean, teacher_mean;
  alignas(64) Lanes<double> nothing;
  // what the sweeps over classes need,
  alignas(64) Lanes<T> inverse_t, teacher_inverse_t, student_base, teacher_base, log_ratio;
  alignas(64) Lanes<T> soft_gain, hard_gain, onehot, uniform;
  // what they need where the sums leave the label out: its logits, its odds against the other
  // classes, at temperature 1 last, the difference of the first two's logarithms, and its gradient,
  alignas(64) Lanes<T> label_student, label_teacher, log_odds, teacher_log_odds, hard_log_odds;
  alignas(64) Lanes<T> odds_difference, rest_gain, label_gradient;
  // and what they sum.
  alignas(64) Lanes<T> slope, agreement;
  alignas(64) Lanes<double> value, slope_sum, classes_that_count, student_entropy, teacher_entropy;

  template <class Args>
  LaneEngine(const Args& args, bool terms)
      : in(args),
        grad(args.grad),
        grad_stride(args.grad_stride),
        hard(args.labels != nullptr &&
             (args.hard_weight != 0 || args.row_settings != nullptr || terms)),
        unit(args.divergence == Divergence::kCosine),
        centered(args.divergence == Divergence::kCenteredSquaredError),
        decoupled(args.divergence == Divergence::kDecoupled),
        constants(make_constants(args.divergence, args.mix)),
        tile(args.classes) {
    const int64_t any_label = 0;
    Inputs common = args;
    common.labels = args.labels != nullptr ? &any_label : nullptr;
    common.ignore_index = -1;
    common.row_settings = nullptr;
    shared = make_row<T>(common, 0, true);
    if (args.row_settings != nullptr) shared.power = 0;
    for (int64_t i = 0; i < kTileRows; ++i) set_row(i, shared);
  }

  void set_row(int64_t i, const Row<T>& row) {
    temperature[i] = static_cast<T>(row.temperature);
    teacher_temperature[i] = static_cast<T>(row.teacher_temperature);
    factor[i] = row.factor;
    teacher_factor[i] = row.teacher_factor;
    least[i] = Format<T>::kMinExponent / row.factor;
    teacher_least[i] = Format<T>::kMinExponent / row.teacher_factor;
    hard_weight[i] = static_cast<T>(row.hard_weight);
    soft_weight[i] = static_cast<T>(row.soft_weight);
  }

  // Turns to rows [begin, begin + rows).
  void start(int64_t begin, int64_t rows) {
    first = begin, count = rows;
    for (int64_t i = 0; i < kTileRows; ++i) {
      label[i] = -1;
      computed[i] = i < count && shared.state == State::kNormal;
      otherwise[i] = kNaN<T>;
    }
    for (int64_t i = 0; i < count && in.row_settings != nullptr; ++i) {
      const Row<T> row = make_row<T>(in, first + i, hard);
      set_row(i, row);
      computed[i] = row.state == State::kNormal;
    }
    for (int64_t i = 0; i < count && in.labels != nullptr; ++i) {
      const int64_t given = in.labels[first + i];
      const bool ignored = given == in.ignore_index;
      if (ignored) otherwise[i] = 0;
      if (ignored || given < 0 || given >= in.classes) {
        computed[i] = 0;
      } else {
        label[i] = static_cast<int32_t>(given);
      }
    }
    if (decoupled) read_labels();
    ahead[0] = {in.student, in.student_dtype, in.student_stride, in, first + kTileRows};
    ahead[1] = {in.teacher, in.teacher_dtype, in.teacher_stride, in, first + kTileRows};
    ahead[2] = {grad, in.student_dtype, grad_stride, in, first};
  }

  void read_labels() {
    for (int64_t i = 0; i < kTileRows; ++i) {
      label_student[i] = label_teacher[i] = 0;
      if (label[i] < 0) continue;
      const auto offset = [&](const RowStrides& stride) {
        return row_offset(first + i, in.group_rows, stride) + label[i] * stride.classes;
      };
      label_student[i] = read_one<T>(in.student, in.student_dtype, offset(in.student_stride));
      label_teacher[i] = read_one<T>(in.teacher, in.teacher_dtype, offset(in.teacher_stride));
    }
  }

  // Where each row's label lies in a block, for the rows that have theirs there: fn(lane, class).
  template <class Fn>
  void for_labels(const Block& b, Fn&& fn) const {
    for (int64_t i = 0; i < count; ++i) {
      if (holds(b.begin, b.count, label[i])) fn(i, b.at + label[i] - b.begin);
    }
  }

  template <class Fn>
  void for_blocks(Fn&& fn) {
    for (int64_t begin = 0; begin < in.classes; begin += kNarrow) {
      const int64_t left = in.classes - begin;
      fn(Block{begin, left < kNarrow ? left : kNarrow, tile.resident ? begin : 0});
    }
  }

  void load(const Block& b) {
    const TileRows student{in.student_dtype, in.student_stride, in.group_rows, first, count};
    const TileRows teacher{in.teacher_dtype, in.teacher_stride, in.group_rows, first, count};
    student.load(in.student, b.begin, b.count, tile.student + b.at);
    teacher.load(in.teacher, b.begin, b.count, tile.teacher + b.at);
    if (!decoupled) return;
    for_labels(
        b, [&](int64_t i, int64_t c) { tile.student[c][i] = tile.teacher[c][i] = -kInfinity<T>; });
  }

  void store(const Block& b) const {
    if (grad == nullptr) return;
    Lanes<T>* const values = tile.student + b.at;
    for (int64_t c = 0; c < b.count; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        values[c][i] = computed[i] != 0 ? values[c][i] : otherwise[i];
      }
    }
    const TileRows rows{in.student_dtype, grad_stride, in.group_rows, first, count};
    rows.store(values, b.begin, b.count, grad);
  }

  static void maxima(const Lanes<T>* logits, int64_t classes, Lanes<T>& max) {
    for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        max[i] = logits[c][i] > max[i] ? logits[c][i] : max[i];
      }
    }
  }

  // In fp64: where classes are few, the rounding of their sum would be most of the gradient's
  // error.
  static void sum(const Lanes<T>* values, int64_t classes, Lanes<double>& sums) {
    alignas(64) Lanes<double> of_block = {};  // so that rows of many classes round less
    int64_t c = 0;
    for (; c + 2 <= classes; c += 2) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        of_block[i] += static_cast<double>(values[c][i]) + static_cast<double>(values[c + 1][i]);
      }
    }
    if (c < classes) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) of_block[i] += static_cast<double>(values[c][i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) sums[i] += of_block[i];
  }

  // The exponentials, given the maxima. Not inlined, like the sweeps below: forward and backward
  // must run the same instructions to arrive at the same bits.
  __attribute__((noinline)) void exponentiate(const Block& b) {
    const Exponential<T> exponential(static_cast<T>(kLog2E), T(0), 1.0);
    const Lanes<T>*const z = tile.student + b.at, *const w = tile.teacher + b.at;
    Lanes<T>*const q = tile.student_power + b.at, *const p = tile.teacher_power + b.at;
    for (int64_t c = 0; c < b.count; ++c) {
      for (const Ahead& rows : ahead) rows.fetch(b.begin + c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        q[c][i] = exponential.of(z[c][i] - student_max[i], factor[i], least[i]);
        p[c][i] = exponential.of(w[c][i] - teacher_max[i], teacher_factor[i], teacher_least[i]);
      }
    }
    if (hard) exponentiate_hard(exponential, b);
  }

  void exponentiate_hard(const Exponential<T>& exponential, const Block& b) {
    const Lanes<T>*const z = tile.student + b.at, *const q = tile.student_power + b.at;
    Lanes<T>* const e = tile.hard_power + b.at;
    const int power = shared.power;
    for (int64_t c = 0; c < b.count; ++c) {
      if (power == 0) {
#pragma omp simd
        for (int64_t i = 0; i < kTileRows; ++i) e[c][i] = exponential(z[c][i] - student_max[i]);
        continue;
      }
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const T tempered = q[c][i], square = tempered * tempered;
        const T cube = square * tempered, fourth = square * square;
        const T low = power == 1 ? tempered : square;
        e[c][i] = power < 3 ? low : power == 3 ? cube : fourth;
      }
    }
  }

  // Maxima, sums of exponentials, and what the cross entropy needs of the logits.
  void scan() {
    for (int64_t i = 0; i < kTileRows; ++i) {
      student_max[i] = teacher_max[i] = -kInfinity<T>;
      student_sum[i] = hard_sum[i] = teacher_sum[i] = offsets[i] = label_logit[i] = 0;
      student_moment[i] = teacher_moment[i] = nothing[i] = 0;
      student_count[i] = teacher_count[i] = student_mean[i] = teacher_mean[i] = 0;
    }
    for_blocks([&](const Block& b) {
      load(b);
      maxima(tile.student + b.at, b.count, student_max);
      maxima(tile.teacher + b.at, b.count, teacher_max);
    });
    for (int64_t i = 0; i < kTileRows && decoupled; ++i) {
      if (student_max[i] == -kInfinity<T>) student_max[i] = 0;
      if (teacher_max[i] == -kInfinity<T>) teacher_max[i] = 0;
    }
    for_blocks([&](const Block& b) {
      if (!tile.resident) load(b);
      exponentiate(b);
      sum(tile.student_power + b.at, b.count, student_sum);
      sum(tile.teacher_power + b.at, b.count, teacher_sum);
      if (unit) add_squares(b);
      if (centered) {
        add_logits(tile.student + b.at, b.count, student_moment, student_count);
        add_logits(tile.teacher + b.at, b.count, teacher_moment, teacher_count);
      }
      if (!hard) return;
      sum(tile.hard_power + b.at, b.count, hard_sum);
      sum_logits(b);
    });
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      // Of the rounded sums: with few classes the forward KL's slopes are their differences.
      student_scale[i] = 1 / static_cast<T>(student_sum[i]);
      teacher_scale[i] = 1 / static_cast<T>(teacher_sum[i]);
      hard_scale[i] = hard ? 1 / static_cast<T>(hard_sum[i]) : T(0);
    }
    if (unit) set_inverses();
    for (int64_t i = 0; i < kTileRows && centered; ++i) {
      student_mean[i] = static_cast<T>(student_moment[i] / static_cast<double>(student_count[i]));
      teacher_mean[i] = static_cast<T>(teacher_moment[i] / static_cast<double>(teacher_count[i]));
    }
    for (int64_t i = 0; i < kTileRows && decoupled; ++i) {
      if (student_sum[i] == 0) student_scale[i] = hard_scale[i] = 0;
      if (teacher_sum[i] == 0) teacher_scale[i] = 0;
    }
  }

  // Add a block to the moments of each row, as sum_squares() in blocks.h does for one row.
  void add_squares(const Block& b) {
    for (int64_t c = b.at; c < b.at + b.count; ++c) {
      const Column x = column(c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const T z = x.z[i], w = x.w[i];
        const bool masked = z == -kInfinity<T> && w == -kInfinity<T>;
        const double counted = masked ? T(0) : z, teacher_counted = masked ? T(0) : w;
        student_moment[i] += counted * counted;
        teacher_moment[i] += teacher_counted * teacher_counted;
      }
    }
  }

  // Add the logits of a block to the moments of each row, as sum_logits() in blocks.h does.
  static void add_logits(const Lanes<T>* logits, int64_t classes, Lanes<double>& sums,
                         Lanes<T>& counts) {
    alignas(64) Lanes<double> of_block = {};
    alignas(64) Lanes<T> counted = {};
    for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const bool masked = logits[c][i] == -kInfinity<T>;
        counted[i] += masked ? T(0) : T(1);
        of_block[i] += static_cast<double>(masked ? T(0) : logits[c][i]);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) sums[i] += of_block[i], counts[i] += counted[i];
  }

  // As inverses_of() of divergences.h.
  void set_inverses() {
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const bool no_student = is_nothing<T>(student_moment[i]);
      const bool no_teacher = is_nothing<T>(teacher_moment[i]);
      const double t = static_cast<double>(temperature[i]);
      const double length = std::sqrt(student_moment[i]);
      const double teacher_length = std::sqrt(teacher_moment[i]);
      student_inverse[i] = static_cast<T>(1 / (no_student ? t : length));
      teacher_inverse[i] = static_cast<T>(1 / (no_teacher ? 1.0 : teacher_length));
      nothing[i] = (no_student ? 0.5 : 0.0) + (no_teacher ? 0.5 : 0.0);
    }
  }

  // The label's logit, and the sum of all, below the maximum.
  void sum_logits(const Block& b) {
    alignas(64) Lanes<T> sums = {}, of_label = {};
    for (int64_t c = 0; c < b.count; ++c) {
      const int32_t index = static_cast<int32_t>(b.begin + c);
      const T* const logits = tile.student[b.at + c];
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const T own = label_student[i], other = logits[i];
        const T z = (decoupled && index == label[i] ? own : other) - student_max[i];
        sums[i] += z;
        of_label[i] = index == label[i] ? z : of_label[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      offsets[i] += static_cast<double>(sums[i]);
      label_logit[i] += static_cast<double>(of_label[i]);
    }
  }

  // Before the sweeps that make the gradient.
  void prepare(bool slopes_known) {
    const T smoothing = static_cast<T>(in.label_smoothing);
    const T classes = static_cast<T>(in.classes), hard_share = hard ? T(1) : T(0);
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const T t = temperature[i], teacher_t = teacher_temperature[i];
      inverse_t[i] = 1 / t;
      teacher_inverse_t[i] = 1 / teacher_t;
      const T distance = teacher_max[i] - student_max[i];
      const T limit = apart_beyond(t);
      const bool apart = t != teacher_t || distance > limit || distance < -limit;
      student_base[i] = apart ? student_max[i] : T(0);
      teacher_base[i] = apart ? teacher_max[i] : T(0);
      const T together = distance * inverse_t[i];
      const T each = teacher_max[i] * teacher_inverse_t[i] - student_max[i] * inverse_t[i];
      const T between = t == teacher_t ? together : each;
      log_ratio[i] = (apart ? T(0) : between) +
                     log2_of(student_scale[i] / teacher_scale[i]) * static_cast<T>(kLn2);
      soft_gain[i] = gain[i] * soft_weight[i] * t;
      const T hard_gain_of_row = hard_share * gain[i] * hard_weight[i];
      onehot[i] = hard_gain_of_row * (1 - smoothing);
      uniform[i] = hard_gain_of_row * smoothing / classes;
      hard_gain[i] = hard_gain_of_row * hard_scale[i];
      const T all = (student_max[i] - student_max[i]) + (student_scale[i] - student_scale[i]) +
                    (teacher_max[i] - teacher_max[i]) + (teacher_scale[i] - teacher_scale[i]) +
                    (student_mean[i] - student_mean[i]) + (teacher_mean[i] - teacher_mean[i]);
      const int32_t finite_row = all == T(0) ? 1 : 0;  // NaN where any is not finite
      computed[i] = computed[i] * finite_row;
      slope[i] = slopes_known ? slope[i] : T(0);
      classes_that_count[i] = slopes_known ? classes_that_count[i] : 0;
      value[i] = slope_sum[i] = 0;
      student_entropy[i] = teacher_entropy[i] = 0;
      agreement[i] = 0;
    }
    if (decoupled) decouple();
    // A logit far above its row's others would take their digits.
    for (int64_t i = 0; i < kTileRows && shared.of_logits; ++i) {
      student_base[i] = student_mean[i], teacher_base[i] = teacher_mean[i];
    }
    for (int64_t i = 0; i < kTileRows && unit; ++i) {
      soft_gain[i] *= temperature[i] * student_inverse[i];
      const bool exist = student_inverse[i] > 0 && finite(student_inverse[i]) &&
                         teacher_inverse[i] > 0 && finite(teacher_inverse[i]);
      if (!exist) computed[i] = 0;
    }
  }

  Odds<T> odds_of(T log) const {
    const Exponential<T> exponential(static_cast<T>(kLog2E), T(0), 1.0);
    return {log, exponential(-std::fabs(log))};
  }

  // As decouple() of label.h.
  __attribute__((noinline)) void decouple() {
    const T smoothing = static_cast<T>(in.label_smoothing), mix = static_cast<T>(in.mix);
    const T over_target = smoothing - smoothing / static_cast<T>(in.classes);
    const T hard_share = hard ? T(1) : T(0);
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const T z = label_student[i], w = label_teacher[i];
      const T student = student_scale[i], teacher = teacher_scale[i];
      const T above = z - student_max[i], teacher_above = w - teacher_max[i];
      const T log = above * inverse_t[i] + log2_of(student) * static_cast<T>(kLn2);
      const T teacher_log =
          teacher_above * teacher_inverse_t[i] + log2_of(teacher) * static_cast<T>(kLn2);
      const T hard_log = above + log2_of(hard_scale[i]) * static_cast<T>(kLn2);
      log_odds[i] = student == T(0) ? kInfinity<T> : log;
      teacher_log_odds[i] = teacher == T(0) ? kInfinity<T> : teacher_log;
      hard_log_odds[i] = hard_scale[i] == T(0) ? kInfinity<T> : hard_log;
      const T from_z = z - student_base[i], from_w = w - teacher_base[i];
      const T together = (from_w - from_z) * inverse_t[i];
      const T each = from_w * teacher_inverse_t[i] - from_z * inverse_t[i];
      const T d = (temperature[i] == teacher_temperature[i] ? together : each) - log_ratio[i];
      const T of_logs = teacher_log_odds[i] - log_odds[i];
      odds_difference[i] = student == T(0) || teacher == T(0) ? of_logs : d;
      const bool exists = (student > T(0) || z > -kInfinity<T>)&(
          teacher > T(0) || w > -kInfinity<T>)&(z < kInfinity<T>)&(w < kInfinity<T>);
      computed[i] = exists ? computed[i] : 0;
      const T diff =
          binary_kl(odds_of(teacher_log_odds[i]), odds_of(log_odds[i]), odds_difference[i]).diff *
          soft_gain[i];
      const T rest = odds_of(hard_log_odds[i]).rest();
      rest_gain[i] = -diff;
      label_gradient[i] = diff + hard_share * gain[i] * hard_weight[i] * (over_target - rest);
      soft_gain[i] = teacher == T(0) ? T(0) : soft_gain[i] * mix;
      hard_gain[i] = hard_gain[i] * rest;
    }
  }

  // One class of all rows. The loops read through pointers of their own, and whatever they may
  // choose, before they choose: compilers vectorise nothing else.
  struct Column {
    const T *z, *w, *q, *p, *hard;
    T* result;  // over z
  };
  Column column(int64_t c) const {
    return {tile.student[c],       tile.teacher[c],    tile.student_power[c],
            tile.teacher_power[c], tile.hard_power[c], tile.student[c]};
  }

  // The teacher's temperature is the student's unless kSeparate.
  template <bool kSeparate>
  FASTKD_HOST_DEVICE Element<T> element_at(const Column& x, int64_t i) const {
    const T z = x.z[i] - student_base[i];
    const T w = x.w[i] - teacher_base[i];
    const T q = x.q[i] * student_scale[i];
    const T p = x.p[i] * teacher_scale[i];
    const T together = (w - z) * inverse_t[i];
    const T each = w * teacher_inverse_t[i] - z * inverse_t[i];
    const bool separate = kSeparate && inverse_t[i] != teacher_inverse_t[i];
    const T gap = separate ? each : together;
    Element<T> e = element<T>(p, q, gap - log_ratio[i]);
    e.gap = gap;
    return e;
  }

  template <bool kHard>
  FASTKD_HOST_DEVICE T gradient_at(const Column& x, int32_t index, int64_t i, T slope_here) const {
    T g = weighted_part(soft_gain[i], slope_here);
    if constexpr (kHard) {
      const T hot = onehot[i];
      g += x.hard[i] * hard_gain[i] - uniform[i];
      g -= index == label[i] ? hot : T(0);
    }
    return g;
  }

  bool wants_hard_gradient() const {
    return hard && (in.hard_weight != 0 || in.row_settings != nullptr);
  }
  bool has_separate_temperatures() const { return in.temperature != in.teacher_temperature; }

  // A block as the first sweep left it.
  void revisit(const Block& b) {
    if (tile.resident) return;
    load(b);
    exponentiate(b);
  }

  // The divergence of each row, and its gradient. `slopes_known`: `slope` has their sum, from the
  // forward pass.
  void differentiate(bool terms, bool slopes_known) {
    prepare(slopes_known);
    const bool separate = has_separate_temperatures(), hard_too = wants_hard_gradient();
    if (is_one_sweep(in.divergence)) {
      for_blocks([&](const Block& b) {
        revisit(b);
        if (terms || in.divergence == Divergence::kSoftCrossEntropy) sum_terms(b);
        const auto write = [&](auto is_decoupled) {
          constexpr bool kDecoupled = decltype(is_decoupled)::value;
          if (separate) {
            hard_too ? write_gradient<true, true, kDecoupled>(b)
                     : write_gradient<true, false, kDecoupled>(b);
          } else {
            hard_too ? write_gradient<false, true, kDecoupled>(b)
                     : write_gradient<false, false, kDecoupled>(b);
          }
        };
        decoupled ? write(constant<true>) : write(constant<false>);
        store(b);
      });
      return;
    }
    if (unit) return differentiate_twice<Cosine, false>(terms, slopes_known);
    visit(in.divergence, [&](auto divergence) {
      using D = decltype(divergence);
      separate ? differentiate_twice<D, true>(terms, slopes_known)
               : differentiate_twice<D, false>(terms, slopes_known);
    });
  }

  template <bool kSeparate, bool kHard, bool kDecoupled>
  __attribute__((noinline)) void write_gradient(const Block& b) {
    alignas(64) Lanes<T> values = {}, diffs = {};
    for (int64_t c = b.at; c < b.at + b.count; ++c) {
      const int32_t index = static_cast<int32_t>(b.begin + c - b.at);
      const Column x = column(c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const Element<T> e = element_at<kSeparate>(x, i);
        const Evaluated<T> kl = ForwardKL::at(e);
        values[i] += kl.value;
        T g = gradient_at<kHard>(x, index, i, kl.slope);
        if constexpr (kDecoupled) diffs[i] += kl.slope, g += rest_gain[i] * e.q;
        x.result[i] = g;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) value[i] += static_cast<double>(values[i]);
    if (!kDecoupled) return;
    for_labels(b, [&](int64_t i, int64_t c) { tile.student[c][i] = label_gradient[i]; });
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) slope_sum[i] += static_cast<double>(diffs[i]);
  }

  // Slopes first; the gradient once they are summed.
  template <class D, bool kSeparate>
  void differentiate_twice(bool terms, bool slopes_known) {
    if (!slopes_known || tile.resident) {
      for_blocks([&](const Block& b) {
        revisit(b);
        if (terms) sum_terms(b);
        find_slopes<D, kSeparate>(b, !slopes_known);
      });
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      value[i] += unit ? nothing[i] : 0.0;
      const T sum = static_cast<T>(slope_sum[i] + (unit ? nothing[i] : 0.0));
      slope[i] = slopes_known ? slope[i] : sum;
    }
    const bool hard_too = wants_hard_gradient();
    for_blocks([&](const Block& b) {
      if (!tile.resident) {
        revisit(b);
        find_slopes<D, kSeparate>(b, false);
      }
      hard_too ? balance_gradient<D, true>(b) : balance_gradient<D, false>(b);
      store(b);
    });
  }

  // The slopes, over the student's logits.
  template <class D, bool kSeparate>
  __attribute__((noinline)) void find_slopes(const Block& b, bool summed) {
    const ConstantsOf<T> k = constants_in<T>(constants);
    // Squares of logits far apart: one would take the digits of the others.
    using Value = std::conditional_t<is_mean(D::kBalance), double, T>;
    alignas(64) Lanes<Value> values = {};
    alignas(64) Lanes<T> sums = {}, counts = {};
    for (int64_t c = b.at; c < b.at + b.count; ++c) {
      const Column x = column(c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        Element<T> e;
        if constexpr (D::kBalance == Balance::kUnit) {
          e = {x.w[i] * teacher_inverse[i], x.z[i] * student_inverse[i], T(0), T(0), T(0)};
        } else {
          e = element_at<kSeparate>(x, i);
        }
        const Evaluated<T> here = D::at(e, k);
        const T summed = D::kBalance == Balance::kUnit ? here.value : here.slope;
        const bool counted = !leaves_out_masked(D::kBalance) || here.slope == here.slope;
        values[i] += static_cast<Value>(counted ? here.value : T(0));
        if constexpr (D::kBalance != Balance::kMean) sums[i] += counted ? summed : T(0);
        counts[i] += is_mean(D::kBalance) && counted ? T(1) : T(0);
        x.result[i] = here.slope;
      }
    }
    if (!summed) return;
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      value[i] += static_cast<double>(values[i]);
      slope_sum[i] += static_cast<double>(sums[i]);
      classes_that_count[i] += static_cast<double>(counts[i]);
    }
  }

  template <class D, bool kHard>
  __attribute__((noinline)) void balance_gradient(const Block& b) {
    alignas(64) Lanes<T> share;
    for (int64_t i = 0; i < kTileRows; ++i) {
      share[i] = is_mean(D::kBalance) ? static_cast<T>(1 / classes_that_count[i]) : T(1);
    }
    for (int64_t c = b.at; c < b.at + b.count; ++c) {
      const int32_t index = static_cast<int32_t>(b.begin + c - b.at);
      const Column x = column(c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        T weight = D::kBalance == Balance::kCentered ? share[i] : T(0);
        if (D::kBalance == Balance::kStudent) weight = x.q[i] * student_scale[i];
        if (D::kBalance == Balance::kUnit) weight = x.z[i] + x.w[i] * teacher_inverse[i];
        // Not 0 times a sum of slopes that may be infinite.
        T here = D::kBalance == Balance::kMean ? x.z[i] : x.z[i] - slope[i] * weight;
        here *= share[i];
        if (leaves_out_masked(D::kBalance)) here = x.z[i] == x.z[i] ? here : T(0);
        x.result[i] = gradient_at<kHard>(x, index, i, here);
      }
    }
  }

  // What only `terms` ask for, in bits.
  void sum_terms(const Block& b) {
    alignas(64) Lanes<T> log_q, log_p, of_student = {}, of_teacher = {};
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      log_q[i] = log2_of(student_scale[i]);
      log_p[i] = log2_of(teacher_scale[i]);
    }
    for (int64_t c = b.at; c < b.at + b.count; ++c) {
      const Column x = column(c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const T z = x.z[i] - student_max[i];
        const T w = x.w[i] - teacher_max[i];
        const T q = x.q[i] * student_scale[i];
        const T p = x.p[i] * teacher_scale[i];
        of_student[i] -= times_log(q, z * factor[i] + log_q[i]);
        of_teacher[i] -= times_log(p, w * teacher_factor[i] + log_p[i]);
        agreement[i] = z == 0 && w == 0 ? T(1) : agreement[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      student_entropy[i] += static_cast<double>(of_student[i]);
      teacher_entropy[i] += static_cast<double>(of_teacher[i]);
    }
  }

  // The divergence itself, in place of the sum of its values.
  void close_divergence() {
    const bool is_mean_of_classes = is_mean(balance_of(in.divergence));
    const bool centered = balance_of(in.divergence) == Balance::kCentered;
    const double entropies = in.divergence == Divergence::kSoftCrossEntropy ? kLn2 : 0.0;
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const double n = classes_that_count[i];
      const double mean = centered ? static_cast<double>(slope[i]) / n / 2 : 0.0;
      const double result = is_mean_of_classes ? value[i] / n - mean * mean
                                               : value[i] + weighted(entropies, teacher_entropy[i]);
      // As in rows.cpp: NaN in a valid row stands for an infinite divergence.
      value[i] = result == result ? at_least_0(result) : -kLowest;
    }
    if (decoupled) include_label();
  }

  // As include_label() of label.h.
  void include_label() {
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const Odds<T> student = odds_of(log_odds[i]), teacher = odds_of(teacher_log_odds[i]);
      const T difference = odds_difference[i] + log1p_of(static_cast<T>(slope_sum[i]));
      const T binary = binary_kl(teacher, student, difference).value;
      const bool student_others = student_scale[i] > T(0), teacher_others = teacher_scale[i] > T(0);
      const double of_others = teacher_others ? in.mix : 0.0;
      const double both = static_cast<double>(binary) + weighted(of_others, value[i]);
      value[i] = both == both ? at_least_0(both) : -kLowest;
      // in bits, as sum_terms() leaves them
      const T of_student = student.entropy(), of_teacher = teacher.entropy();
      student_entropy[i] = static_cast<double>(of_student) * kLog2E +
                           static_cast<double>(student.rest()) * student_entropy[i];
      teacher_entropy[i] = static_cast<double>(of_teacher) * kLog2E +
                           static_cast<double>(teacher.rest()) * teacher_entropy[i];
      const T z = label_student[i], w = label_teacher[i];
      const bool label_is_greatest =
          (!student_others | (z >= student_max[i])) & (!teacher_others | (w >= teacher_max[i]));
      const bool others_are = student_others & teacher_others & (student_max[i] >= z) &
                              (teacher_max[i] >= w) & (agreement[i] > T(0));
      agreement[i] = (label_is_greatest | others_are) ? T(1) : T(0);
    }
  }

  // log(sum exp z) - max z of all classes, from the other classes' sum; as log_sum() of label.h.
  double with_label(int64_t i, double log_sum) const {
    const T minor = odds_of(hard_log_odds[i]).minor;
    const T above = label_student[i] - student_max[i];
    const double greater = hard_log_odds[i] > T(0) ? static_cast<double>(above) : log_sum;
    return greater + static_cast<double>(log1p_of(minor));
  }

  template <class Number>
  void put(void* base, int64_t rows_before, const Lanes<Number>& values) const {
    alignas(64) Lanes<T> result;
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      result[i] = computed[i] != 0 ? static_cast<T>(values[i]) : otherwise[i];
    }
    std::memcpy(static_cast<T*>(base) + rows_before + first, result,
                static_cast<size_t>(count) * sizeof(T));
  }

  void store_losses(const ForwardArgs& args) {
    close_divergence();
    const double smoothing = args.label_smoothing, classes = static_cast<double>(args.classes);
    alignas(64) Lanes<double> cross = {}, total;
    if (hard) {
      alignas(64) Lanes<T> log_sum;
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) log_sum[i] = log2_of(static_cast<T>(hard_sum[i]));
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) cross[i] = static_cast<double>(log_sum[i]) * kLn2;
      for (int64_t i = 0; i < kTileRows && decoupled; ++i) cross[i] = with_label(i, cross[i]);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        cross[i] -=
            weighted(1 - smoothing, label_logit[i]) + weighted(smoothing, offsets[i] / classes);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const double t = static_cast<double>(temperature[i]);
      total[i] = weighted(static_cast<double>(soft_weight[i]) * t * t, value[i]) +
                 weighted(static_cast<double>(hard_weight[i]), cross[i]);
    }
    put(args.loss, 0, total);
    if (args.terms == nullptr) return;
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      student_entropy[i] *= kLn2;
      teacher_entropy[i] *= kLn2;
      total[i] = static_cast<double>(agreement[i]);
    }
    put(args.terms, kHard * args.rows, cross);
    put(args.terms, kSoft * args.rows, value);
    put(args.terms, kStudentEntropy * args.rows, student_entropy);
    put(args.terms, kTeacherEntropy * args.rows, teacher_entropy);
    put(args.terms, kAgreement * args.rows, total);
  }

  void store_stats(const ForwardArgs& args) const {
    if (args.stats == nullptr) return;
    put(args.stats, kStudentMax * args.rows, student_max);
    put(args.stats, kStudentScale * args.rows, unit ? student_inverse : student_scale);
    put(args.stats, kHardScale * args.rows, hard_scale);
    put(args.stats, kTeacherMax * args.rows, centered ? teacher_mean : teacher_max);
    put(args.stats, kTeacherScale * args.rows,
        unit       ? teacher_inverse
        : centered ? student_mean
                   : teacher_scale);
    put(args.stats, kSlopeSum * args.rows, slope);
    put(args.stats, kClassCount * args.rows, classes_that_count);
    if (first == 0) static_cast<T*>(args.stats)[kStats * args.rows] = static_cast<T>(args.scale);
  }

  void forward(const ForwardArgs& args) {
    scan();
    const T all = static_cast<T>(args.scale) * static_cast<T>(args.grad_output);
    for (int64_t i = 0; i < kTileRows; ++i) gain[i] = all;
    differentiate(args.terms != nullptr, false);
    store_losses(args);
    store_stats(args);
  }

  void get_stats(const BackwardArgs& args) {
    const T* stats = static_cast<const T*>(args.stats);
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = first + (i < count ? i : 0);
      student_max[i] = stats[kStudentMax * args.rows + row];
      student_scale[i] = stats[kStudentScale * args.rows + row];
      hard_scale[i] = stats[kHardScale * args.rows + row];
      teacher_max[i] = stats[kTeacherMax * args.rows + row];
      teacher_scale[i] = stats[kTeacherScale * args.rows + row];
      student_inverse[i] = student_scale[i];
      teacher_inverse[i] = teacher_scale[i];
      student_mean[i] = centered ? teacher_scale[i] : T(0);
      teacher_mean[i] = centered ? teacher_max[i] : T(0);
      slope[i] = stats[kSlopeSum * args.rows + row];
      classes_that_count[i] = static_cast<double>(stats[kClassCount * args.rows + row]);
    }
  }

  void backward(const BackwardArgs& args) {
    get_stats(args);
    const T scale = static_cast<const T*>(args.stats)[kStats * args.rows];
    const T* grad_output = static_cast<const T*>(args.grad_output);
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = first + (i < count ? i : 0);
      gain[i] = scale * grad_output[args.grad_output_per_row ? row : 0];
    }
    if (tile.resident) {
      for_blocks([&](const Block& b) {
        load(b);
        exponentiate(b);
      });
    }
    differentiate(false, true);
  }
};

template <class T, class Args, class Fn>
void for_tiles_of(const Args& args, bool terms, int64_t begin, int64_t end, Fn&& fn) {
  LaneEngine<T> engine(args, terms);
  for (int64_t first = begin; first < end; first += kTileRows) {
    engine.start(first, end - first < kTileRows ? end - first : kTileRows);
    fn(engine);
  }
}

// Calls fn(engine), having turned it to one tile of rows [begin, end) after the other.
template <class Args, class Fn>
void for_tiles(const Args& args, bool terms, int64_t begin, int64_t end, Fn&& fn) {
  if (computes_in_double(args.student_dtype, args.teacher_dtype)) {
    for_tiles_of<double>(args, terms, begin, end, fn);
  } else {
    for_tiles_of<float>(args, terms, begin, end, fn);
  }
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
