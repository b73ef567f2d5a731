// Check the arguments of an op, lay out rows, and allocate results (arguments.h). docs/maths.md,
// sections 1, 6 and 12, explains the arguments.
#include "arguments.h"

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

void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  " must be on the device of the student logits");
}

// Throw unless all elements of `tensor` lie inside its storage. For example, FSDP releases storages
// of tensors that still exist.
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

}  // namespace

Tensor checked_rows(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t rows,
                    const char* name, int64_t entries) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == entries * rows, name, " must have ", entries,
                  " for each row of logits: ", entries * rows, ", not ", tensor.numel());
  check_device(tensor, like, name);
  check_storage(tensor, name);
  return readable(tensor);
}

void Call::take_row_settings(const std::optional<Tensor>& settings) {
  if (!settings) return;
  row_settings = checked_rows(*settings, student, acc_type(in_double(inputs)), inputs.rows,
                              "row_settings", kRowSettings);
  inputs.row_settings = row_settings->const_data_ptr();
}

// Allocate without torch::stable::empty, whose dispatcher call is slow compared with a small loss.
Tensor Call::empty(std::initializer_list<int64_t> shape) const {
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(student.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(student.get(), &device_index));
  int64_t strides[2] = {1, 1};
  if (shape.size() == 2) strides[0] = shape.begin()[1];
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.begin(), strides,
      in_double(inputs) ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), device_type,
      device_index, &handle));
  return Tensor(handle);
}

Tensor Call::empty_out(int64_t fields, bool per_row) const {
  if (fields == 1) return per_row ? empty({inputs.rows}) : empty({});
  return per_row ? empty({fields, inputs.rows}) : empty({fields});
}

Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const Inputs& settings, bool strided, const Tensor* grad) {
  STD_TORCH_CHECK(student.dim() >= 1, "student logits must have at least one dimension");
  check_same_sizes(student, teacher, "teacher logits");
  check_device(teacher, student, "teacher logits");
  check_storage(student, "student logits");
  check_storage(teacher, "teacher logits");
  Call call{settings, {}, student, teacher, labels, std::nullopt};
  Inputs& in = call.inputs;
  in.student_dtype = dtype_of(student, "student logits");
  in.teacher_dtype = dtype_of(teacher, "teacher logits");
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
  const std::vector<int64_t> grad_strides =
      grad ? std::vector<int64_t>(grad->strides().begin(), grad->strides().end())
           : gradient_strides(student, strided);
  const Layout layout = lay_out(&call.student, &call.teacher, grad_strides, strided, inplace);
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
  } else {
    in.hard_weight = 0;
  }
  return call;
}

void check_reducing(const Reducing& reducing, const Call& call, bool with_grad) {
  STD_TORCH_CHECK(!with_grad || !reducing.per_row(),
                  "a gradient is written for reduction mean or sum");
  if (reducing.denominator)
    checked_rows(*reducing.denominator, call.student, acc_type(in_double(call.inputs)), 1,
                 "denominator", 1);
}

void check_grad_output(const Call& call, const Reducing& reducing, const Tensor& grad_output,
                       bool filled) {
  const int64_t dims = grad_output.dim();
  STD_TORCH_CHECK(dims == 0 || (dims == 1 && reducing.per_row()),
                  "grad_output must be 0-d, or, with reduction none, have one number for each row");
  STD_TORCH_CHECK(dims == 0 || !filled,
                  "grad_output must be 0-d where filled is true: one number scales the gradient");
  STD_TORCH_CHECK(grad_output.is_contiguous(), "grad_output must be contiguous");
  checked_rows(grad_output, call.student, acc_type(in_double(call.inputs)),
               dims == 1 ? call.inputs.rows : 1, "grad_output", 1);
}

}  // namespace fastkd::glue
