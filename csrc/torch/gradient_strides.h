// The strides of a new gradient: the student's order of dimensions if the kernels support that
// order, so that no copy is needed. This file is free of torch, because both _C (row_strides.cpp)
// and _eager include the file.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastkd {

// Return the first dimension with a stride less than that of the classes, as H in (N, C, H, W). In
// memory, the classes lie just outside that dimension. Return the last dimension if there is no
// such dimension, or if the strides of the dimensions but the classes increase somewhere.
inline int64_t dimension_outside_classes(int64_t dims, const int64_t* sizes,
                                         const int64_t* strides) {
  const int64_t last = dims - 1;
  int64_t result = last, outer = -1;  // `outer`: the stride of the previous dimension
  for (int64_t dim = 0; dim < last; ++dim) {
    if (sizes[dim] == 1) continue;
    if (outer >= 0 && strides[dim] > outer) return last;
    if (result == last && strides[dim] < strides[last]) result = dim;
    outer = strides[dim];
  }
  return result;
}

// Write the strides of a new, dense gradient to `result`. `strided`: true if the kernels take
// classes that are not adjacent. With `strided`, a student such as (N, C, H, W) determines the
// order: its classes are not adjacent, and the strides of its other dimensions never increase.
// Otherwise the gradient is contiguous. _make_fake_gradient() in python/fastkd/_core/shapes.py, for
// tracing, must agree.
inline void gradient_strides(int64_t dims, const int64_t* sizes, const int64_t* strides,
                             bool strided, int64_t* result) {
  const int64_t last = dims - 1;
  const bool empty = std::find(sizes, sizes + dims, 0) != sizes + dims;
  const bool adjacent = sizes[last] == 1 || strides[last] == 1 || empty;
  const int64_t outside =
      strided && !adjacent ? dimension_outside_classes(dims, sizes, strides) : last;
  int64_t next = 1;
  const auto put = [&](int64_t dim) {
    result[dim] = next;
    next *= sizes[dim];
  };
  if (outside == last) put(last);
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    put(dim);
    if (dim == outside) put(last);
  }
}

}  // namespace fastkd
