#include "layout.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

namespace fastkd::glue {
namespace {

Placed placed(const Tensor& tensor) {
  return {tensor.const_data_ptr(), static_cast<int64_t>(tensor.element_size()),
          tensor.strides().data()};
}

std::optional<Layout> walk(const Tensor& student, const Tensor& teacher,
                           const std::vector<int64_t>& grad_strides, bool strided) {
  return fastkd::walk(student.dim(), student.sizes().data(), placed(student), placed(teacher),
                      grad_strides.data(), strided);
}

Tensor copied(const Tensor& tensor, const std::vector<int64_t>& strides) {
  Tensor copy = empty_strided(tensor, strides);
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace

std::vector<int64_t> gradient_strides(const Tensor& student, bool strided) {
  std::vector<int64_t> strides(static_cast<size_t>(student.dim()));
  fastkd::gradient_strides(student.dim(), student.sizes().data(), student.strides().data(), strided,
                           strides.data());
  return strides;
}

Tensor empty_strided(const Tensor& student, const std::vector<int64_t>& strides) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(student.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(student.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(student.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(student.dim(), student.sizes().data(),
                                                  strides.data(), dtype, device_type, device_index,
                                                  &handle));
  return Tensor(handle);
}

Tensor readable(const Tensor& tensor) {
  const Tensor adjacent = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return is_aligned(adjacent.const_data_ptr(), static_cast<int64_t>(adjacent.element_size()))
             ? adjacent
             : torch::stable::clone(adjacent);
}

Layout lay_out(Tensor* student, Tensor* teacher, const std::vector<int64_t>& grad_strides,
               bool strided, bool inplace) {
  if (const auto layout = walk(*student, *teacher, grad_strides, strided)) return *layout;
  const bool same = student->get() == teacher->get();
  if (!same) {
    *teacher = copied(*teacher, grad_strides);
    if (const auto layout = walk(*student, *teacher, grad_strides, strided)) return *layout;
  }
  STD_TORCH_CHECK(
      !inplace,
      "inplace needs student logits that are laid out row by row, or class by class, at a "
      "multiple of their size");
  *student = copied(*student, grad_strides);
  if (same) *teacher = *student;
  const auto layout = walk(*student, *teacher, grad_strides, strided);
  STD_TORCH_CHECK(layout, "grad must be laid out as the op that computed the loss returned it");
  return *layout;
}

}  // namespace fastkd::glue
