// The walk over the rows of tensors in place. No torch, because both _C (layout.cpp) and _eager
// use this file.
#pragma once
#include <cstdint>
#include <optional>

#include "../kernels.h"

namespace fastkd {

// Address and strides of a tensor whose sizes are known.
struct Placed {
  const void* data;
  int64_t element_bytes;
  const int64_t* strides;  // of each dimension
};

struct Layout {
  int64_t group_rows = 1;
  RowStrides student, teacher, grad;
};

// Two levels at most: rows of a group, last dimension first, and groups. Nothing where there are
// more, where neither the classes nor the rows of a group are adjacent, or where C++ may not read
// the numbers. `strided`: whether the kernels take classes that are not adjacent.
std::optional<Layout> walk(int64_t dims, const int64_t* sizes, const Placed& student,
                           const Placed& teacher, const int64_t* grad_strides, bool strided);

// Write the strides of a new, dense gradient to `result`. `strided`: true if the kernels take
// classes that are not adjacent. Then the gradient has the student's order of dimensions, if the
// student's classes are not adjacent and its other dimensions are in order, as in (N, C, H, W).
// Otherwise the gradient is contiguous. _fake_gradient() in python/fastkd/_core/shapes.py, for
// tracing, must agree.
void gradient_strides(int64_t dims, const int64_t* sizes, const int64_t* strides, bool strided,
                      int64_t* result);

inline bool is_aligned(const void* data, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(element_bytes) == 0;
}

}  // namespace fastkd
