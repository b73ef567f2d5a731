// For the tests of the CPU kernels: conversions between double and each type, independent of the
// kernels' code, and matrices in memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/kernels.h"

namespace {

using namespace fastkd;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

struct Shape {
  int precision, min_exponent;  // significant bits; exponent of the least normal number
};
Shape shape_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {11, -14};
    case DType::kBFloat16:
      return {8, -126};
    case DType::kFloat64:
      return {53, -1022};
    default:
      return {24, -126};
  }
}

// Return the distance between neighboring numbers of `dtype` around x.
double spacing(double x, DType dtype) {
  const Shape shape = shape_of(dtype);
  const int exponent = x == 0 ? shape.min_exponent : std::max(std::ilogb(x), shape.min_exponent);
  return std::ldexp(1.0, exponent - shape.precision + 1);
}

double rounded(double x, DType dtype) {
  if (!std::isfinite(x)) return x;
  const double step = spacing(x, dtype);
  return std::nearbyint(x / step) * step;
}

double decode(const unsigned char* from, DType dtype) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, from, 4);
    return x;
  }
  if (dtype == DType::kFloat64) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  const int mantissa_bits = dtype == DType::kFloat16 ? 10 : 7;
  const int bias = dtype == DType::kFloat16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * bias + 1) return mantissa != 0 ? kNan : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

void encode(double x, DType dtype, unsigned char* to) {
  if (dtype == DType::kFloat32) {
    const float y = static_cast<float>(x);
    std::memcpy(to, &y, 4);
    return;
  }
  if (dtype == DType::kFloat64) {
    std::memcpy(to, &x, 8);
    return;
  }
  const int mantissa_bits = dtype == DType::kFloat16 ? 10 : 7;
  const int bias = dtype == DType::kFloat16 ? 15 : 127;
  int bits = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    bits |= 0x7fff;
  } else if (std::isinf(x)) {
    bits |= (2 * bias + 1) << mantissa_bits;
  } else if (x != 0) {
    const double y = std::fabs(rounded(x, dtype));
    const int exponent = std::ilogb(y);
    bits |= exponent < 1 - bias ? static_cast<int>(std::ldexp(y, bias - 1 + mantissa_bits))
                                : ((exponent + bias) << mantissa_bits) +
                                      static_cast<int>(std::ldexp(y, mantissa_bits - exponent)) -
                                      (1 << mantissa_bits);
  }
  const uint16_t stored = static_cast<uint16_t>(bits);
  std::memcpy(to, &stored, 2);
}

// Rows in memory: [rows, classes], with a stride, at any alignment, between guard bytes. With
// `pixels`: [groups, classes, rows of a group], like (N, C, L).

struct Matrix {
  int64_t rows, classes, group_rows, stride, class_stride, group;
  DType dtype;
  std::vector<unsigned char> bytes;
  int64_t start;

  Matrix(int64_t rows, int64_t classes, DType dtype, int64_t padding, int64_t misalignment,
         int64_t group_rows = 0, bool pixels = false)
      : rows(rows),
        classes(classes),
        group_rows(group_rows > 0 ? group_rows : std::max<int64_t>(rows, 1)),
        stride(pixels ? 1 : classes + padding),
        class_stride(pixels ? this->group_rows + padding : 1),
        group((pixels ? classes * class_stride : this->group_rows * stride) +
              (group_rows > 0 ? 5 : 0)),
        dtype(dtype),
        start(64 + misalignment * size_of(dtype)) {
    const int64_t groups = (rows + this->group_rows - 1) / this->group_rows;
    bytes.assign(static_cast<size_t>(start + (groups * group + 16) * size_of(dtype)), 0xa5);
  }
  unsigned char* at(int64_t row, int64_t i) {
    const int64_t offset = row / group_rows * group + row % group_rows * stride + i * class_stride;
    return bytes.data() + start + offset * size_of(dtype);
  }
  double get(int64_t row, int64_t i) { return decode(at(row, i), dtype); }
  void set(int64_t row, int64_t i, double x) { encode(x, dtype, at(row, i)); }
  void* base() { return bytes.data() + start; }
  RowStrides strides() const { return {stride, group, class_stride}; }
};

}  // namespace
