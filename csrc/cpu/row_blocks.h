// The student, teacher and gradient of a row, divided into blocks, which the loops of scan.h and
// blocks.h read and write. This file also has the cache that passes exponentials from the first
// sweep to the later sweeps. The boundaries of blocks fix the order of sums (docs/maths.md, section
// 9).
#pragma once
#include <memory>
#include <new>

#include "row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class S>
constexpr DType kStorage = DType::kFloat32;
template <>
constexpr DType kStorage<double> = DType::kFloat64;
template <>
constexpr DType kStorage<BFloat16> = DType::kBFloat16;

// Call fn with `source` as a compile-time constant.
template <class Fn>
FASTKD_HOST_DEVICE auto with_source(ExpSource source, Fn&& fn) {
  if (source == ExpSource::kPower) return fn(constant<ExpSource::kPower>);
  if (source == ExpSource::kSeparate) return fn(constant<ExpSource::kSeparate>);
  return fn(constant<ExpSource::kNone>);
}

struct Logits {
  const void* base;  // [classes]
  DType dtype;

  const void* at(int64_t index) const { return FASTKD_ISA::at(base, dtype, index); }
};

inline Logits student_of(const Inputs& in, int64_t row) {
  return {at(in.student, in.student_dtype, row_offset(row, in.group_rows, in.student_stride)),
          in.student_dtype};
}
inline Logits teacher_of(const Inputs& in, int64_t row) {
  return {at(in.teacher, in.teacher_dtype, row_offset(row, in.group_rows, in.teacher_stride)),
          in.teacher_dtype};
}

// Padded length of the longest block: the last block of a segment takes up to a vector more.
constexpr int64_t kLongest = kBlock + kLanes;

template <class S>
constexpr int64_t full_steps(int64_t count) {
  return count / kStep<S> * kStep<S>;
}
template <class S>
constexpr int64_t padded(int64_t count) {
  return (count + kStep<S> - 1) / kStep<S> * kStep<S>;
}

// Read a block into `buffer`, and pad the buffer with -inf.
template <class T>
__attribute__((noinline)) void copy_block(const Logits& logits, int64_t begin, int64_t count,
                                          T* buffer) {
  read(logits.at(begin), logits.dtype, count, buffer);
  for (int64_t i = count; i < padded<T>(count); ++i) buffer[i] = narrow<T>(-__builtin_huge_valf());
}

// Return a block. If the loops can read the tensor itself, only a last step that is not full is
// copied to `buffer` and padded. Otherwise the block is copied to `buffer`. The class that the sums
// leave out is masked.
template <class S>
FASTKD_HOST_DEVICE Vectors<const S> fetch(const Logits& logits, int64_t begin, int64_t count,
                                          S* buffer, int64_t left_out = -1) {
  const bool masks = holds(begin, count, left_out);
  if (logits.dtype == kStorage<S> && !masks) {
    const int64_t full_classes = full_steps<S>(count);
    if (full_classes < count)
      copy_block(logits, begin + full_classes, count - full_classes, buffer);
    return {static_cast<const S*>(logits.at(begin)), buffer, full_classes};
  }
  copy_block(logits, begin, count, buffer);
  if (masks) buffer[left_out - begin] = narrow<S>(-__builtin_huge_valf());
  return {buffer};
}

// Return true if non-temporal stores write the gradient: it is too large for the caches, and does
// not overwrite the student. Rows of fewer than `least_classes` classes take longer with
// non-temporal stores, even if rows begin with a cache line.
inline bool stores_non_temporal(const Inputs& in, const void* grad, int64_t least_classes) {
  constexpr int64_t kBytes = 12 << 20;
  return in.classes >= least_classes &&
         in.rows * in.classes * size_of(in.student_dtype) >= kBytes && grad != in.student;
}

// Return the vectors to which the loops write a block's gradient: `grad` for full steps and
// `result` for the remainder, or `result` for all.
template <class S>
Vectors<S> target(void* grad, DType dtype, int64_t count, S* result, bool non_temporal) {
  if (grad == nullptr || dtype != kStorage<S> || non_temporal) return {result};
  return {static_cast<S*>(grad), result, full_steps<S>(count)};
}
// Copy to `grad` the results that the loops have written to `result`.
template <class S>
void put_result(const Vectors<S>& target, const S* result, void* grad, DType dtype, int64_t count,
                bool non_temporal) {
  const int64_t full_classes = target.block == result ? 0 : target.full_classes;
  if (grad == nullptr || full_classes == count) return;
  if (non_temporal && dtype == kStorage<S>) {
    return store_non_temporal(result, count * static_cast<int64_t>(sizeof(S)), grad);
  }
  write(result, dtype, count - full_classes, const_cast<void*>(at(grad, dtype, full_classes)));
}

// Call fn(at, count) for the blocks of [begin, end); the last block may be shorter or longer. A
// vector with a class that the sums leave out is a separate block, so that only this vector is
// copied to mask the class.
template <class Fn>
FASTKD_HOST_DEVICE void for_blocks(int64_t begin, int64_t end, int64_t left_out, Fn&& fn) {
  const int64_t alone = left_out < begin ? end : left_out - (left_out - begin) % kLanes;
  for (int64_t at = begin, next; at < end; at = next) {
    next = end - at < kLongest ? end : at + kBlock;
    if (at == alone && next > at + kLanes) next = at + kLanes;
    if (at < alone && next > alone) next = alone;
    fn(at, next - at);
  }
}

// The exponentials of student and teacher in a segment, cached by the first sweep for the later
// sweeps. The exponentials are relative to the greatest logit of the segment up to the end of the
// block. The cache is empty if no memory is available, or if another call ran the first sweep. A
// later sweep then recomputes the exponentials block by block, to equal bits.
template <class T>
struct SegmentCache {
  static constexpr int64_t kBlocks =
      kSegment / kBlock + 3;  // for_blocks() divides a segment into at most this number of blocks

  T* student = nullptr;
  T* teacher = nullptr;
  double* student_max = nullptr;
  double* teacher_max = nullptr;

  bool empty() const { return student == nullptr; }
};

// The caches of a row's segments, in memory that the rows of a call share.
template <class T>
class RowCache {
 public:
  explicit RowCache(int64_t classes)
      : width_(padded<BFloat16>(classes < kSegment ? classes : kSegment) + kLanes) {
    const int64_t segments = (classes + kSegment - 1) / kSegment;
    const size_t bytes = static_cast<size_t>(2 * segments * width_) * sizeof(T);
    exponentials_.reset(static_cast<T*>(::operator new[](bytes, kAlignment, std::nothrow)));
    maxima_.reset(
        new (std::nothrow) double[static_cast<size_t>(2 * segments * SegmentCache<T>::kBlocks)]);
  }

  SegmentCache<T> segment(int64_t index) const {
    if (exponentials_ == nullptr || maxima_ == nullptr) return {};
    T* const student = exponentials_.get() + 2 * index * width_;
    double* const student_max = maxima_.get() + 2 * index * SegmentCache<T>::kBlocks;
    return {student, student + width_, student_max, student_max + SegmentCache<T>::kBlocks};
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* memory) const { ::operator delete[](memory, kAlignment); }
  };

  int64_t width_;  // padded number of classes of a segment
  std::unique_ptr<T[], Delete> exponentials_;
  std::unique_ptr<double[]> maxima_;
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
