// Helpers shared by the ops on CPU tensors.
#pragma once
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "backends.h"

namespace fastkd::glue {

// Rows that are worth a thread: with less, a second one costs more than it brings. A row takes as
// long as so many classes of a long one, which take some 0.6 ns each.
inline int64_t grain_rows(int64_t classes) {
  constexpr int64_t kGrain = 16384;
  return std::max<int64_t>(1, kGrain / std::min(classes + 160, 5 * classes / 2 + 12));
}

// An error if one of acc [2, rows] is no temperature.
void check_temperatures(const void* of_rows, int64_t rows, bool in_double);

// Checks what only the data can tell, before anything is written; returns the number of rows that
// count.
int64_t count_rows(const Inputs& inputs);

// Return the factor of the sum over rows. `count`: the number of rows that are not ignored. If it
// is 0, the factor is 1, so that the mean is 0 for any divisor, 0 included.
double scale_of(const Reducing& reducing, int64_t count);

// Multiply `grad`, the gradient for grad_output = 1, by grad_output, and return true. Return false,
// with `grad` unchanged, if computing the gradient again is more accurate and still possible: it is
// not if `grad` has overwritten the student's logits.
bool scale_filled(const Inputs& inputs, const Tensor& grad_output, const Tensor& grad);

// Losses and terms of all rows: `fields` numbers a row, one field after the other. With kNone their
// memory is `out`. Otherwise the memory is from operator new, which costs a small call less than a
// tensor. If that fails, a tensor is allocated, whose error callers know.
class RowLosses {
 public:
  RowLosses(const Inputs& inputs, Reduction reduction, int64_t fields, void* out);
  void* loss() const { return data_; }
  void* terms() const { return static_cast<char*>(data_) + inputs_.rows * acc_bytes_; }
  // Writes the sums, times `scale`, to `out`.
  void add_up(double scale) const;

 private:
  const Inputs& inputs_;
  int64_t acc_bytes_, fields_;
  void* out_;
  std::unique_ptr<char[]> own_;
  std::optional<Tensor> tensor_;
  void* data_;
};

}  // namespace fastkd::glue
