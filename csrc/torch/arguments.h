// Read and check the arguments of an op, and convert them to the structs of kernels.h, for every
// backend.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../mixture.h"
#include "layout.h"
#include "options.h"

namespace fastkd::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reads the arguments of a boxed kernel from its stack, in the order of the op's schema. Each
// argument must be taken, because the stack owns a reference to each tensor.
class ArgumentReader {
 public:
  explicit ArgumentReader(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

// Write the results of a boxed kernel to its stack.
template <class... Results>
void return_results(StableIValue* stack, const Results&... results) {
  ((*stack++ = torch::stable::detail::from(results)), ...);
}

DType dtype_of(const Tensor& tensor, const char* name);

// Check that `tensor` has `entries` numbers of `dtype` for each row and is on the device of `like`.
// Return `tensor`, or a contiguous copy of it.
Tensor checked_rows(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t rows,
                    const char* name, int64_t entries);

// Throw unless all elements of `tensor` lie inside its storage. FSDP, for one, releases storages
// of tensors that still exist.
void check_storage(const Tensor& tensor, const char* name);

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

// Use row_settings, if there are any, for the temperatures and weights of each row.
void take_row_settings(Call* call, const std::optional<Tensor>& row_settings);

// Check the arguments, and lay out the rows. `strided`: true if the kernels take classes that are
// not adjacent. `grad`: the gradient's memory, or null. If `grad` is the student, the student is
// not copied.
Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& row_settings, const Options& options, bool strided,
             const Tensor* grad);

// The shapes of the ops' results. The sums over rows are 0-d; with terms they are a vector of 1 +
// kTerms.
Tensor empty_out(const Call& call, bool terms, bool per_row);
Tensor empty_stats(const Call& call);  // acc [kStats * rows + 1]

// Check the arguments of a backward pass. `grad_output`: acc, one number or one for each row.
// `stats`: from the forward pass; null for the sparse loss, which has none.
BackwardArgs backward_args(const Call& call, const Tensor* stats, const Tensor& grad_output,
                           const Tensor& grad);

inline int64_t acc_size(const Call& call) { return call.acc == ScalarType::Double ? 8 : 4; }

// Return an empty tensor, for a result that was not requested.
Tensor nothing(const Call& call);

}  // namespace fastkd::glue
