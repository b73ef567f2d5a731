// The two sweeps of one row, block by block and segment by segment.
#pragma once
#include "label.h"
#include "operands.h"
#include "plain.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Whether both sweeps read bf16 in place, in pairs; other types than T are copied.
template <class T>
bool reads_pairs(const Inputs& in) {
  return kHasPairs && sizeof(T) == sizeof(float) && in.student_dtype == DType::kBFloat16 &&
         in.teacher_dtype == DType::kBFloat16;
}

template <class T>
struct Engine {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  bool terms;
  Constants constants;
  bool pairs = reads_pairs<T>(in);

  bool one_sweep() const { return is_one_sweep(in.divergence); }
  // Whether the sweep that sums slopes leaves them for the one that centers them.
  bool caches_slopes() const { return !one_sweep() && !is_reverse(in.divergence); }

  // Whether a row's gradient is q - p as it stands, and its value known.
  bool is_difference(const Scales<T>& s) const {
    return s.mean > 0 && is_mean_log_ratio(in.divergence);
  }

  bool past_caches() const {
    constexpr int64_t kLeastClasses = 2048;  // set by measurement
    return passes_caches(in, grad, kLeastClasses);
  }
  // After whatever is to be seen by other threads.
  void complete() const {
    if (past_caches()) complete_copies();
  }

  void* grad_at(int64_t row, int64_t index) const {
    if (grad == nullptr) return nullptr;
    return const_cast<void*>(
        at(grad, in.student_dtype, row_offset(row, in.group_rows, grad_stride) + index));
  }

  Coefficients<T> coefficients(const Row<T>& row, const Scales<T>& s, double gain) const {
    Coefficients<T> c = make_coefficients(in, row, s, gain);
    if (row.left_out >= 0) decouple(in, row, s, gain, &c);
    return c;
  }

  int64_t segments() const { return (in.classes + kSegment - 1) / kSegment; }
  int64_t end_of(int64_t segment) const {
    const int64_t end = (segment + 1) * kSegment;
    return end < in.classes ? end : in.classes;
  }

  // Calls fn with a value of the type that logits are read as.
  template <class Fn>
  auto with_storage(Fn&& fn) const {
    if constexpr (kHasPairs && sizeof(T) == sizeof(float)) {
      if (pairs) return fn(BFloat16{});
    }
    return fn(T{});
  }

  // A block of one operand as numbers of T: where it lies, or in `buffer`. Pairs are unpacked, and
  // then padded to steps(count) numbers.
  Vectors<const T> numbers(const Logits& logits, int64_t at, int64_t count, T* buffer,
                           int64_t left_out = -1) const {
    if constexpr (kHasPairs && sizeof(T) == sizeof(float)) {
      if (pairs) {
        alignas(64) BFloat16 copy[kLongest];
        const Vectors<const BFloat16> packed = fetch(logits, at, count, copy, left_out);
        for_vectors<BFloat16>(count, [&](int64_t i, auto width) FASTKD_INLINE {
          unpack<decltype(width)::value>(packed.at(i), buffer + i);
        });
        return {buffer};
      }
    }
    return fetch(logits, at, count, buffer, left_out);
  }
  int64_t steps(int64_t count) const { return pairs ? padded<BFloat16>(count) : count; }
  // Where numbers() leaves a class of a block.
  int64_t place(int64_t index) const { return pairs ? unpacked_place(index) : index; }

  // Has the processor look up where the next pages are, many at once, before they are wanted: a
  // first access of a page, even to prefetch, waits for that, some 100 ns on a virtual machine.
  // Longer rows gain nothing. (Inlined also because GCC leaves out calls of functions that only
  // prefetch.)
  template <class S>
  FASTKD_HOST_DEVICE void touch_pages(const Logits& student, const Logits& teacher, int64_t index,
                                      int64_t at, int64_t count) const {
    constexpr int64_t kPage = 4096, kAtOnce = 4 * kPage;  // bytes
    constexpr int64_t kClasses = kAtOnce / static_cast<int64_t>(sizeof(S));
    if (in.classes > kSegment || (index * in.classes + at) % kClasses >= count) return;
    for (int64_t ahead = kAtOnce; ahead < 2 * kAtOnce; ahead += kPage) {
      prefetch<Into::kL2>(static_cast<const char*>(student.at(at)), ahead);
      prefetch<Into::kL2>(static_cast<const char*>(teacher.at(at)), ahead);
      if (grad != nullptr) prefetch<Into::kL2>(static_cast<const char*>(grad_at(index, at)), ahead);
    }
  }

  // The teacher's sums, with those that show whether the row is well separated.
  template <class S>
  ExponentialSums sum_gaps(const Vectors<const S>& z, const Vectors<const S>& w, int64_t count,
                           const Exponential<T>& teachers, T student_max, T* cache,
                           Into next) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto sum = is_even_jsd(in) ? &sum_exponentials<ExpSource::kNone, GapSum::kBounded, T, S>
                                       : &sum_exponentials<ExpSource::kNone, GapSum::kWhole, T, S>;
      return sum(w, count, teachers, teachers, 0, cache, next, z, student_max);
    }
    return {};
  }

  // Maxima and sums in one go: the sums so far are rescaled when a block raises a maximum. `cache`
  // receives the exponentials and what each block's are relative to.
  template <class S>
  Statistics scan_blocks(const Row<T>& row, int64_t index, int64_t begin, int64_t end,
                         const SegmentCache<T>& cache) const {
    alignas(64) S student_buffer[kLongest];
    alignas(64) S teacher_buffer[kLongest];
    const Logits student = student_of(in, index), teacher = teacher_of(in, index);
    Exponential<T> tempered(row.factor, 0, 1), separate(row.hard_factor, 0, 1);
    Exponential<T> teachers(row.teacher_factor, 0, 1);
    const auto sum = &sum_exponentials<ExpSource::kNone, GapSum::kNone, T, S>;
    const auto sum_student = with_source(row.hard, [](auto source) {
      return &sum_exponentials<decltype(source)::value, GapSum::kNone, T, S>;
    });
    Statistics result = kNoStatistics;
    // One by one: a copy of the struct would wait for its members to be stored.
    T *student_cache = cache.student, *teacher_cache = cache.teacher;
    double *student_max = cache.student_max, *teacher_max = cache.teacher_max;
    bool gaps = row.gaps;
    for_blocks(begin, end, row.left_out, [&](int64_t at, int64_t count) {
      const Vectors<const S> z = fetch(student, at, count, student_buffer, row.left_out);
      const Vectors<const S> w = fetch(teacher, at, count, teacher_buffer, row.left_out);
      touch_pages<S>(student, teacher, index, at, count);
      const double top = maximum(z, count), teacher_top = maximum(w, count);
      const bool raised = top > result.student_max || teacher_top > result.teacher_max;
      if (gaps && raised && at > begin) {
        result.gap_sum = moved_gaps(row, result, std::fmax(top, result.student_max),
                                    std::fmax(teacher_top, result.teacher_max));
      }
      if (top > result.student_max) {
        if (result.student_max > kLowest) {
          result.student_sum *= row.rescale(result.student_max, top);
          result.hard_sum *= row.hard_rescale(result.student_max, top);
        }
        tempered.max = separate.max = static_cast<T>(top);
        result.student_max = top;
      }
      if (teacher_top > result.teacher_max) {
        if (result.teacher_max > kLowest) {
          result.teacher_sum *= row.teacher_rescale(result.teacher_max, teacher_top);
        }
        teachers.max = static_cast<T>(teacher_top);
        result.teacher_max = teacher_top;
      }
      const Into next = next_of<S>(at, in.classes);
      const ExponentialSums sums =
          sum_student(z, count, tempered, separate, row.squarings(), student_cache, next, {}, 0);
      const ExponentialSums teacher_sums =
          gaps ? sum_gaps<S>(z, w, count, teachers, tempered.max, teacher_cache, next)
               : sum(w, count, teachers, teachers, 0, teacher_cache, next, {}, 0);
      if (student_cache != nullptr) {
        student_cache += count, teacher_cache += count;
        *student_max++ = result.student_max, *teacher_max++ = result.teacher_max;
      }
      result.student_sum += sums.tempered;
      result.hard_sum += sums.hard;
      result.teacher_sum += teacher_sums.tempered;
      result.gap_sum += teacher_sums.gaps;
      // A row that is not well separated by its first classes is not worth the gaps of the others.
      if (gaps && at == begin && at + count < end && mean_of(row, result) == 0) {
        gaps = false;
        result.gap_sum = kNaN<double>;
      }
    });
    return result;
  }

  // Not inlined, for most divergences have none.
  __attribute__((noinline)) void add_moments(int64_t index, int64_t begin, int64_t end,
                                             Statistics* result) const {
    alignas(64) T student[kLongest];
    alignas(64) T teacher[kLongest];
    const bool squares = in.divergence == Divergence::kCosine;
    for_blocks(begin, end, -1, [&](int64_t at, int64_t count) {
      const Vectors<const T> z = numbers(student_of(in, index), at, count, student);
      const Vectors<const T> w = numbers(teacher_of(in, index), at, count, teacher);
      const Moments moments =
          squares ? sum_squares(z, w, steps(count)) : sum_moments(z, w, steps(count));
      result->student_moment += moments.student, result->teacher_moment += moments.teacher;
      result->student_count += moments.student_count;
      result->teacher_count += moments.teacher_count;
    });
  }

  Statistics scan(const Row<T>& row, int64_t index, int64_t segment,
                  const SegmentCache<T>& cache) const {
    if (row.state != State::kNormal) return kNoStatistics;
    const int64_t begin = segment * kSegment, end = end_of(segment);
    Statistics result = with_storage([&](auto storage) {
      return scan_blocks<decltype(storage)>(row, index, begin, end, cache);
    });
    if (row.unit || row.centered) add_moments(index, begin, end, &result);
    if (holds(begin, end - begin, row.left_out)) {
      const Logits student = student_of(in, index), teacher = teacher_of(in, index);
      result.student_label = read_one<double>(student.base, student.dtype, row.left_out);
      result.teacher_label = read_one<double>(teacher.base, teacher.dtype, row.left_out);
    }
    return result;
  }

  // What each block's exponentials are relative to, as scan() finds it.
  template <class S>
  __attribute__((noinline)) void find_maxima(const Row<T>& row, int64_t index, int64_t begin,
                                             int64_t end, double* student_max,
                                             double* teacher_max) const {
    alignas(64) S buffer[kLongest];
    double student_top = kLowest, teacher_top = kLowest;
    for_blocks(begin, end, row.left_out, [&](int64_t at, int64_t count) {
      student_top =
          std::fmax(student_top,
                    maximum(fetch(student_of(in, index), at, count, buffer, row.left_out), count));
      *student_max++ = student_top;
      teacher_top =
          std::fmax(teacher_top,
                    maximum(fetch(teacher_of(in, index), at, count, buffer, row.left_out), count));
      *teacher_max++ = teacher_top;
    });
  }

  template <class S>
  __attribute__((noinline)) void exponentiate(const Logits& logits, int64_t at, int64_t count,
                                              int64_t left_out, T factor, double max,
                                              T* exponentials) const {
    alignas(64) S buffer[kLongest];
    // Where all classes are masked so far, no maximum is subtracted.
    const Exponential<T> exponential(factor, max > kLowest ? static_cast<T>(max) : T(0), 1);
    sum_exponentials<ExpSource::kNone, GapSum::kNone>(fetch(logits, at, count, buffer, left_out),
                                                      count, exponential, exponential, 0,
                                                      exponentials, Into::kL1);
  }

  // Calls fn(at, count, student's exponentials, teacher's) for the blocks of a segment, with their
  // constants in `c`: with what `cache` has of them, or recomputed.
  template <class Fn>
  void for_exponentials(const Row<T>& row, const Scales<T>& s, int64_t index, int64_t segment,
                        const SegmentCache<T>& cache, Coefficients<T>* c, Fn&& fn) const {
    const int64_t begin = segment * kSegment, end = end_of(segment);
    double maxima[2][SegmentCache<T>::kBlocks];
    alignas(64) T exponentials[2][kLongest];
    const double *student_max = cache.student_max, *teacher_max = cache.teacher_max;
    if (cache.empty()) {
      student_max = maxima[0], teacher_max = maxima[1];
      with_storage([&](auto storage) {
        find_maxima<decltype(storage)>(row, index, begin, end, maxima[0], maxima[1]);
      });
    }
    for_blocks(begin, end, row.left_out, [&](int64_t at, int64_t count) {
      T *student = cache.student + (at - begin), *teacher = cache.teacher + (at - begin);
      if (cache.empty()) {
        student = exponentials[0], teacher = exponentials[1];
        with_storage([&](auto storage) {
          using S = decltype(storage);
          exponentiate<S>(student_of(in, index), at, count, row.left_out, row.factor, *student_max,
                          student);
          exponentiate<S>(teacher_of(in, index), at, count, row.left_out, row.teacher_factor,
                          *teacher_max, teacher);
        });
      }
      set_block(row, s, *student_max++, *teacher_max++, c);
      fn(at, count, student, teacher);
    });
  }

  void fill(int64_t index, int64_t begin, int64_t end, T value) const {
    if (grad == nullptr) return;
    alignas(64) T block[kBlock];
    for (T& x : block) x = value;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = end - at < kBlock ? end - at : kBlock;
      FASTKD_ISA::write(block, in.student_dtype, count, grad_at(index, at));
    }
  }

  // Whether the sweep after the first has more to sum than the divergence.
  bool has_extras() const {
    return terms || in.label_smoothing != 0 || in.divergence == Divergence::kSoftCrossEntropy;
  }
  // The label's logit, which the hard term is made of.
  void add_label_logit(const Row<T>& row, const Scales<T>& s, int64_t index, int64_t segment,
                       Sums* sums) const {
    const int64_t begin = segment * kSegment;
    if (row.hard == ExpSource::kNone || !holds(begin, end_of(segment) - begin, row.label)) return;
    const Logits student = student_of(in, index);
    const double z = read_one<T>(student.base, student.dtype, row.label);
    sums->student_logits +=
        weighted(1 - in.label_smoothing, z - static_cast<double>(s.student_max));
  }
  // What label smoothing, `terms` and the soft cross entropy ask for of a block.
  __attribute__((noinline)) void add_extras(const Row<T>& row, const Coefficients<T>& c,
                                            const Scales<T>& s, int64_t index, int64_t at,
                                            int64_t count, const T* student_exponentials,
                                            const T* teacher_exponentials, Sums* sums) const {
    alignas(64) T z[kLongest];
    alignas(64) T w[kLongest];
    if (row.hard != ExpSource::kNone && in.label_smoothing != 0) {
      const double share = in.label_smoothing / static_cast<double>(in.classes);
      copy_block(student_of(in, index), at, count, z);
      sums->student_logits += share * sum_offsets(z, s.student_max, count);
    }
    if (!terms && in.divergence != Divergence::kSoftCrossEntropy) return;
    const Vectors<const T> teacher = numbers(teacher_of(in, index), at, count, w, row.left_out);
    const T teacher_log_scale = std::log(s.teacher_scale);
    if (!terms) {
      sums->teacher_entropy += sum_teacher_entropy(c, teacher_log_scale, s.teacher_max, teacher,
                                                   teacher_exponentials, steps(count));
      return;
    }
    const Entropies<T> e =
        sum_entropies(c, std::log(s.student_scale), teacher_log_scale, s.student_max, s.teacher_max,
                      numbers(student_of(in, index), at, count, z, row.left_out), teacher,
                      student_exponentials, teacher_exponentials, steps(count));
    sums->student_entropy += e.student;
    sums->teacher_entropy += e.teacher;
    sums->agreement += e.agreement;
  }

  // Value and slopes of a block.
  SlopeSums slopes(const Coefficients<T>& c, const Vectors<const T>& z, const Vectors<const T>& w,
                   const T* student_exponentials, const T* teacher_exponentials, T* slope,
                   int64_t count) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (c.is_comparable()) {
        return find_even_slopes(c, z, w, student_exponentials, teacher_exponentials, slope, count);
      }
    }
    const auto find = [&](auto divergence, auto shifted) {
      return find_slopes<decltype(divergence), decltype(shifted)::value>(
          c, constants_in<T>(constants), z, w, student_exponentials, teacher_exponentials, slope,
          count);
    };
    if (in.divergence == Divergence::kCosine) return find(Cosine{}, constant<false>);
    return visit(in.divergence, [&](auto divergence) -> SlopeSums {
      using D = decltype(divergence);
      if constexpr (std::is_same<D, ForwardKL>::value || std::is_same<D, ReverseKL>::value) {
        return {};
      } else {
        if (is_mean(D::kBalance) || !c.shifted) return find(divergence, constant<false>);
        return find(divergence, constant<true>);
      }
    });
  }

  // Sums value and slopes of a block. Slopes that are cached replace the teacher's exponentials.
  SlopeSums sum_block(const Coefficients<T>& c, int64_t index, int64_t at, int64_t count,
                      const T* student_exponentials, T* teacher_exponentials) const {
    alignas(64) T student[kLongest];
    alignas(64) T teacher[kLongest];
    const Vectors<const T> z = numbers(student_of(in, index), at, count, student);
    const Vectors<const T> w = numbers(teacher_of(in, index), at, count, teacher);
    if (is_reverse(in.divergence)) {
      const auto sum = c.shifted ? &sum_reverse<true, T> : &sum_reverse<false, T>;
      return {0, sum(c, z, w, student_exponentials, steps(count)), 0};
    }
    return slopes(c, z, w, student_exponentials, teacher_exponentials, teacher_exponentials,
                  steps(count));
  }

  // Sums value and slopes of one segment; in `cache` slopes replace the teacher's exponentials.
  void sum_segment(const Row<T>& row, Coefficients<T>* c, const Scales<T>& s, int64_t index,
                   int64_t segment, const SegmentCache<T>& cache, Sums* sums) const {
    if (row.state != State::kNormal || !s.valid()) return;
    add_label_logit(row, s, index, segment, sums);
    for_exponentials(row, s, index, segment, cache, c,
                     [&](int64_t at, int64_t count, T* student, T* teacher) {
                       if (has_extras()) {
                         add_extras(row, *c, s, index, at, count, student, teacher, sums);
                       }
                       const SlopeSums of_block = sum_block(*c, index, at, count, student, teacher);
                       sums->value += of_block.value;
                       sums->slope += of_block.slope;
                       sums->classes += of_block.classes;
                     });
    if (segment == 0) sums->value += s.nothing, sums->slope += s.nothing;
  }

  // What centers the slopes. Their sum is rounded to T, because backward reads it from `stats`.
  void set_shares(Coefficients<T>* c, const Sums& sums) const {
    const Balance balance = balance_of(in.divergence);
    const T slope = static_cast<T>(sums.slope);
    c->student_share = balance == Balance::kStudent || balance == Balance::kUnit ? slope : T(0);
    if (!is_mean(balance)) return;
    c->soft_gain = static_cast<T>(static_cast<double>(c->soft_gain) / sums.classes);
    if (balance == Balance::kCentered) {
      c->constant_share = static_cast<T>(static_cast<double>(slope) / sums.classes);
    }
  }

  // What is to become of the label's element: what the one-hot target takes off, or another value.
  struct Label {
    int64_t index = -1;  // in the row, or none
    bool replaces = false;
    T value = 0;
  };
  template <class S>
  void put_label(const Label& label, int64_t at, int64_t count, const Vectors<S>& g) const {
    if (!holds(at, count, label.index)) return;
    T* const element = g.element(place(label.index - at));
    *element = label.replaces ? label.value : *element - label.value;
  }

  // Writes a block's gradient as q - p, or from slopes, of a row that is well separated. A label of
  // pairs is computed once more, before it is rounded.
  template <bool kSlopes, class S>
  void write_separated(const Row<T>& row, const Coefficients<T>& c, int64_t index, int64_t at,
                       int64_t count, const T* student_exponentials, const T* other,
                       const Label& label) const {
    alignas(64) S student[kLongest];
    alignas(64) S result[kLongest];
    void* const to = grad_at(index, at);
    const Vectors<S> g = target(to, in.student_dtype, count, result, past_caches());
    const Logits logits = student_of(in, index);
    Vectors<const S> z;
    if (row.gradient_hard == ExpSource::kSeparate) z = fetch(logits, at, count, student);
    T of_label = 0;
    const bool has_label = holds(at, count, label.index);
    if constexpr (!std::is_same<S, T>::value) {
      if (has_label) {
        const int64_t i = unpacked_place(label.index - at);
        const T logit = read_one<T>(logits.base, logits.dtype, label.index);
        of_label = well_separated_gradient(c, row.gradient_hard, kSlopes, logit,
                                           student_exponentials[i], other[i]);
      }
    }
    with_source(row.gradient_hard, [&](auto source) {
      write_well_separated<decltype(source)::value, kSlopes>(c, z, student_exponentials, other, g,
                                                             count);
    });
    if constexpr (std::is_same<S, T>::value) {
      put_label(label, at, count, g);
    } else {
      if (has_label) *g.element(label.index - at) = narrow<S>(of_label - label.value);
    }
    put_result(g, result, to, in.student_dtype, count, past_caches());
  }

  // Writes a block's gradient, or sums alone; `other`: the teacher's exponentials, or slopes.
  SlopeSums write_block(const Row<T>& row, const Coefficients<T>& c, int64_t index, int64_t at,
                        int64_t count, const T* student_exponentials, const T* other,
                        const Label& label) const {
    alignas(64) T student[kLongest];
    alignas(64) T teacher[kLongest];
    alignas(64) T result[kLongest];
    alignas(64) T hard_part[kLongest];
    void* const to = grad_at(index, at);
    const Vectors<T> g =
        pairs ? Vectors<T>{result} : target(to, in.student_dtype, count, result, past_caches());
    const int64_t wide = steps(count);
    const Vectors<const T> z = numbers(student_of(in, index), at, count, student, row.left_out);
    with_source(row.gradient_hard, [&](auto source) {
      write_hard_part<decltype(source)::value>(c, z, student_exponentials, hard_part, wide);
    });
    SlopeSums sums;
    if (caches_slopes()) {
      const bool any = leaves_out_masked(balance_of(in.divergence)) || c.soft_gain == T(0);
      const auto center = any ? &center_gradient<true, T> : &center_gradient<false, T>;
      const Vectors<const T> q = row.unit ? z : Vectors<const T>{student_exponentials};
      center(c, q, row.unit ? c.student_inverse : c.student_scale, other, hard_part, g, wide);
    } else {
      const Vectors<const T> w = numbers(teacher_of(in, index), at, count, teacher, row.left_out);
      sums = write_slopes(row, c, z, w, student_exponentials, other, hard_part, g, wide);
    }
    put_label(label, at, count, g);
    if (grad == nullptr) return sums;
    pairs ? put_pairs(result, to, count)
          : put_result(g, result, to, in.student_dtype, count, past_caches());
    return sums;
  }

  // The gradient of divergences whose slopes are not cached, and what is summed with it.
  SlopeSums write_slopes(const Row<T>& row, const Coefficients<T>& c, const Vectors<const T>& z,
                         const Vectors<const T>& w, const T* student_exponentials,
                         const T* teacher_exponentials, const T* hard_part, const Vectors<T>& g,
                         int64_t count) const {
    if (is_reverse(in.divergence)) {
      // In backward, too, where nobody asks for the value: other loops might have other bits.
      const bool value = !is_sum_of_slopes(c, c.student_share);
      const auto write =
          c.shifted ? (value ? &write_reverse<true, true, T> : &write_reverse<true, false, T>)
                    : (value ? &write_reverse<false, true, T> : &write_reverse<false, false, T>);
      return {write(c, z, w, student_exponentials, teacher_exponentials, hard_part, g, count), 0,
              0};
    }
    const bool decoupled = row.left_out >= 0;
    const auto write =
        c.shifted
            ? (decoupled ? &write_gradient<true, true, T> : &write_gradient<true, false, T>)
            : (decoupled ? &write_gradient<false, true, T> : &write_gradient<false, false, T>);
    return write(c, z, w, student_exponentials, teacher_exponentials, hard_part, g, count);
  }

  // Rounds a block of numbers that are in the order of unpack() to bf16.
  void put_pairs(const T* numbers, void* to, int64_t count) const {
    if constexpr (kHasPairs && sizeof(T) == sizeof(float)) {
      alignas(64) BFloat16 packed[kLongest];
      const Vectors<BFloat16> g = target(to, in.student_dtype, count, packed, past_caches());
      for_vectors<BFloat16>(count, [&](int64_t at, auto width) FASTKD_INLINE {
        pack<decltype(width)::value>(numbers + at, g.at(at));
      });
      put_result(g, packed, to, in.student_dtype, count, past_caches());
    }
  }

  T onehot(const Row<T>& row, double gain) const {
    return static_cast<T>(gain * row.hard_weight * (1 - in.label_smoothing));
  }

  Label label_of(const Row<T>& row, const Coefficients<T>& c, double gain) const {
    const bool decoupled = row.left_out >= 0;
    // As backward sees it, which knows no terms.
    if (grad == nullptr || (row.gradient_hard == ExpSource::kNone && !decoupled)) return {};
    return {row.label, decoupled, decoupled ? c.label_gradient : onehot(row, gain)};
  }

  // The gradient of a segment. Sums are wanted by forward alone; null in backward. `has_slopes`:
  // sum_segment() left them in `cache`.
  void write(const Row<T>& row, Coefficients<T>* c, const Scales<T>& s, double gain, int64_t index,
             int64_t segment, const SegmentCache<T>& cache, bool has_slopes, Sums* sums) const {
    const bool difference = is_difference(s);
    const bool extras = sums != nullptr && one_sweep() && has_extras();
    const bool summed =
        sums != nullptr &&
        (one_sweep() ? !difference
                     : is_reverse(in.divergence) && !is_sum_of_slopes(*c, c->student_share));
    if (sums != nullptr && one_sweep()) add_label_logit(row, s, index, segment, sums);
    if (grad == nullptr && !summed && !extras) return;
    const Label label = label_of(row, *c, gain);
    for_exponentials(
        row, s, index, segment, cache, c, [&](int64_t at, int64_t count, T* student, T* teacher) {
          if (extras) add_extras(row, *c, s, index, at, count, student, teacher, sums);
          if (grad == nullptr && !summed) return;
          if (caches_slopes() && !has_slopes) {
            sum_block(*c, index, at, count, student, teacher);
          }
          if (difference || c->is_comparable()) {
            with_storage([&](auto storage) {
              using S = decltype(storage);
              difference
                  ? write_separated<false, S>(row, *c, index, at, count, student, teacher, label)
                  : write_separated<true, S>(row, *c, index, at, count, student, teacher, label);
            });
            return;
          }
          const SlopeSums of_block =
              write_block(row, *c, index, at, count, student, teacher, label);
          if (sums != nullptr) sums->value += of_block.value, sums->slope += of_block.slope;
        });
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
