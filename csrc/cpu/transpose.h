// The transposed layout: for each class, the numbers of 32 rows side by side. This file copies
// tensors to that layout and back. transposed_engine.h has the arithmetic.
//
// If the classes of a row are adjacent, (..., C), the copy is a transposition. In (N, C, H, W), the
// numbers of 32 rows already lie side by side.
#pragma once
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "registers.h"
#include "storage.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Number of rows side by side: one cache line of 16-bit numbers, two of 32-bit numbers.
constexpr int64_t kTileRows = 32;

// A group has as many rows as a register has lanes.
using V = Register<float>;
constexpr int64_t kGroupRows = kPerRegister<float>;
static_assert(kTileRows % kGroupRows == 0, "");

FASTKD_HOST_DEVICE V load(const float* from) {
  V rows;
  std::memcpy(&rows, from, sizeof(rows));
  return rows;
}
FASTKD_HOST_DEVICE void store(V rows, float* to) { std::memcpy(to, &rows, sizeof(rows)); }

// Call fn(lane, length, offset) for runs of rows that are `stride.row` apart: `length` rows from
// row first + lane on. The first of these rows starts at `offset`.
template <class Fn>
FASTKD_HOST_DEVICE void for_runs(int64_t first, int64_t count, int64_t group_rows,
                                 const RowStrides& stride, Fn&& fn) {
  for (int64_t lane = 0; lane < count;) {
    const int64_t row = first + lane;
    const int64_t remaining = group_rows - row % group_rows;
    const int64_t length = remaining < count - lane ? remaining : count - lane;
    fn(lane, length, row_offset(row, group_rows, stride));
    lane += length;
  }
}

// Convert the numbers of kCount adjacent rows, or of `count` rows if kCount is 0.
template <int64_t kCount, class From, class To>
FASTKD_HOST_DEVICE void convert_rows(const From* from, int64_t count, To* to) {
  const int64_t rows = kCount > 0 ? kCount : count;
  const int64_t done = convert_vectors(from, rows, to);
#pragma omp simd
  for (int64_t i = done; i < rows; ++i) to[i] = narrow<To>(widen(from[i]));
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

// Interleave two vectors: a[first], b[first], a[first + 1], b[first + 1], ...
template <size_t kFirst, class V, size_t... kAt>
FASTKD_HOST_DEVICE V zip(V a, V b, std::index_sequence<kAt...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kAt / 2 + kAt % 2 * sizeof...(kAt))...);
#else
  return __builtin_shuffle(a, b, V{(kFirst + kAt / 2 + kAt % 2 * sizeof...(kAt))...});
#endif
}

// Side of the squares that are transposed in registers: one side fills a register of 16 bytes.
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

// Transpose a block of numbers: to[column][row] = from[row][column].
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
  // The last square in either direction may overlap the previous square.
  for (int64_t i = 0; i < rows; i += kStep) {
    const int64_t row = i < rows - kStep ? i : rows - kStep;
    for (int64_t j = 0; j < columns; j += kStep) {
      const int64_t column = j < columns - kStep ? j : columns - kStep;
      transpose_square(from + row * from_stride + column, from_stride,
                       to + column * to_stride + row, to_stride);
    }
  }
}

// Rows [first, first + count) of one tensor; `tile` is float [classes][kTileRows].
struct TileRows {
  DType dtype;
  RowStrides stride;
  int64_t group_rows, first, count;

  void load(const void* base, int64_t classes, float* tile) const {
    for_steps(classes, [&](auto type, int64_t begin, int64_t count) {
      load_as<decltype(type)>(base, begin, count, tile + begin * kTileRows);
    });
  }
  void store(const float* tile, int64_t classes, void* base) const {
    for_steps(classes, [&](auto type, int64_t begin, int64_t count) {
      store_as<decltype(type)>(tile + begin * kTileRows, begin, count, base);
    });
  }

 private:
  // Call fn for as many classes at a time as fit on the stack.
  template <class Fn>
  void for_steps(int64_t classes, Fn&& fn) const {
    with_type(dtype, [&](auto type) {
      if constexpr (sizeof(type) <= sizeof(float)) {
        for (int64_t begin = 0; begin < classes; begin += kNarrow) {
          fn(type, begin, classes - begin < kNarrow ? classes - begin : kNarrow);
        }
      }
    });
  }

  template <class S>
  void load_as(const void* base, int64_t begin, int64_t classes, float* tile) const {
    constexpr bool kSame = std::is_same<S, float>::value;
    const bool adjacent = stride.classes == 1;
    alignas(64) S transposed[kSame ? 1 : kNarrow * kTileRows];
    for_runs(first, count, group_rows, stride, [&](int64_t lane, int64_t length, int64_t offset) {
      const S* from = static_cast<const S*>(base) + offset + begin * stride.classes;
      int64_t between = stride.classes;
      if (adjacent) {
        if constexpr (kSame) {
          return transpose(from, stride.row, length, classes, tile + lane, kTileRows);
        } else {
          transpose(from, stride.row, length, classes, transposed + lane, kTileRows);
          from = transposed + lane, between = kTileRows;
        }
      }
      for (int64_t c = 0; c < classes; ++c) {
        const S* rows = from + c * between;
        if (length < kTileRows) {
          convert_rows<0>(rows, length, tile + c * kTileRows + lane);
          continue;
        }
        // Each class is a memory stream: too many streams for hardware prefetchers.
        for (int64_t i = 0; i < kTileRows && !adjacent; i += 64 / static_cast<int64_t>(sizeof(S))) {
          __builtin_prefetch(rows + kTileRows + i);
        }
        convert_rows<kTileRows>(rows, length, tile + c * kTileRows);
      }
    });
  }

  template <class S>
  void store_as(const float* tile, int64_t begin, int64_t classes, void* base) const {
    constexpr bool kSame = std::is_same<S, float>::value;
    const bool adjacent = stride.classes == 1;
    alignas(64) S narrowed[kSame ? 1 : kNarrow * kTileRows];
    for_runs(first, count, group_rows, stride, [&](int64_t lane, int64_t length, int64_t offset) {
      S* const to = static_cast<S*>(base) + offset + begin * stride.classes;
      if constexpr (kSame) {
        if (adjacent) return transpose(tile + lane, kTileRows, classes, length, to, stride.row);
      }
      S* const rows = adjacent ? narrowed + lane : to;
      const int64_t between = adjacent ? kTileRows : stride.classes;
      for (int64_t c = 0; c < classes; ++c) {
        if (length < kTileRows) {
          convert_rows<0>(tile + c * kTileRows + lane, length, rows + c * between);
        } else {
          convert_rows<kTileRows>(tile + c * kTileRows, length, rows + c * between);
        }
      }
      if (adjacent) transpose<S>(rows, kTileRows, classes, length, to, stride.row);
    });
  }
};

// The memory of a tile: on the stack for few classes, else on the heap.
struct Tile {
  static constexpr int64_t kPerClass = 2 * kTileRows + 3 * kGroupRows;

  alignas(64) float few[kPerClass * kNarrow];
  std::unique_ptr<float[]> many;
  float *student, *teacher;          // logits, [classes][kTileRows]; results overwrite the student
  float *student_exp, *teacher_exp;  // exp((z - max z) / t), exp((w - max w) / t) of one group,
  float* hard_exp;                   // and exp(z - max z), [classes][kGroupRows]

  explicit Tile(int64_t classes) {
    student = few;
    if (classes > kNarrow) {
      constexpr size_t kLine =
          64 / sizeof(float);  // a register that spans two cache lines loads more slowly
      many.reset(new float[static_cast<size_t>(kPerClass * classes) + kLine]);
      const size_t in_line = reinterpret_cast<uintptr_t>(many.get()) / sizeof(float) % kLine;
      student = many.get() + (kLine - in_line);
    }
    teacher = student + classes * kTileRows;
    student_exp = teacher + classes * kTileRows;
    teacher_exp = student_exp + classes * kGroupRows;
    hard_exp = teacher_exp + classes * kGroupRows;
  }
  Tile(const Tile&) = delete;  // the pointers point into the object
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
