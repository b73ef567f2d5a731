// Tiles: a block of classes of a few rows with a row in each lane, and the copies between that and
// tensors of either layout.
//
// Where the classes of a row are adjacent, (..., C), a tile is a transposition. Where rows are,
// (N, C, H, W), it is a copy: the logits of 32 pixels lie side by side, class after class.
#pragma once
#include <memory>
#include <new>

#include "row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int64_t kTileRows = 32;

template <class T>
using Lanes = T[kTileRows];

// Lanes [lane, lane + length) whose rows are `stride.row` apart, the first at `offset`.
template <class Fn>
FASTKD_HOST_DEVICE void for_runs(int64_t first, int64_t count, int64_t group_rows,
                                 const RowStrides& stride, Fn&& fn) {
  for (int64_t lane = 0; lane < count;) {
    const int64_t row = first + lane;
    const int64_t left = group_rows - row % group_rows;
    const int64_t length = left < count - lane ? left : count - lane;
    fn(lane, length, row_offset(row, group_rows, stride));
    lane += length;
  }
}

// `kCount` lanes where that is known, or `count`.
template <int64_t kCount, class S, class T>
FASTKD_HOST_DEVICE void widen_lanes(const S* from, int64_t count, T* to) {
  const int64_t lanes = kCount > 0 ? kCount : count;
  const int64_t done = convert_vectors(from, lanes, to);
#pragma omp simd
  for (int64_t i = done; i < lanes; ++i) to[i] = static_cast<T>(widen(from[i]));
}

template <int64_t kCount, class S, class T>
FASTKD_HOST_DEVICE void narrow_lanes(const T* from, int64_t count, S* to) {
  const int64_t lanes = kCount > 0 ? kCount : count;
  const int64_t done = convert_vectors(from, lanes, to);
#pragma omp simd
  for (int64_t i = done; i < lanes; ++i) to[i] = narrow<S>(from[i]);
}

// Rows [first, first + count) of one tensor.
struct TileRows {
  DType dtype;
  RowStrides stride;
  int64_t group_rows, first, count;

  // Classes [begin, begin + classes); at most kNarrow.
  template <class T>
  void load(const void* base, int64_t begin, int64_t classes, Lanes<T>* to) const {
    with_type(dtype, [&](auto type) {
      using S = decltype(type);
      for_runs(first, count, group_rows, stride, [&](int64_t lane, int64_t length, int64_t offset) {
        const S* from = static_cast<const S*>(base) + offset + begin * stride.classes;
        if (stride.classes == 1) return transpose(from, classes, lane, length, to);
        for (int64_t c = 0; c < classes; ++c) {
          const S* lanes = from + c * stride.classes;
          if (length == kTileRows) {
            // Each class is a stream of its own, more of them than processors follow by themselves.
            for (int64_t i = 0; i < kTileRows; i += 64 / static_cast<int64_t>(sizeof(S))) {
              __builtin_prefetch(lanes + kTileRows + i);
            }
            widen_lanes<kTileRows>(lanes, length, to[c]);
          } else {
            widen_lanes<0>(lanes, length, to[c] + lane);
          }
        }
      });
    });
  }

  template <class T>
  void store(const Lanes<T>* from, int64_t begin, int64_t classes, void* base) const {
    with_type(dtype, [&](auto type) {
      using S = decltype(type);
      for_runs(first, count, group_rows, stride, [&](int64_t lane, int64_t length, int64_t offset) {
        S* to = static_cast<S*>(base) + offset + begin * stride.classes;
        if (stride.classes == 1) return transpose_back(from, classes, lane, length, to);
        for (int64_t c = 0; c < classes; ++c) {
          S* lanes = to + c * stride.classes;
          if (length == kTileRows) {
            narrow_lanes<kTileRows>(from[c], length, lanes);
          } else {
            narrow_lanes<0>(from[c] + lane, length, lanes);
          }
        }
      });
    });
  }

 private:
  template <class S, class T>
  void transpose(const S* from, int64_t classes, int64_t lane, int64_t length, Lanes<T>* to) const {
    alignas(64) T buffer[kNarrow];
    for (int64_t i = lane; i < lane + length; ++i, from += stride.row) {
      widen_lanes<0>(from, classes, buffer);
      for (int64_t c = 0; c < classes; ++c) to[c][i] = buffer[c];
    }
  }

  template <class S, class T>
  void transpose_back(const Lanes<T>* from, int64_t classes, int64_t lane, int64_t length,
                      S* to) const {
    alignas(64) T buffer[kNarrow];
    for (int64_t i = lane; i < lane + length; ++i, to += stride.row) {
      for (int64_t c = 0; c < classes; ++c) buffer[c] = from[c][i];
      narrow_lanes<0>(buffer, classes, to);
    }
  }
};

// What a tile holds of each class: of all of them where they fit the caches, or else of a block of
// kNarrow at a time, which is then loaded anew by each sweep.
template <class T>
struct Tile {
  // 5 arrays of 1024 fp32 classes take 640 KB: a second-level cache's.
  static constexpr int64_t kMost = 4096 / static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kArrays = 5;

  alignas(64) Lanes<T> own[kArrays * kNarrow];
  std::unique_ptr<Lanes<T>[]> more;
  bool resident;
  Lanes<T>*student, *teacher;              // logits; the student's become the gradient
  Lanes<T>*student_power, *teacher_power;  // exp((z - max z) / t), exp((w - max w) / t)
  Lanes<T>* hard_power;                    // exp(z - max z)

  explicit Tile(int64_t classes) {
    if (classes > kNarrow && classes <= kMost) {
      more.reset(new (std::nothrow) Lanes<T>[static_cast<size_t>(kArrays * classes)]);
    }
    resident = classes <= kNarrow || more != nullptr;
    Lanes<T>* const start = more != nullptr ? more.get() : own;
    const int64_t size = more != nullptr ? classes : kNarrow;
    student = start, teacher = start + size;
    student_power = start + 2 * size, teacher_power = start + 3 * size;
    hard_power = start + 4 * size;
    // Lanes without a row are computed with like the others.
    for (int64_t c = 0; c < 2 * size; ++c) {
      for (T& lane : start[c]) lane = 0;
    }
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
