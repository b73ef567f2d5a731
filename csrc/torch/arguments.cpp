#include "arguments.h"

#include <initializer_list>

namespace fastkd::glue {
DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16");
      return DType::kFloat32;
  }
}

namespace {

void same_sizes(const Tensor& student, const Tensor& teacher) {
  bool same = student.dim() == teacher.dim();
  for (int64_t dim = 0; same && dim < student.dim(); ++dim)
    same = student.size(dim) == teacher.size(dim);
  STD_TORCH_CHECK(same, "student and teacher logits must have the same shape");
}

std::vector<int64_t> strides_of(const Tensor& tensor) {
  return {tensor.strides().begin(), tensor.strides().end()};
}

}  // namespace

Tensor checked_rows(const Tensor& tensor, ScalarType dtype, int64_t rows, const char* name,
                    int64_t entries) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == entries * rows, name, " must have ", entries,
                  " for each row of logits: ", entries * rows, ", not ", tensor.numel());
  return readable(tensor);
}

void take_row_settings(Call* call, const std::optional<Tensor>& row_settings) {
  if (!row_settings) return;
  call->row_settings =
      checked_rows(*row_settings, call->acc, call->inputs.rows, "row_settings", kRowSettings);
  call->inputs.row_settings = call->row_settings->const_data_ptr();
}

Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& row_settings, const Options& options, bool strided,
             const Tensor* grad, bool inplace) {
  STD_TORCH_CHECK(student.dim() >= 1, "student logits must have at least one dimension");
  same_sizes(student, teacher);
  Call call{{}, {}, {}, student, teacher, labels, std::nullopt, ScalarType::Float};
  Inputs& in = call.inputs;
  in.student_dtype = dtype_of(student, "student logits");
  in.teacher_dtype = dtype_of(teacher, "teacher logits");
  if (computes_in_double(in.student_dtype, in.teacher_dtype)) call.acc = ScalarType::Double;
  in.classes = student.size(student.dim() - 1);
  STD_TORCH_CHECK(in.classes > 0, "logits must have at least one class");
  in.rows = student.numel() / in.classes;

  call.grad_strides = grad ? strides_of(*grad) : gradient_strides(student, strided);
  const Layout layout = lay_out(&call.student, &call.teacher, call.grad_strides, strided, inplace);
  in.group_rows = layout.group_rows;
  in.student_stride = layout.student;
  in.teacher_stride = layout.teacher;
  call.grad_stride = layout.grad;
  in.student = call.student.const_data_ptr();
  in.teacher = call.teacher.const_data_ptr();

  if (labels) {
    call.labels = checked_rows(*labels, ScalarType::Long, in.rows, "labels", 1);
    in.labels = static_cast<const int64_t*>(call.labels->const_data_ptr());
  }
  take_row_settings(&call, row_settings);
  set_options(options, &in);
  return call;
}

namespace {

// A new contiguous tensor on the student's device, without a trip through the dispatcher.
Tensor empty(const Call& call, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(call.student.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(call.student.get(), &device_index));
  int64_t strides[2] = {1, 1};
  if (shape.size() == 2) strides[0] = shape.begin()[1];
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.begin(), strides,
      dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor empty_out(const Call& call, bool terms, bool per_row) {
  const int64_t rows = call.inputs.rows;
  if (terms) {
    return per_row ? empty(call, {1 + kTerms, rows}, call.acc)
                   : empty(call, {1 + kTerms}, call.acc);
  }
  return per_row ? empty(call, {rows}, call.acc) : empty(call, {}, call.acc);
}

Tensor empty_stats(const Call& call) {
  return empty(call, {kStats * call.inputs.rows + 1}, call.acc);
}

Tensor empty_grad(const Call& call) { return empty_strided(call.student, call.grad_strides); }

BackwardArgs backward_args(const Call& call, const Tensor& stats, const Tensor& grad_output,
                           const Tensor& grad) {
  BackwardArgs args;
  static_cast<Inputs&>(args) = call.inputs;
  args.stats = stats.const_data_ptr();
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_per_row = grad_output.dim() == 1;
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = call.grad_stride;
  return args;
}

Tensor nothing(const Call& call) { return empty(call, {0}, call.acc); }

}  // namespace fastkd::glue
