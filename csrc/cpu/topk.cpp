// The sparse loss, row by row, compiled once for each instruction set. The student is read from
// memory once, and the second sweep writes the gradient (docs/maths.md, section 13).
//
// The first sweep sums the exponentials of the rest, with the listed classes masked (topk_row.h).
// The second sweep writes the gradient of the rest to all classes, which takes a few products per
// exponential. The gradients of the listed classes and of the label are computed in double, and
// overwrite that result.
#include <memory>

#include "../topk_row.h"
#include "fp64.h"
#include "precise_sums.h"
#include "row_blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using topk::Comparison;
using topk::Gains;
using topk::kMinusInfinity;
using topk::RelativeSums;
using topk::RowOptions;
using topk::Soft;
using topk::SoftSums;
using topk::Summary;

// True if the first sweep caches the rest's exponentials for the second. Caching the exponentials
// of fp32 logits would double the memory; recomputing the exponentials from logits in the
// processor's cache takes less time.
template <class T, class S>
constexpr bool kCachesRest = sizeof(S) < sizeof(T);

// The listed classes of a row, without padding: class, logit, log-probability, the student's
// probability, and slope. All rows of a thread share the memory.
struct List {
  int64_t count = 0;
  std::unique_ptr<int64_t[]> id;
  std::unique_ptr<double[]> z, log_p, q, slope;

  explicit List(int64_t k)
      : id(new int64_t[static_cast<size_t>(k)]),
        z(new double[static_cast<size_t>(k)]),
        log_p(new double[static_cast<size_t>(k)]),
        q(new double[static_cast<size_t>(k)]),
        slope(new double[static_cast<size_t>(k)]) {}
};

// The memory of a thread: the list, and, if kCachesRest, the rest's exponentials for the second
// sweep. The exponentials of each block are relative to the maximum in `maxima`.
template <class T, class S>
struct Scratch {
  List list;
  const Comparison comparison;
  const Constants constants;
  std::unique_ptr<T[]> exponentials;
  std::unique_ptr<double[]> maxima;

  explicit Scratch(const TopkArgs& args)
      : list(args.k), comparison(args), constants(make_constants(args.divergence, args.mix)) {
    if (!kCachesRest<T, S>) return;
    exponentials.reset(new T[static_cast<size_t>(args.classes + kLanes)]);
    maxima.reset(new double[static_cast<size_t>(args.classes / kBlock + 1)]);
  }
};

// Return the sums over the listed classes, and store q and the slope of each class in the list.
template <class D>
SoftSums sum_listed(const Comparison& comparison, const RowOptions& row, const Summary& summary,
                    const Soft& soft, const ConstantsOf<double>& constants, const List& list) {
  const double origin = topk::origin(summary.list), inverse_temperature = 1 / row.temperature;
  const Exponential<double> student(kLog2E / row.temperature, origin, soft.student_scale);
  const Exponential<double> teacher(kLog2E, 0, soft.teacher_scale);
  SoftSums sums;
  for (int64_t i = 0; i < list.count; ++i) {
    const double p = teacher(list.log_p[i]), q = student(list.z[i]);
    const double log_e = (list.z[i] - origin) * inverse_temperature;
    const Evaluated<double> here =
        topk::listed<D>(comparison, soft, constants, p, q, list.log_p[i], log_e);
    sums.add(here);
    if (comparison.wants_entropy)
      sums.entropy -= times_log(p, list.log_p[i] + soft.teacher_log_scale);
    list.q[i] = q, list.slope[i] = here.slope;
  }
  return sums;
}

template <class T, class S>
struct TopkRow {
  static constexpr bool kCaches = kCachesRest<T, S>;
  const TopkArgs& args;
  int64_t index;
  // The logits of the thread's next row, which the second sweep prefetches, or of this row if it is
  // the thread's last.
  const char* next_row;
  uint64_t* listed;  // one bit for each class
  Row<T> row;
  RowOptions options;
  Logits student;
  Scratch<T, S>& scratch;

  TopkRow(const TopkArgs& args, int64_t index, int64_t end, uint64_t* listed,
          Scratch<T, S>& scratch)
      : args(args),
        index(index),
        next_row(
            static_cast<const char*>(student_of(args, index + 1 < end ? index + 1 : index).base)),
        listed(listed),
        row(make_row<T>(args, index, args.terms != nullptr)),
        options{row.temperature,
                row.hard_weight,
                row.soft_weight,
                args.label_smoothing,
                static_cast<double>(args.classes),
                row.hard != ExpSource::kNone},
        student(student_of(args, index)),
        scratch(scratch) {}

  double logit(int64_t id) const { return read_one<double>(student.base, student.dtype, id); }
  bool is_listed(int64_t id) const { return listed[id / 64] >> (id % 64) & 1; }

  // Gather the list without its padding, and set its bits. Return false if a class is out of range
  // or listed twice. The list then ends before that class.
  bool read_list() {
    List& list = scratch.list;
    const int64_t* const ids = args.indices + index * args.k;
    const T* const log_probs = static_cast<const T*>(args.teacher) + index * args.k;
    list.count = 0;
    for (int64_t i = 0; i < args.k; ++i) {
      const double log_p = static_cast<double>(log_probs[i]);
      if (ids[i] < 0 || log_p == kMinusInfinity) continue;  // padding (topk.h)
      if (ids[i] >= args.classes || is_listed(ids[i])) return false;
      listed[ids[i] / 64] |= uint64_t{1} << (ids[i] % 64);
      list.id[list.count] = ids[i];
      list.z[list.count] = logit(ids[i]);
      list.log_p[list.count++] = log_p;
    }
    return true;
  }
  void clear_bits() {
    for (int64_t i = 0; i < scratch.list.count; ++i) listed[scratch.list.id[i] / 64] = 0;
  }

  void sum_list(Summary* summary) const {
    const List& list = scratch.list;
    double max = kMinusInfinity;
    for (int64_t i = 0; i < list.count; ++i) max = list.z[i] > max ? list.z[i] : max;
    const double near = topk::origin({max});
    const Exponential<double> tempered(kLog2E / row.temperature, near, 1);
    const Exponential<double> separate(kLog2E, near, 1), teacher(kLog2E, 0, 1);
    double tempered_sum = 0, hard_sum = 0, teacher_sum = 0;
#pragma omp simd reduction(+ : tempered_sum, hard_sum, teacher_sum)
    for (int64_t i = 0; i < list.count; ++i) {
      tempered_sum += tempered(list.z[i]);
      hard_sum += separate(list.z[i]);
      // A log-probability of 1 already makes the list invalid, and exponentials beyond 2^1024 would
      // wrap around.
      teacher_sum += teacher(list.log_p[i] > 1 ? 1 : list.log_p[i]);
    }
    summary->list = {max, tempered_sum, hard_sum};
    summary->teacher = teacher_sum, summary->count = static_cast<double>(list.count);
  }

  // Mask the listed classes of the block that starts at `at`. Return the masked block, which lies
  // in `buffer` if a class was masked.
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

  // Return the rest's sums; for label smoothing, add all logits to `total`.
  RelativeSums scan_rest(double* total) const {
    alignas(64) S buffer[kLongest];
    alignas(64) T logits[kLongest];
    Exponential<T> tempered(row.factor, 0, 1), separate(row.hard_factor, 0, 1);
    PreciseExponential precise(row.temperature);
    bool is_precise = false;
    RelativeSums sums;
    double* block_max = scratch.maxima.get();
    for_blocks(0, args.classes, -1, [&](int64_t at, int64_t count) {
      const Vectors<const S> block =
          mask_listed(fetch(student, at, count, buffer), at, count, buffer);
      const double top = maximum(block, count);
      if (top > sums.max) {
        sums.tempered *= topk::rescaling_of(sums.max, top, row.temperature);
        sums.hard *= topk::rescaling_of(sums.max, top, 1);
        tempered.max = separate.max = static_cast<T>(top);
        sums.max = top;
        is_precise = precise.set_max(top);
      }
      T* exponentials = nullptr;
      if constexpr (kCaches) exponentials = &scratch.exponentials[at], *block_max++ = sums.max;
      const CacheLevel next = next_of<S>(at, args.classes);
      const ExponentialSums block_sums = with_source(row.hard, [&](auto source) {
        constexpr ExpSource kSource = decltype(source)::value;
        if constexpr (std::is_same_v<S, float>) {
          if (is_precise)
            return sum_precisely<kSource>(block, count, precise, separate, row.squarings(), next);
        }
        return sum_exponentials<kSource, LogRatioSum::kNone>(block, count, tempered, separate,
                                                             row.squarings(), exponentials, next);
      });
      sums.tempered += block_sums.tempered;
      sums.hard += block_sums.hard;
      if (args.label_smoothing != 0) {
        copy_block(student, at, count, logits);
        const double near =
            topk::origin({static_cast<double>(maximum(Vectors<const T>{logits}, count))});
        *total += static_cast<double>(sum_offsets(logits, static_cast<T>(near), count)) +
                  static_cast<double>(count) * near;
      }
    });
    if (sums.max == kMinusInfinity) sums.tempered *= 0, sums.hard *= 0;  // 0; NaN stays NaN
    return sums;
  }

  Summary sum_row() const {
    Summary summary;
    double total = 0;
    summary.rest = scan_rest(&total);
    sum_list(&summary);
    summary.complete(options, total);
    return summary;
  }

  Gains gains(const Summary& summary, const Soft& soft) const {
    double gain = args.scale;
    if (args.grad_output != nullptr) {
      gain *= static_cast<double>(
          static_cast<const T*>(args.grad_output)[args.grad_output_per_row ? index : 0]);
    }
    return topk::gains_of(options, summary, soft, gain);
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

  // Write the gradient of the rest. The values written for listed classes have no meaning.
  template <ExpSource kSource>
  void write_rest(const Summary& summary, const Gains& gains) const {
    alignas(64) S buffer[kLongest];
    alignas(64) S result[kLongest];
    const double max = topk::origin(summary.rest);
    const Exponentials<T> tempered({row.factor, static_cast<T>(max), 1});
    const Exponentials<T> separate({row.hard_factor, static_cast<T>(max), 1});
    const Register<T> uniform = splat(static_cast<T>(gains.uniform));
    const double* block_max = scratch.maxima.get();
    // The limit is higher than for the dense loss, because the stores of listed classes wait for
    // these stores.
    const bool non_temporal = stores_non_temporal(args, args.grad, 16384);
    const int64_t size = size_of(args.student_dtype);
    for_blocks(0, args.classes, -1, [&](int64_t at, int64_t count) {
      const double relative_to = kCaches ? *block_max++ : max;
      const double shift = topk::rescaling_of(relative_to, max, row.temperature);
      const double hard_shift =
          kSource == ExpSource::kSeparate ? 1 : topk::rescaling_of(relative_to, max, 1);
      const Register<T> soft_gain = splat(static_cast<T>(gains.rest * shift));
      const Register<T> hard_gain = splat(static_cast<T>(gains.rest_hard * hard_shift));
      const T* const exponentials = kCaches ? &scratch.exponentials[at] : nullptr;
      Vectors<const S> block;
      if (!kCaches || kSource == ExpSource::kSeparate) block = fetch(student, at, count, buffer);
      const Vectors<S> grad = target(grad_at(at), args.student_dtype, count, result, non_temporal);
      for_vectors<S>(count, [&](int64_t step, auto width) FASTKD_INLINE {
        constexpr int64_t kWidth = decltype(width)::value, kMany = kRegisters<kWidth, T>;
        Register<T> z[kMany] = {}, e[kMany], gradient[kMany];
        prefetch_next<CacheLevel::kL2, kWidth>(grad.at(step));
        for (int64_t byte = 0; byte < kWidth * size; byte += 64) {
          prefetch<CacheLevel::kL2>(next_row, static_cast<uintptr_t>((at + step) * size + byte));
        }
        if (!kCaches || kSource == ExpSource::kSeparate)
          load<kWidth>(block.at(step), -kInfinity<T>, z);
        if constexpr (kCaches) load<kWidth>(exponentials + step, T(0), e);
        FASTKD_UNROLL
        for (int64_t i = 0; i < kMany; ++i) {
          if constexpr (!kCaches || kSource == ExpSource::kSeparate) z[i] -= tempered.max;
          if constexpr (!kCaches) e[i] = tempered(z[i]);
          gradient[i] = mul_add(soft_gain, e[i], uniform);
        }
        if constexpr (kSource != ExpSource::kNone) {
          add_hard<kSource, kMany>(separate, row.squarings(), z, e, hard_gain, gradient);
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

  void write_label(const Summary& summary, const Gains& gains) const {
    if (row.gradient_hard == ExpSource::kNone || is_listed(row.label)) return;
    put(row.label, topk::label_gradient(options, summary, gains, logit(row.label)));
  }

  // Write the gradients of the listed classes.
  void write_list(const Summary& summary, const SoftSums& sums, const Gains& gains) const {
    const List& list = scratch.list;
    const bool hard = row.gradient_hard != ExpSource::kNone;
    // The exponential has scale 1, because the gain may be negative.
    const double hard_gain = hard ? gains.hard / summary.all.hard : 0.0;
    const Exponential<double> separate(kLog2E, summary.all.max, 1);
    for (int64_t i = 0; i < list.count; ++i) {
      double gradient = gains.uniform;
      if (gains.soft != 0) gradient += gains.soft * (list.slope[i] - list.q[i] * sums.slope);
      if (hard) gradient += hard_gain * separate(list.z[i]);
      put(list.id[i], gradient - (hard && list.id[i] == row.label ? gains.onehot : 0.0));
    }
  }

  void put_term(int term, T value) const {
    static_cast<T*>(args.terms)[term * args.rows + index] = value;
  }

  void put_constant(T value) const {
    fill(value);
    if (args.loss != nullptr) static_cast<T*>(args.loss)[index] = value;
    for (int i = 0; i < kTopkTerms && args.terms != nullptr; ++i) put_term(i, value);
  }

  // Return the sum of exp((z - max z) / t) (z - max z) over all classes.
  double sum_weighted_offsets(double max) const {
    alignas(64) S buffer[kLongest];
    alignas(64) const S zeros[kLongest] = {};
    const Exponential<T> tempered(row.factor, static_cast<T>(max), 1);
    double sum = 0;
    for_blocks(0, args.classes, -1, [&](int64_t at, int64_t count) {
      // A log ratio to logits of 0 is the offset z - max z.
      sum += sum_exponentials<ExpSource::kNone, LogRatioSum::kUnbounded>(
                 fetch(student, at, count, buffer), count, tempered, tempered, 0,
                 static_cast<T*>(nullptr), CacheLevel::kL1, Vectors<const S>{zeros})
                 .log_ratios;
    });
    return sum;
  }

  // Return true if a class is the greatest of both student and teacher.
  bool agrees(double max) const {
    const List& list = scratch.list;
    double most = kMinusInfinity;
    for (int64_t i = 0; i < list.count; ++i) most = list.log_p[i] > most ? list.log_p[i] : most;
    for (int64_t i = 0; i < list.count; ++i)
      if (list.log_p[i] == most && list.z[i] == max) return true;
    return false;
  }

  void write_results(const Summary& summary, const Soft& softened, const SoftSums& sums) const {
    const double soft = topk::soft_term(scratch.comparison, softened, sums);
    const double hard = topk::hard_term(options, summary, options.hard ? logit(row.label) : 0.0);
    if (args.loss != nullptr)
      static_cast<T*>(args.loss)[index] = static_cast<T>(topk::row_loss(options, hard, soft));
    if (args.terms == nullptr) return;
    const double max = summary.all.max;
    topk::for_terms(scratch.comparison, options, summary, sums, hard, soft,
                    sum_weighted_offsets(max), agrees(max),
                    [&](int term, double value) { put_term(term, static_cast<T>(value)); });
  }

  // Compute a row after read_list(). Return false if the list does not hold log-probabilities.
  bool run() const {
    const Summary summary = sum_row();
    if (row.state == State::kInvalid || !summary.has_valid_list() || !summary.valid()) {
      put_constant(kNaN<T>);
      return summary.has_valid_list();
    }
    Soft soft = topk::soften(scratch.comparison, options, summary);
    const SoftSums sums = visit(args.divergence, [&](auto divergence) {
      using D = decltype(divergence);
      const ConstantsOf<double>& constants = constants_in<double>(scratch.constants);
      SoftSums result =
          sum_listed<D>(scratch.comparison, options, summary, soft, constants, scratch.list);
      topk::include_rest<D>(scratch.comparison, constants, summary, &result, &soft);
      return result;
    });
    const Gains g = gains(summary, soft);
    if (args.grad != nullptr) {
      with_source(row.gradient_hard,
                  [&](auto source) { write_rest<decltype(source)::value>(summary, g); });
      write_label(summary, g);
      write_list(summary, sums, g);
    }
    write_results(summary, soft, sums);
    return true;
  }
};

// Compute rows [begin, end), and return the first row whose list is invalid, or -1.
template <class T, class S>
int64_t run_rows(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed) {
  Scratch<T, S> scratch(args);
  int64_t bad = -1;
  for (int64_t i = begin; i < end; ++i) {
    TopkRow<T, S> row(args, i, end, listed, scratch);
    if (row.row.state == State::kIgnored) {
      row.put_constant(T(0));
      continue;
    }
    bool good = row.read_list();
    if (good) {
      good = row.run();
    } else {
      row.put_constant(kNaN<T>);
    }
    row.clear_bits();
    if (!good && bad < 0) bad = i;
  }
  return bad;
}

}  // namespace

#if defined(FASTKD_FP64)
int64_t fp64::topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed) {
  return run_rows<double, double>(args, begin, end, listed);
}
#endif

int64_t run_topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed);
int64_t run_topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed) {
  if (computes_in_double(args.student_dtype, args.teacher_dtype)) {
    return baseline::fp64::topk(args, begin, end, listed);
  }
  if (args.student_dtype == DType::kBFloat16) {
    return run_rows<float, BFloat16>(args, begin, end, listed);
  }
  return run_rows<float, float>(args, begin, end, listed);
}

}  // namespace fastkd::cpu::FASTKD_ISA
