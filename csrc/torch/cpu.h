// What the ops on CPU tensors share.
#pragma once
#include <algorithm>
#include <memory>
#include <new>
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

double number(const Tensor& tensor);

void prefer_huge_pages(void* data, size_t bytes);
size_t gradient_bytes(const Inputs& inputs);

// An error if one of acc [2, rows] is no temperature.
void check_temperatures(const void* of_rows, int64_t rows, bool in_double);

// Checks what only the data can tell, before anything is written; returns the number of rows that
// count.
int64_t count_rows(const Call& call);

// Where kernels leave `fields` numbers of each row: in `out` where it has them, or else in malloc's
// memory, which costs a small call less than a tensor. Where there is none, a tensor's error is
// what callers know.
class RowLosses {
 public:
  RowLosses(const Call& call, const Tensor& out, bool per_row, int64_t fields) {
    if (per_row) {
      data_ = out.mutable_data_ptr();
      return;
    }
    const int64_t bytes = fields * call.inputs.rows * acc_size(call);
    own_.reset(new (std::nothrow) char[static_cast<size_t>(bytes)]);
    data_ = own_.get();
    if (data_ != nullptr) return;
    tensor_ = empty_out(call, fields > 1, true);
    data_ = tensor_->mutable_data_ptr();
  }
  void* data() const { return data_; }

 private:
  std::unique_ptr<char[]> own_;
  std::optional<Tensor> tensor_;
  void* data_;
};

double divisor(const Reducing& reducing, int64_t count);

void multiply_(const Tensor& self, const Tensor& factor);

// Several teachers, or probabilities, as the ops take them.
struct Teachers {
  std::vector<Tensor> tensors;  // each (..., C), of one shape
  std::vector<double> shares;
  bool probabilities;
  int64_t ensemble;
  std::optional<Tensor> row_temperatures;  // acc [2, rows], which replaces the two numbers
  double temperature, teacher_temperature;
};

// What mixes them, and what it reads.
struct Mixture {
  MixtureArgs args;
  std::vector<MixedTeacher> teachers;
  std::vector<Tensor> kept;
};
Mixture make_mixture(const Teachers& teachers, bool in_double);

// As prepare(), with a mixture, which must outlive the call, for the teacher.
Call prepare_mixed(const Tensor& student, const Mixture& mixture,
                   const std::optional<Tensor>& labels, const std::optional<Tensor>& row_settings,
                   const Options& options, const Tensor* grad, bool inplace);

template <class T>
double ordered_sum(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

}  // namespace fastkd::glue
