// The ops of the dense loss (docs/maths.md, sections 1, 6 and 12). This file has the ops' schemas,
// and boxed kernels that pass the arguments to a backend (cpu.cpp, cuda.cpp). Users differentiate
// `loss`. The autograd kernel of `loss` (eager.cpp, or python/fastkd/_core/autograd.py) calls
// `loss_into` and `loss_backward_`, which write the gradient. Shapes for tracing are in
// python/fastkd/_core/shapes.py.
#include <torch/csrc/stable/library.h>

#include <array>

#include "backends.h"
#include "huge_pages.h"

namespace fastkd::glue {
namespace {

// The arguments that all ops of the dense loss share, in the order of FASTKD_LOSS below.
struct LossArguments {
  Tensor student;
  Mixture teachers;
  std::optional<Tensor> labels, row_settings;
  Inputs settings;
  Reducing reducing;
  bool with_terms;

  explicit LossArguments(ArgumentReader* in) : student(in->take<Tensor>()), teachers(in) {
    in->take(&labels, &row_settings, &reducing.denominator, &settings.temperature,
             &settings.teacher_temperature);
    in->take_settings(&settings);
    reducing.take_from(in);
    in->take(&with_terms);
  }

  // Return the call for the kernels. With a mixture of teachers, the call points into this object.
  Call prepare_call(const Tensor* grad) {
    const bool is_mixed = !teachers.shares.empty();
    STD_TORCH_CHECK(is_mixed || teachers.tensors.size() == 1, "several teachers must have shares");
    STD_TORCH_CHECK(!is_mixed || student.is_cpu(), "only the CPU kernels read several teachers");
    // A mixture has no layout yet, so the student is passed in place of the teacher.
    Call call =
        prepare(student, is_mixed ? student : teachers.tensors[0], labels, settings, true, grad);
    if (is_mixed) use_mixture(&call);
    call.take_row_settings(row_settings);
    return call;
  }

 private:
  void use_mixture(Call* call) {
    bool in_double = student.scalar_type() == ScalarType::Double;
    for (const Tensor& teacher : teachers.tensors)
      in_double |= teacher.scalar_type() == ScalarType::Double;
    teachers.prepare(in_double);
    Inputs& in = call->inputs;
    STD_TORCH_CHECK(teachers.args.rows == in.rows && teachers.args.classes == in.classes,
                    "student and teacher logits must have the same shape");
    call->mixture = &teachers.args;
    in.teacher = nullptr;
    in.teacher_dtype = in_double ? DType::kFloat64 : DType::kFloat32;
    in.teacher_stride = {in.classes, in.group_rows * in.classes, 1};
  }
};

// Compute the loss, and return `out` and `stats`. `grad`: the gradient's memory, or null.
std::array<Tensor, 2> forward(LossArguments* arguments, bool with_stats, const Tensor* grad) {
  const Call call = arguments->prepare_call(grad);
  check_reducing(arguments->reducing, call, grad != nullptr);
  ForwardArgs args;
  const int64_t fields = arguments->with_terms ? 1 + kTerms : 1;
  const Outputs outputs = set_outputs(call, arguments->reducing, fields, grad, &args);
  if (arguments->with_terms)
    args.terms = static_cast<char*>(args.loss) + args.rows * acc_bytes(args);
  // A CPU call with a gradient stores no statistics. Statistics would take 14 MB for 524288 rows of
  // 19 classes, whose logits take 40 MB.
  with_stats = !call.student.is_cpu() || (with_stats && grad == nullptr);
  const Tensor stats = with_stats ? call.empty_stats() : call.empty({0});
  if (with_stats) args.stats = stats.mutable_data_ptr();
  backend_of(call.student).forward(call, args, arguments->reducing, outputs);
  return {outputs.out, stats};
}

void loss(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  LossArguments arguments(&in);
  return_results(stack, forward(&arguments, false, nullptr)[0]);
}

void loss_into(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<std::optional<Tensor>>();
  LossArguments arguments(&in);
  const bool with_stats = in.take<bool>();
  const auto results = forward(&arguments, with_stats, grad ? &*grad : nullptr);
  return_results(stack, results[0], results[1]);
}

void loss_backward_(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<Tensor>(), grad_output = in.take<Tensor>(), stats = in.take<Tensor>();
  LossArguments arguments(&in);
  const Reducing& reducing = arguments.reducing;
  const bool filled = in.take<bool>();
  const Call call = arguments.prepare_call(&grad);
  check_reducing(reducing, call, false);
  check_grad_output(call, reducing, grad_output, filled);
  BackwardArgs args;
  set_gradient(call, grad_output, grad, &args);
  if (stats.numel() > 0 || !call.student.is_cpu()) {
    checked_rows(stats, call.student, acc_type(in_double(args)), kStats * args.rows + 1, "stats",
                 1);
    STD_TORCH_CHECK(stats.is_contiguous(), "stats must be contiguous");
    args.stats = stats.const_data_ptr();
  }
  STD_TORCH_CHECK(args.stats || !reducing.per_row(),
                  "with reduction none the backward pass needs stats");
  backend_of(call.student).backward(call, args, reducing, grad_output, grad, filled);
}

void empty_gradient(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto student = in.take<Tensor>();
  const bool strided = in.take<bool>();
  STD_TORCH_CHECK(student.dim() >= 1, "student logits must have at least one dimension");
  const Tensor grad = empty_strided(student, gradient_strides(student, strided));
  if (grad.is_cpu()) {
    prefer_huge_pages(grad.mutable_data_ptr(),
                      static_cast<size_t>(grad.numel()) * grad.element_size());
  }
  return_results(stack, grad);
}

}  // namespace

// "acc" is the dtype of the loss: float64 if any logits are float64, else float32. teachers: (...,
// C), all of one shape; probabilities if `probabilities` is true, else logits. If `shares` is
// empty, there is one teacher, of logits. If `shares` is not empty, the CPU kernels mix the
// teachers, a few rows at a time. row_temperatures: acc [2, rows], replaces mixture_temperature and
// teachers_temperature. row_settings: acc [4, rows], replaces temperature, teacher_temperature,
// hard_weight and soft_weight. denominator: acc, one number; divisor of a mean, instead of the
// number of rows that are not ignored.
#define FASTKD_LOSS                                                                              \
  "Tensor student, Tensor[] teachers, Tensor? row_temperatures, float[] shares, bool "           \
  "probabilities, int ensemble, float mixture_temperature, float teachers_temperature, Tensor? " \
  "labels, Tensor? row_settings, Tensor? denominator, float temperature, float "                 \
  "teacher_temperature, float hard_weight, float soft_weight, float label_smoothing, int "       \
  "ignore_index, int divergence, float mix, int reduction, float normalizer, bool with_terms"

STABLE_TORCH_LIBRARY(fastkd, m) {
  // Compute the loss. Classes are the last dimension, with any stride. The result is acc [], [1 +
  // kTerms], [rows] or [1 + kTerms, rows]. Only the loss, which comes first, has a gradient.
  m.def("loss(" FASTKD_LOSS ") -> Tensor");
  // Compute the loss, and write its gradient for grad_output = 1 to `grad` if `grad` is not None.
  // `grad` has the student's shape and may be the student itself. stats: acc [7 * rows + 1], for
  // loss_backward_. stats may be empty without with_stats, and on a CPU with a gradient.
  // loss_backward_ then recomputes the gradient without statistics.
  m.def("loss_into(Tensor(a!)? grad, " FASTKD_LOSS
        ", bool with_stats) -> (Tensor out, Tensor stats)");
  // Write grad_output times the gradient to `grad`. grad_output: acc, one number, or one for each
  // row with reduction none. stats: from loss_into. `filled`: true if `grad` already holds the
  // gradient for grad_output = 1.
  m.def("loss_backward_(Tensor(a!) grad, Tensor grad_output, Tensor stats, " FASTKD_LOSS
        ", bool filled) -> ()");
  // Compute grad_output times the gradient by PyTorch operations, which can be differentiated
  // (python/fastkd/_core/dense.py).
  m.def("loss_gradient(Tensor grad_output, " FASTKD_LOSS ") -> Tensor");
  // Allocate a gradient with the strides of gradient_strides.h.
  m.def("empty_gradient(Tensor student, bool strided) -> Tensor");
}

#undef FASTKD_LOSS

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("empty_gradient", &empty_gradient);
}

void add_loss(torch::stable::detail::StableLibrary& m) {
  m.impl("loss", &loss);
  m.impl("loss_into", &loss_into);
  m.impl("loss_backward_", &loss_backward_);
}
STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { add_loss(m); }
#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { add_loss(m); }
#endif

}  // namespace fastkd::glue
