// The row engine: two sweeps of each row of student and teacher logits, compiled once for each
// instruction set (FASTKD_ISA names it and the namespace).
//
// Sweep 1 finds the maxima and the sums of exponentials, and keeps the exponentials; sweep 2 finds
// logits and exponentials in the cache, so that the divergence and the gradient cost no further
// trip to memory (engine.h). Both sweeps work on blocks in L1 (scan.h, blocks.h), and rows are cut
// into segments whose results are merged in a fixed order: the bits do not depend on who computes
// which. docs/maths.md derives the formulas.
#include <memory>
#include <new>

#include "engine.h"
#include "gather.h"

namespace fastkd::cpu::FASTKD_ISA {

// transposed.cpp
void forward_transposed(const ForwardArgs& args, int64_t begin, int64_t end);
void backward_transposed(const BackwardArgs& args, int64_t begin, int64_t end);

namespace {

template <class T>
void put_loss(const ForwardArgs& args, const Row<T>& row, int64_t index, const Statistics& of,
              const Scales<T>& scales, Sums sums) {
  double hard = 0;
  const Scales<double> exact = scales.template as<double>();
  if (row.hard != Hard::kNone) {
    // log sum exp(z) - max; then the target's mean of max - z.
    hard = std::log2(of.hard_sum) / row.hard_exponent();
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
  T* stats = static_cast<T*>(args.stats) + index;
  const bool jsd = args.divergence == Divergence::kJensenShannon;
  T slope = static_cast<T>(sums.slope), classes = jsd ? s.mean : static_cast<T>(sums.classes);
  for_stats(args.divergence, s, slope, classes,
            [&](Stat which, T number) { stats[which * args.rows] = number; });
  if (index == 0) static_cast<T*>(args.stats)[kStats * args.rows] = static_cast<T>(args.scale);
}

template <class T>
Scales<T> get_stats(const BackwardArgs& args, const Row<T>& row, int64_t index) {
  const T* stats = static_cast<const T*>(args.stats) + index;
  Scales<T> s = {};
  T slope, classes;
  for_stats(args.divergence, s, slope, classes,
            [&](Stat which, T& number) { number = stats[which * args.rows]; });
  const bool jsd = args.divergence == Divergence::kJensenShannon;
  if (row.gaps) s.mean = stats[(jsd ? kClassCount : kSlopeSum) * args.rows];
  if (row.left_out < 0) return s;
  const Logits student = student_of(args, index), teacher = teacher_of(args, index);
  s.student_label = read_one<T>(student.base, student.dtype, row.left_out);
  s.teacher_label = read_one<T>(teacher.base, teacher.dtype, row.left_out);
  return s;
}

// The last step of a row: its loss, terms and stats.
template <class T>
void finish(const ForwardArgs& args, const Row<T>& row, int64_t index, const Statistics& of,
            const Scales<T>& scales, Sums* sums) {
  if (row.state == State::kIgnored) {
    put_constant(args, index, T(0));
    return put_stats(args, index, Scales<T>{}, Sums{});
  }
  if (scales.mean > 0 && is_mean_of_gaps(args.divergence)) {
    sums->value = sums->slope = static_cast<double>(scales.mean);
  }
  if (is_reverse(args.divergence)) {
    const Gaps<T> gaps = make_gaps(row, scales);
    if (is_sum_of_slopes(gaps, static_cast<T>(sums->slope))) {
      sums->value = reverse_of(row, of, gaps, sums->slope);
    }
  }
  if (row.state == State::kInvalid || !scales.valid()) {
    put_constant(args, index, kNaN<T>);
  } else {
    put_loss(args, row, index, of, scales, *sums);
  }
  put_stats(args, index, scales, *sums);
}

// Gradient and sums of one segment; a constant where the row has no gradient.
template <class T, class S>
void write_segment(const Engine<T, S>& engine, const Row<T>& row, const Scales<T>& scales,
                   Coefficients<T, S>* c, double gain, int64_t index, int64_t segment,
                   const Left<T>& left, Sums* sums) {
  const int64_t begin = segment * kSegment, end = engine.end_of(segment);
  if (row.state == State::kIgnored) {
    engine.fill(index, begin, end, T(0));
  } else if (row.state == State::kInvalid || !scales.valid()) {
    engine.fill(index, begin, end, kNaN<T>);
  } else {
    engine.write(row, c, scales, gain, index, segment, left, sums);
  }
}

// As backward_row() forms it from what put_stats() leaves, to the same bits.
template <class T>
double gain_of(const ForwardArgs& args) {
  return static_cast<double>(static_cast<T>(args.scale)) * args.grad_output;
}

// Where the segments of a row leave their exponentials: the last on the stack; the others where the
// gradients of the range's last rows will be written, which takes no memory. Without a gradient,
// and for divergences that take another sweep, in memory for a row. Where there is neither (in
// place, or of these last rows) they are computed anew, segment by segment, to the same bits.
template <class T>
struct Room {
  static constexpr uintptr_t kAlignment = 64;
  Kept<T> last;
  int64_t end;       // of the range of rows
  size_t count = 0;  // of exponentials of the other segments, the student's and the teacher's
  bool borrows = false;
  std::unique_ptr<T[]> own;
  std::unique_ptr<double[]> maxima;
  Left<T> of_last, of_other;  // handed out by reference: copies of them cost 20 ns a row

  Room(const Room&) = delete;  // of_last points into it
  template <class S>
  Room(const Engine<T, S>& engine, int64_t end) : end(end) {
    if (engine.keeps()) of_last = last.left();
    const size_t others = static_cast<size_t>(engine.segments() - 1);
    if (others == 0 || !engine.keeps()) return;
    count = 2 * others * kSegment;
    const RowStrides& stride = engine.grad_stride;
    const Inputs& in = engine.in;
    const bool adjacent = stride.row == in.classes &&
                          (in.rows <= in.group_rows || stride.group == in.group_rows * stride.row);
    borrows = adjacent && engine.grad != nullptr && engine.grad != in.student;
    if (engine.grad == nullptr || !engine.one_sweep()) own.reset(new (std::nothrow) T[count]);
    maxima.reset(new (std::nothrow) double[2 * others * Kept<T>::kBlocks]);
  }

  template <class S>
  T* exponentials(const Engine<T, S>& engine, int64_t row) const {
    if (maxima == nullptr) return nullptr;
    if (own != nullptr) return own.get();
    if (!borrows) return nullptr;
    const uintptr_t next = reinterpret_cast<uintptr_t>(engine.grad_at(row, engine.in.classes));
    const uintptr_t to = reinterpret_cast<uintptr_t>(engine.grad_at(end - 1, engine.in.classes));
    const uintptr_t from = (to - count * sizeof(T)) / kAlignment * kAlignment;
    return from >= next && from < to ? reinterpret_cast<T*>(from) : nullptr;
  }

  // What is returned holds until the next call.
  template <class S>
  const Left<T>& of(const Engine<T, S>& engine, int64_t row, int64_t segment) {
    if (segment == engine.segments() - 1) return of_last;
    of_other = {};
    if (!engine.keeps()) return of_other;
    T* const of_row = exponentials(engine, row);
    if (of_row == nullptr) return of_other;
    T* const student = of_row + 2 * segment * kSegment;
    double* const student_max = maxima.get() + 2 * segment * Kept<T>::kBlocks;
    of_other = {student, student + kSegment, student_max, student_max + Kept<T>::kBlocks};
    return of_other;
  }
};

template <class T, class S>
void forward_row(const ForwardArgs& args, const Engine<T, S>& engine, int64_t index,
                 Room<T>& room) {
  const Row<T> row = make_row<T>(args, index, engine.terms);
  const int64_t last = engine.segments() - 1;
  Statistics statistics = engine.scan(row, index, 0, room.of(engine, index, 0));
  for (int64_t i = 1; i <= last; ++i) {
    merge(row, engine.scan(row, index, i, room.of(engine, index, i)), &statistics);
  }
  const double gain = gain_of<T>(args);
  const Scales<T> scales = make_scales(row, statistics);
  auto c = engine.coefficients(row, scales, gain);
  // Without memory for the other segments, each of them is recomputed in the place of the last one,
  // whose exponentials then serve the first loop alone.
  const bool spare = last == 0 || room.of(engine, index, 0).any();
  bool last_is_cached = true;
  const auto left_of = [&](int64_t i) -> const Left<T>& {
    const Left<T>& left = room.of(engine, index, i);
    if (left.any() && (i < last || last_is_cached)) return left;
    return room.of_other = engine.keep(row, scales, index, i, &room.last);
  };
  Sums sums = {};
  // Backwards, because a long row's end is what the sweep before left in the cache.
  if (!engine.one_sweep()) {
    for (int64_t i = last; i >= 0; --i) {
      Sums of_segment = {};
      engine.sum_segment(row, &c, scales, index, i, left_of(i), &of_segment);
      add(of_segment, &sums);
    }
    engine.set_shares(&c, sums);
    last_is_cached = spare;
  }
  for (int64_t i = last; i >= 0; --i) {
    Sums of_segment = {};
    if (!engine.keeps_slopes()) {
      write_segment(engine, row, scales, &c, gain, index, i, left_of(i), &of_segment);
    } else {
      Left<T> left = room.of(engine, index, i);
      left.slopes = left.any() && spare;
      if (!left.slopes) left = engine.keep(row, scales, index, i, &room.last);
      write_segment(engine, row, scales, &c, gain, index, i, left, &of_segment);
    }
    add(of_segment, &sums);
  }
  finish(args, row, index, statistics, scales, &sums);
}

template <class T, class S>
void backward_row(const BackwardArgs& args, const Engine<T, S>& engine, int64_t index,
                  Kept<T>& kept) {
  const Row<T> row = make_row<T>(args, index, false);
  const T grad_output =
      static_cast<const T*>(args.grad_output)[args.grad_output_per_row ? index : 0];
  const double scale = static_cast<const T*>(args.stats)[kStats * args.rows];
  const double gain = scale * static_cast<double>(grad_output);
  const Scales<T> scales = get_stats(args, row, index);
  auto c = engine.coefficients(row, scales, gain);
  Sums sums = {};
  const T* stats = static_cast<const T*>(args.stats) + index;
  sums.slope = stats[kSlopeSum * args.rows], sums.classes = stats[kClassCount * args.rows];
  engine.set_shares(&c, sums);
  for (int64_t i = engine.segments(); i-- > 0;) {
    const Left<T> left = engine.keep(row, scales, index, i, &kept);
    write_segment(engine, row, scales, &c, gain, index, i, left, nullptr);
  }
}

// Calls fn with the engine for the number types of `args`.
template <class Args, class Fn>
void with_engine(const Args& args, bool terms, Fn&& fn) {
  const Constants constants = make_constants(args.divergence, args.mix);
  if (computes_in_double(args.student_dtype, args.teacher_dtype)) {
    fn(Engine<double, double>{args, args.grad, args.grad_stride, terms, constants}, double{});
  } else if (args.student_dtype == DType::kBFloat16 && args.teacher_dtype == DType::kBFloat16) {
    fn(Engine<float, BFloat16>{args, args.grad, args.grad_stride, terms, constants}, float{});
  } else {
    fn(Engine<float, float>{args, args.grad, args.grad_stride, terms, constants}, float{});
  }
}

void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  if (is_transposed(args)) return forward_transposed(args, begin, end);
  if (has_apart_classes(args)) return for_gathered_rows(args, begin, end, forward);
  with_engine(args, args.terms != nullptr, [&](const auto& engine, auto zero) {
    Room<decltype(zero)> room(engine, end);
    for (int64_t i = begin; i < end; ++i) forward_row(args, engine, i, room);
    engine.complete();
  });
}

void backward(const BackwardArgs& args, int64_t begin, int64_t end) {
  if (is_transposed(args)) return backward_transposed(args, begin, end);
  if (has_apart_classes(args)) return for_gathered_rows(args, begin, end, backward);
  with_engine(args, false, [&](const auto& engine, auto zero) {
    Kept<decltype(zero)> kept;
    for (int64_t i = begin; i < end; ++i) backward_row(args, engine, i, kept);
    engine.complete();
  });
}

void scan(const ForwardArgs& args, int64_t index, int64_t segment, Statistics* result) {
  with_engine(args, args.terms != nullptr, [&](const auto& engine, auto zero) {
    using T = decltype(zero);
    Kept<T> kept;
    const Row<T> row = make_row<T>(args, index, engine.terms);
    *result = engine.scan(row, index, segment, engine.keeps() ? kept.left() : Left<T>{});
  });
}

template <class T>
Statistics merge_all(const Row<T>& row, const Statistics* of_row, int64_t segments) {
  Statistics result = of_row[0];
  for (int64_t i = 1; i < segments; ++i) merge(row, of_row[i], &result);
  return result;
}

// The state of a row of which other threads compute other segments.
template <class T, class S>
struct SharedRow {
  const Engine<T, S>& engine;
  Row<T> row;
  double gain;
  Scales<T> scales;
  Coefficients<T, S> c;
  Kept<T> kept;

  SharedRow(const ForwardArgs& args, const Engine<T, S>& engine, int64_t index,
            const Statistics* of_row)
      : engine(engine),
        row(make_row<T>(args, index, engine.terms)),
        gain(gain_of<T>(args)),
        scales(make_scales(row, merge_all(row, of_row, engine.segments()))),
        c(engine.coefficients(row, scales, gain)) {}

  Left<T> left(int64_t index, int64_t segment) {
    return engine.keep(row, scales, index, segment, &kept);
  }
};

void sum_one(const ForwardArgs& args, int64_t index, int64_t segment, const Statistics* of_row,
             Sums* result) {
  with_engine(args, args.terms != nullptr, [&](const auto& engine, auto) {
    SharedRow shared(args, engine, index, of_row);
    engine.sum_segment(shared.row, &shared.c, shared.scales, index, segment,
                       shared.left(index, segment), result);
  });
}

void write_one(const ForwardArgs& args, int64_t index, int64_t segment, const Statistics* of_row,
               const Sums& of_balance, Sums* result) {
  with_engine(args, args.terms != nullptr, [&](const auto& engine, auto) {
    SharedRow shared(args, engine, index, of_row);
    engine.set_shares(&shared.c, of_balance);
    write_segment(engine, shared.row, shared.scales, &shared.c, shared.gain, index, segment,
                  shared.left(index, segment), result);
    engine.complete();
  });
}

void close(const ForwardArgs& args, int64_t index, const Statistics* of_row, const Sums* of_sums) {
  with_engine(args, args.terms != nullptr, [&](const auto& engine, auto zero) {
    using T = decltype(zero);
    const Row<T> row = make_row<T>(args, index, engine.terms);
    Sums sums = {};
    for (int64_t i = engine.segments(); i-- > 0;) add(of_sums[i], &sums);
    const Statistics statistics = merge_all(row, of_row, engine.segments());
    finish(args, row, index, statistics, make_scales(row, statistics), &sums);
  });
}

void exp2_all(const float* in, float* out, int64_t count, bool by_registers) {
  const Exponential<float> power(1.0f, 0.0f, 1.0);
  if (!by_registers) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = power(in[i]);
    return;
  }
  const Exponentials<float, float> powers(power);
  for (int64_t i = 0; i < count; ++i) {
    Register<float> result = powers(all(in[i]));
    std::memcpy(&out[i], &result, sizeof(float));
  }
}

}  // namespace

int64_t run_topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed);  // topk.cpp
void run_mixture(const MixtureArgs& args, int64_t begin, int64_t end);  // mixture.cpp

Kernels make_kernels(const char* name);
Kernels make_kernels(const char* name) {
  return {name,      forward, backward, scan,     sum_one,
          write_one, close,   exp2_all, run_topk, run_mixture};
}

}  // namespace fastkd::cpu::FASTKD_ISA
