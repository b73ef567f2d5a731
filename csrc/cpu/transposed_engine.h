// The transposed engine: loss and gradient of several rows at once, one row per SIMD lane. The
// engine computes, in fp32, rows of few classes, and rows whose classes are not adjacent.
//
// The engine evaluates formulas.h, decoupled.h and divergences.h with registers as numbers
// (docs/maths.md, sections 1 to 3, 7 and 10). In the row engine, a row of ten classes would fill
// less than one vector. The formulas of each row, with three logarithms, would take most of the
// time.
//
// A tile of rows is copied to the transposed layout (transpose.h). All sweeps find a tile of few
// classes in L1. scan() computes maxima and sums of exponentials, and sweep() values and slopes.
// The gradient comes from center(), or from sweep() if slopes are not centered. No lane reads
// another lane: the bits do not depend on which rows share a group.
#pragma once
#include "blocks.h"
#include "decoupled.h"
#include "row_blocks.h"
#include "transpose.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// A compensated sum (Kahan), which may be NaN if a simple sum is infinite.
struct PreciseSum {
  V sum{}, excess{};

  FASTKD_HOST_DEVICE void add(int64_t, V x) {
    const V part = x - excess, next = sum + part;
    excess = (next - sum) - part;
    sum = next;
  }
};

struct PlainSum {
  V sum{};

  FASTKD_HOST_DEVICE void add(int64_t, V x) { sum += x; }
};

// Compensated sums: if exponentials are few, rounding their sum would be most of the gradient's
// error.
struct ExpSums {
  PreciseSum student, hard, teacher;
};

// Classes [begin, end). Values, slopes, entropies and offsets are summed block by block, so that
// sums round less.
struct Block {
  int64_t begin, end;
};

// Rows to prefetch while a group is computed, a few numbers for each class. Prefetching all rows at
// once would exceed the processor's line fill buffers.
struct Ahead {
  uintptr_t from = 0, size = 0;  // `size`: bytes of a number; 0 to prefetch only one line

  FASTKD_HOST_DEVICE void fetch(int64_t number) const {
    const uintptr_t address = from + static_cast<uintptr_t>(number) * size;
    __builtin_prefetch(reinterpret_cast<const void*>(address));
  }
};

struct TransposedEngine {
  const Inputs& in;
  void* const grad;  // [rows, classes], or null
  const RowStrides grad_stride;
  const bool hard;      // the hard term is needed
  const bool terms;     // ForwardArgs::terms are needed
  const bool unit;      // the divergence is of unit vectors (kCosine)
  const bool centered;  // the divergence is of centered logits (kCenteredSquaredError)
  const bool
      decoupled;  // the sums are over the classes other than the label (kDecoupled; decoupled.h)
  const Constants constants;
  Row<float> shared;  // settings of the call; `settings` has those of each row
  Tile tile;
  Ahead ahead[3];  // the next tile's logits, and this tile's gradient

  // The group: rows [first, first + count), from `lane` of the tile on. The vectors below have one
  // element per row.
  int64_t first = 0, count = 0, lane = 0;
  Settings<V> settings;
  V factor, teacher_factor;  // factors of the exponents, as in Row (row.h)
  V gain;
  Integer<V> label;  // the label's class, or -1
  Mask<V> computed;
  V otherwise;  // results of rows that are not computed: 0, or NaN
  Scales<V> scales{};
  LogRatio<V> ratio;
  RowGains<V> gains;
  LabelGains<V> label_gains{};  // used by kDecoupled; else 0
  // Sums of the first sweep.
  ExpSums exponentials;
  Moments<float> moments;
  V offsets;
  // Sums of the second sweep, as in Sums (kernels.h).
  V value, slope, classes, student_entropy, teacher_entropy, agreement;

  template <class Args>
  TransposedEngine(const Args& args, bool terms)
      : in(args),
        grad(args.grad),
        grad_stride(args.grad_stride),
        hard(args.labels != nullptr &&
             (args.hard_weight != 0 || args.row_settings != nullptr || terms)),
        terms(terms),
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
    shared = make_row<float>(common, 0, true);
    if (!hard) shared.hard = ExpSource::kNone;
    if (hard && args.row_settings != nullptr) shared.hard = ExpSource::kSeparate;
    for (int64_t i = 0; i < kGroupRows; ++i) set_row(i, shared);
  }

  void set_row(int64_t i, const Row<float>& row) {
    settings.temperature[i] = static_cast<float>(row.temperature);
    settings.teacher_temperature[i] = static_cast<float>(row.teacher_temperature);
    settings.hard_weight[i] = static_cast<float>(row.hard_weight);
    settings.soft_weight[i] = static_cast<float>(row.soft_weight);
    factor[i] = row.factor;
    teacher_factor[i] = row.teacher_factor;
  }

  // Call fn() for each group of rows [begin, end), and write the gradient that fn() leaves in the
  // tile.
  template <class Fn>
  void for_groups(int64_t begin, int64_t end, Fn&& fn) {
    for (int64_t at = begin; at < end; at += kTileRows) {
      const int64_t rows = end - at < kTileRows ? end - at : kTileRows;
      const auto rows_of = [&](DType dtype, const RowStrides& stride) {
        return TileRows{dtype, stride, in.group_rows, at, rows};
      };
      for (int64_t i = 0; i < in.classes * kTileRows && rows % kGroupRows != 0; ++i) {
        tile.student[i] = tile.teacher[i] = 0;  // lanes without a row are computed as well
      }
      rows_of(in.student_dtype, in.student_stride).load(in.student, in.classes, tile.student);
      rows_of(in.teacher_dtype, in.teacher_stride).load(in.teacher, in.classes, tile.teacher);
      ahead[0] = rows_ahead(in.student, in.student_dtype, in.student_stride, at + kTileRows);
      ahead[1] = rows_ahead(in.teacher, in.teacher_dtype, in.teacher_stride, at + kTileRows);
      ahead[2] = rows_ahead(grad, in.student_dtype, grad_stride, at);
      for (lane = 0; lane < rows; lane += kGroupRows) {
        first = at + lane, count = rows - lane < kGroupRows ? rows - lane : kGroupRows;
        start_group();
        fn();
      }
      if (grad == nullptr) continue;
      rows_of(in.student_dtype, grad_stride).store(tile.student, in.classes, grad);
    }
  }

  Ahead rows_ahead(const void* base, DType dtype, const RowStrides& stride, int64_t row) const {
    if (base == nullptr || stride.classes != 1 || stride.row != in.classes) {
      return {reinterpret_cast<uintptr_t>(tile.student), 0};
    }
    const uintptr_t offset = static_cast<uintptr_t>(row_offset(row, in.group_rows, stride));
    const uintptr_t size = static_cast<uintptr_t>(size_of(dtype));
    return {reinterpret_cast<uintptr_t>(base) + offset * size, size};
  }

  template <class Fn>
  void for_blocks(Fn&& fn) {
    for (int64_t begin = 0; begin < in.classes; begin += kNarrow) {
      fn(Block{begin, in.classes - begin < kNarrow ? in.classes : begin + kNarrow});
    }
  }

  void start_group() {
    const bool normal = shared.state == State::kNormal;
    for (int64_t i = 0; i < kGroupRows; ++i) {
      label[i] = -1;
      computed[i] = normal ? -1 : 0;
    }
    otherwise = broadcast<V>(kNaN<float>);
    scales.student_label = scales.teacher_label = V{};
    for (int64_t i = 0; i < count && in.row_settings != nullptr; ++i) {
      const Row<float> row = make_row<float>(in, first + i, hard);
      set_row(i, row);
      computed[i] = row.state == State::kNormal ? -1 : 0;
    }
    for (int64_t i = 0; i < count && in.labels != nullptr; ++i) {
      const int64_t class_index = in.labels[first + i];
      const bool ignored = class_index == in.ignore_index;
      if (ignored) otherwise[i] = 0;
      if (ignored || class_index < 0 || class_index >= in.classes) {
        computed[i] = 0;
      } else {
        label[i] = static_cast<int32_t>(class_index);
      }
    }
    if (hard || decoupled) {
      for_labels([&](int64_t i, int64_t at) {
        scales.student_label[i] = tile.student[at], scales.teacher_label[i] = tile.teacher[at];
        if (decoupled) tile.student[at] = tile.teacher[at] = -kInfinity<float>;
      });
    }
    exponentials = ExpSums{};
    moments = Moments<float>{};
    offsets = V{};
    value = slope = classes = student_entropy = teacher_entropy = agreement = V{};
  }

  // Call fn(row, index) for the rows with a label. `index`: position of the label's logits in the
  // tile.
  template <class Fn>
  void for_labels(Fn&& fn) const {
    for (int64_t i = 0; i < count; ++i) {
      if (label[i] >= 0) fn(i, label[i] * kTileRows + lane + i);
    }
  }

  // Return the group's logits of class `c`.
  FASTKD_HOST_DEVICE float* student_at(int64_t c) const {
    return tile.student + c * kTileRows + lane;
  }
  FASTKD_HOST_DEVICE const float* teacher_at(int64_t c) const {
    return tile.teacher + c * kTileRows + lane;
  }

  // Compute the exponentials from the maxima. With kSummed, also sum the exponentials.
  template <bool kSummed>
  void exponentiate(const Block& b) {
    with_source(shared.hard,
                [&](auto source) { exponentiate_as<decltype(source)::value, kSummed>(b); });
  }
  template <ExpSource kSource, bool kSummed>
  void exponentiate_as(const Block& b) {
    const Exponentials<float> of_student(factor), of_teacher(teacher_factor);
    const Exponentials<float> separate(broadcast<V>(static_cast<float>(kLog2E)));
    const V student_max = scales.student_max, teacher_max = scales.teacher_max;
    const int squarings = kSource == ExpSource::kPower ? shared.squarings() : 0;
    ExpSums sums;
    if constexpr (kSummed) sums = exponentials;
    for (int64_t c = b.begin; c < b.end; ++c) {
      for (const Ahead& rows : ahead) rows.fetch(c * kTileRows + lane);
      const V z = load(student_at(c)) - student_max, w = load(teacher_at(c)) - teacher_max;
      const V tempered = of_student(z), of_teachers = of_teacher(w);
      V hard_exp = kSource == ExpSource::kSeparate ? separate(z)
                   : kSource == ExpSource::kPower  ? tempered
                                                   : V{};
      for (int square = 0; square < squarings; ++square) hard_exp *= hard_exp;
      store(tempered, tile.student_exp + c * kGroupRows);
      store(of_teachers, tile.teacher_exp + c * kGroupRows);
      store(hard_exp, tile.hard_exp + c * kGroupRows);
      if constexpr (!kSummed) continue;
      sums.student.add(c, tempered);
      sums.teacher.add(c, of_teachers);
      if constexpr (kSource != ExpSource::kNone) sums.hard.add(c, hard_exp);
    }
    if constexpr (kSummed) exponentials = sums;
  }

  // Compute the maxima, the sums of exponentials, and the moments and sums of logits that some
  // options need.
  void scan() {
    V max = broadcast<V>(-kInfinity<float>), teacher_max = max;
    for (int64_t c = 0; c < in.classes; ++c) {
      max = FASTKD_ISA::max(load(student_at(c)), max);
      teacher_max = FASTKD_ISA::max(load(teacher_at(c)), teacher_max);
    }
    if (decoupled) {  // the label may be the only class that is not masked
      max = max == -kInfinity<float> ? V{} : max;
      teacher_max = teacher_max == -kInfinity<float> ? V{} : teacher_max;
    }
    scales.student_max = max, scales.teacher_max = teacher_max;
    for_blocks([&](const Block& b) {
      exponentiate<true>(b);
      if (unit || centered) add_moments(b);
      if (hard && in.label_smoothing != 0) add_offsets(b);
    });
    struct {
      V student_max, student_sum, hard_sum, teacher_max, teacher_sum, student_label, teacher_label;
    } const sums = {scales.student_max,  exponentials.student.sum, exponentials.hard.sum,
                    scales.teacher_max,  exponentials.teacher.sum, scales.student_label,
                    scales.teacher_label};
    scales = scales_of<V>(sums, hard, decoupled);
    if (unit || centered) set_moments();
  }

  // Add z - max z over the classes of a block.
  void add_offsets(const Block& b) {
    V sum{};
    for (int64_t c = b.begin; c < b.end; ++c) {
      // With kDecoupled the label is masked in the tile.
      const auto is_label = label == static_cast<int32_t>(c);
      sum += (is_label ? scales.student_label : load(student_at(c))) - scales.student_max;
    }
    offsets += sum;
  }

  void add_moments(const Block& b) {
    for (int64_t c = b.begin; c < b.end; ++c) {
      moments.add(load(student_at(c)), load(teacher_at(c)), unit);
    }
  }
  void set_moments() {
    for (int64_t i = 0; i < kGroupRows; ++i) {
      if (unit) {
        const auto inverses = inverses_of<float>(moments.student.lanes[i], moments.teacher.lanes[i],
                                                 static_cast<double>(settings.temperature[i]));
        scales.student_inverse[i] = inverses.student, scales.teacher_inverse[i] = inverses.teacher;
        scales.zero_row_value[i] = static_cast<float>(inverses.zero_row_value);
      } else {
        const double classes = moments.student_count[i], teacher_classes = moments.teacher_count[i];
        scales.student_mean[i] = static_cast<float>(moments.student.lanes[i] / classes);
        scales.teacher_mean[i] = static_cast<float>(moments.teacher.lanes[i] / teacher_classes);
      }
    }
  }

  // Compute each row's divergence and gradient. In backward, `slope` and `classes` are known.
  void differentiate(bool backward) {
    gains = gains_of(in, settings, scales, gain, hard);
    ratio = make_log_ratio<V, V>(settings, scales, shared.of_logits);
    computed &= scales.valid();
    if (decoupled) {
      label_gains = FASTKD_ISA::label_gains(in, settings, scales, ratio, gains, hard);
      label_gains.label = computed ? label_gains.label : otherwise;
      gains.soft = label_gains.soft, gains.hard *= label_gains.hard_share;
    }
    gains.hard *= scales.hard_scale;
    if (unit) return sweep_all<Cosine>(backward);
    visit(in.divergence, [&](auto divergence) { sweep_all<decltype(divergence)>(backward); });
  }

  template <class D>
  void sweep_all(bool backward) {
    const V known_slope = slope, known_classes = classes;
    for_blocks([&](const Block& b) {
      if (terms || in.divergence == Divergence::kSoftCrossEntropy) add_entropies(b);
      sweep<D>(b);
    });
    value += scales.zero_row_value, slope += scales.zero_row_value;
    if (backward) slope = known_slope, classes = known_classes;
    if (D::kCentering != SlopeCentering::kNone) center<D>();
    finish();
  }

  // Subtract the one-hot target from the gradient, or set the label's gradient (kDecoupled).
  void finish() {
    if (!hard && !decoupled) return;
    for_labels([&](int64_t i, int64_t at) {
      float& g = tile.student[at];
      g = decoupled ? label_gains.label[i] : g - gains.onehot[i];
    });
  }

  // Return a function that computes the gradient of one class without the label's part.
  FASTKD_HOST_DEVICE auto make_gradient() const {
    return [soft = gains.soft, hard = gains.hard, uniform = gains.uniform, rest = label_gains.rest,
            otherwise = otherwise, computed = computed](V slope, V q, V hard_exp) FASTKD_INLINE {
      const V g = mul_add(rest, q, weighted_part(soft, slope, mul_add(hard_exp, hard, -uniform)));
      return computed ? g : otherwise;
    };
  }

  // Sum values and slopes. Replace the student's logits by the slopes, or by the gradient if the
  // slopes are not centered.
  template <class D>
  void sweep(const Block& b) {
    constexpr bool kIsGradient = D::kCentering == SlopeCentering::kNone;
    const ConstantsOf<float> k = constants.narrow;
    const auto gradient = make_gradient();
    const LogRatio<V> r = ratio;
    const Scales<V> of_rows = scales;
    // Sums of squares are compensated, because one great square would cost the other squares
    // digits.
    std::conditional_t<is_mean(D::kCentering), PreciseSum, PlainSum> values;
    PlainSum slopes, counted;
    for (int64_t c = b.begin; c < b.end; ++c) {
      const V z = load(student_at(c)), w = load(teacher_at(c));
      const V student = load(tile.student_exp + c * kGroupRows);
      const V teacher = load(tile.teacher_exp + c * kGroupRows);
      const Evaluated<V> here = D::at(element_of<D, V>(r, of_rows, z, w, student, teacher), k);
      add_classes<D>(here, c, &values, &slopes, &counted);
      const V hard_exp = load(tile.hard_exp + c * kGroupRows);
      store(kIsGradient ? gradient(here.slope, student * of_rows.student_scale, hard_exp)
                        : here.slope,
            student_at(c));
    }
    value += values.sum, slope += slopes.sum, classes += counted.sum;
  }

  // Compute the gradient from the slopes, given their sum.
  template <class D>
  void center() {
    constexpr SlopeCentering kCentering = D::kCentering;
    const auto gradient = make_gradient();
    const V student_scale = scales.student_scale, teacher_inverse = scales.teacher_inverse;
    const V share = is_mean(kCentering) ? 1 / classes : broadcast<V>(1), sum = slope;
    for (int64_t c = 0; c < in.classes; ++c) {
      const V uncentered = load(student_at(c));
      const V q = load(tile.student_exp + c * kGroupRows) * student_scale;
      V weight = share;
      if (kCentering == SlopeCentering::kStudent) weight = q;
      if (kCentering == SlopeCentering::kUnit)
        weight = mul_add(load(teacher_at(c)), teacher_inverse, uncentered);
      // Avoid the product of 0 and a sum of slopes, which may be infinite.
      V here = kCentering == SlopeCentering::kMean ? uncentered : mul_add(-sum, weight, uncentered);
      here *= share;
      if (leaves_out_masked(kCentering)) here = uncentered == uncentered ? here : V{};
      store(gradient(here, q, load(tile.hard_exp + c * kGroupRows)), student_at(c));
    }
  }

  // Add the sums that only `terms` and the soft cross entropy need.
  void add_entropies(const Block& b) {
    const V inverse = 1 / settings.temperature, teacher_inverse = 1 / settings.teacher_temperature;
    const V log_scale = log_of(scales.student_scale);
    const V teacher_log_scale = log_of(scales.teacher_scale);
    V of_student{}, of_teacher{};
    for (int64_t c = b.begin; c < b.end; ++c) {
      const V z = load(student_at(c)) - scales.student_max;
      const V w = load(teacher_at(c)) - scales.teacher_max;
      const V q = load(tile.student_exp + c * kGroupRows) * scales.student_scale;
      const V p = load(tile.teacher_exp + c * kGroupRows) * scales.teacher_scale;
      of_student -= times_log<V>(q, mul_add(z, inverse, log_scale));
      of_teacher -= times_log<V>(p, mul_add(w, teacher_inverse, teacher_log_scale));
      const auto greatest = (z == 0) & (w == 0);
      agreement = greatest ? broadcast<V>(1) : agreement;
    }
    student_entropy += of_student, teacher_entropy += of_teacher;
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
