// The row engine: two or three sweeps over each row of student and teacher logits.
//
// The first sweep finds the maxima and the sums of exponentials, and caches the exponentials. The
// last sweep writes the gradient. For some divergences a sweep before the last sums the slopes. The
// later sweeps find logits and exponentials in the processor's cache, so that they cost no further
// memory traffic (engine.h). All sweeps work on blocks in L1 (scan.h, blocks.h). Rows are divided
// into segments whose results are merged in a fixed order: the bits do not depend on how segments
// are divided among threads. Derivations: docs/maths.md, sections 1 to 3, and 9.
#pragma once
#include "engine.h"
#include "gather.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class T>
void put_loss(const ForwardArgs& args, const Row<T>& row, int64_t index,
              const Statistics& statistics, const Scales<T>& scales, Sums sums) {
  double hard = 0;
  const Scales<double> exact = scales.template as<double>();
  if (row.hard != ExpSource::kNone) {
    // Set `hard` to log sum exp(z) - max z. Then subtract the target's mean of z - max z.
    hard = std::log2(statistics.hard_sum) / row.hard_exponent();
    if (row.left_out >= 0) hard = log_sum(exact, hard);
    hard -= sums.student_logits;
  }
  if (row.left_out >= 0) {
    include_label<double>(args, row, exact, make_log_ratio<T, double>(row, exact, false), &sums);
  }
  const Results<double> results = results_of<double>(args.divergence, row, hard, sums);
  static_cast<T*>(args.loss)[index] = static_cast<T>(results.loss);
  if (args.terms == nullptr) return;
  T* terms = static_cast<T*>(args.terms) + index;
  for (int i = 0; i < kTerms; ++i) terms[i * args.rows] = static_cast<T>(results.terms[i]);
}

template <class T>
void put_constant(const ForwardArgs& args, int64_t index, T value) {
  static_cast<T*>(args.loss)[index] = value;
  if (args.terms == nullptr) return;
  for (int i = 0; i < kTerms; ++i) static_cast<T*>(args.terms)[i * args.rows + index] = value;
}

template <class T>
void put_stats(const ForwardArgs& args, int64_t index, Scales<T> s, const Sums& sums) {
  if (args.stats == nullptr) return;
  T* const stats = static_cast<T*>(args.stats);
  const auto put = [&](Stat which, T value) { stats[which * args.rows + index] = value; };
  T slope = static_cast<T>(sums.slope), classes = static_cast<T>(sums.classes);
  for_stats(args.divergence, s, slope, classes, put);
  if (may_be_well_separated(args)) put(kMeanLogRatio, s.mean);
  if (index == 0) stats[kStats * args.rows] = static_cast<T>(args.scale);
}

template <class T>
Scales<T> get_stats(const BackwardArgs& args, const Row<T>& row, int64_t index, Sums* sums) {
  const T* const stats = static_cast<const T*>(args.stats);
  Scales<T> s = {};
  T slope, classes;
  for_stats(args.divergence, s, slope, classes,
            [&](Stat which, T& value) { value = stats[which * args.rows + index]; });
  sums->slope = slope, sums->classes = classes;
  if (row.log_ratios) s.mean = stats[kMeanLogRatio * args.rows + index];
  if (row.left_out < 0) return s;
  const Logits student = student_of(args, index), teacher = teacher_of(args, index);
  s.student_label = read_one<T>(student.base, student.dtype, row.left_out);
  s.teacher_label = read_one<T>(teacher.base, teacher.dtype, row.left_out);
  return s;
}

// Write loss, terms and stats of a row, as the last step.
template <class T>
void finish(const ForwardArgs& args, const Row<T>& row, int64_t index, const Statistics& statistics,
            const Scales<T>& scales, Sums* sums) {
  if (row.state == State::kIgnored) {
    put_constant(args, index, T(0));
    return put_stats(args, index, Scales<T>{}, Sums{});
  }
  if (scales.mean > 0 && is_mean_log_ratio(args.divergence)) {
    sums->value = static_cast<double>(scales.mean);
  }
  if (is_reverse(args.divergence)) {
    const LogRatio<T> ratio = make_log_ratio(row, scales);
    if (is_sum_of_slopes(ratio, static_cast<T>(sums->slope))) {
      sums->value = reverse_of(row, statistics, ratio, sums->slope);
    }
  }
  if (row.state == State::kInvalid || !scales.valid()) {
    put_constant(args, index, kNaN<T>);
  } else {
    put_loss(args, row, index, statistics, scales, *sums);
  }
  put_stats(args, index, scales, *sums);
}

// Write the gradient of one segment, and add to `sums`. Write a constant if the row has no
// gradient.
template <class T>
void write_segment(const Engine<T>& engine, ActiveRow<T>* r, int64_t segment,
                   const SegmentCache<T>& cache, bool has_slopes, Sums* sums) {
  if (r->has_gradient()) return engine.write(r, segment, cache, has_slopes, sums);
  const T value = r->row.state == State::kIgnored ? T(0) : kNaN<T>;
  engine.fill(r->index, segment * kSegment, engine.end_of(segment), value);
}

// Return the gradient's factor, with the bits that backward_row() computes from put_stats()'s
// output.
template <class T>
double gain_of(const ForwardArgs& args) {
  return static_cast<double>(static_cast<T>(args.scale)) * args.grad_output;
}

template <class T>
void forward_row(const ForwardArgs& args, const Engine<T>& engine, int64_t index,
                 const RowCache<T>& cache) {
  const Row<T> row = make_row<T>(args, index, engine.terms);
  const int64_t last = engine.segments() - 1;
  Statistics statistics = engine.scan(row, index, 0, cache.segment(0));
  for (int64_t i = 1; i <= last; ++i) {
    merge(row, engine.scan(row, index, i, cache.segment(i)), &statistics);
  }
  ActiveRow<T> r = engine.activate(row, make_scales(row, statistics), gain_of<T>(args), index);
  Sums sums = {};
  // Sweep backwards, because the previous sweep has left the end of a long row in the processor's
  // cache.
  if (!engine.one_sweep()) {
    for (int64_t i = last; i >= 0; --i) {
      Sums of_segment = {};
      engine.sum_segment(&r, i, cache.segment(i), &of_segment);
      add(of_segment, &sums);
    }
    engine.set_shares(&r.c, sums);
  }
  for (int64_t i = last; i >= 0; --i) {
    const SegmentCache<T> segment = cache.segment(i);
    const bool has_slopes = engine.caches_slopes() && !segment.empty();
    Sums of_segment = {};
    write_segment(engine, &r, i, segment, has_slopes, &of_segment);
    add(of_segment, &sums);
  }
  finish(args, row, index, statistics, r.scales, &sums);
}

template <class T>
void backward_row(const BackwardArgs& args, const Engine<T>& engine, int64_t index) {
  const Row<T> row = make_row<T>(args, index, false);
  const T grad_output =
      static_cast<const T*>(args.grad_output)[args.grad_output_per_row ? index : 0];
  const double scale = static_cast<const T*>(args.stats)[kStats * args.rows];
  const double gain = scale * static_cast<double>(grad_output);
  Sums sums = {};
  const Scales<T> scales = get_stats(args, row, index, &sums);
  ActiveRow<T> r = engine.activate(row, scales, gain, index);
  engine.set_shares(&r.c, sums);
  for (int64_t i = engine.segments(); i-- > 0;) {
    write_segment(engine, &r, i, SegmentCache<T>{}, false, static_cast<Sums*>(nullptr));
  }
}

template <class T, class Args>
Engine<T> make_engine(const Args& args, bool terms) {
  return {{args, args.grad, args.grad_stride, terms, make_constants(args.divergence, args.mix)}};
}

template <class T>
void forward_rows(const ForwardArgs& args, int64_t begin, int64_t end) {
  if (has_apart_classes(args)) return for_gathered_rows(args, begin, end, forward_rows<T>);
  const Engine<T> engine = make_engine<T>(args, args.terms != nullptr);
  const RowCache<T> cache(args.classes);
  for (int64_t i = begin; i < end; ++i) forward_row(args, engine, i, cache);
  engine.complete();
}

template <class T>
void backward_rows(const BackwardArgs& args, int64_t begin, int64_t end) {
  if (has_apart_classes(args)) return for_gathered_rows(args, begin, end, backward_rows<T>);
  const Engine<T> engine = make_engine<T>(args, false);
  for (int64_t i = begin; i < end; ++i) backward_row(args, engine, i);
  engine.complete();
}

// ---- the steps of forward_row(), for rows whose segments several threads share

template <class T>
void scan_segment(const ForwardArgs& args, int64_t index, int64_t segment, Statistics* result) {
  const Engine<T> engine = make_engine<T>(args, args.terms != nullptr);
  const Row<T> row = make_row<T>(args, index, engine.terms);
  *result = engine.scan(row, index, segment, SegmentCache<T>{});
}

template <class T>
Statistics merge_all(const Row<T>& row, const Statistics* of_row, int64_t segments) {
  Statistics result = of_row[0];
  for (int64_t i = 1; i < segments; ++i) merge(row, of_row[i], &result);
  return result;
}

template <class T>
ActiveRow<T> activate(const ForwardArgs& args, const Engine<T>& engine, int64_t index,
                      const Statistics* of_row) {
  const Row<T> row = make_row<T>(args, index, engine.terms);
  const Scales<T> scales = make_scales(row, merge_all(row, of_row, engine.segments()));
  return engine.activate(row, scales, gain_of<T>(args), index);
}

template <class T>
void sum_slopes_of_segment(const ForwardArgs& args, int64_t index, int64_t segment,
                           const Statistics* of_row, Sums* result) {
  const Engine<T> engine = make_engine<T>(args, args.terms != nullptr);
  ActiveRow<T> r = activate(args, engine, index, of_row);
  engine.sum_segment(&r, segment, SegmentCache<T>{}, result);
}

template <class T>
void write_segment(const ForwardArgs& args, int64_t index, int64_t segment,
                   const Statistics* of_row, const Sums& slope_sums, Sums* result) {
  const Engine<T> engine = make_engine<T>(args, args.terms != nullptr);
  ActiveRow<T> r = activate(args, engine, index, of_row);
  engine.set_shares(&r.c, slope_sums);
  write_segment(engine, &r, segment, SegmentCache<T>{}, false, result);
  engine.complete();
}

template <class T>
void close_row(const ForwardArgs& args, int64_t index, const Statistics* of_row,
               const Sums* of_segments) {
  const Row<T> row = make_row<T>(args, index, args.terms != nullptr);
  const int64_t segments = (args.classes + kSegment - 1) / kSegment;
  Sums sums = {};
  for (int64_t i = segments; i-- > 0;) add(of_segments[i], &sums);
  const Statistics statistics = merge_all(row, of_row, segments);
  finish(args, row, index, statistics, make_scales(row, statistics), &sums);
}

template <class T>
Kernels row_kernels(const char* name) {
  Kernels kernels = {};
  kernels.name = name;
  kernels.forward = forward_rows<T>, kernels.backward = backward_rows<T>;
  kernels.scan = scan_segment<T>, kernels.sum_slopes = sum_slopes_of_segment<T>;
  kernels.write = write_segment<T>, kernels.close = close_row<T>;
  return kernels;
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
