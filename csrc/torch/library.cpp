// The ops of the loss with all logits: their schemas, written once, and the step from boxed
// arguments to a backend (cpu.cpp, cuda.cpp). `loss` is what users differentiate; its autograd
// kernel (eager.cpp, or python/fastkd/derivatives.py) calls the two ops that write gradients.
// Shapes for tracing are in python/fastkd/shapes.py.
#include <torch/csrc/stable/library.h>

#include "backends.h"
#include "huge_pages.h"

namespace fastkd::glue {
namespace {

// The arguments that the three ops share, in the order of FASTKD_LOSS below.
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

  // Return the call that kernels take. `mixture` keeps what stands for several teachers.
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
  give(stack, forward<Backend>(arguments, false, nullptr).out);
}

template <class Backend>
void loss_into(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<std::optional<Tensor>>();
  const LossArguments arguments(&in);
  const bool with_stats = in.take<bool>();
  const ForwardResult result = forward<Backend>(arguments, with_stats, grad ? &*grad : nullptr);
  give(stack, result.out, result.stats);
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
  Backend::backward(call, backward_args(call, &stats, grad_output, grad), grad_output, grad,
                    filled);
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
  give(stack, grad);
}

}  // namespace

// teachers: each (..., C), of one shape. Without shares it is one teacher, whose logits are taken
// as they are; with shares it is their mixture, of which no more is in memory than some rows.
// row_temperatures: acc [2, rows], which replaces the mixture's two temperatures. row_settings: acc
// [4, rows], which replaces temperature, teacher_temperature, hard_weight and soft_weight.
// denominator: acc, one number, which a mean divides by instead of the count of rows.
#define FASTKD_LOSS                                                                              \
  "Tensor student, Tensor[] teachers, Tensor? row_temperatures, float[] shares, bool "           \
  "probabilities, int ensemble, float mixture_temperature, float teachers_temperature, Tensor? " \
  "labels, Tensor? row_settings, Tensor? denominator, float temperature, float "                 \
  "teacher_temperature, float hard_weight, float soft_weight, float label_smoothing, int "       \
  "ignore_index, int divergence, float mix, int reduction, float normalizer, bool with_terms"

STABLE_TORCH_LIBRARY(fastkd, m) {
  // Classes are the last dimension, whatever their stride. The result: acc [], [1 + kTerms], [rows]
  // or [1 + kTerms, rows], of which only the loss, the first, has a gradient.
  m.def("loss(" FASTKD_LOSS ") -> Tensor");
  // The loss, and its gradient for grad_output = 1 in `grad`, which has the student's shape and may
  // be the student. stats: acc [7 * rows + 1], what loss_backward_ needs; empty without with_stats.
  m.def("loss_into(Tensor(a!)? grad, " FASTKD_LOSS
        ", bool with_stats) -> (Tensor out, Tensor stats)");
  // Fills grad with grad_output (acc, one number, or one for each row with reduction none) times
  // the gradient of the loss whose stats these are. `filled`: grad holds it for grad_output = 1.
  m.def("loss_backward_(Tensor(a!) grad, Tensor grad_output, Tensor stats, " FASTKD_LOSS
        ", bool filled) -> ()");
  // grad_output times the gradient, by PyTorch operations, so that it can be differentiated
  // (python/fastkd/derivatives.py).
  m.def("loss_gradient(Tensor grad_output, " FASTKD_LOSS ") -> Tensor");
  // Memory for a gradient, laid out as gradient_strides() in walk.h says.
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
