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

// The leading dimensions of student and teacher, merged wherever both allow it, last one first.
struct Level {
  int64_t size, student, teacher;
};

// At most two levels are left when the kernels can walk the rows; three mean that they cannot.
int merge_levels(const Tensor& student, const Tensor& teacher, Level levels[3]) {
  int count = 0;
  if (student.numel() == 0) return count;  // contiguous() leaves the strides of no elements alone
  for (int64_t dim = student.dim() - 2; dim >= 0; --dim) {
    const int64_t size = student.size(dim);
    if (size == 1) continue;
    const Level next{size, student.stride(dim), teacher.stride(dim)};
    if (count > 0) {
      Level& last = levels[count - 1];
      if (next.student == last.student * last.size && next.teacher == last.teacher * last.size) {
        last.size *= size;
        continue;
      }
    }
    if (count == 2) return 3;
    levels[count++] = next;
  }
  return count;
}

bool classes_adjacent(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1;
}

void same_sizes(const Tensor& student, const Tensor& teacher) {
  bool same = student.dim() == teacher.dim();
  for (int64_t dim = 0; same && dim < student.dim(); ++dim)
    same = student.size(dim) == teacher.size(dim);
  STD_TORCH_CHECK(same, "student and teacher logits must have the same shape");
}

Tensor checked_rows(const Tensor& tensor, ScalarType dtype, int64_t rows, const char* name,
                    int64_t entries) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == entries * rows, name, " must have ", entries,
                  " for each row of logits: ", entries * rows, ", not ", tensor.numel());
  return torch::stable::contiguous(tensor);
}

}  // namespace

Call prepare(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& row_settings, const Options& options, bool inplace) {
  STD_TORCH_CHECK(student.dim() >= 1, "student logits must have at least one dimension");
  same_sizes(student, teacher);
  Call call{{}, student, teacher, labels, row_settings, ScalarType::Float};
  Inputs& in = call.inputs;
  in.student_dtype = dtype_of(student, "student logits");
  in.teacher_dtype = dtype_of(teacher, "teacher logits");
  if (computes_in_double(in.student_dtype, in.teacher_dtype)) call.acc = ScalarType::Double;
  in.classes = student.size(student.dim() - 1);
  STD_TORCH_CHECK(in.classes > 0, "logits must have at least one class");
  in.rows = student.numel() / in.classes;

  if (!classes_adjacent(call.teacher)) call.teacher = torch::stable::contiguous(call.teacher);
  if (!inplace && !classes_adjacent(call.student))
    call.student = torch::stable::contiguous(call.student);
  Level levels[3];
  int count = merge_levels(call.student, call.teacher, levels);
  if (count == 3 || !classes_adjacent(call.student)) {
    call.teacher = torch::stable::contiguous(call.teacher);
    if (!inplace) call.student = torch::stable::contiguous(call.student);
    count = merge_levels(call.student, call.teacher, levels);
    STD_TORCH_CHECK(count < 3 && classes_adjacent(call.student),
                    "inplace needs student logits that are laid out row by row");
  }
  in.group_rows = count == 0 ? 1 : levels[0].size;
  if (count > 0) {
    in.student_stride.row = levels[0].student;
    in.teacher_stride.row = levels[0].teacher;
  }
  if (count > 1) {
    in.student_stride.group = levels[1].student;
    in.teacher_stride.group = levels[1].teacher;
  }
  in.student = call.student.const_data_ptr();
  in.teacher = call.teacher.const_data_ptr();

  if (labels) {
    call.labels = checked_rows(*labels, ScalarType::Long, in.rows, "labels", 1);
    in.labels = static_cast<const int64_t*>(call.labels->const_data_ptr());
  }
  if (row_settings) {
    call.row_settings =
        checked_rows(*row_settings, call.acc, in.rows, "row_settings", kRowSettings);
    in.row_settings = call.row_settings->const_data_ptr();
  }
  in.temperature = options.temperature;
  in.teacher_temperature = options.teacher_temperature;
  in.hard_weight = labels ? options.hard_weight : 0.0;
  in.soft_weight = options.soft_weight;
  in.label_smoothing = options.label_smoothing;
  in.ignore_index = options.ignore_index;
  in.divergence = static_cast<Divergence>(options.divergence);
  in.mix = options.mix;
  return call;
}

RowStrides strides_of(const Tensor& tensor, const Call& call) {
  if (tensor.const_data_ptr() == call.inputs.student) return call.inputs.student_stride;
  const int64_t classes = call.inputs.classes;  // contiguous
  return {classes, classes * call.inputs.group_rows};
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

Tensor empty_grad(const Call& call) {
  return torch::stable::new_empty(call.student, call.student.sizes());
}

BackwardArgs backward_args(const Call& call, const Tensor& stats, const Tensor& grad_output,
                           const Tensor& grad) {
  BackwardArgs args;
  static_cast<Inputs&>(args) = call.inputs;
  args.stats = stats.const_data_ptr();
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_per_row = grad_output.dim() == 1;
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = strides_of(grad, call);
  return args;
}

Tensor nothing(const Call& call) { return empty(call, {0}, call.acc); }

}  // namespace fastkd::glue
