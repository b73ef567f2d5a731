// What the ops on CPU tensors share.
#pragma once
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "backends.h"
#include "huge_pages.h"

namespace fastkd::glue {

// Rows that are worth a thread: with less, a second one costs more than it brings. A row takes as
// long as so many classes of a long one, which take some 0.6 ns each.
inline int64_t grain_rows(int64_t classes) {
  constexpr int64_t kGrain = 16384;
  return std::max<int64_t>(1, kGrain / std::min(classes + 160, 5 * classes / 2 + 12));
}

double number(const Tensor& tensor);

size_t gradient_bytes(const Inputs& inputs);

// An error if one of acc [2, rows] is no temperature.
void check_temperatures(const void* of_rows, int64_t rows, bool in_double);

// Checks what only the data can tell, before anything is written; returns the number of rows that
// count.
int64_t count_rows(const Inputs& inputs);

// What kMean divides by, where the call says it.
std::optional<double> given_divisor(const Reducing& reducing);
// 1 over what the sum of all rows is divided by.
double scale_of(Reduction reduction, std::optional<double> divisor, int64_t count);

// What kernels leave of each row: `fields` numbers, one field after the other. They leave them in
// `out` itself, with kNone, or else in malloc's memory, which costs a small call less than a
// tensor. Where there is none, a tensor's error is what callers know.
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

// Rows of the sparse loss, `args` complete, on all threads (topk.cpp).
void run_topk(TopkArgs args, Reduction reduction, std::optional<double> divisor, void* out);

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

}  // namespace fastkd::glue
