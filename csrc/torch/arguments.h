// Read and check the arguments of an op, and convert them to the structs of kernels.h, topk.h and
// mixture.h. The arguments' meanings are in docs/maths.md, sections 1, 6 and 12.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "../mixture.h"
#include "../topk.h"
#include "row_strides.h"

namespace fastkd::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Return `value` as the enum `E`, whose last member is `last`.
template <class E>
E checked_enum(int64_t value, E last, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= static_cast<int64_t>(last), name, " has no member ",
                  value);
  return static_cast<E>(value);
}

// A reader of the arguments of a boxed kernel from its stack, in the order of the op's schema. Each
// argument must be taken, because the stack owns a reference to each tensor.
class ArgumentReader {
 public:
  explicit ArgumentReader(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  template <class... Ts>
  void take(Ts*... arguments) {
    ((*arguments = take<Ts>()), ...);
  }
  // Take the numbers from hard_weight to mix.
  void take_settings(Inputs* inputs) {
    int64_t divergence = 0;
    take(&inputs->hard_weight, &inputs->soft_weight, &inputs->label_smoothing,
         &inputs->ignore_index, &divergence, &inputs->mix);
    STD_TORCH_CHECK(divergence >= 0 && divergence < kDivergences, "no divergence has the number ",
                    divergence);
    inputs->divergence = static_cast<Divergence>(divergence);
  }

 private:
  StableIValue* next_;
};

// Write the results of a boxed kernel to its stack.
template <class... Results>
void return_results(StableIValue* stack, const Results&... results) {
  ((*stack++ = torch::stable::detail::from(results)), ...);
}

struct Reducing {
  Reduction reduction;
  double normalizer;                  // divisor of the mean, if positive and without denominator
  std::optional<Tensor> denominator;  // divisor of the mean: acc, one number on the inputs' device

  void take_from(ArgumentReader* reader) {
    reduction = checked_enum(reader->take<int64_t>(), Reduction::kMean, "reduction");
    normalizer = reader->take<double>();
  }
  bool per_row() const { return reduction == Reduction::kNone; }
};

DType dtype_of(const Tensor& tensor, const char* name);

inline bool in_double(const Inputs& in) {
  return computes_in_double(in.student_dtype, in.teacher_dtype);
}
// Return torch's type for acc (kernels.h).
inline ScalarType acc_type(bool in_double) {
  return in_double ? ScalarType::Double : ScalarType::Float;
}
inline int64_t acc_bytes(const Inputs& in) { return in_double(in) ? 8 : 4; }

// Check that `tensor` has `entries` numbers of `dtype` for each row and is on the device of `like`.
// Return `tensor`, or a copy that kernels can read (readable()).
Tensor checked_rows(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t rows,
                    const char* name, int64_t entries);

// The inputs of a call and the tensors that keep them alive. A tensor with a layout that the
// kernels do not support is replaced by a copy (row_strides.h).
struct Call {
  Inputs inputs;
  RowStrides grad_stride;
  Tensor student, teacher;
  std::optional<Tensor> labels, row_settings;
  const MixtureArgs* mixture = nullptr;  // CPU only: replaces the teacher; its `mixed` is set later

  // Use `settings`, if given, as the temperatures and weights of each row.
  void take_row_settings(const std::optional<Tensor>& settings);
  // Return a new contiguous tensor of acc on the student's device, of at most two dimensions.
  Tensor empty(std::initializer_list<int64_t> shape) const;
  // Return memory for `fields` numbers of each row, or for `fields` totals.
  Tensor empty_out(int64_t fields, bool per_row) const;
  Tensor empty_stats() const { return empty({kStats * inputs.rows + 1}); }
};

// Check the arguments, and lay out the rows. `settings`: the numbers among the arguments.
// `strided`: true if the kernels take classes that are not adjacent. `grad`: the gradient's memory,
// or null. If `grad` is the student, the student is not copied. A caller with row settings calls
// take_row_settings() afterwards.
Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const Inputs& settings, bool strided, const Tensor* grad);

// The op's result `out`, and the losses and terms of all rows, `rows`. With reduction none, `out`
// and `rows` are one tensor.
struct Outputs {
  Tensor out, rows;
};

// Allocate the outputs, and complete the arguments of a forward pass but for terms, stats and
// scale. `fields`: the number of results of each row, of which the loss is the first. `grad`: the
// gradient's memory, or null.
template <class Args>
Outputs set_outputs(const Call& call, const Reducing& reducing, int64_t fields, const Tensor* grad,
                    Args* args) {
  static_cast<Inputs&>(*args) = call.inputs;
  const Tensor out = call.empty_out(fields, reducing.per_row());
  const Outputs outputs{out, reducing.per_row() ? out : call.empty_out(fields, true)};
  args->loss = outputs.rows.mutable_data_ptr();
  args->reduction = reducing.reduction;
  if (grad) {
    args->grad = grad->mutable_data_ptr();
    args->grad_stride = call.grad_stride;
  }
  return outputs;
}

// Complete the arguments of a backward pass but for statistics and scale.
template <class Args>
void set_gradient(const Call& call, const Tensor& grad_output, const Tensor& grad, Args* args) {
  static_cast<Inputs&>(*args) = call.inputs;
  args->grad_output = grad_output.const_data_ptr();
  args->grad_output_per_row = grad_output.dim() == 1;
  args->grad = grad.mutable_data_ptr();
  args->grad_stride = call.grad_stride;
}

// Throw unless `grad_output` is one number or, with reduction none, one for each row. If `filled`
// is true, `grad_output` must be one number, which scales the gradient.
void check_grad_output(const Call& call, const Reducing& reducing, const Tensor& grad_output,
                       bool filled);

// Throw unless the denominator, if given, is one number with the dtype and device of the call's
// loss. With `with_grad`, also throw for reduction none.
void check_reducing(const Reducing& reducing, const Call& call, bool with_grad);

}  // namespace fastkd::glue
