// Forward and backward of the transposed engine (transposed_engine.h) over a range of rows. The
// file is compiled once for each instruction set (docs/maths.md, sections 1 to 3).
#include "transposed_engine.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Copy one number for each row of the group.
void copy_rows(const TransposedEngine& engine, const void* from, void* to) {
  if (engine.count == kGroupRows) {
    std::memcpy(to, from, sizeof(V));
  } else {
    std::memcpy(to, from, static_cast<size_t>(engine.count) * sizeof(float));
  }
}

// Write the group's numbers, or `otherwise` for rows that are not computed, to field `index` of
// `base`, float [fields, rows].
void put(const TransposedEngine& engine, void* base, int64_t index, V numbers) {
  const V result = engine.computed ? numbers : engine.otherwise;
  copy_rows(engine, &result, static_cast<float*>(base) + index * engine.in.rows + engine.first);
}

void put_results(const TransposedEngine& e, const ForwardArgs& args) {
  struct {
    V value, slope, classes, student_entropy, teacher_entropy, agreement;
  } sums = {e.value, e.slope, e.classes, e.student_entropy, e.teacher_entropy, e.agreement};
  V cross{};
  if (e.hard) {
    const V smoothing = broadcast<V>(static_cast<float>(args.label_smoothing));
    const V hard_sum = e.exponentials.hard.sum;
    V log = log_of(hard_sum);
    if (e.decoupled)
      log = log_sum<V>(e.scales, hard_sum == 0 ? broadcast<V>(-kInfinity<float>) : log);
    const V label_logit = e.scales.student_label - e.scales.student_max;
    cross = weighted<V>(1 - smoothing, log - label_logit) +
            weighted<V>(smoothing, log - e.offsets / static_cast<float>(args.classes));
  }
  if (e.decoupled) include_label(args, e.settings, e.scales, e.ratio, &sums);
  const Results<V> results = results_of(args.divergence, e.settings, cross, sums);
  put(e, args.loss, 0, results.loss);
  for (int i = 0; i < kTerms && args.terms != nullptr; ++i) {
    put(e, args.terms, i, results.terms[i]);
  }
}

void put_stats(TransposedEngine& e, const ForwardArgs& args) {
  if (args.stats == nullptr) return;
  for_stats(args.divergence, e.scales, e.slope, e.classes,
            [&](Stat which, V numbers) { put(e, args.stats, which, numbers); });
  float* const scale = static_cast<float*>(args.stats) + kStats * args.rows;
  if (e.first == 0) *scale = static_cast<float>(args.scale);
}

void get_stats(TransposedEngine& e, const BackwardArgs& args) {
  const float* const stats = static_cast<const float*>(args.stats) + e.first;
  for_stats(args.divergence, e.scales, e.slope, e.classes,
            [&](Stat which, V& numbers) { copy_rows(e, stats + which * args.rows, &numbers); });
}

}  // namespace

void forward_transposed(const ForwardArgs& args, int64_t begin, int64_t end);
void forward_transposed(const ForwardArgs& args, int64_t begin, int64_t end) {
  TransposedEngine engine(args, args.terms != nullptr);
  const float gain = static_cast<float>(args.scale) * static_cast<float>(args.grad_output);
  engine.for_groups(begin, end, [&] {
    engine.scan();
    engine.gain = broadcast<V>(gain);
    engine.differentiate(false);
    put_results(engine, args);
    put_stats(engine, args);
  });
}

void backward_transposed(const BackwardArgs& args, int64_t begin, int64_t end);
void backward_transposed(const BackwardArgs& args, int64_t begin, int64_t end) {
  TransposedEngine engine(args, false);
  const float scale = static_cast<const float*>(args.stats)[kStats * args.rows];
  const float* const grad_output = static_cast<const float*>(args.grad_output);
  engine.for_groups(begin, end, [&] {
    get_stats(engine, args);
    engine.gain = broadcast<V>(scale * grad_output[0]);
    for (int64_t i = 0; i < engine.count && args.grad_output_per_row; ++i) {
      engine.gain[i] = scale * grad_output[engine.first + i];
    }
    engine.exponentiate<false>({0, args.classes});
    engine.differentiate(true);
  });
}

}  // namespace fastkd::cpu::FASTKD_ISA
