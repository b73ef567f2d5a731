// The ops of the dense loss: their schemas, and boxed kernels that pass the arguments to a backend
// (cpu.cpp, cuda.cpp). Users differentiate `loss`. The autograd kernel of `loss` (eager.cpp, or
// python/fastkd/_core/autograd.py) calls `loss_into` and `loss_backward_`, which write the
// gradient. Shapes for tracing are in python/fastkd/_core/shapes.py.
#include <torch/csrc/stable/library.h>

#include "backends.h"
#include "huge_pages.h"

namespace fastkd::glue {
namespace {

// The arguments that all ops of the loss share, in the order of FASTKD_LOSS below.
struct LossArguments {
  Tensor student;
  Teachers teachers;
  std::optional<Tensor> labels, row_settings;
  Options options;
  Reducing reducing;
  bool with_terms;

  explicit LossArguments(ArgumentReader* in)
      : student(in->take<Tensor>()),
        teachers{in->take<std::vector<Tensor>>(),
                 in->take<std::optional<Tensor>>(),
                 in->take<std::vector<double>>(),
                 in->take<bool>(),
                 in->take<int64_t>(),
                 in->take<double>(),
                 in->take<double>()},
        labels(in->take<std::optional<Tensor>>()),
        row_settings(in->take<std::optional<Tensor>>()) {
    const auto denominator = in->take<std::optional<Tensor>>();
    options = {in->take<double>(), in->take<double>(),  in->take<double>(),  in->take<double>(),
               in->take<double>(), in->take<int64_t>(), in->take<int64_t>(), in->take<double>()};
    reducing = take_reducing(in, denominator);
    with_terms = in->take<bool>();
  }

  // Return the call that kernels take. Several teachers become `*mixture`, which must outlive the
  // call.
  Call prepare_call(const Tensor* grad, std::optional<Mixture>* mixture) const {
    if (teachers.shares.empty()) {
      STD_TORCH_CHECK(teachers.tensors.size() == 1, "several teachers must have shares");
      return prepare(student, teachers.tensors[0], labels, row_settings, options, true, grad);
    }
    STD_TORCH_CHECK(student.is_cpu(), "only the CPU kernels read several teachers");
    bool in_double = student.scalar_type() == ScalarType::Double;
    for (const Tensor& teacher : teachers.tensors)
      in_double |= teacher.scalar_type() == ScalarType::Double;
    *mixture = make_mixture(teachers, in_double);
    return prepare_mixed(student, **mixture, labels, row_settings, options, grad);
  }
};

template <class Backend>
ForwardResult forward(const LossArguments& arguments, bool with_stats, const Tensor* grad) {
  std::optional<Mixture> mixture;
  const Call call = arguments.prepare_call(grad, &mixture);
  check_reducing(arguments.reducing, call, grad != nullptr);
  return Backend::forward(call, arguments.reducing, arguments.with_terms, with_stats, grad);
}

template <class Backend>
void loss(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const LossArguments arguments(&in);
  return_results(stack, forward<Backend>(arguments, false, nullptr).out);
}

template <class Backend>
void loss_into(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<std::optional<Tensor>>();
  const LossArguments arguments(&in);
  const bool with_stats = in.take<bool>();
  const ForwardResult result = forward<Backend>(arguments, with_stats, grad ? &*grad : nullptr);
  return_results(stack, result.out, result.stats);
}

template <class Backend>
void loss_backward_(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<Tensor>(), grad_output = in.take<Tensor>(), stats = in.take<Tensor>();
  const LossArguments arguments(&in);
  const bool filled = in.take<bool>();
  check_grad_output(grad_output, arguments.reducing, filled);
  std::optional<Mixture> mixture;
  const Call call = arguments.prepare_call(&grad, &mixture);
  const bool has_stats = stats.numel() > 0 || !arguments.student.is_cpu();
  STD_TORCH_CHECK(has_stats || arguments.reducing.reduction != Reduction::kNone,
                  "with reduction none the backward pass needs stats");
  check_reducing(arguments.reducing, call, false);
  const BackwardArgs args = backward_args(call, has_stats ? &stats : nullptr, grad_output, grad);
  Backend::backward(call, args, arguments.reducing, grad_output, grad, filled);
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

// "acc" is the dtype of the loss: float64 if any logits are float64, else float32.
// teachers: logits (..., C), all of one shape. If `shares` is empty, there is one teacher. If not,
// the CPU kernels mix the teachers, a few rows at a time. row_temperatures: acc [2, rows], replaces
// mixture_temperature and teachers_temperature. row_settings: acc [4, rows], replaces temperature,
// teacher_temperature, hard_weight and soft_weight. denominator: acc, one number; a mean divides by
// it instead of by the number of rows.
#define FASTKD_LOSS                                                                              \
  "Tensor student, Tensor[] teachers, Tensor? row_temperatures, float[] shares, bool "           \
  "probabilities, int ensemble, float mixture_temperature, float teachers_temperature, Tensor? " \
  "labels, Tensor? row_settings, Tensor? denominator, float temperature, float "                 \
  "teacher_temperature, float hard_weight, float soft_weight, float label_smoothing, int "       \
  "ignore_index, int divergence, float mix, int reduction, float normalizer, bool with_terms"

STABLE_TORCH_LIBRARY(fastkd, m) {
  // Classes are the last dimension, with any stride. The result is acc [], [1 + kTerms], [rows] or
  // [1 + kTerms, rows]. The loss comes first, and it alone has a gradient.
  m.def("loss(" FASTKD_LOSS ") -> Tensor");
  // Compute the loss, and write its gradient for grad_output = 1 to `grad`, if there is one. `grad`
  // has the student's shape and may be the student itself. stats: acc [7 * rows + 1], for
  // loss_backward_; may be empty without with_stats, and on a CPU with a gradient, which
  // loss_backward_ computes again without them.
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
  // Allocate a gradient with the strides of gradient_strides() in walk.h.
  m.def("empty_gradient(Tensor student, bool strided) -> Tensor");
}

#undef FASTKD_LOSS

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("empty_gradient", &empty_gradient);
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("loss", &loss<Cpu>);
  m.impl("loss_into", &loss_into<Cpu>);
  m.impl("loss_backward_", &loss_backward_<Cpu>);
}

#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("loss", &loss<Cuda>);
  m.impl("loss_into", &loss_into<Cuda>);
  m.impl("loss_backward_", &loss_backward_<Cuda>);
}
#endif

}  // namespace fastkd::glue
