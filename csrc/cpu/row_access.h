// Reads the logits of a row and writes its gradient, a block at a time, whatever their types.
#pragma once
#include "row_blocks.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Return true if both sweeps read bf16 in place, in pairs. Otherwise types other than T are copied.
template <class T>
bool reads_pairs(const Inputs& in) {
  return kHasPairs && sizeof(T) == sizeof(float) && in.student_dtype == DType::kBFloat16 &&
         in.teacher_dtype == DType::kBFloat16;
}

template <class T>
struct RowAccess {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  bool terms;
  Constants constants;
  bool pairs = reads_pairs<T>(in);

  bool non_temporal() const {
    constexpr int64_t kLeastClasses = 2048;  // set by measurement
    return stores_non_temporal(in, grad, kLeastClasses);
  }
  // After whatever is to be seen by other threads.
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
  // Return the position at which numbers() leaves a class of a block.
  int64_t place(int64_t index) const { return pairs ? unpacked_place(index) : index; }

  void fill(int64_t index, int64_t begin, int64_t end, T value) const {
    if (grad == nullptr) return;
    alignas(64) T block[kBlock];
    for (T& x : block) x = value;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = end - at < kBlock ? end - at : kBlock;
      FASTKD_ISA::write(block, in.student_dtype, count, grad_at(index, at));
    }
  }

  // Rounds a block of numbers that are in the order of unpack() to bf16.
  void put_pairs(const T* numbers, void* to, int64_t count) const {
    if constexpr (kHasPairs && sizeof(T) == sizeof(float)) {
      alignas(64) BFloat16 packed[kLongest];
      const Vectors<BFloat16> g = target(to, in.student_dtype, count, packed, non_temporal());
      for_vectors<BFloat16>(count, [&](int64_t at, auto width) FASTKD_INLINE {
        prefetch_next<Into::kL2, decltype(width)::value>(g.at(at));
        pack<decltype(width)::value>(numbers + at, g.at(at));
      });
      put_result(g, packed, to, in.student_dtype, count, non_temporal());
    }
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
