// The strides of the rows of tensors, which decide whether kernels read a tensor in place or a
// copy.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../kernels.h"

namespace fastkd::glue {

using torch::stable::Tensor;

struct Layout {
  int64_t group_rows = 1;
  RowStrides student, teacher, grad;
};

// Return the strides of a new gradient (gradient_strides.h).
std::vector<int64_t> gradient_strides(const Tensor& student, bool strided);

// Return the layout of the rows of student, teacher and gradient, whose sizes are equal. If kernels
// cannot walk all three together, the teacher is replaced by a copy with the gradient's strides. If
// that copy is not enough, the student is replaced as well. `strided`: true if the kernels take
// classes that are not adjacent. `inplace`: true if the student must not be copied. A layout that
// needs a copy of the student is then an error.
Layout lay_out(Tensor* student, Tensor* teacher, const std::vector<int64_t>& grad_strides,
               bool strided, bool inplace);

// Return the tensor, or a copy if the tensor is not contiguous or not aligned to the element size.
// C++ requires alignment, and torch.frombuffer makes tensors at any address.
Tensor readable(const Tensor& tensor);

// Return a new tensor with the sizes, dtype and device of `like`, and with `strides`.
Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& strides);

}  // namespace fastkd::glue
