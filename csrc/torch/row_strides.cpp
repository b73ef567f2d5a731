// Find the layout of rows that kernels can read in place, and copy tensors that have another layout
// (row_strides.h).
#include "row_strides.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

#include "gradient_strides.h"

namespace fastkd::glue {
namespace {

using Strides = std::array<int64_t, 3>;  // of student, teacher and gradient, in one dimension

// Neighboring dimensions, merged into one.
struct MergedDimension {
  int64_t size = 1;
  Strides strides = {};

  // Return true if a dimension with the strides `outer` continues this dimension outwards.
  bool continues_in(const Strides& outer) const {
    for (size_t i = 0; i < outer.size(); ++i)
      if (outer[i] != strides[i] * size) return false;
    return true;
  }
};

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

// Return the layout of rows that kernels can walk in place, or nothing. The dimensions but the
// classes must merge into two at most: the rows of a group, and the groups. Either the classes or
// the rows of a group must be adjacent. The student's and the teacher's numbers must be aligned, as
// C++ requires.
std::optional<Layout> find_layout(const Tensor& student, const Tensor& teacher,
                                  const std::vector<int64_t>& grad_strides, bool strided) {
  if (!is_aligned(student) || !is_aligned(teacher)) return std::nullopt;
  const int64_t last = student.dim() - 1;
  const auto strides_of = [&](int64_t dim) {
    return Strides{student.stride(dim), teacher.stride(dim),
                   grad_strides[static_cast<size_t>(dim)]};
  };
  const bool empty = student.numel() == 0;
  std::array<MergedDimension, 2> merged;  // rows of a group, and groups
  size_t count = 0;
  // The strides of an empty tensor do not matter, because kernels read no row.
  for (int64_t dim = empty ? -1 : last - 1; dim >= 0; --dim) {
    const int64_t size = student.size(dim);
    if (size == 1) continue;
    const Strides strides = strides_of(dim);
    if (count > 0 && merged[count - 1].continues_in(strides)) {
      merged[count - 1].size *= size;
    } else if (count < merged.size()) {
      merged[count++] = {size, strides};
    } else {
      return std::nullopt;
    }
  }
  const Strides classes = strides_of(last);
  std::array<RowStrides, 3> rows;
  for (size_t i = 0; i < rows.size(); ++i) {
    const bool adjacent = empty || student.size(last) == 1 || classes[i] == 1;
    if (!adjacent && (!strided || (count > 0 && merged[0].strides[i] != 1))) return std::nullopt;
    rows[i] = {merged[0].strides[i], merged[1].strides[i], adjacent ? 1 : classes[i]};
  }
  // The kernels for logits with adjacent classes write gradients with adjacent classes
  // (has_apart_classes() in kernels.h).
  if (rows[0].classes == 1 && rows[1].classes == 1 && rows[2].classes != 1) return std::nullopt;
  return Layout{merged[0].size, rows[0], rows[1], rows[2]};
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

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& strides) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), like.sizes().data(), strides.data(),
                                                  dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor readable(const Tensor& tensor) {
  const Tensor adjacent = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return is_aligned(adjacent) ? adjacent : torch::stable::clone(adjacent);
}

Layout lay_out(Tensor* student, Tensor* teacher, const std::vector<int64_t>& grad_strides,
               bool strided, bool inplace) {
  if (const auto layout = find_layout(*student, *teacher, grad_strides, strided)) return *layout;
  const bool same = student->get() == teacher->get();
  if (!same) {
    *teacher = copied(*teacher, grad_strides);
    if (const auto layout = find_layout(*student, *teacher, grad_strides, strided)) return *layout;
  }
  STD_TORCH_CHECK(
      !inplace,
      "inplace needs student logits that are laid out row by row, or class by class, at a "
      "multiple of their size");
  *student = copied(*student, grad_strides);
  if (same) *teacher = *student;
  const auto layout = find_layout(*student, *teacher, grad_strides, strided);
  STD_TORCH_CHECK(layout, "grad must be laid out as the op that computed the loss returned it");
  return *layout;
}

}  // namespace fastkd::glue
