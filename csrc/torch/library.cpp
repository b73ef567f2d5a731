// The ops: their schemas, written once, and the step from boxed arguments to a backend (cpu.cpp,
// cuda.cpp). Shapes for tracing are in python/fastkd/shapes.py, the autograd
// formulas in derivatives.py.
#include <torch/csrc/stable/library.h>

#include "backends.h"

namespace fastkd::glue {
namespace {

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> loss(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> labels,
    std::optional<Tensor> row_settings, std::optional<Tensor> denominator, double temperature,
    double teacher_temperature, double hard_weight, double soft_weight, double label_smoothing,
    int64_t ignore_index, int64_t divergence, double mix, int64_t reduction, double normalizer,
    bool with_terms, bool with_grad) {
  const Call call = prepare(student, teacher, labels, row_settings,
                            {temperature, teacher_temperature, hard_weight, soft_weight,
                             label_smoothing, ignore_index, divergence, mix},
                            true, nullptr, false);
  const bool filled = with_grad && static_cast<Reduction>(reduction) != Reduction::kNone;
  const Tensor grad = filled ? empty_grad(call) : nothing(call);
  const ForwardResult result =
      Backend::forward(call, {static_cast<Reduction>(reduction), normalizer, denominator},
                       with_terms, with_grad, filled ? &grad : nullptr);
  return {result.out, grad, result.stats};
}

template <class Backend>
std::tuple<Tensor, Tensor> loss_(const Tensor& student, const Tensor& teacher,
                                 std::optional<Tensor> labels, std::optional<Tensor> row_settings,
                                 std::optional<Tensor> denominator, double temperature,
                                 double teacher_temperature, double hard_weight, double soft_weight,
                                 double label_smoothing, int64_t ignore_index, int64_t divergence,
                                 double mix, int64_t reduction, double normalizer,
                                 bool with_terms) {
  STD_TORCH_CHECK(static_cast<Reduction>(reduction) != Reduction::kNone,
                  "inplace needs reduction mean or sum");
  const Call call = prepare(student, teacher, labels, row_settings,
                            {temperature, teacher_temperature, hard_weight, soft_weight,
                             label_smoothing, ignore_index, divergence, mix},
                            true, &student, true);
  const ForwardResult result =
      Backend::forward(call, {static_cast<Reduction>(reduction), normalizer, denominator},
                       with_terms, true, &student);
  return {result.out, result.stats};
}

template <class Backend>
void loss_backward_(const Tensor& grad, const Tensor& grad_output, const Tensor& stats,
                    const Tensor& student, const Tensor& teacher, std::optional<Tensor> labels,
                    std::optional<Tensor> row_settings, double temperature,
                    double teacher_temperature, double hard_weight, double soft_weight,
                    double label_smoothing, int64_t ignore_index, int64_t divergence, double mix,
                    bool filled) {
  const Call call = prepare(student, teacher, labels, row_settings,
                            {temperature, teacher_temperature, hard_weight, soft_weight,
                             label_smoothing, ignore_index, divergence, mix},
                            true, &grad, false);
  Backend::backward(call, stats, grad_output, grad, filled);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastkd, m) {
  // Classes are the last dimension, whatever their stride. out: acc [], [1 + kTerms], [rows] or [1
  // + kTerms, rows]; grad: the student's shape, laid out as gradient_strides (layout.h) says, or
  // [0] without `with_grad`; stats: acc [7 * rows + 1]; row_settings: acc [4, rows], which replaces
  // temperature, teacher_temperature, hard_weight and soft_weight. `denominator`: acc, one number,
  // instead of the count of rows.
  m.def(
      "loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? row_settings, "
      "Tensor? denominator, float temperature, float teacher_temperature, float hard_weight, float "
      "soft_weight, "
      "float label_smoothing, int ignore_index, int divergence, float mix, int reduction, float "
      "normalizer, "
      "bool with_terms, "
      "bool with_grad) -> (Tensor out, Tensor grad, Tensor stats)");
  // The same with the gradient written over the student.
  m.def(
      "loss_(Tensor(a!) student, Tensor teacher, Tensor? labels, Tensor? row_settings, "
      "Tensor? denominator, float temperature, float teacher_temperature, float hard_weight, float "
      "soft_weight, "
      "float label_smoothing, int ignore_index, int divergence, float mix, int reduction, float "
      "normalizer, "
      "bool with_terms) "
      "-> (Tensor out, Tensor stats)");
  // Fills grad with grad_output times the gradient of the loss whose stats these are. `filled`:
  // grad holds it for grad_output = 1 already. student and grad are the same tensor after loss_.
  m.def(
      "loss_backward_(Tensor(a!) grad, Tensor grad_output, Tensor stats, Tensor student, "
      "Tensor teacher, Tensor? labels, Tensor? row_settings, float temperature, float "
      "teacher_temperature, float hard_weight, "
      "float soft_weight, float label_smoothing, int ignore_index, int divergence, float mix, bool "
      "filled) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("loss", TORCH_BOX(&loss<Cpu>));
  m.impl("loss_", TORCH_BOX(&loss_<Cpu>));
  m.impl("loss_backward_", TORCH_BOX(&loss_backward_<Cpu>));
}

#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("loss", TORCH_BOX(&loss<Cuda>));
  m.impl("loss_", TORCH_BOX(&loss_<Cuda>));
  m.impl("loss_backward_", TORCH_BOX(&loss_backward_<Cuda>));
}
#endif

}  // namespace fastkd::glue
