// Rows of few classes, many at a time: a row in each vector lane.
//
// A row of ten classes fills less than one vector, and what a row costs besides its classes (three
// logarithms, scales, coefficients) would be most of its time. Here kTileRows rows are transposed
// into a tile, and every step, logarithms included, runs over rows.
#pragma once
#include "row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int64_t kTileRows = 32;

using Lanes = float[kTileRows];

// log2 of a positive normal number, within 2 ulp or 1e-7, whichever is more.
FASTKD_HOST_DEVICE float log2_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  // x = 2^n m with m in [1/sqrt 2, sqrt 2)
  const uint32_t shifted = bits - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float m = bits_as<float>(bits - (shifted & 0xff800000u));
  // log m = 2 artanh s, s = (m - 1) / (m + 1), |s| <= 0.172: five terms of the series suffice.
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  float series = s2 * (1.0f / 9.0f) + 1.0f / 7.0f;
  series = series * s2 + 1.0f / 5.0f;
  series = series * s2 + 1.0f / 3.0f;
  series = series * s2 + 1.0f;
  return n + series * s * static_cast<float>(2.0 * kLog2E);
}

struct Tile {
  alignas(64) float student[kNarrow][kTileRows];  // logits; in the end the gradient
  alignas(64) float teacher[kNarrow][kTileRows];
  alignas(64) float student_power[kNarrow][kTileRows];  // exp((z - max z) / t)
  alignas(64) float teacher_power[kNarrow][kTileRows];  // exp((w - max w) / t)
  alignas(64) float hard_power[kNarrow][kTileRows];     // exp(z - max z)
  alignas(64) Lanes student_max, student_scale, hard_scale, teacher_max, teacher_scale;
  alignas(64) Lanes student_sum, hard_sum, teacher_sum;
  alignas(64) Lanes temperature, factor, least, teacher_temperature, teacher_factor, teacher_least;
  alignas(64) Lanes hard_weight, soft_weight, gain, label_logit, value, slope, classes_that_count;
  alignas(64) Lanes student_entropy, teacher_entropy, offsets, agreement;
  alignas(64) int32_t label[kTileRows];  // -1: none
  State state[kTileRows];
};

struct NarrowEngine {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  int64_t first;  // row in lane 0
  int64_t count;  // rows, at most kTileRows
  bool hard;      // the hard term is wanted
  const Constants& constants;
  Tile& tile;

  // Fills the tile; lanes without a row, and ignored rows, hold zeros.
  void load() {
    alignas(64) float buffer[kNarrow];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const bool present = i < count;
      const Row<float> row = present ? make_row<float>(in, first + i, hard) : Row<float>{};
      tile.state[i] = present ? row.state : State::kIgnored;
      tile.label[i] = tile.state[i] == State::kNormal ? static_cast<int32_t>(row.label) : -1;
      tile.temperature[i] = static_cast<float>(row.temperature);
      tile.factor[i] = row.factor;
      tile.least[i] = Format<float>::kMinExponent / row.factor;
      tile.teacher_factor[i] = row.teacher_factor;
      tile.teacher_least[i] = Format<float>::kMinExponent / row.teacher_factor;
      tile.teacher_temperature[i] = static_cast<float>(row.teacher_temperature);
      tile.hard_weight[i] = static_cast<float>(row.hard_weight);
      tile.soft_weight[i] = static_cast<float>(row.soft_weight);
      if (tile.state[i] == State::kIgnored) {
        for (int64_t c = 0; c < in.classes; ++c) tile.student[c][i] = tile.teacher[c][i] = 0;
        continue;
      }
      const int64_t z = row_offset(first + i, in.group_rows, in.student_stride);
      const int64_t w = row_offset(first + i, in.group_rows, in.teacher_stride);
      read(at(in.student, in.student_dtype, z), in.student_dtype, in.classes, buffer);
      for (int64_t c = 0; c < in.classes; ++c) tile.student[c][i] = buffer[c];
      read(at(in.teacher, in.teacher_dtype, w), in.teacher_dtype, in.classes, buffer);
      for (int64_t c = 0; c < in.classes; ++c) tile.teacher[c][i] = buffer[c];
    }
  }

  static void maxima(const float (*logits)[kTileRows], int64_t classes, Lanes& max) {
    for (int64_t i = 0; i < kTileRows; ++i) max[i] = logits[0][i];
    for (int64_t c = 1; c < classes; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        max[i] = logits[c][i] > max[i] ? logits[c][i] : max[i];
      }
    }
  }

  // In fp64: where classes are few, the rounding of their sum would be most of the gradient's
  // error.
  static void sum(const float (*values)[kTileRows], int64_t classes, Lanes& result) {
    double sums[kTileRows] = {};
    int64_t c = 0;
    for (; c + 2 <= classes; c += 2) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        sums[i] += static_cast<double>(values[c][i]) + static_cast<double>(values[c + 1][i]);
      }
    }
    if (c < classes) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) sums[i] += static_cast<double>(values[c][i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) result[i] = static_cast<float>(sums[i]);
  }

  // The exponentials, given the maxima, and their sums. Not inlined, like differentiate(): forward
  // and backward must run the same instructions to arrive at the same bits.
  __attribute__((noinline)) void exponentiate() {
    const Exponential<float> exponential(static_cast<float>(kLog2E), 0.0f, 1.0);
    for (int64_t c = 0; c < in.classes; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const float z = tile.student[c][i] - tile.student_max[i];
        const float w = tile.teacher[c][i] - tile.teacher_max[i];
        tile.student_power[c][i] = exponential.of(z, tile.factor[i], tile.least[i]);
        tile.teacher_power[c][i] = exponential.of(w, tile.teacher_factor[i], tile.teacher_least[i]);
      }
    }
    sum(tile.student_power, in.classes, tile.student_sum);
    sum(tile.teacher_power, in.classes, tile.teacher_sum);
    if (!hard) return;
    for (int64_t c = 0; c < in.classes; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        tile.hard_power[c][i] = exponential(tile.student[c][i] - tile.student_max[i]);
      }
    }
    sum(tile.hard_power, in.classes, tile.hard_sum);
  }

  void scan() {
    maxima(tile.student, in.classes, tile.student_max);
    maxima(tile.teacher, in.classes, tile.teacher_max);
    exponentiate();
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      tile.student_scale[i] = 1 / tile.student_sum[i];
      tile.teacher_scale[i] = 1 / tile.teacher_sum[i];
      tile.hard_scale[i] = hard ? 1 / tile.hard_sum[i] : 0.0f;
    }
  }

  // What the sweeps over classes need of each row.
  struct RowConstants {
    alignas(64) Lanes inverse_t, teacher_inverse_t, student_base, teacher_base, log_ratio, shift;
    alignas(64) Lanes soft_gain, hard_gain, onehot, uniform;
  };

  void make_constants_of_rows(RowConstants* c) const {
    const float smoothing = static_cast<float>(in.label_smoothing);
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const float t = tile.temperature[i], teacher_t = tile.teacher_temperature[i];
      c->inverse_t[i] = 1 / t;
      c->teacher_inverse_t[i] = 1 / teacher_t;
      const float distance = tile.teacher_max[i] - tile.student_max[i];
      const bool apart = t != teacher_t || distance > static_cast<float>(kApart) ||
                         distance < -static_cast<float>(kApart);
      c->student_base[i] = apart ? tile.student_max[i] : 0.0f;
      c->teacher_base[i] = apart ? tile.teacher_max[i] : 0.0f;
      const float shift = t == teacher_t ? distance * c->inverse_t[i]
                                         : tile.teacher_max[i] * c->teacher_inverse_t[i] -
                                               tile.student_max[i] * c->inverse_t[i];
      c->shift[i] = apart ? shift : 0.0f;
      c->log_ratio[i] =
          (apart ? 0.0f : shift) +
          log2_of(tile.student_scale[i] / tile.teacher_scale[i]) * static_cast<float>(kLn2);
      c->soft_gain[i] = tile.gain[i] * tile.soft_weight[i] * t;
      const float hard_gain = hard ? tile.gain[i] * tile.hard_weight[i] : 0.0f;
      c->onehot[i] = hard_gain * (1 - smoothing);
      c->uniform[i] = hard_gain * smoothing / static_cast<float>(in.classes);
      c->hard_gain[i] = hard_gain * tile.hard_scale[i];
    }
  }

  // One class of one row; its teacher's temperature is the student's unless kSeparate.
  template <bool kSeparate>
  FASTKD_HOST_DEVICE Element<float> element_at(const RowConstants& c, int64_t index,
                                               int64_t i) const {
    const float z = tile.student[index][i] - c.student_base[i];
    const float w = tile.teacher[index][i] - c.teacher_base[i];
    const float q = tile.student_power[index][i] * tile.student_scale[i];
    const float p = tile.teacher_power[index][i] * tile.teacher_scale[i];
    const float gap =
        kSeparate ? w * c.teacher_inverse_t[i] - z * c.inverse_t[i] : (w - z) * c.inverse_t[i];
    Element<float> e = element<float>(p, q, gap - c.log_ratio[i]);
    e.gap = gap + c.shift[i];
    return e;
  }

  // Turns slope, in place of the student's logits, into the gradient.
  FASTKD_HOST_DEVICE float gradient_at(const RowConstants& c, bool wanted, int64_t index, int64_t i,
                                       float slope) const {
    float g = c.soft_gain[i] * slope - c.uniform[i];
    if (wanted) g += tile.hard_power[index][i] * c.hard_gain[i];
    return g - (static_cast<int32_t>(index) == tile.label[i] ? c.onehot[i] : 0.0f);
  }

  bool wants_hard_gradient() const {
    return hard && (in.hard_weight != 0 || in.row_settings != nullptr);
  }
  bool has_separate_temperatures() const {
    return in.row_settings != nullptr || in.temperature != in.teacher_temperature;
  }

  // The divergence of each row, and the gradient over the student's logits. What needs the logits
  // of the student comes before. `slope_sums`: tile.slope has them, from the forward pass.
  void differentiate(bool slope_sums) {
    RowConstants c;
    make_constants_of_rows(&c);
    const bool separate = has_separate_temperatures();
    if (is_one_sweep(in.divergence)) {
      return separate ? write_gradient<true>(c) : write_gradient<false>(c);
    }
    visit(in.divergence, [&](auto divergence) {
      using D = decltype(divergence);
      separate ? balance_gradient<D, true>(c, slope_sums)
               : balance_gradient<D, false>(c, slope_sums);
    });
  }

  template <bool kSeparate>
  __attribute__((noinline)) void write_gradient(const RowConstants& c) {
    const bool wanted = wants_hard_gradient();
    for (int64_t i = 0; i < kTileRows; ++i) tile.value[i] = 0;
    for (int64_t index = 0; index < in.classes; ++index) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const Evaluated<float> kl = ForwardKL::at(element_at<kSeparate>(c, index, i));
        tile.value[i] += kl.value;
        tile.student[index][i] = gradient_at(c, wanted, index, i, kl.slope);
      }
    }
  }

  template <class D, bool kSeparate>
  __attribute__((noinline)) void balance_gradient(const RowConstants& c, bool slope_sums) {
    const ConstantsOf<float> k = constants_in<float>(constants);
    alignas(64) Lanes sums, counts;
    for (int64_t i = 0; i < kTileRows; ++i) tile.value[i] = sums[i] = counts[i] = 0;
    for (int64_t index = 0; index < in.classes; ++index) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const Evaluated<float> here = D::at(element_at<kSeparate>(c, index, i), k);
        const bool in_mean = !is_mean(D::kBalance) || here.slope == here.slope;
        tile.value[i] += in_mean ? here.value : 0.0f;
        sums[i] += in_mean ? here.slope : 0.0f;
        counts[i] += in_mean ? 1.0f : 0.0f;
        tile.student[index][i] = here.slope;
      }
    }
    const bool wanted = wants_hard_gradient();
    alignas(64) Lanes factor;
    for (int64_t i = 0; i < kTileRows; ++i) {
      if (!slope_sums || is_mean(D::kBalance)) tile.slope[i] = sums[i];
      tile.classes_that_count[i] = counts[i];
      factor[i] = is_mean(D::kBalance) ? 1 / counts[i] : 1.0f;
    }
    for (int64_t index = 0; index < in.classes; ++index) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        float share = D::kBalance == Balance::kCentered ? factor[i] : 0.0f;
        if (D::kBalance == Balance::kStudent) {
          share = tile.student_power[index][i] * tile.student_scale[i];
        }
        float slope = (tile.student[index][i] - tile.slope[i] * share) * factor[i];
        if (is_mean(D::kBalance)) slope = slope == slope ? slope : 0.0f;
        tile.student[index][i] = gradient_at(c, wanted, index, i, slope);
      }
    }
  }

  void sum_terms() {
    alignas(64) Lanes log_q, log_p;
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      log_q[i] = log2_of(tile.student_scale[i]);
      log_p[i] = log2_of(tile.teacher_scale[i]);
      tile.student_entropy[i] = tile.teacher_entropy[i] = tile.agreement[i] = 0;
    }
    for (int64_t c = 0; c < in.classes; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const float z = tile.student[c][i] - tile.student_max[i];
        const float w = tile.teacher[c][i] - tile.teacher_max[i];
        const float q = tile.student_power[c][i] * tile.student_scale[i];
        const float p = tile.teacher_power[c][i] * tile.teacher_scale[i];
        tile.student_entropy[i] -= times_log(q, z * tile.factor[i] + log_q[i]);
        tile.teacher_entropy[i] -= times_log(p, w * tile.teacher_factor[i] + log_p[i]);
        tile.agreement[i] = z == 0 && w == 0 ? 1.0f : tile.agreement[i];
      }
    }
  }

  // The label's logit, and the sum of all, below the maximum.
  void sum_logits() {
    for (int64_t i = 0; i < kTileRows; ++i) tile.offsets[i] = tile.label_logit[i] = 0;
    if (!hard) return;
    for (int64_t c = 0; c < in.classes; ++c) {
      const int32_t index = static_cast<int32_t>(c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const float z = tile.student[c][i] - tile.student_max[i];
        tile.offsets[i] += z;
        tile.label_logit[i] = index == tile.label[i] ? z : tile.label_logit[i];
      }
    }
  }

  bool valid(int64_t i) const {
    return tile.state[i] == State::kNormal && finite(tile.student_max[i]) &&
           finite(tile.student_scale[i]) && finite(tile.teacher_max[i]) &&
           finite(tile.teacher_scale[i]);
  }

  void store_gradient() const {
    if (grad == nullptr) return;
    alignas(64) float buffer[kNarrow];
    for (int64_t i = 0; i < count; ++i) {
      if (tile.state[i] != State::kIgnored && valid(i)) {
        for (int64_t c = 0; c < in.classes; ++c) buffer[c] = tile.student[c][i];
      } else {
        const float constant = tile.state[i] == State::kIgnored ? 0.0f : kNaN<float>;
        for (int64_t c = 0; c < in.classes; ++c) buffer[c] = constant;
      }
      const int64_t offset = row_offset(first + i, in.group_rows, grad_stride);
      write(buffer, in.student_dtype, in.classes,
            const_cast<void*>(at(grad, in.student_dtype, offset)));
    }
  }

  void store_row(const ForwardArgs& args, int64_t i) const {
    const int64_t index = first + i;
    float* loss = static_cast<float*>(args.loss) + index;
    float* terms = args.terms == nullptr ? nullptr : static_cast<float*>(args.terms) + index;
    if (!valid(i)) {
      const float constant = tile.state[i] == State::kIgnored ? 0.0f : kNaN<float>;
      *loss = constant;
      for (int k = 0; terms != nullptr && k < kTerms; ++k) terms[k * args.rows] = constant;
      return;
    }
    double cross = 0;
    if (hard) {
      const double smoothing = args.label_smoothing;
      const double mean = tile.offsets[i] / static_cast<double>(args.classes);
      cross = log2_of(tile.hard_sum[i]) * kLn2 -
              weighted(1 - smoothing, static_cast<double>(tile.label_logit[i])) -
              weighted(smoothing, mean);
    }
    // As in rows.cpp: NaN in a valid row stands for an infinite divergence.
    const double value =
        divergence_of<double>(args.divergence, tile.value[i], tile.slope[i],
                              tile.classes_that_count[i], tile.teacher_entropy[i] * kLn2);
    const double soft = value == value ? value : -kLowest;
    const double t = tile.temperature[i];
    const double total = weighted(static_cast<double>(tile.soft_weight[i]) * t * t, soft);
    const double hard_weight = tile.hard_weight[i];
    *loss = static_cast<float>(hard ? total + weighted(hard_weight, cross) : total);
    if (terms == nullptr) return;
    terms[kHard * args.rows] = static_cast<float>(cross);
    terms[kSoft * args.rows] = static_cast<float>(soft);
    terms[kStudentEntropy * args.rows] = tile.student_entropy[i] * static_cast<float>(kLn2);
    terms[kTeacherEntropy * args.rows] = tile.teacher_entropy[i] * static_cast<float>(kLn2);
    terms[kAgreement * args.rows] = tile.agreement[i];
  }

  void store_stats(const ForwardArgs& args, int64_t i) const {
    if (args.stats == nullptr) return;
    float* stats = static_cast<float*>(args.stats) + first + i;
    const bool ignored = tile.state[i] == State::kIgnored;
    stats[kStudentMax * args.rows] = ignored ? 0 : tile.student_max[i];
    stats[kStudentScale * args.rows] = ignored ? 0 : tile.student_scale[i];
    stats[kHardScale * args.rows] = ignored ? 0 : tile.hard_scale[i];
    stats[kTeacherMax * args.rows] = ignored ? 0 : tile.teacher_max[i];
    stats[kTeacherScale * args.rows] = ignored ? 0 : tile.teacher_scale[i];
    stats[kSlopeSum * args.rows] = ignored || is_one_sweep(in.divergence) ? 0 : tile.slope[i];
    stats[kClassCount * args.rows] =
        ignored || !is_mean(balance_of(in.divergence)) ? 0 : tile.classes_that_count[i];
    if (first + i == 0) stats[kStats * args.rows] = static_cast<float>(args.scale);
  }

  void forward(const ForwardArgs& args) {
    load();
    scan();
    const float gain = static_cast<float>(args.scale) * static_cast<float>(args.grad_output);
    for (int64_t i = 0; i < kTileRows; ++i) tile.gain[i] = gain;
    sum_logits();
    if (args.terms != nullptr || in.divergence == Divergence::kSoftCrossEntropy) sum_terms();
    differentiate(false);
    store_gradient();
    for (int64_t i = 0; i < count; ++i) {
      store_row(args, i);
      store_stats(args, i);
    }
  }

  void backward(const BackwardArgs& args) {
    load();
    const float* stats = static_cast<const float*>(args.stats);
    const float* grad_output = static_cast<const float*>(args.grad_output);
    const float scale = stats[kStats * args.rows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = first + (i < count ? i : 0);
      tile.student_max[i] = stats[kStudentMax * args.rows + row];
      tile.student_scale[i] = stats[kStudentScale * args.rows + row];
      tile.hard_scale[i] = stats[kHardScale * args.rows + row];
      tile.teacher_max[i] = stats[kTeacherMax * args.rows + row];
      tile.teacher_scale[i] = stats[kTeacherScale * args.rows + row];
      tile.slope[i] = stats[kSlopeSum * args.rows + row];
      tile.gain[i] = scale * grad_output[args.grad_output_per_row ? row : 0];
    }
    exponentiate();
    differentiate(true);
    store_gradient();
  }
};

bool is_narrow(const Inputs& in) {
  return in.classes <= kNarrow && !computes_in_double(in.student_dtype, in.teacher_dtype);
}

// Calls fn(engine) for tiles of rows [begin, end).
template <class Args, class Fn>
void for_tiles(const Args& args, bool terms, int64_t begin, int64_t end, Fn&& fn) {
  const Constants constants = make_constants(args.divergence, args.mix);
  const bool weighs = args.hard_weight != 0 || args.row_settings != nullptr;
  Tile tile;
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int64_t count = end - first < kTileRows ? end - first : kTileRows;
    const bool hard = args.labels != nullptr && (weighs || terms);
    NarrowEngine engine{args, args.grad, args.grad_stride, first, count, hard, constants, tile};
    fn(engine);
  }
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
