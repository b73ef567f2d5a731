// Tiles: a block of classes of a few rows with a row in each lane, and the copies between that and
// tensors of either layout.
//
// Where the classes of a row are adjacent, (..., C), a tile is a transposition. Where rows are,
// (N, C, H, W), it is a copy: the logits of 32 pixels lie side by side, class after class.
#pragma once
#include <memory>
#include <new>
#include <utility>

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

template <size_t kBytes>
struct Bits;
template <>
struct Bits<2> {
  typedef uint16_t Vector __attribute__((vector_size(16)));
};
template <>
struct Bits<4> {
  typedef uint32_t Vector __attribute__((vector_size(16)));
};
template <>
struct Bits<8> {
  typedef uint64_t Vector __attribute__((vector_size(16)));
};

// a[first], b[first], a[first + 1], b[first + 1], ...
template <size_t kFirst, class V, size_t... kAt>
FASTKD_HOST_DEVICE V zip(V a, V b, std::index_sequence<kAt...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kAt / 2 + kAt % 2 * sizeof...(kAt))...);
#else
  return __builtin_shuffle(a, b, V{(kFirst + kAt / 2 + kAt % 2 * sizeof...(kAt))...});
#endif
}

// What fills so many registers of 16 bytes is transposed in them.
template <class S>
constexpr int64_t kSide = 16 / static_cast<int64_t>(sizeof(S));

template <class S>
FASTKD_HOST_DEVICE void transpose_square(const S* from, int64_t from_stride, S* to,
                                         int64_t to_stride) {
  constexpr int64_t kHalf = kSide<S> / 2;
  using V = typename Bits<sizeof(S)>::Vector;
  constexpr std::make_index_sequence<kSide<S>> all;
  V rows[kSide<S>], zipped[kSide<S>];
  for (int64_t i = 0; i < kSide<S>; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(V));
  for (int64_t stage = 1; stage < kSide<S>; stage *= 2) {
    for (int64_t i = 0; i < kHalf; ++i) {
      zipped[2 * i] = zip<0>(rows[i], rows[i + kHalf], all);
      zipped[2 * i + 1] = zip<kHalf>(rows[i], rows[i + kHalf], all);
    }
    for (int64_t i = 0; i < kSide<S>; ++i) rows[i] = zipped[i];
  }
  for (int64_t i = 0; i < kSide<S>; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof(V));
}

// to[column][row] = from[row][column]
template <class S>
__attribute__((noinline)) void transpose(const S* from, int64_t from_stride, int64_t rows,
                                         int64_t columns, S* to, int64_t to_stride) {
  constexpr int64_t kStep = kSide<S>;
  if (rows < kStep || columns < kStep) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        to[column * to_stride + row] = from[row * from_stride + column];
      }
    }
    return;
  }
  // The last square of either direction may overlap the one before.
  for (int64_t i = 0; i < rows; i += kStep) {
    const int64_t row = i < rows - kStep ? i : rows - kStep;
    for (int64_t j = 0; j < columns; j += kStep) {
      const int64_t column = j < columns - kStep ? j : columns - kStep;
      transpose_square(from + row * from_stride + column, from_stride,
                       to + column * to_stride + row, to_stride);
    }
  }
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
      constexpr bool kSame = std::is_same<S, T>::value;
      const bool adjacent = stride.classes == 1;
      alignas(64) Lanes<S> transposed[kSame ? 1 : kNarrow];
      for_runs(first, count, group_rows, stride, [&](int64_t lane, int64_t length, int64_t offset) {
        const S* from = static_cast<const S*>(base) + offset + begin * stride.classes;
        int64_t between = stride.classes;
        if (adjacent) {
          if constexpr (kSame) {
            return transpose(from, stride.row, length, classes, *to + lane, kTileRows);
          } else {
            transpose(from, stride.row, length, classes, *transposed + lane, kTileRows);
            from = *transposed + lane, between = kTileRows;
          }
        }
        for (int64_t c = 0; c < classes; ++c) {
          const S* lanes = from + c * between;
          if (length == kTileRows) {
            // Each class is a stream of its own, more of them than processors follow by themselves.
            for (int64_t i = 0; i < kTileRows && !adjacent;
                 i += 64 / static_cast<int64_t>(sizeof(S))) {
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
      constexpr bool kSame = std::is_same<S, T>::value;
      const bool adjacent = stride.classes == 1;
      alignas(64) Lanes<S> narrowed[kSame ? 1 : kNarrow];
      for_runs(first, count, group_rows, stride, [&](int64_t lane, int64_t length, int64_t offset) {
        S* const to = static_cast<S*>(base) + offset + begin * stride.classes;
        if constexpr (kSame) {
          if (adjacent) return transpose(*from + lane, kTileRows, classes, length, to, stride.row);
        }
        S* const all_lanes = adjacent ? *narrowed + lane : to;
        const int64_t between = adjacent ? kTileRows : stride.classes;
        for (int64_t c = 0; c < classes; ++c) {
          S* lanes = all_lanes + c * between;
          if (length == kTileRows) {
            narrow_lanes<kTileRows>(from[c], length, lanes);
          } else {
            narrow_lanes<0>(from[c] + lane, length, lanes);
          }
        }
        if (adjacent) transpose<S>(all_lanes, kTileRows, classes, length, to, stride.row);
      });
    });
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
    const int64_t used = classes < size ? classes : size;
    for (int64_t c = 0; c < used; ++c) {
      for (int64_t i = 0; i < kTileRows; ++i) student[c][i] = teacher[c][i] = 0;
    }
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
