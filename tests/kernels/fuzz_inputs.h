// Shared code of the fuzzers of the CPU kernels' interface: numbers from bytes, matrices with
// exactly the length that their strides require, and comparisons of results.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/kernels.h"

namespace fastkd {

// Read numbers from the input, and zeros after its end.
struct Bytes {
  const uint8_t* at;
  const uint8_t* end;

  template <class T>
  T take() {
    T value{};
    if (end - at >= static_cast<std::ptrdiff_t>(sizeof(T))) {
      std::memcpy(&value, at, sizeof(T));
      at += sizeof(T);
    } else {
      at = end;
    }
    return value;
  }
  // Return a number in [low, high], both ends included.
  int64_t between(int64_t low, int64_t high) {
    return low + take<uint32_t>() % static_cast<uint64_t>(high - low + 1);
  }
  bool coin() { return take<uint8_t>() & 1; }
  template <class T, size_t N>
  T one_of(const T (&options)[N]) {
    return options[take<uint8_t>() % N];
  }
};

constexpr uint8_t kGuard = 0xa5;

// A matrix of [rows, classes] at some alignment, with exactly the length that the strides require.
struct Matrix {
  int64_t rows, classes, group_rows, size;
  RowStrides stride;
  int64_t offset, bytes;
  std::unique_ptr<uint8_t[]> memory;

  Matrix(Bytes& in, int64_t rows, int64_t classes, int64_t group_rows, DType dtype)
      : rows(rows), classes(classes), group_rows(group_rows), size(size_of(dtype)) {
    stride.row = classes + in.between(0, 3);
    stride.group = group_rows * stride.row + in.between(0, 5);
    offset = in.between(0, 7) * size;
    bytes = offset + (rows == 0 ? 0 : (row_start(rows - 1) + classes) * size);
    memory.reset(new uint8_t[static_cast<size_t>(bytes)]);
    std::memset(memory.get(), kGuard, static_cast<size_t>(bytes));
  }
  int64_t row_start(int64_t row) const { return row_offset(row, group_rows, stride); }
  uint8_t* base() const { return memory.get() + offset; }
  uint8_t* row(int64_t row) const { return base() + row_start(row) * size; }

  // Fill the rows with the input's bytes, repeated, or with numbers of moderate size.
  void fill(Bytes& in, DType dtype, bool bits) {
    const int64_t remaining = in.end - in.at;
    std::mt19937 random(in.take<uint32_t>());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < classes; ++i) {
        const uint64_t word = random();
        uint8_t* to = row(r) + i * size;
        if (bits && remaining > 0) {
          for (int64_t b = 0; b < size; ++b)
            to[b] = in.end[-1 - (i * size + b + r * 7) % remaining];
        } else if (dtype == DType::kFloat64) {
          const double x = static_cast<double>(word) / 1e9 - 2;
          std::memcpy(to, &x, 8);
        } else if (dtype == DType::kFloat32) {
          const float x = static_cast<float>(word) / 1e9f - 2;
          std::memcpy(to, &x, 4);
        } else {  // random sign and low bits of the mantissa: magnitudes in [1, 2)
          const uint16_t one = dtype == DType::kFloat16 ? 0x3c00 : 0x3f80;
          const uint16_t x = static_cast<uint16_t>((word & 0x80ff) | one);
          std::memcpy(to, &x, 2);
        }
      }
    }
  }
  std::vector<uint8_t> copy() const { return {memory.get(), memory.get() + bytes}; }
};

// Return true if the numbers of each pair have equal bits, are both zero, or are both NaN. The sign
// of a zero or a NaN depends on the order of operands.
inline bool same_numbers(const uint8_t* a, const uint8_t* b, int64_t count, DType dtype) {
  const int64_t size = size_of(dtype);
  const auto magnitude = [size](const uint8_t* at) {
    uint64_t bits = 0;
    std::memcpy(&bits, at, static_cast<size_t>(size));  // on little-endian machines
    return bits & ~(uint64_t{1} << (8 * size - 1));
  };
  const uint64_t infinity = dtype == DType::kFloat64   ? 0x7ff0000000000000
                            : dtype == DType::kFloat32 ? 0x7f800000
                            : dtype == DType::kFloat16 ? 0x7c00
                                                       : 0x7f80;
  for (int64_t i = 0; i < count; ++i, a += size, b += size) {
    if (std::memcmp(a, b, static_cast<size_t>(size)) == 0) continue;
    const uint64_t x = magnitude(a), y = magnitude(b);
    if (!(x == 0 && y == 0) && !(x > infinity && y > infinity)) return false;
  }
  return true;
}

// Return true if the bytes outside the rows are unchanged.
inline bool padding_is_whole(const Matrix& m) {
  std::vector<bool> in_row(static_cast<size_t>(m.bytes), false);
  for (int64_t r = 0; r < m.rows; ++r) {
    const auto start = in_row.begin() + (m.row(r) - m.memory.get());
    std::fill(start, start + m.classes * m.size, true);
  }
  for (int64_t i = 0; i < m.bytes; ++i) {
    if (!in_row[static_cast<size_t>(i)] && m.memory[static_cast<size_t>(i)] != kGuard) return false;
  }
  return true;
}

}  // namespace fastkd
