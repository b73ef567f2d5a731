#include <initializer_list>

#include "backends.h"

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

void check_same_sizes(const Tensor& student, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(student.sizes().equals(other.sizes()), name,
                  " must have the shape of the student logits");
}

std::vector<int64_t> strides_of(const Tensor& tensor) {
  return {tensor.strides().begin(), tensor.strides().end()};
}

void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  " must be on the device of the student logits");
}

}  // namespace

void check_storage(const Tensor& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  int64_t last = tensor.storage_offset();  // index of the last element in the storage
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STD_TORCH_CHECK((last + 1) * static_cast<int64_t>(tensor.element_size()) <= bytes, name,
                  ": its data is not allocated, or was released; the storage has ", bytes,
                  " bytes");
}

Tensor checked_rows(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t rows,
                    const char* name, int64_t entries) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == entries * rows, name, " must have ", entries,
                  " for each row of logits: ", entries * rows, ", not ", tensor.numel());
  check_device(tensor, like, name);
  check_storage(tensor, name);
  return readable(tensor);
}

void take_row_settings(Call* call, const std::optional<Tensor>& row_settings) {
  if (!row_settings) return;
  call->row_settings = checked_rows(*row_settings, call->student, call->acc, call->inputs.rows,
                                    "row_settings", kRowSettings);
  call->inputs.row_settings = call->row_settings->const_data_ptr();
}

Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& row_settings, const Options& options, bool strided,
             const Tensor* grad) {
  STD_TORCH_CHECK(student.dim() >= 1, "student logits must have at least one dimension");
  check_same_sizes(student, teacher, "teacher logits");
  check_device(teacher, student, "teacher logits");
  check_storage(student, "student logits");
  check_storage(teacher, "teacher logits");
  Call call{{}, {}, {}, student, teacher, labels, std::nullopt, ScalarType::Float};
  Inputs& in = call.inputs;
  in.student_dtype = dtype_of(student, "student logits");
  in.teacher_dtype = dtype_of(teacher, "teacher logits");
  if (computes_in_double(in.student_dtype, in.teacher_dtype)) call.acc = ScalarType::Double;
  in.classes = student.size(student.dim() - 1);
  STD_TORCH_CHECK(in.classes > 0, "logits must have at least one class");
  in.rows = student.numel() / in.classes;

  bool inplace = false;
  if (grad) {
    check_same_sizes(student, *grad, "the gradient");
    check_device(*grad, student, "the gradient");
    check_storage(*grad, "the gradient");
    STD_TORCH_CHECK(grad->scalar_type() == student.scalar_type(),
                    "the gradient must have the dtype of the student logits");
    inplace = grad->const_data_ptr() == student.const_data_ptr();
  }
  call.grad_strides = grad ? strides_of(*grad) : gradient_strides(student, strided);
  const Layout layout = lay_out(&call.student, &call.teacher, call.grad_strides, strided, inplace);
  in.group_rows = layout.group_rows;
  in.student_stride = layout.student;
  in.teacher_stride = layout.teacher;
  call.grad_stride = layout.grad;
  in.student = call.student.const_data_ptr();
  in.teacher = call.teacher.const_data_ptr();

  if (labels) {
    STD_TORCH_CHECK(
        labels->sizes().equals(student.sizes().slice(0, static_cast<size_t>(student.dim() - 1))),
        "labels must have the shape of the student logits without the classes");
    call.labels = checked_rows(*labels, student, ScalarType::Long, in.rows, "labels", 1);
    in.labels = static_cast<const int64_t*>(call.labels->const_data_ptr());
  }
  take_row_settings(&call, row_settings);
  STD_TORCH_CHECK(options.divergence >= 0 && options.divergence < kDivergences,
                  "no divergence has the number ", options.divergence);
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

BackwardArgs backward_args(const Call& call, const Tensor* stats, const Tensor& grad_output,
                           const Tensor& grad) {
  const int64_t rows = call.inputs.rows;
  const bool per_row = grad_output.dim() == 1;
  BackwardArgs args;
  static_cast<Inputs&>(args) = call.inputs;
  checked_rows(grad_output, call.student, call.acc, per_row ? rows : 1, "grad_output", 1);
  STD_TORCH_CHECK(grad_output.dim() <= 1 && grad_output.is_contiguous(),
                  "grad_output must be contiguous");
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_per_row = per_row;
  if (stats) {
    checked_rows(*stats, call.student, call.acc, kStats * rows + 1, "stats", 1);
    STD_TORCH_CHECK(stats->is_contiguous(), "stats must be contiguous");
    args.stats = stats->const_data_ptr();
  }
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = call.grad_stride;
  return args;
}

void check_reducing(const Reducing& reducing, const Call& call, bool with_grad) {
  STD_TORCH_CHECK(!with_grad || reducing.reduction != Reduction::kNone,
                  "a gradient is written for reduction mean or sum");
  if (reducing.denominator)
    checked_rows(*reducing.denominator, call.student, call.acc, 1, "denominator", 1);
}

void check_grad_output(const Tensor& grad_output, const Reducing& reducing, bool filled) {
  STD_TORCH_CHECK(grad_output.dim() == 0 || reducing.reduction == Reduction::kNone,
                  "grad_output must be 0-d, or, with reduction none, have one number for each row");
  STD_TORCH_CHECK(grad_output.dim() == 0 || !filled,
                  "grad_output must be 0-d where filled is true: one number scales the gradient");
}

Tensor nothing(const Call& call) { return empty(call, {0}, call.acc); }

}  // namespace fastkd::glue
