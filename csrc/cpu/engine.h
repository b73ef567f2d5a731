// The two sweeps of one row, block by block and segment by segment.
#pragma once
#include <type_traits>

#include "row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class S>
constexpr DType kStorage = DType::kFloat32;
template <>
constexpr DType kStorage<double> = DType::kFloat64;
template <>
constexpr DType kStorage<BFloat16> = DType::kBFloat16;

// Calls fn with `hard` as a compile-time constant.
template <class T, class Fn>
FASTKD_HOST_DEVICE auto with_hard(Hard hard, Fn&& fn) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (hard == Hard::kPower1) return fn(std::integral_constant<Hard, Hard::kPower1>{});
    if (hard == Hard::kPower2) return fn(std::integral_constant<Hard, Hard::kPower2>{});
    if (hard == Hard::kPower3) return fn(std::integral_constant<Hard, Hard::kPower3>{});
    if (hard == Hard::kPower4) return fn(std::integral_constant<Hard, Hard::kPower4>{});
  }
  if (hard == Hard::kOwn) return fn(std::integral_constant<Hard, Hard::kOwn>{});
  return fn(std::integral_constant<Hard, Hard::kNone>{});
}

// One operand of one row.
struct Logits {
  const void* base;  // [classes]
  DType dtype;

  const void* at(int64_t index) const { return FASTKD_ISA::at(base, dtype, index); }
};

Logits student_of(const Inputs& in, int64_t row) {
  return {at(in.student, in.student_dtype, row_offset(row, in.group_rows, in.student_stride)),
          in.student_dtype};
}
Logits teacher_of(const Inputs& in, int64_t row) {
  return {at(in.teacher, in.teacher_dtype, row_offset(row, in.group_rows, in.teacher_stride)),
          in.teacher_dtype};
}

constexpr int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Reads a block into `buffer`, and pads it.
template <class T>
void copy_block(const Logits& logits, int64_t begin, int64_t count, T* buffer) {
  read(logits.at(begin), logits.dtype, count, buffer);
  for (int64_t i = count; i < padded(count); ++i) buffer[i] = narrow<T>(-__builtin_huge_valf());
}

// The block itself where the loops can read it in place, or else a copy in `buffer`.
template <class S>
const S* fetch(const Logits& logits, int64_t begin, int64_t count, S* buffer) {
  if (logits.dtype == kStorage<S> && count % kLanes == 0) {
    return static_cast<const S*>(logits.at(begin));
  }
  copy_block(logits, begin, count, buffer);
  return buffer;
}

// The last segment of a row keeps the exponentials of the first sweep for the second, which starts
// there: while they lie in L2, loading is cheaper than computing. Bounded by the stack.
template <class T>
struct Kept {
  static constexpr int64_t kClasses = sizeof(T) == sizeof(float) ? kSegment : 0;
  alignas(64) T student[kClasses + kLanes];
  alignas(64) T teacher[kClasses + kLanes];
  // What each block's exponentials are relative to: the greatest logit of the segment so far.
  static constexpr int64_t kBlocks = kSegment / kBlock + 1;
  double student_max[kBlocks], teacher_max[kBlocks];
};

// Makes q and p of exponentials that are relative to other maxima than the row's.
template <class T, class S>
void rescale_kept(const Row<T>& row, const Scales<T>& s, double student_max, double teacher_max,
                  Coefficients<T, S>* c) {
  const double student = row.rescale(student_max, s.student_max);
  const double teacher = row.rescale(teacher_max, s.teacher_max);
  c->student_scale = static_cast<T>(student * static_cast<double>(s.student_scale));
  c->teacher_scale = static_cast<T>(teacher * static_cast<double>(s.teacher_scale));
}

// T computes, S is what the loops read and write, D is the divergence.
template <class T, class S, class D>
struct Engine {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  bool terms;

  void* grad_at(int64_t row, int64_t index) const {
    return const_cast<void*>(
        at(grad, in.student_dtype, row_offset(row, in.group_rows, grad_stride) + index));
  }

  Coefficients<T, S> coefficients(const Row<T>& row, const Scales<T>& s, double gain) const {
    return make_coefficients<S>(in, row, s, gain);
  }

  bool keeps(int64_t segment) const { return Kept<T>::kClasses > 0 && segment == segments() - 1; }

  // Calls fn(at, count) for blocks of [begin, end): whole ones, then what is left of full vectors,
  // then a tail shorter than kLanes, so that only the tail is ever padded.
  template <class Fn>
  static FASTKD_HOST_DEVICE void for_blocks(int64_t begin, int64_t end, Fn&& fn) {
    const int64_t full = begin + (end - begin) / kLanes * kLanes;
    for (int64_t at = begin; at < full; at += kBlock) {
      fn(at, full - at < kBlock ? full - at : kBlock);
    }
    if (full < end) fn(full, end - full);
  }

  int64_t segments() const { return (in.classes + kSegment - 1) / kSegment; }
  int64_t end_of(int64_t segment) const {
    const int64_t end = (segment + 1) * kSegment;
    return end < in.classes ? end : in.classes;
  }

  // Maximum and sums in one go: the sums so far are rescaled when a block raises the maximum. With
  // kKeep, `kept` receives the exponentials and `maxima` what each block's are relative to.
  template <Hard kHard, bool kKeep>
  Pair<double> scan_blocks(const Row<T>& row, const Logits& logits, int64_t begin, int64_t end,
                           double* max, T* kept, double* maxima) const {
    alignas(64) S buffer[kBlock];
    Exponential<T, S> tempered(row.factor, 0, 1), own(row.hard_factor, 0, 1);
    Pair<double> result = {0, 0};
    *max = kLowest;
    for_blocks(begin, end, [&](int64_t at, int64_t count) {
      const S* block = fetch(logits, at, count, buffer);
      const double top = maximum(block, padded(count));
      if (top > *max) {
        if (*max > kLowest) {
          result.tempered *= row.rescale(*max, top);
          result.hard *= row.hard_rescale(*max, top);
        }
        tempered.max = own.max = static_cast<T>(top);
        *max = top;
      }
      const Pair<T> sums =
          sum_exponentials<kHard, kKeep>(block, padded(count), tempered, own, kept);
      if constexpr (kKeep) kept += count, *maxima++ = *max;
      result.tempered += sums.tempered;
      result.hard += sums.hard;
    });
    return result;
  }

  template <bool kKeep>
  Statistics scan_range(const Row<T>& row, int64_t index, int64_t begin, int64_t end,
                        Kept<T>* kept) const {
    Statistics result = kNoStatistics;
    const Pair<double> sums = with_hard<T>(row.hard, [&](auto hard) {
      return scan_blocks<decltype(hard)::value, kKeep>(row, student_of(in, index), begin, end,
                                                       &result.student_max, kept->student,
                                                       kept->student_max);
    });
    result.student_sum = sums.tempered, result.hard_sum = sums.hard;
    result.teacher_sum =
        scan_blocks<Hard::kNone, kKeep>(row, teacher_of(in, index), begin, end, &result.teacher_max,
                                        kept->teacher, kept->teacher_max)
            .tempered;
    return result;
  }

  Statistics scan(const Row<T>& row, int64_t index, int64_t segment, Kept<T>* kept) const {
    if (row.state != State::kNormal) return kNoStatistics;
    const int64_t begin = segment * kSegment, end = end_of(segment);
    return keeps(segment) ? scan_range<true>(row, index, begin, end, kept)
                          : scan_range<false>(row, index, begin, end, kept);
  }

  // What scan() keeps of the last segment, once more, for who has only the statistics.
  void keep(const Row<T>& row, const Scales<T>& s, int64_t index, Kept<T>* kept) const {
    const int64_t last = segments() - 1;
    if (!keeps(last) || row.state != State::kNormal || !s.valid()) return;
    Row<T> tempered_only = row;
    tempered_only.hard = Hard::kNone;
    scan_range<true>(tempered_only, index, last * kSegment, in.classes, kept);
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

  // What only `terms` and label smoothing ask for, of the block that starts at `at`.
  void sum_extras(const Row<T>& row, const Coefficients<T, S>& c, const Scales<T>& s, int64_t index,
                  int64_t at, int64_t count, Sums* sums) const {
    alignas(64) T z[kBlock];
    alignas(64) T w[kBlock];
    copy_block(student_of(in, index), at, count, z);
    if (row.hard != Hard::kNone && in.label_smoothing != 0) {
      const double share = in.label_smoothing / static_cast<double>(in.classes);
      sums->student_logits += share * sum_offsets(z, s.student_max, count);
    }
    if (!terms) return;
    copy_block(teacher_of(in, index), at, count, w);
    const Entropies<T> e = sum_entropies(c, std::log(s.student_scale), std::log(s.teacher_scale),
                                         s.student_max, s.teacher_max, z, w, padded(count));
    sums->student_entropy += e.student;
    sums->teacher_entropy += e.teacher;
    sums->agreement += e.agreement;
  }

  // One block of the second sweep, in the form that the row asks for.
  template <class L>
  T differentiate(const Row<T>& row, const Coefficients<T, S>& c, Way way, const L* z, const L* w,
                  const T* student_kept, const T* teacher_kept, L* g, int64_t count) const {
    if (c.apart && row.gradient_hard == Hard::kNone) {
      return write_gradient<D, Hard::kNone, Way::kApart>(c, z, w, student_kept, teacher_kept, g,
                                                         count);
    }
    if (c.apart) {
      return write_gradient<D, Hard::kOwn, Way::kApart>(c, z, w, student_kept, teacher_kept, g,
                                                        count);
    }
    return with_hard<T>(row.gradient_hard, [&](auto hard) {
      constexpr Hard kHard = decltype(hard)::value;
      return way == Way::kKept ? write_gradient<D, kHard, Way::kKept>(c, z, w, student_kept,
                                                                      teacher_kept, g, count)
                               : write_gradient<D, kHard, Way::kAnew>(c, z, w, student_kept,
                                                                      teacher_kept, g, count);
    });
  }

  T write_block(const Row<T>& row, const Coefficients<T, S>& c, int64_t index, int64_t at,
                int64_t count, const T* student_kept, const T* teacher_kept) const {
    alignas(64) S student[kBlock];
    alignas(64) S teacher[kBlock];
    alignas(64) S result[kBlock];
    const S* z = fetch(student_of(in, index), at, count, student);
    const S* w = fetch(teacher_of(in, index), at, count, teacher);
    const bool direct = grad != nullptr && in.student_dtype == kStorage<S> && count % kLanes == 0;
    S* g = direct ? static_cast<S*>(grad_at(index, at)) : result;
    const Way way = student_kept != nullptr ? Way::kKept : Way::kAnew;
    const T value = differentiate(row, c, way, z, w, student_kept, teacher_kept, g, padded(count));
    if (grad != nullptr && !direct) {
      FASTKD_ISA::write(result, in.student_dtype, count, grad_at(index, at));
    }
    return value;
  }

  // The label's element, where the one-hot target is taken off before the gradient is rounded.
  T label_gradient(const Row<T>& row, const Coefficients<T, S>& c, T student, T teacher,
                   double gain) const {
    alignas(64) T z[kLanes];
    alignas(64) T w[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) z[i] = student, w[i] = teacher;
    differentiate(row, c, Way::kAnew, z, w, z, w, z, kLanes);
    return z[0] - onehot(gain);
  }
  T onehot(double gain) const {
    return static_cast<T>(gain * in.hard_weight * (1 - in.label_smoothing));
  }

  // Sums are wanted by forward alone; null in backward.
  void write(const Row<T>& row, Coefficients<T, S>* c, const Scales<T>& s, double gain,
             int64_t index, int64_t segment, const Kept<T>& kept, Sums* sums) const {
    const int64_t begin = segment * kSegment, end = end_of(segment);
    const bool labelled = row.hard != Hard::kNone && begin <= row.label && row.label < end;
    const bool exact = in.student_dtype == kStorage<T>;
    T label_grad = 0;
    if (labelled) {
      const T z = read_one<T>(student_of(in, index).base, in.student_dtype, row.label);
      const T w = read_one<T>(teacher_of(in, index).base, in.teacher_dtype, row.label);
      if (!exact) label_grad = label_gradient(row, *c, z, w, gain);
      if (sums != nullptr) {
        const double share = 1 - in.label_smoothing;
        sums->student_logits +=
            weighted(share, static_cast<double>(z) - static_cast<double>(s.student_max));
      }
    }
    const bool keep = keeps(segment);
    const bool extras = sums != nullptr && (terms || in.label_smoothing != 0);
    double value = 0;
    int64_t block = 0;
    for_blocks(begin, end, [&](int64_t at, int64_t count) {
      if (extras) sum_extras(row, *c, s, index, at, count, sums);
      if (keep) rescale_kept(row, s, kept.student_max[block], kept.teacher_max[block], c);
      value += write_block(row, *c, index, at, count, keep ? kept.student + (at - begin) : nullptr,
                           keep ? kept.teacher + (at - begin) : nullptr);
      ++block;
    });
    if (sums != nullptr) sums->value = value;
    if (!labelled || grad == nullptr) return;
    void* target = grad_at(index, row.label);
    if (exact) label_grad = *static_cast<const T*>(target) - onehot(gain);
    FASTKD_ISA::write(&label_grad, in.student_dtype, 1, target);
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
