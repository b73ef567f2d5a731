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
  alignas(64) Lanes temperature, factor, least, gain, label_logit, value;
  alignas(64) Lanes student_entropy, teacher_entropy, offsets, agreement;
  alignas(64) int32_t label[kTileRows];  // -1: none
  State state[kTileRows];
};

template <class D>
struct NarrowEngine {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  int64_t first;  // row in lane 0
  int64_t count;  // rows, at most kTileRows
  bool hard;      // the hard term is wanted
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
      tile.factor[i] = static_cast<float>(kLog2E / row.temperature);
      tile.least[i] = Format<float>::kMinExponent / tile.factor[i];
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
        tile.teacher_power[c][i] = exponential.of(w, tile.factor[i], tile.least[i]);
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

  // The divergence of each row, and the gradient over the student's logits. What needs the logits
  // of the student comes before.
  __attribute__((noinline)) void differentiate() {
    static_assert(D::kSlopeSumKnown, "a sweep that sums the slopes must come first");
    alignas(64) Lanes inverse_t, student_base, teacher_base, log_ratio;
    alignas(64) Lanes soft_gain, hard_gain, onehot, uniform;
    const bool wanted = hard && in.hard_weight != 0;
    const float smoothing = static_cast<float>(in.label_smoothing);
#pragma omp simd
    for (int64_t i = 0; i < kTileRows; ++i) {
      const float t = tile.temperature[i];
      inverse_t[i] = 1 / t;
      const float distance = tile.teacher_max[i] - tile.student_max[i];
      const bool apart =
          distance > static_cast<float>(kApart) || distance < -static_cast<float>(kApart);
      student_base[i] = apart ? tile.student_max[i] : 0.0f;
      teacher_base[i] = apart ? tile.teacher_max[i] : 0.0f;
      log_ratio[i] =
          (apart ? 0.0f : distance * inverse_t[i]) +
          log2_of(tile.student_scale[i] / tile.teacher_scale[i]) * static_cast<float>(kLn2);
      soft_gain[i] = tile.gain[i] * static_cast<float>(in.soft_weight) * t;
      hard_gain[i] = wanted ? tile.gain[i] * static_cast<float>(in.hard_weight) : 0.0f;
      onehot[i] = hard_gain[i] * (1 - smoothing);
      uniform[i] = hard_gain[i] * smoothing / static_cast<float>(in.classes);
      hard_gain[i] *= tile.hard_scale[i];
      tile.value[i] = 0;
    }
    for (int64_t c = 0; c < in.classes; ++c) {
      const int32_t index = static_cast<int32_t>(c);
#pragma omp simd
      for (int64_t i = 0; i < kTileRows; ++i) {
        const float z = tile.student[c][i], w = tile.teacher[c][i];
        const float q = tile.student_power[c][i] * tile.student_scale[i];
        const float p = tile.teacher_power[c][i] * tile.teacher_scale[i];
        const float apart = (w - teacher_base[i]) - (z - student_base[i]);
        const Element<float> e = element<float>(p, q, apart * inverse_t[i] - log_ratio[i]);
        tile.value[i] += D::template value<float>(e);
        float g = soft_gain[i] * D::template gradient<float>(e) - uniform[i];
        if (wanted) g += tile.hard_power[c][i] * hard_gain[i];
        tile.student[c][i] = g - (index == tile.label[i] ? onehot[i] : 0.0f);
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
        tile.teacher_entropy[i] -= times_log(p, w * tile.factor[i] + log_p[i]);
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
    const double soft = tile.value[i] == tile.value[i] ? tile.value[i] : -kLowest;
    const double t = tile.temperature[i];
    const double total = weighted(args.soft_weight * t * t, soft);
    *loss = static_cast<float>(hard ? total + weighted(args.hard_weight, cross) : total);
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
    stats[kSlopeSum * args.rows] = 0;
    if (first + i == 0) stats[kStats * args.rows] = static_cast<float>(args.scale);
  }

  void forward(const ForwardArgs& args) {
    load();
    scan();
    for (int64_t i = 0; i < kTileRows; ++i) tile.gain[i] = static_cast<float>(args.scale);
    sum_logits();
    if (args.terms != nullptr) sum_terms();
    differentiate();
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
      tile.gain[i] = scale * grad_output[args.grad_output_per_row ? row : 0];
    }
    exponentiate();
    differentiate();
    store_gradient();
  }
};

bool is_narrow(const Inputs& in) {
  return in.classes <= kNarrow && !computes_in_double(in.student_dtype, in.teacher_dtype);
}

// Calls fn(engine) for tiles of rows [begin, end).
template <class Args, class Fn>
void for_tiles(const Args& args, bool terms, int64_t begin, int64_t end, Fn&& fn) {
  visit(args.divergence, [&](auto divergence) {
    Tile tile;
    for (int64_t first = begin; first < end; first += kTileRows) {
      const int64_t count = end - first < kTileRows ? end - first : kTileRows;
      const bool hard = args.labels != nullptr && (args.hard_weight != 0 || terms);
      NarrowEngine<decltype(divergence)> engine{args, args.grad, args.grad_stride, first, count,
                                                hard, tile};
      fn(engine);
    }
  });
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
