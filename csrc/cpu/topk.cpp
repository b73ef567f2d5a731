// The sparse loss, row by row, compiled once for each instruction set: the student is read once
// from memory, and its gradient is written in a second sweep that finds the row in the cache.
//
// A row's classes are those that the teacher lists and the rest. Sums of exponentials are taken of
// each apart, the rest's with the listed classes masked: so the rest's probability is a sum of
// positive terms, not 1 minus something near 1. The gradient is dense but simple for the rest; the
// listed classes, and the label, are computed apart in double and written over it.
// docs/maths.md, section 13, derives the formulas.
#include "../topk.h"

#include "engine.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Sums of exponentials, at temperature t and at 1, relative to the greatest logit.
struct Mass {
  double max = kLowest, tempered = 0, hard = 0;
};

// What is known of a row once the student has been read.
struct Summary {
  Mass rest, list, all;
  double teacher = 0;  // the teacher's mass on its list
  double offsets = 0;  // sum of z - max z over all classes; for label smoothing alone
};

// The soft term. With e = exp((z - max) / t), max that of the listed or of the other classes:
struct Soft {
  double student_scale, student_log_scale;  // q = student_scale * e for a listed class
  double teacher_scale, teacher_log_scale;  // p, likewise, of exp(log_prob)
  double surplus = 0;   // S = -(1 + surplus), the target's mass: gradient = (1 + surplus) q - p
  double rest = 0;      // gradient = rest * e for any other class
  double constant = 0;  // of the value, beside the listed classes
};

// Constants of a row's gradient; T computes.
template <class T>
struct Gains {
  double soft, hard, onehot, uniform;
  T rest, rest_hard;
};

constexpr int64_t kChunk = 64;

template <class T, class S>
struct TopkRow {
  const TopkArgs& args;
  int64_t index;
  uint64_t* listed;  // one bit for each class
  Row<T> row;
  Logits student;
  const int64_t* ids;
  const T* log_probs;

  TopkRow(const TopkArgs& args, int64_t index, uint64_t* listed)
      : args(args),
        index(index),
        listed(listed),
        row(make_row<T>(args, index, false)),
        student(student_of(args, index)),
        ids(args.indices + index * args.k),
        log_probs(static_cast<const T*>(args.teacher) + index * args.k) {}

  double logit(int64_t id) const { return read_one<double>(student.base, student.dtype, id); }
  double shift(double from, double to) const {
    return from == to ? 1.0 : std::exp((from - to) / row.temperature);
  }
  bool is_listed(int64_t id) const { return listed[id / 64] >> (id % 64) & 1; }
  // Maxima to subtract: any finite number where there is nothing to subtract from.
  static double origin(double max) { return max > kLowest ? max : 0.0; }

  // Sets the bits of the list. Returns whether it is one: no class out of range or twice.
  bool mark() {
    bool good = true;
    for (int64_t i = 0; i < args.k; ++i) {
      if (ids[i] < 0) continue;
      if (ids[i] >= args.classes || is_listed(ids[i])) {
        good = false;
      } else {
        listed[ids[i] / 64] |= uint64_t{1} << (ids[i] % 64);
      }
    }
    return good;
  }
  void unmark() {
    for (int64_t i = 0; i < args.k; ++i) {
      if (ids[i] >= 0 && ids[i] < args.classes) listed[ids[i] / 64] = 0;
    }
  }

  // Calls fn(ids, z, log_p, count) for chunks of the list; z and log_p are -inf where nothing is.
  template <class Fn>
  void for_list(Fn&& fn) const {
    alignas(64) double z[kChunk];
    alignas(64) double log_p[kChunk];
    for (int64_t at = 0; at < args.k; at += kChunk) {
      const int64_t count = args.k - at < kChunk ? args.k - at : kChunk;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t id = ids[at + i];
        z[i] = id < 0 ? kLowest : logit(id);
        log_p[i] = id < 0 ? kLowest : static_cast<double>(log_probs[at + i]);
      }
      fn(ids + at, z, log_p, count);
    }
  }

  void sum_list(Summary* into) const {
    double max = kLowest;
    for_list([&](const int64_t*, const double* z, const double*, int64_t count) {
      for (int64_t i = 0; i < count; ++i) max = z[i] > max ? z[i] : max;
    });
    const Exponential<double> tempered(kLog2E / row.temperature, origin(max), 1);
    const Exponential<double> own(kLog2E, origin(max), 1), plain(kLog2E, 0, 1);
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

  // Calls fn(at, count) for blocks of the row: only the last, shorter than kLanes, needs padding.
  template <class Fn>
  void for_blocks(Fn&& fn) const {
    const int64_t full = args.classes / kLanes * kLanes;
    for (int64_t at = 0; at < full; at += kBlock) {
      fn(at, full - at < kBlock ? full - at : kBlock);
    }
    if (full < args.classes) fn(full, args.classes - full);
  }

  // Masks the listed classes of the block that starts at `at`. Returns where it lies afterwards:
  // in `buffer` if there were any.
  const S* mask_listed(const S* block, int64_t at, int64_t count, S* buffer) const {
    for (int64_t word = at / 64; word <= (at + count - 1) / 64; ++word) {
      for (uint64_t bits = listed[word]; bits != 0; bits &= bits - 1) {
        const int64_t i = word * 64 + __builtin_ctzll(bits) - at;
        if (i < 0 || i >= count) continue;
        if (block != buffer) copy_block(student, at, count, buffer), block = buffer;
        buffer[i] = narrow<S>(-__builtin_huge_valf());
      }
    }
    return block;
  }

  // One sweep: the rest's sums and, for label smoothing, the sum of all logits.
  template <Hard kHard>
  Mass scan_rest(double* offsets) const {
    alignas(64) S buffer[kBlock];
    alignas(64) T logits[kBlock];
    Exponential<T, S> tempered(row.factor, 0, 1), own(row.hard_factor, 0, 1);
    Mass mass;
    for_blocks([&](int64_t at, int64_t count) {
      const S* block = mask_listed(fetch(student, at, count, buffer), at, count, buffer);
      const double top = maximum(block, padded(count));
      if (top > mass.max) {
        mass.tempered *= shift(mass.max, top);
        mass.hard *= std::exp(mass.max - top);
        tempered.max = own.max = static_cast<T>(top);
        mass.max = top;
      }
      const Pair<T> sums =
          sum_exponentials<kHard, false, T, S>(block, padded(count), tempered, own, nullptr);
      mass.tempered += sums.tempered;
      mass.hard += sums.hard;
      if (args.label_smoothing != 0) {
        copy_block(student, at, count, logits);
        const T near = maximum(logits, padded(count));
        *offsets += static_cast<double>(sum_offsets(logits, static_cast<T>(origin(near)), count)) +
                    static_cast<double>(count) * origin(near);
      }
    });
    return mass;
  }

  Summary summarise() const {
    Summary of;
    of.rest = with_hard<T>(
        row.hard, [&](auto hard) { return scan_rest<decltype(hard)::value>(&of.offsets); });
    sum_list(&of);  // from the cache
    const double max = of.rest.max > of.list.max ? of.rest.max : of.list.max;
    of.all.max = max;
    of.all.tempered =
        of.rest.tempered * shift(of.rest.max, max) + of.list.tempered * shift(of.list.max, max);
    of.all.hard =
        of.rest.hard * std::exp(of.rest.max - max) + of.list.hard * std::exp(of.list.max - max);
    of.offsets -= static_cast<double>(args.classes) * max;
    return of;
  }

  // Not so where a logit is NaN or +inf, or all of them are -inf, or the label is out of range.
  bool valid(const Summary& of) const {
    return row.state == State::kNormal && finite(of.all.max) && finite(of.all.tempered);
  }

  // log of the share of all student mass that sums relative to `max` have, given their sum.
  double log_share(const Summary& of, double max, double sum) const {
    return (max - of.all.max) / row.temperature + std::log(sum / of.all.tempered);
  }

  Soft soften(const Summary& of) const {
    Soft soft;
    soft.teacher_scale = 1, soft.teacher_log_scale = 0;
    // Relative to the listed classes' own maximum; nothing underflows where all others are greater.
    soft.student_log_scale = 0;
    if (of.list.max > kLowest) {
      soft.student_log_scale = args.tail == Tail::kRenormalize ? -std::log(of.list.tempered)
                                                               : log_share(of, of.list.max, 1.0);
    }
    const bool has_rest = of.rest.max > kLowest;
    const double log_q = has_rest ? log_share(of, of.rest.max, of.rest.tempered) : kLowest;
    const double q = std::exp(log_q);
    soft.surplus = of.teacher - 1;
    switch (args.tail) {
      case Tail::kGhost:
        if (has_rest) {
          const double p = of.teacher < 1 ? 1 - of.teacher : 0.0;
          if (soft.surplus < 0) soft.surplus = 0;
          const Element<double> ghost = element(p, q, std::log(p) - log_q);
          soft.constant = ghost.excess;
          soft.rest = (ghost.diff + soft.surplus * q) / of.rest.tempered;
        }
        break;
      case Tail::kIgnore:
        // sum of p - q over the list, which the listed classes' values count too little.
        soft.constant = soft.surplus + q;
        if (has_rest) soft.rest = of.teacher * (q / of.rest.tempered);
        break;
      case Tail::kRenormalize:
        soft.surplus = 0;
        soft.teacher_scale = of.teacher > 0 ? 1 / of.teacher : 0.0;
        soft.teacher_log_scale = of.teacher > 0 ? -std::log(of.teacher) : 0.0;
        break;
    }
    soft.student_scale = std::exp(soft.student_log_scale);
    return soft;
  }

  Gains<T> gains(const Summary& of, const Soft& soft) const {
    double gain = args.scale;
    if (args.grad_output != nullptr) {
      gain *= static_cast<double>(
          static_cast<const T*>(args.grad_output)[args.grad_output_per_row ? index : 0]);
    }
    Gains<T> g = {};
    // Nothing listed has no distribution to renormalise.
    const bool has_soft = args.tail != Tail::kRenormalize || of.teacher > 0;
    g.soft = has_soft ? gain * args.soft_weight * row.temperature : 0.0;
    g.rest = static_cast<T>(g.soft * soft.rest);
    if (row.gradient_hard == Hard::kNone) return g;
    g.hard = gain * args.hard_weight;
    g.onehot = g.hard * (1 - args.label_smoothing);
    g.uniform = -g.hard * args.label_smoothing / static_cast<double>(args.classes);
    g.rest_hard = static_cast<T>(g.hard * std::exp(of.rest.max - of.all.max) / of.all.hard);
    return g;
  }

  void* grad_at(int64_t id) const {
    return const_cast<void*>(at(args.grad, args.student_dtype,
                                row_offset(index, args.group_rows, args.grad_stride) + id));
  }

  void fill(T value) const {
    if (args.grad == nullptr) return;
    alignas(64) T block[kBlock];
    for (T& x : block) x = value;
    for_blocks([&](int64_t at, int64_t count) {
      FASTKD_ISA::write(block, args.student_dtype, count, grad_at(at));
    });
  }

  // The rest's gradient. What it writes for listed classes has no meaning.
  template <Hard kHard>
  void write_rest(const Summary& of, const Gains<T>& gains) const {
    alignas(64) S buffer[kBlock];
    alignas(64) S result[kBlock];
    const T max = static_cast<T>(origin(of.rest.max)), uniform = static_cast<T>(gains.uniform);
    const T soft_gain = gains.rest, hard_gain = gains.rest_hard;
    const Exponential<T, S> tempered(row.factor, max, 1), own(row.hard_factor, max, 1);
    for_blocks([&](int64_t at, int64_t count) {
      const S* block = fetch(student, at, count, buffer);
      const bool direct = args.student_dtype == kStorage<S> && count % kLanes == 0;
      S* grad = direct ? static_cast<S*>(grad_at(at)) : result;
      const int64_t end = padded(count);
      for (int64_t lanes = 0; lanes < end; lanes += kLanes) {
        T logits[kLanes], gradients[kLanes];
        const T* z = unpack(block + lanes, logits);
        T* g = unpacked(grad + lanes, gradients);
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
          const T e = tempered(z[i]);
          T sum = uniform + soft_gain * e;
          if constexpr (kHard != Hard::kNone) {
            sum += hard_gain * hard_exponential<kHard>(e, z[i], own);
          }
          g[i] = sum;
        }
        pack(gradients, grad + lanes);
      }
      if (!direct) FASTKD_ISA::write(result, args.student_dtype, count, grad_at(at));
    });
  }

  void put(int64_t id, double gradient) const {
    FASTKD_ISA::write(&gradient, args.student_dtype, 1, grad_at(id));
  }

  // A label that is not listed: the one-hot target is taken off before anything is rounded.
  void write_label(const Summary& of, const Soft& soft, const Gains<T>& gains) const {
    if (row.gradient_hard == Hard::kNone || is_listed(row.label)) return;
    const double z = logit(row.label);
    put(row.label, gains.soft * soft.rest * std::exp((z - origin(of.rest.max)) / row.temperature) +
                       gains.hard * std::exp(z - of.all.max) / of.all.hard + gains.uniform -
                       gains.onehot);
  }

  // The listed classes: their share of the divergence, and their gradients.
  double write_list(const Summary& of, const Soft& soft, const Gains<T>& gains) const {
    const double origin = TopkRow::origin(of.list.max);
    const double inverse_temperature = 1 / row.temperature;
    const Exponential<double> tempered(kLog2E / row.temperature, origin, soft.student_scale);
    const Exponential<double> plain(kLog2E, 0, soft.teacher_scale);
    const bool hard = row.gradient_hard != Hard::kNone;
    const Exponential<double> own(kLog2E, of.all.max, hard ? gains.hard / of.all.hard : 0.0);
    double value = 0;
    for_list([&](const int64_t* id, const double* z, const double* log_p, int64_t count) {
      alignas(64) double gradient[kChunk];
#pragma omp simd reduction(+ : value)
      for (int64_t i = 0; i < count; ++i) {
        const double log_q = (z[i] - origin) * inverse_temperature + soft.student_log_scale;
        const double q = tempered(z[i]), p = plain(log_p[i]);
        const Element<double> e = element(p, q, log_p[i] + soft.teacher_log_scale - log_q);
        value += e.excess;
        gradient[i] = gains.soft * (e.diff + soft.surplus * q) + own(z[i]) + gains.uniform;
      }
      if (args.grad == nullptr) return;
      for (int64_t i = 0; i < count; ++i) {
        if (id[i] < 0) continue;
        put(id[i], gradient[i] - (hard && id[i] == row.label ? gains.onehot : 0.0));
      }
    });
    return value;
  }

  void put_loss(const Summary& of, const Soft& soft, double listed_value) const {
    // In a valid row only 0 * inf makes a NaN: a class that the student masks, and whose teacher
    // probability underflows. That is an infinite divergence.
    double value = listed_value + soft.constant;
    if (value != value) value = -kLowest;
    if (args.tail == Tail::kRenormalize && !(of.teacher > 0)) value = 0;
    const double t = row.temperature;
    double loss = weighted(args.soft_weight * t * t, value);
    if (row.hard != Hard::kNone) {
      const double smoothing = args.label_smoothing;
      double target = weighted(1 - smoothing, logit(row.label) - of.all.max);
      if (smoothing != 0) target += smoothing / static_cast<double>(args.classes) * of.offsets;
      loss += weighted(args.hard_weight, std::log(of.all.hard) - target);
    }
    static_cast<T*>(args.loss)[index] = static_cast<T>(loss);
  }

  void put_constant(T value) const {
    fill(value);
    if (args.loss != nullptr) static_cast<T*>(args.loss)[index] = value;
  }

  // The whole row, its bits set. Returns whether the list is of log-probabilities.
  bool run() const {
    const Summary of = summarise();
    const bool good = of.teacher <= kMostMass;
    if (!good || !valid(of)) {
      put_constant(kNaN<T>);
      return good;
    }
    const Soft soft = soften(of);
    const Gains<T> g = gains(of, soft);
    if (args.grad != nullptr) {
      with_hard<T>(row.gradient_hard, [&](auto hard) { write_rest<decltype(hard)::value>(of, g); });
      write_label(of, soft, g);
    }
    const double value = write_list(of, soft, g);
    if (args.loss != nullptr) put_loss(of, soft, value);
    return true;
  }
};

template <class T, class S>
int64_t run_rows(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed) {
  int64_t bad = -1;
  for (int64_t i = begin; i < end; ++i) {
    TopkRow<T, S> row(args, i, listed);
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
