// The first sweep over a row: maxima, sums of exponentials, and a cache of the exponentials for the
// later sweeps (docs/maths.md, sections 3 and 4). FirstSweep also addresses the gradient, and can
// fill it with a constant.
#pragma once
#include "blocks.h"
#include "row_blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class T>
struct FirstSweep {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  bool terms;
  Constants constants;

  bool non_temporal() const {
    constexpr int64_t kLeastClasses =
        2048;  // non-temporal stores: 11 % faster at 4096, 6 % slower at 1000 (Zen 4, 2026-11-28)
    return stores_non_temporal(in, grad, kLeastClasses);
  }
  // Complete non-temporal stores, so that other threads see the gradient.
  void complete() const {
    if (non_temporal()) store_fence();
  }

  void* grad_at(int64_t row, int64_t index) const {
    if (grad == nullptr) return nullptr;
    return const_cast<void*>(
        at(grad, in.student_dtype, row_offset(row, in.group_rows, grad_stride) + index));
  }

  int64_t segments() const { return (in.classes + kSegment - 1) / kSegment; }
  int64_t end_of(int64_t segment) const {
    const int64_t end = (segment + 1) * kSegment;
    return end < in.classes ? end : in.classes;
  }

  // Call fn with a value of the type that the sweeps read: bf16 if both logits are bf16, else T.
  template <class Fn>
  auto with_storage(Fn&& fn) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      const DType pairs = DType::kBFloat16;
      if (in.student_dtype == pairs && in.teacher_dtype == pairs) return fn(BFloat16{});
    }
    return fn(T{});
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

  // Prefetch from the next pages, so that the processor walks the page table for several pages at
  // once. The first access to a page waits for the page walk: 90 ns for each 4 KB page on a Zen 4
  // virtual machine (November 2026). Rows longer than a segment gain nothing. The function is
  // inlined, because GCC drops calls of functions that only prefetch.
  template <class S>
  FASTKD_HOST_DEVICE void touch_pages(const Logits& student, const Logits& teacher, int64_t index,
                                      int64_t at, int64_t count) const {
    constexpr int64_t kPage = 4096, kAtOnce = 4 * kPage;  // in bytes
    constexpr int64_t kClasses = kAtOnce / static_cast<int64_t>(sizeof(S));
    if (in.classes > kSegment || (index * in.classes + at) % kClasses >= count) return;
    for (int64_t ahead = kAtOnce; ahead < 2 * kAtOnce; ahead += kPage) {
      prefetch<CacheLevel::kL2>(static_cast<const char*>(student.at(at)), ahead);
      prefetch<CacheLevel::kL2>(static_cast<const char*>(teacher.at(at)), ahead);
      if (grad != nullptr)
        prefetch<CacheLevel::kL2>(static_cast<const char*>(grad_at(index, at)), ahead);
    }
  }

  // Sum the teacher's exponentials, and the log ratios that show whether the row is well separated.
  template <class S>
  ExponentialSums sum_log_ratios(const Vectors<const S>& z, const Vectors<const S>& w,
                                 int64_t count, const Exponential<T>& teachers, T student_max,
                                 T* cache, CacheLevel next) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto sum = is_even_jsd(in)
                           ? &sum_exponentials<ExpSource::kNone, LogRatioSum::kBounded, T, S>
                           : &sum_exponentials<ExpSource::kNone, LogRatioSum::kUnbounded, T, S>;
      return sum(w, count, teachers, teachers, 0, cache, next, z, student_max);
    }
    return {};
  }

  // Compute maxima and sums in one pass: the sums so far are rescaled when a block raises a
  // maximum. `cache` receives the exponentials and the maximum that each block's exponentials are
  // relative to.
  template <class S>
  Statistics scan_blocks(const Row<T>& row, int64_t index, int64_t begin, int64_t end,
                         const SegmentCache<T>& cache) const {
    alignas(64) S student_buffer[kLongest];
    alignas(64) S teacher_buffer[kLongest];
    const Logits student = student_of(in, index), teacher = teacher_of(in, index);
    Exponential<T> tempered(row.factor, 0, 1), separate(row.hard_factor, 0, 1);
    Exponential<T> teachers(row.teacher_factor, 0, 1);
    const auto sum = &sum_exponentials<ExpSource::kNone, LogRatioSum::kNone, T, S>;
    const auto sum_student = with_source(row.hard, [](auto source) {
      return &sum_exponentials<decltype(source)::value, LogRatioSum::kNone, T, S>;
    });
    Statistics result = kNoStatistics;
    // Copy the pointers one by one: a copy of the struct would wait for the stores of its members.
    T *student_cache = cache.student, *teacher_cache = cache.teacher;
    double *student_max = cache.student_max, *teacher_max = cache.teacher_max;
    bool log_ratios = row.log_ratios;
    for_blocks(begin, end, row.left_out, [&](int64_t at, int64_t count) {
      const Vectors<const S> z = fetch(student, at, count, student_buffer, row.left_out);
      const Vectors<const S> w = fetch(teacher, at, count, teacher_buffer, row.left_out);
      touch_pages<S>(student, teacher, index, at, count);
      const double top = maximum(z, count), teacher_top = maximum(w, count);
      if (top > result.student_max || teacher_top > result.teacher_max) {
        if (at == begin) {
          result.student_max = top, result.teacher_max = teacher_top;
        } else {  // rescale the sums so far to the greater maxima
          merge(row, Statistics{top, 0, 0, teacher_top, 0}, &result);
        }
        tempered.max = separate.max = origin_of<T>(result.student_max);
        teachers.max = origin_of<T>(result.teacher_max);
      }
      const CacheLevel next = next_of<S>(at, in.classes);
      const ExponentialSums sums =
          sum_student(z, count, tempered, separate, row.squarings(), student_cache, next, {}, 0);
      const ExponentialSums teacher_sums =
          log_ratios ? sum_log_ratios<S>(z, w, count, teachers, tempered.max, teacher_cache, next)
                     : sum(w, count, teachers, teachers, 0, teacher_cache, next, {}, 0);
      if (student_cache != nullptr) {
        student_cache += count, teacher_cache += count;
        *student_max++ = result.student_max, *teacher_max++ = result.teacher_max;
      }
      result.student_sum += sums.tempered;
      result.hard_sum += sums.hard;
      result.teacher_sum += teacher_sums.tempered;
      result.log_ratio_sum += teacher_sums.log_ratios;
      if (row.unit || row.centered) {
        add_moments(RowBlock<T, S>{at, count, nullptr, nullptr, z, w}, row.unit, &result);
      }
      // If the first block is not well separated, the row probably is not either. The sweep then
      // sums no more log ratios.
      if (log_ratios && at == begin && at + count < end && mean_of(row, result) == 0) {
        log_ratios = false;
        result.log_ratio_sum = kNaN<double>;
      }
    });
    return result;
  }

  Statistics scan(const Row<T>& row, int64_t index, int64_t segment,
                  const SegmentCache<T>& cache) const {
    if (row.state != State::kNormal) return kNoStatistics;
    const int64_t begin = segment * kSegment, end = end_of(segment);
    Statistics result = with_storage([&](auto storage) {
      return scan_blocks<decltype(storage)>(row, index, begin, end, cache);
    });
    if (holds(begin, end - begin, row.left_out)) {
      const Logits student = student_of(in, index), teacher = teacher_of(in, index);
      result.student_label = read_one<double>(student.base, student.dtype, row.left_out);
      result.teacher_label = read_one<double>(teacher.base, teacher.dtype, row.left_out);
    }
    return result;
  }

  // Compute the maxima that scan_blocks() would store in a cache, for a segment without a cache.
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
    const Exponential<T> exponential(factor, origin_of<T>(max), 1);
    sum_exponentials<ExpSource::kNone, LogRatioSum::kNone>(
        fetch(logits, at, count, buffer, left_out), count, exponential, exponential, 0,
        exponentials, CacheLevel::kL1);
  }

  // Call fn(block) for each block of a segment, after setting r->c to the block's coefficients.
  // Exponentials are read from `cache`, or recomputed.
  template <class S, class Fn>
  void for_exponentials(ActiveRow<T>* r, int64_t segment, const SegmentCache<T>& cache,
                        Fn&& fn) const {
    const Row<T>& row = r->row;
    const int64_t begin = segment * kSegment, end = end_of(segment);
    double maxima[2][SegmentCache<T>::kBlocks];
    alignas(64) T exponentials[2][kLongest];
    const double *student_max = cache.student_max, *teacher_max = cache.teacher_max;
    if (cache.empty()) {
      student_max = maxima[0], teacher_max = maxima[1];
      find_maxima<S>(row, r->index, begin, end, maxima[0], maxima[1]);
    }
    for_blocks(begin, end, row.left_out, [&](int64_t at, int64_t count) {
      T *student = exponentials[0], *teacher = exponentials[1];
      if (!cache.empty()) {
        student = cache.student + (at - begin), teacher = cache.teacher + (at - begin);
      } else {
        exponentiate<S>(student_of(in, r->index), at, count, row.left_out, row.factor, *student_max,
                        student);
        exponentiate<S>(teacher_of(in, r->index), at, count, row.left_out, row.teacher_factor,
                        *teacher_max, teacher);
      }
      set_block(row, r->scales, *student_max++, *teacher_max++, &r->c);
      fn(RowBlock<T, S>{at, count, student, teacher});
    });
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
