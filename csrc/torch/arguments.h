// From tensors to the plain structs of kernels.h: checks, layouts and allocation, the same for each
// backend.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../mixture.h"
#include "layout.h"
#include "options.h"

namespace fastkd::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* name);

// The same, contiguous, if it has `entries` for each row, of this dtype; or an error.
Tensor checked_rows(const Tensor& tensor, ScalarType dtype, int64_t rows, const char* name,
                    int64_t entries);

// The inputs of a call and the tensors that keep them alive: a tensor whose rows the kernels cannot
// walk is replaced by a copy (layout.h).
struct Call {
  Inputs inputs;
  RowStrides grad_stride;
  std::vector<int64_t> grad_strides;  // of each dimension
  Tensor student;
  Tensor teacher;
  std::optional<Tensor> labels;
  std::optional<Tensor> row_settings;
  ScalarType acc;                        // type of loss, terms, stats, row_settings and grad_output
  const MixtureArgs* mixture = nullptr;  // stands for the teacher: on CPUs, `mixed` yet to be set
};

// Settings of rows of their own, which replace four of the options.
void take_row_settings(Call* call, const std::optional<Tensor>& row_settings);

// `strided`: whether the kernels take classes that are not adjacent. `grad`: the gradient, where
// there is one already. `inplace`: the student must be used where it is.
Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& row_settings, const Options& options, bool strided,
             const Tensor* grad, bool inplace);

// The shapes of the op's results. The sums over rows are 0-d; with terms they are a vector of 1 +
// kTerms.
Tensor empty_out(const Call& call, bool terms, bool per_row);
Tensor empty_stats(const Call& call);  // acc [kStats * rows + 1]
Tensor empty_grad(const Call& call);   // the student's shape and dtype

BackwardArgs backward_args(const Call& call, const Tensor& stats, const Tensor& grad_output,
                           const Tensor& grad);

inline int64_t acc_size(const Call& call) { return call.acc == ScalarType::Double ? 8 : 4; }

// A result that an op has nothing to say in.
Tensor nothing(const Call& call);

}  // namespace fastkd::glue
