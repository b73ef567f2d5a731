// The sparse loss, row by row, compiled once for each instruction set: the student is read once
// from memory, and its gradient is written in a second sweep.
//
// The rest's sums are taken with the listed classes masked (topk_row.h). The gradient is dense but
// simple for the rest, a few products of its exponentials; the listed classes, and the label, are
// computed apart in double and written over it.
#include <memory>

#include "../topk_row.h"
#include "row_blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using topk::Gains;
using topk::kNothing;
using topk::Mass;
using topk::Soft;
using topk::Summary;

constexpr int64_t kChunk = 64;

// Whether the first sweep keeps the rest's exponentials for the gradient. Of fp32 logits they would
// be as much memory again, and it takes less time to form them anew from what the cache has.
template <class T, class S>
constexpr bool kKeepsRest = sizeof(S) < sizeof(T);

// What is kept, and what the exponentials of each block are relative to. A thread's, for all rows.
template <class T, class S>
struct KeptRest {
  std::unique_ptr<T[]> exponentials;
  std::unique_ptr<double[]> maxima;

  explicit KeptRest(int64_t classes) {
    if (!kKeepsRest<T, S>) return;
    exponentials.reset(new T[static_cast<size_t>(classes + kLanes)]);
    maxima.reset(new double[static_cast<size_t>(classes / kBlock + 1)]);
  }
};

template <class T, class S>
struct TopkRow {
  static constexpr bool kKeeps = kKeepsRest<T, S>;
  const TopkArgs& args;
  int64_t index;
  uint64_t* listed;  // one bit for each class
  Row<T> row;
  Logits student;
  const int64_t* ids;
  const T* log_probs;
  const KeptRest<T, S>& kept;

  TopkRow(const TopkArgs& args, int64_t index, uint64_t* listed, const KeptRest<T, S>& kept)
      : args(args),
        index(index),
        listed(listed),
        row(make_row<T>(args, index, false)),
        student(student_of(args, index)),
        ids(args.indices + index * args.k),
        log_probs(static_cast<const T*>(args.teacher) + index * args.k),
        kept(kept) {}

  double logit(int64_t id) const { return read_one<double>(student.base, student.dtype, id); }
  bool is_listed(int64_t id) const { return listed[id / 64] >> (id % 64) & 1; }
  // The class of entry i of the list, or a negative number for padding (topk.h).
  int64_t class_at(int64_t i) const {
    return static_cast<double>(log_probs[i]) == kNothing ? -1 : ids[i];
  }

  // Sets the bits of the list. Returns whether it is one: no class out of range or twice.
  bool mark() {
    bool good = true;
    for (int64_t i = 0; i < args.k; ++i) {
      const int64_t id = class_at(i);
      if (id < 0) continue;
      if (id >= args.classes || is_listed(id)) {
        good = false;
      } else {
        listed[id / 64] |= uint64_t{1} << (id % 64);
      }
    }
    return good;
  }
  void unmark() {
    for (int64_t i = 0; i < args.k; ++i) {
      const int64_t id = class_at(i);
      if (id >= 0 && id < args.classes) listed[id / 64] = 0;
    }
  }

  // Calls fn(ids, z, log_p, count) for chunks of the list. Padding has a negative id, and z and
  // log_p of -inf.
  template <class Fn>
  void for_list(Fn&& fn) const {
    alignas(64) double z[kChunk];
    alignas(64) double log_p[kChunk];
    int64_t id[kChunk];
    for (int64_t at = 0; at < args.k; at += kChunk) {
      const int64_t count = args.k - at < kChunk ? args.k - at : kChunk;
      for (int64_t i = 0; i < count; ++i) {
        id[i] = class_at(at + i);
        z[i] = id[i] < 0 ? kNothing : logit(id[i]);
        log_p[i] = id[i] < 0 ? kNothing : static_cast<double>(log_probs[at + i]);
      }
      fn(id, z, log_p, count);
    }
  }

  void sum_list(Summary* into) const {
    double max = kNothing;
    for_list([&](const int64_t*, const double* z, const double*, int64_t count) {
      for (int64_t i = 0; i < count; ++i) max = z[i] > max ? z[i] : max;
    });
    const double near = topk::origin({max});
    const Exponential<double> tempered(kLog2E / row.temperature, near, 1);
    const Exponential<double> own(kLog2E, near, 1), plain(kLog2E, 0, 1);
    double tempered_sum = 0, hard_sum = 0, teacher_sum = 0;
    for_list([&](const int64_t*, const double* z, const double* log_p, int64_t count) {
#pragma omp simd reduction(+ : tempered_sum, hard_sum, teacher_sum)
      for (int64_t i = 0; i < count; ++i) {
        tempered_sum += tempered(z[i]);
        hard_sum += own(z[i]);
        // e is too much already, and beyond 2^1024 the exponential's bits wrap round.
        teacher_sum += plain(log_p[i] > 1 ? 1 : log_p[i]);
      }
    });
    into->list = {max, tempered_sum, hard_sum};
    into->teacher = teacher_sum;
  }

  // Masks the listed classes of the block that starts at `at`. Returns where it lies afterwards:
  // in `buffer` if there were any.
  Vectors<const S> mask_listed(Vectors<const S> block, int64_t at, int64_t count, S* buffer) const {
    for (int64_t word = at / 64; word <= (at + count - 1) / 64; ++word) {
      for (uint64_t bits = listed[word]; bits != 0; bits &= bits - 1) {
        const int64_t i = word * 64 + __builtin_ctzll(bits) - at;
        if (i < 0 || i >= count) continue;
        if (block.block != buffer) copy_block(student, at, count, buffer), block = {buffer};
        buffer[i] = narrow<S>(-__builtin_huge_valf());
      }
    }
    return block;
  }

  // One sweep: the rest's sums and, for label smoothing, the sum of all logits.
  Mass scan_rest(double* total) const {
    alignas(64) S buffer[kLongest];
    alignas(64) T logits[kLongest];
    Exponential<T> tempered(row.factor, 0, 1), own(row.hard_factor, 0, 1);
    Mass mass;
    double* block_max = kept.maxima.get();
    const auto sum = with_source(row.hard, [](auto source) {
      return &sum_exponentials<decltype(source)::value, LogRatioSum::kNone, T, S>;
    });
    for_blocks(0, args.classes, -1, [&](int64_t at, int64_t count) {
      const Vectors<const S> block =
          mask_listed(fetch(student, at, count, buffer), at, count, buffer);
      const double top = maximum(block, count);
      if (top > mass.max) {
        mass.tempered *= topk::shift(mass.max, top, row.temperature);
        mass.hard *= topk::shift(mass.max, top, 1);
        tempered.max = own.max = static_cast<T>(top);
        mass.max = top;
      }
      T* exponentials = nullptr;
      if constexpr (kKeeps) exponentials = &kept.exponentials[at], *block_max++ = mass.max;
      const ExponentialSums sums = sum(block, count, tempered, own, row.squarings(), exponentials,
                                       next_of<S>(at, args.classes), {}, 0);
      mass.tempered += sums.tempered;
      mass.hard += sums.hard;
      if (args.label_smoothing != 0) {
        copy_block(student, at, count, logits);
        const double near =
            topk::origin({static_cast<double>(maximum(Vectors<const T>{logits}, count))});
        *total += static_cast<double>(sum_offsets(logits, static_cast<T>(near), count)) +
                  static_cast<double>(count) * near;
      }
    });
    return mass;
  }

  Summary summarise() const {
    Summary of;
    double total = 0;
    of.rest = scan_rest(&total);
    sum_list(&of);  // from the cache
    of.complete(args, total);
    return of;
  }

  Gains gains(const Summary& of, const Soft& soft) const {
    double gain = args.scale;
    if (args.grad_output != nullptr) {
      gain *= static_cast<double>(
          static_cast<const T*>(args.grad_output)[args.grad_output_per_row ? index : 0]);
    }
    return topk::gains_of(args, args.tail, of, soft, gain, row.gradient_hard != ExpSource::kNone);
  }

  void* grad_at(int64_t id) const {
    return const_cast<void*>(at(args.grad, args.student_dtype,
                                row_offset(index, args.group_rows, args.grad_stride) + id));
  }

  void fill(T value) const {
    if (args.grad == nullptr) return;
    alignas(64) T block[kLongest];
    for (T& x : block) x = value;
    for_blocks(0, args.classes, -1, [&](int64_t at, int64_t count) {
      FASTKD_ISA::write(block, args.student_dtype, count, grad_at(at));
    });
  }

  // The rest's gradient. What it writes for listed classes has no meaning.
  template <ExpSource kSource>
  void write_rest(const Summary& of, const Gains& gains) const {
    alignas(64) S buffer[kLongest];
    alignas(64) S result[kLongest];
    const double max = topk::origin(of.rest);
    const Exponentials<T> tempered({row.factor, static_cast<T>(max), 1});
    const Exponentials<T> own({row.hard_factor, static_cast<T>(max), 1});
    const Register<T> uniform = splat(static_cast<T>(gains.uniform));
    const double* block_max = kept.maxima.get();
    // More classes than the dense loss wants: what is written to listed ones afterwards waits.
    const bool non_temporal = stores_non_temporal(args, args.grad, 16384);
    for_blocks(0, args.classes, -1, [&](int64_t at, int64_t count) {
      const double relative_to = kKeeps ? *block_max++ : max;
      const double shift = topk::shift(relative_to, max, row.temperature);
      const double hard_shift =
          kSource == ExpSource::kSeparate ? 1 : topk::shift(relative_to, max, 1);
      const Register<T> soft_gain = splat(static_cast<T>(gains.rest * shift));
      const Register<T> hard_gain = splat(static_cast<T>(gains.rest_hard * hard_shift));
      const T* const exponentials = kKeeps ? &kept.exponentials[at] : nullptr;
      Vectors<const S> block;
      if (!kKeeps || kSource == ExpSource::kSeparate) block = fetch(student, at, count, buffer);
      const Vectors<S> grad = target(grad_at(at), args.student_dtype, count, result, non_temporal);
      for_vectors<S>(count, [&](int64_t step, auto width) FASTKD_INLINE {
        constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, T>;
        Register<T> z[kMany] = {}, e[kMany], gradient[kMany];
        prefetch_next<Into::kL2, kWidth>(grad.at(step));
        if (!kKeeps || kSource == ExpSource::kSeparate)
          load<kWidth>(block.at(step), -kInfinity<T>, z);
        if constexpr (kKeeps) load<kWidth>(exponentials + step, T(0), e);
        FASTKD_UNROLL
        for (int64_t i = 0; i < kMany; ++i) {
          if constexpr (!kKeeps || kSource == ExpSource::kSeparate) z[i] -= tempered.max;
          if constexpr (!kKeeps) e[i] = tempered(z[i]);
          gradient[i] = uniform + soft_gain * e[i];
        }
        if constexpr (kSource != ExpSource::kNone) {
          add_hard<kSource, kMany>(own, row.squarings(), z, e, hard_gain, gradient);
        }
        store<kWidth>(gradient, grad.at(step));
      });
      put_result(grad, result, grad_at(at), args.student_dtype, count, non_temporal);
    });
    if (non_temporal) store_fence();
  }

  void put(int64_t id, double gradient) const {
    FASTKD_ISA::write(&gradient, args.student_dtype, 1, grad_at(id));
  }

  void write_label(const Summary& of, const Soft& soft, const Gains& gains) const {
    if (row.gradient_hard == ExpSource::kNone || is_listed(row.label)) return;
    put(row.label, topk::label_gradient(args, of, soft, gains, logit(row.label)));
  }

  // The listed classes: their share of the divergence, and their gradients.
  double write_list(const Summary& of, const Soft& soft, const Gains& gains) const {
    const double origin = topk::origin(of.list);
    const double inverse_temperature = 1 / row.temperature;
    const Exponential<double> tempered(kLog2E / row.temperature, origin, soft.student_scale);
    const Exponential<double> plain(kLog2E, 0, soft.teacher_scale);
    const bool hard = row.gradient_hard != ExpSource::kNone;
    // The gain, which may be negative, is no scale of an exponential.
    const double hard_gain = hard ? gains.hard / of.all.hard : 0.0;
    const Exponential<double> own(kLog2E, of.all.max, 1);
    double value = 0;
    for_list([&](const int64_t* id, const double* z, const double* log_p, int64_t count) {
      alignas(64) double gradient[kChunk];
#pragma omp simd reduction(+ : value)
      for (int64_t i = 0; i < count; ++i) {
        const Element<double> e = topk::listed(soft, plain(log_p[i]), tempered(z[i]), log_p[i],
                                               (z[i] - origin) * inverse_temperature);
        value += e.excess;
        gradient[i] =
            gains.soft * (e.diff + soft.surplus * e.q) + hard_gain * own(z[i]) + gains.uniform;
      }
      if (args.grad == nullptr) return;
      for (int64_t i = 0; i < count; ++i) {
        if (id[i] < 0) continue;
        put(id[i], gradient[i] - (hard && id[i] == row.label ? gains.onehot : 0.0));
      }
    });
    return value;
  }

  void put_constant(T value) const {
    fill(value);
    if (args.loss != nullptr) static_cast<T*>(args.loss)[index] = value;
  }

  // The whole row, its bits set. Returns whether the list is of log-probabilities.
  bool run() const {
    const Summary of = summarise();
    if (row.state == State::kInvalid || !of.listed_well() || !of.valid()) {
      put_constant(kNaN<T>);
      return of.listed_well();
    }
    const Soft soft = topk::soften(args, args.tail, of);
    const Gains g = gains(of, soft);
    if (args.grad != nullptr) {
      with_source(row.gradient_hard,
                  [&](auto source) { write_rest<decltype(source)::value>(of, g); });
      write_label(of, soft, g);
    }
    const double value = write_list(of, soft, g);
    if (args.loss != nullptr) {
      const bool hard = row.hard != ExpSource::kNone;
      static_cast<T*>(args.loss)[index] = static_cast<T>(
          topk::row_loss(args, args.tail, of, soft, value, hard, hard ? logit(row.label) : 0.0));
    }
    return true;
  }
};

template <class T, class S>
int64_t run_rows(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed) {
  const KeptRest<T, S> kept(args.classes);
  int64_t bad = -1;
  for (int64_t i = begin; i < end; ++i) {
    TopkRow<T, S> row(args, i, listed, kept);
    if (row.row.state == State::kIgnored) {
      row.put_constant(T(0));
      continue;
    }
    bool good = row.mark();
    if (good) {
      good = row.run();
    } else {
      row.put_constant(kNaN<T>);
    }
    row.unmark();
    if (!good && bad < 0) bad = i;
  }
  return bad;
}

}  // namespace

int64_t run_topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed);
int64_t run_topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed) {
  if (computes_in_double(args.student_dtype, args.teacher_dtype)) {
    return run_rows<double, double>(args, begin, end, listed);
  }
  if (args.student_dtype == DType::kBFloat16) {
    return run_rows<float, BFloat16>(args, begin, end, listed);
  }
  return run_rows<float, float>(args, begin, end, listed);
}

}  // namespace fastkd::cpu::FASTKD_ISA
