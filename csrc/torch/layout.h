// Layouts: those that the kernels take in place, those that are copied, and that of a gradient.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "walk.h"

namespace fastkd::glue {

using torch::stable::Tensor;

// Return the strides of a new gradient (walk.h).
std::vector<int64_t> gradient_strides(const Tensor& student, bool strided);

// Finds how the rows of three tensors of the student's sizes can be walked together, and replaces
// student or teacher by a copy, laid out like the gradient, where they cannot. `inplace`: the
// student must be used where it is, so a layout that would need its copy is an error.
Layout lay_out(Tensor* student, Tensor* teacher, const std::vector<int64_t>& grad_strides,
               bool strided, bool inplace);

// Return the tensor, or a copy if it is not contiguous or not aligned to its element size, as C++
// requires: torch.frombuffer makes tensors at any address.
Tensor readable(const Tensor& tensor);

// A new tensor of the student's sizes, dtype and device.
Tensor empty_strided(const Tensor& student, const std::vector<int64_t>& strides);

}  // namespace fastkd::glue
