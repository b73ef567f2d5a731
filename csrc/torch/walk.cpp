#include "walk.h"

#include <array>

namespace fastkd {
namespace {

constexpr int kTensors = 3;  // student, teacher, grad
using Strides = std::array<int64_t, kTensors>;

// Leading dimensions, merged wherever all tensors allow it.
struct Level {
  int64_t size = 1;
  Strides strides = {};
};

bool is_empty(int64_t dims, const int64_t* sizes) {
  for (int64_t dim = 0; dim < dims; ++dim)
    if (sizes[dim] == 0) return true;
  return false;
}

// The dimension that the classes lie before in memory, where the others lie in order; or the last.
int64_t place_of_classes(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  const int64_t last = dims - 1;
  int64_t place = last, before = -1;
  for (int64_t dim = 0; dim < last; ++dim) {
    if (sizes[dim] == 1) continue;
    if (before >= 0 && strides[dim] > before) return last;
    if (place == last && strides[dim] < strides[last]) place = dim;
    before = strides[dim];
  }
  return place;
}

}  // namespace

void gradient_strides(int64_t dims, const int64_t* sizes, const int64_t* strides, bool strided,
                      int64_t* result) {
  const int64_t last = dims - 1;
  const bool adjacent = sizes[last] == 1 || strides[last] == 1 || is_empty(dims, sizes);
  const int64_t place = strided && !adjacent ? place_of_classes(dims, sizes, strides) : last;
  int64_t next = 1;
  const auto put = [&](int64_t dim) {
    result[dim] = next;
    next *= sizes[dim];
  };
  if (place == last) put(last);
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    put(dim);
    if (dim == place) put(last);
  }
}

std::optional<Layout> walk(int64_t dims, const int64_t* sizes, const Placed& student,
                           const Placed& teacher, const int64_t* grad_strides, bool strided) {
  if (!is_aligned(student.data, student.element_bytes) ||
      !is_aligned(teacher.data, teacher.element_bytes))
    return std::nullopt;
  const auto strides_of = [&](int64_t dim) {
    return Strides{student.strides[dim], teacher.strides[dim], grad_strides[dim]};
  };
  const int64_t last = dims - 1;
  const bool empty = is_empty(dims, sizes);
  std::array<Level, 2> levels;
  int count = 0;
  // contiguous() leaves the strides of no elements alone
  for (int64_t dim = empty ? -1 : last - 1; dim >= 0; --dim) {
    const int64_t size = sizes[dim];
    if (size == 1) continue;
    const Strides strides = strides_of(dim);
    bool merges = count > 0;
    for (int i = 0; i < kTensors && merges; ++i) {
      const Level& inner = levels[count - 1];
      merges = strides[i] == inner.strides[i] * inner.size;
    }
    if (merges) {
      levels[count - 1].size *= size;
    } else if (count < 2) {
      levels[count++] = {size, strides};
    } else {
      return std::nullopt;
    }
  }
  Layout layout;
  layout.group_rows = levels[0].size;
  const Strides classes = strides_of(last);
  RowStrides* const all[kTensors] = {&layout.student, &layout.teacher, &layout.grad};
  for (int i = 0; i < kTensors; ++i) {
    const bool adjacent = empty || sizes[last] == 1 || classes[i] == 1;
    if (!adjacent && (!strided || (count > 0 && levels[0].strides[i] != 1))) return std::nullopt;
    *all[i] = {levels[0].strides[i], levels[1].strides[i], adjacent ? 1 : classes[i]};
  }
  // The kernels for adjacent logits write adjacent gradients (has_apart_classes() in kernels.h).
  const bool adjacent_logits = layout.student.classes == 1 && layout.teacher.classes == 1;
  if (adjacent_logits && layout.grad.classes != 1) return std::nullopt;
  return layout;
}

}  // namespace fastkd
