// From tensors to the plain structs of kernels.h: checks, layouts and allocation, the same for each
// backend.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../kernels.h"

namespace fastkd::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The scalar arguments of every op, in the order of the schema (library.cpp).
struct Options {
  double temperature;
  double teacher_temperature;
  double hard_weight;
  double soft_weight;
  double label_smoothing;
  int64_t ignore_index;
  int64_t divergence;
  double mix;
};

DType dtype_of(const Tensor& tensor, const char* name);

// The inputs of a call and the tensors that keep them alive: a tensor whose rows the kernels cannot
// walk (classes not adjacent, or rows in more than one level of groups) is replaced by a contiguous
// copy.
struct Call {
  Inputs inputs;
  Tensor student;
  Tensor teacher;
  std::optional<Tensor> labels;
  std::optional<Tensor> row_settings;
  ScalarType acc;  // type of loss, terms, stats, row_settings and grad_output
};

// `inplace`: the student must be used where it is, so a layout that would need a copy is an error.
Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& row_settings, const Options& options, bool inplace);

// `tensor` has the student's shape and dtype, and is laid out like an existing grouping of `call`.
RowStrides strides_of(const Tensor& tensor, const Call& call);

// The shapes of the op's results. The sums over rows are 0-d; with terms they are a vector of 1 +
// kTerms.
Tensor empty_out(const Call& call, bool terms, bool per_row);
Tensor empty_stats(const Call& call);  // acc [kStats * rows + 1]
Tensor empty_grad(const Call& call);   // contiguous, the student's shape and dtype

BackwardArgs backward_args(const Call& call, const Tensor& stats, const Tensor& grad_output,
                           const Tensor& grad);

inline int64_t acc_size(const Call& call) { return call.acc == ScalarType::Double ? 8 : 4; }

// A result that an op has nothing to say in.
Tensor nothing(const Call& call);

}  // namespace fastkd::glue
