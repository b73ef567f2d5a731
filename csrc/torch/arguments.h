// From the arguments of an op to the plain structs of kernels.h: reading, checks, layouts and
// allocation, the same for each backend.
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

// Takes the arguments of an op off the stack that its boxed kernel is called with, in the order of
// the op's schema. Each argument must be taken, for the stack holds references.
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

// Puts the results of an op on its stack.
template <class... Results>
void give(StableIValue* stack, const Results&... results) {
  ((*stack++ = torch::stable::detail::from(results)), ...);
}

DType dtype_of(const Tensor& tensor, const char* name);

// Return a contiguous `tensor`, after checking that it has `entries` numbers of `dtype` for each
// row and lies on the device of `like`.
Tensor checked_rows(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t rows,
                    const char* name, int64_t entries);

// Throw unless all elements of `tensor` lie inside its storage, which may have been released.
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

// Replace four of the options by one number for each row.
void take_row_settings(Call* call, const std::optional<Tensor>& row_settings);

// `strided`: whether the kernels take classes that are not adjacent. `grad`: the gradient, where
// it exists already. It may be the student, which then must be used where it is.
Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& row_settings, const Options& options, bool strided,
             const Tensor* grad);

// The shapes of the ops' results. The sums over rows are 0-d; with terms they are a vector of 1 +
// kTerms.
Tensor empty_out(const Call& call, bool terms, bool per_row);
Tensor empty_stats(const Call& call);  // acc [kStats * rows + 1]

// `grad_output`: acc, one number or one for each row; `stats`: of the forward pass, or null where
// the kernels compute it again.
BackwardArgs backward_args(const Call& call, const Tensor* stats, const Tensor& grad_output,
                           const Tensor& grad);

inline int64_t acc_size(const Call& call) { return call.acc == ScalarType::Double ? 8 : 4; }

// An empty tensor, for a result that was not asked for.
Tensor nothing(const Call& call);

}  // namespace fastkd::glue
