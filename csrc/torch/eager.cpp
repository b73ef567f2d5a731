// The module fastkd._eager: the way in for plain eager calls, whose host time is the whole cost of
// a small batch.
//
// Optional. It uses torch's C++ autograd, which has no stable ABI, so it is built from source only,
// carries the version of the torch that it was built with, and is left unused with any other
// (python/fastkd/ops.py). It takes a call only when nothing about it needs a thought: plain
// tensors, the usual options, all valid. For anything else it returns None, and the Python path
// (losses.py) checks, explains, or does it.
#include <ATen/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "gradients.h"

namespace py = pybind11;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace fastkd {
namespace {

// The numbers of a call, as the ops' schemas have them (library.cpp).
struct Settings {
  double temperature, teacher_temperature, hard_weight, soft_weight, label_smoothing;
  int64_t ignore_index, divergence;
  double mix;
  int64_t reduction;
  double normalizer;  // 0: the rows that count
  bool with_terms;
};

using LossOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                  const std::optional<Tensor>&,
                                                  const std::optional<Tensor>&,
                                                  const std::optional<Tensor>&, double, double,
                                                  double, double, double, int64_t, int64_t, double,
                                                  int64_t, double, bool, bool);
using LossIntoOp = std::tuple<Tensor, Tensor>(const Tensor&, double, const Tensor&, const Tensor&,
                                              const std::optional<Tensor>&, double, double, double,
                                              double, double, int64_t, int64_t, double, int64_t,
                                              double, bool);
using BackwardOp = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const std::optional<Tensor>&, const std::optional<Tensor>&, double, double,
                        double, double, double, int64_t, int64_t, double, bool);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor, Tensor> call_loss(const Tensor& student, const Tensor& teacher,
                                             const std::optional<Tensor>& labels,
                                             const Settings& settings, bool with_grad) {
  static const auto loss = op<LossOp>("fastkd::loss");
  return loss.call(student, teacher, labels, std::nullopt, std::nullopt, settings.temperature,
                   settings.teacher_temperature, settings.hard_weight, settings.soft_weight,
                   settings.label_smoothing, settings.ignore_index, settings.divergence,
                   settings.mix, settings.reduction, settings.normalizer, settings.with_terms,
                   with_grad);
}

std::tuple<Tensor, Tensor> call_loss_into(const Tensor& grad, double grad_output,
                                          const Tensor& student, const Tensor& teacher,
                                          const std::optional<Tensor>& labels,
                                          const Settings& settings) {
  static const auto loss_into = op<LossIntoOp>("fastkd::loss_into");
  return loss_into.call(grad, grad_output, student, teacher, labels, settings.temperature,
                        settings.teacher_temperature, settings.hard_weight, settings.soft_weight,
                        settings.label_smoothing, settings.ignore_index, settings.divergence,
                        settings.mix, settings.reduction, settings.normalizer, settings.with_terms);
}

// 16-bit gradients cannot be scaled afterwards (Cpu::backward), and under a GradScaler, or where
// gradients are accumulated, grad_output is not 1. It seldom changes: so the forward pass writes
// them for the grad_output that the last one met. Where that was wrong they are computed anew, to
// the same bits.
std::atomic<double> last_grad_output{1.0};

bool is_16_bit(const Tensor& tensor) { return tensor.element_size() == 2; }

// The backward pass of a call whose forward pass has written the gradient.
struct LossBackward : torch::autograd::Node {
  SavedVariable student, teacher, labels;
  Tensor grad;               // given away by the first call
  double grad_output = 1.0;  // that `grad` was written for
  Tensor stats;              // for the following calls, and where scaling `grad` would not be exact
  Settings settings;

  std::string name() const override { return "FastKDLossBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    student.reset_data();
    teacher.reset_data();
    labels.reset_data();
    grad.reset();
    stats.reset();
  }

  variable_list apply(variable_list&& grad_outputs) override {
    Tensor factor = std::move(grad_outputs[0]);
    if (!factor.defined()) return {Tensor()};
    // create_graph=True, is_grads_batched=True
    if (at::GradMode::is_enabled() || is_batch(factor)) return {differentiable(factor)};
    // Tensors whose memory does not hold their number.
    if (factor.is_neg() || factor._is_zerotensor()) factor = at::zeros_like(factor).add_(factor);
    if (settings.with_terms) factor = factor.select(0, 0);
    // With retain_graph=True the first call gives the forward pass's buffer away: a second one,
    // which may not scale it again, starts anew.
    Tensor result;
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // threads may share the graph
      result = std::move(grad);
      grad.reset();
    }
    if (factor.is_cpu()) {
      const double wanted = number(factor);
      if (result.defined() && is_16_bit(result) && wanted != 0 && std::isfinite(wanted)) {
        last_grad_output = wanted;
      }
      // What the op would find out too, without the cost of calling it.
      if (result.defined() && wanted == grad_output) return {result};
    }
    const Tensor student_logits = student.unpack();
    const bool filled = result.defined() && grad_output == 1.0;
    if (!result.defined()) result = empty_like(student_logits);
    static const auto backward = op<BackwardOp>("fastkd::loss_backward_");
    const Tensor label_tensor = labels.unpack();
    backward.call(result, factor, stats, student_logits, teacher.unpack(),
                  label_tensor.defined() ? std::optional<Tensor>(label_tensor) : std::nullopt,
                  std::nullopt, settings.temperature, settings.teacher_temperature,
                  settings.hard_weight, settings.soft_weight, settings.label_smoothing,
                  settings.ignore_index, settings.divergence, settings.mix, filled);
    return {result};
  }

 private:
  static Tensor empty_like(const Tensor& logits) {
    return logits.is_cpu() ? empty_gradient(logits)
                           : at::empty_like(logits, at::MemoryFormat::Contiguous);
  }

  static bool is_batch(const Tensor& factor) {
    return c10::impl::tls_is_dispatch_key_included(
               c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
           factor.key_set().has(c10::DispatchKey::Batched);
  }

  static double number(const Tensor& scalar) {
    return scalar.scalar_type() == at::kDouble ? *scalar.const_data_ptr<double>()
                                               : *scalar.const_data_ptr<float>();
  }

  // The gradient by differentiable operations: fastkd.derivatives.differentiable_gradient.
  Tensor differentiable(const Tensor& factor) {
    py::gil_scoped_acquire gil;
    const py::module_ derivatives = py::module_::import("fastkd.derivatives");
    const py::object numbers = derivatives.attr("Settings")(
        settings.temperature, settings.teacher_temperature, settings.hard_weight,
        settings.soft_weight, settings.label_smoothing, settings.ignore_index, settings.divergence,
        settings.mix, settings.reduction, settings.normalizer, settings.with_terms);
    const Tensor label_tensor = labels.unpack();
    return derivatives
        .attr("differentiable_gradient")(
            student.unpack(), teacher.unpack(),
            label_tensor.defined() ? py::cast(label_tensor) : py::none(), py::none(), py::none(),
            numbers, factor)
        .cast<Tensor>();
  }
};

// A node is held by shared_ptr up to torch 2.13, and by intrusive_ptr from 2.14 on.
template <class Pointer>
std::pair<Pointer, LossBackward*> make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    auto node = std::make_shared<LossBackward>();
    return {node, node.get()};
  } else {
    auto node = c10::make_intrusive<LossBackward>();
    auto* raw = node.get();
    return {Pointer(std::move(node)), raw};
  }
}

Tensor differentiable_loss(const Tensor& student, const Tensor& teacher,
                           const std::optional<Tensor>& labels, const Settings& settings) {
  auto [pointer, node] = make_node<decltype(torch::autograd::Edge::function)>();
  node->set_next_edges(torch::autograd::collect_next_edges(student));
  node->settings = settings;
  node->student = SavedVariable(student, false);
  node->teacher = SavedVariable(teacher, false);
  if (labels) node->labels = SavedVariable(*labels, false);
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (student.is_cpu()) {
      node->grad = empty_gradient(student);
      if (is_16_bit(student)) node->grad_output = last_grad_output;
      std::tie(out, node->stats) =
          call_loss_into(node->grad, node->grad_output, student, teacher, labels, settings);
    } else {
      std::tie(out, node->grad, node->stats) = call_loss(student, teacher, labels, settings, true);
    }
  }
  torch::autograd::set_history(out, pointer);
  return out;
}

bool is_plain(const py::handle& value) { return THPVariable_CheckExact(value.ptr()); }

bool has_kernels(const Tensor& tensor, bool cuda) {
  return tensor.is_cpu() || (cuda && tensor.is_cuda());
}

// A float or int in [low, high], or nothing.
std::optional<double> number(const py::handle& value, double low, double high) {
  double result;
  if (PyFloat_CheckExact(value.ptr())) {
    result = PyFloat_AS_DOUBLE(value.ptr());
  } else if (PyLong_CheckExact(value.ptr())) {
    result = PyLong_AsDouble(value.ptr());
    if (PyErr_Occurred()) PyErr_Clear();
  } else {
    return std::nullopt;
  }
  return result >= low && result <= high ? std::optional<double>(result) : std::nullopt;
}

bool is(const py::handle& value, std::string_view text) {
  Py_ssize_t size = 0;
  const char* data =
      PyUnicode_CheckExact(value.ptr()) ? PyUnicode_AsUTF8AndSize(value.ptr(), &size) : nullptr;
  return data && std::string_view(data, static_cast<size_t>(size)) == text;
}

// Function transforms, dispatch modes and forward-mode differentiation take the Python path.
bool is_observed(const Tensor& student, const Tensor& teacher) {
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() || student._fw_grad(0).defined() ||
         teacher._fw_grad(0).defined();
}

bool suits(Divergence divergence, const Tensor& student, const std::optional<Tensor>& labels) {
  return divergence != Divergence::kDecoupled || (labels && student.size(-1) > 1);
}

bool same_rows(const Tensor& labels, const Tensor& student) {
  return labels.sizes() == student.sizes().slice(0, student.dim() - 1);
}

constexpr double kLeast = std::numeric_limits<double>::min();
constexpr double kMost = std::numeric_limits<double>::max();

// (hard_weight, soft_weight) from the two ways to give them, as checks.weights() has them.
std::optional<std::pair<double, double>> read_weights(const py::handle& alpha,
                                                      const py::handle& hard,
                                                      const py::handle& soft, bool has_labels) {
  if (hard.is_none() && soft.is_none()) {
    if (!has_labels) return alpha.is_none() ? std::optional(std::pair(0.0, 1.0)) : std::nullopt;
    const auto share = alpha.is_none() ? std::optional<double>(0.5) : number(alpha, 0, 1);
    return share ? std::optional(std::pair(*share, 1.0 - *share)) : std::nullopt;
  }
  const auto own_hard = hard.is_none() ? std::optional<double>(1.0) : number(hard, 0, kMost);
  const auto own_soft = soft.is_none() ? std::optional<double>(1.0) : number(soft, 0, kMost);
  if (!alpha.is_none() || (!has_labels && !hard.is_none()) || !own_hard || !own_soft) {
    return std::nullopt;
  }
  return std::pair(*own_hard, *own_soft);
}

// In the order in which losses.py gives them.
std::optional<Settings> read_settings(const py::args& options, bool has_labels, bool with_terms) {
  const py::object own_temperature = options[1], given_normalizer = options[8];
  const py::object ignore_index = options[5], reduction = options[6], mix = options[10];
  const auto temperature = number(options[0], kLeast, kMost);
  const auto teacher_temperature =
      own_temperature.is_none() ? temperature : number(own_temperature, kLeast, kMost);
  const auto weights = read_weights(options[2], options[3], options[4], has_labels);
  const auto smoothing = number(options[7], 0, 1);
  const auto normalizer = given_normalizer.is_none() ? std::optional<double>(0.0)
                                                     : number(given_normalizer, kLeast, kMost);
  const bool mean = is(reduction, "mean"), sum = is(reduction, "sum");
  if (!temperature || !teacher_temperature || !weights || !smoothing || !normalizer ||
      !(mean || (sum && given_normalizer.is_none())) || !PyLong_CheckExact(ignore_index.ptr())) {
    return std::nullopt;
  }
  return Settings{*temperature,
                  *teacher_temperature,
                  weights->first,
                  weights->second,
                  *smoothing,
                  ignore_index.cast<int64_t>(),
                  options[9].cast<int64_t>(),
                  mix.is_none() ? 0.5 : mix.cast<double>(),
                  mean ? 2 : 1,
                  *normalizer,
                  with_terms};
}

py::object loss(const py::handle& student_object, const py::handle& teacher_object,
                const py::handle& labels_object, bool with_terms, bool cuda,
                const py::args& options) {
  const bool has_labels = !labels_object.is_none();
  if (!is_plain(student_object) || !is_plain(teacher_object) ||
      (has_labels && !is_plain(labels_object)))
    return py::none();
  const Tensor& student = THPVariable_Unpack(student_object.ptr());
  const Tensor& teacher = THPVariable_Unpack(teacher_object.ptr());
  std::optional<Tensor> labels;
  if (has_labels) labels = THPVariable_Unpack(labels_object.ptr());
  const auto is_logits = [](const Tensor& tensor) {
    const at::ScalarType type = tensor.scalar_type();
    return tensor.layout() == at::kStrided && (type == at::kFloat || type == at::kBFloat16 ||
                                               type == at::kHalf || type == at::kDouble);
  };
  const bool usual =
      is_logits(student) && is_logits(teacher) && has_kernels(student, cuda) &&
      student.device() == teacher.device() && student.dim() > 0 && student.size(-1) > 0 &&
      (student.stride(-1) == 1 || student.size(-1) == 1) && student.sizes() == teacher.sizes() &&
      !teacher.requires_grad() && !is_observed(student, teacher) &&
      (!labels || (labels->scalar_type() == at::kLong && same_rows(*labels, student) &&
                   labels->device() == student.device()));
  if (!usual) return py::none();
  const auto settings = read_settings(options, has_labels, with_terms);
  if (!settings || !suits(static_cast<Divergence>(settings->divergence), student, labels)) {
    return py::none();
  }
  Tensor out;
  {
    py::gil_scoped_release no_gil;
    out = at::GradMode::is_enabled() && student.requires_grad()
              ? differentiable_loss(student, teacher, labels, *settings)
              : std::get<0>(call_loss(student, teacher, labels, *settings, false));
  }
  return py::cast(out);
}

// Memory for a contiguous gradient, from gradients.h; None where that has none to give.
py::object gradient(const py::handle& student_object) {
  if (!is_plain(student_object)) return py::none();
  const Tensor& student = THPVariable_Unpack(student_object.ptr());
  const bool usual = student.is_cpu() && student.layout() == at::kStrided &&
                     !c10::impl::TorchDispatchModeTLS::any_modes_set();
  return usual ? py::cast(empty_gradient(student)) : py::none();
}

}  // namespace

PYBIND11_MODULE(_eager, m) {
  m.attr("torch_version") = FASTKD_TORCH_VERSION;
  m.def("loss", &loss);
  m.def("gradient", &gradient);
}

}  // namespace fastkd
