// What the two ways in for plain eager calls share (eager.cpp, eager_topk.cpp): the node of a loss
// whose forward pass has written the gradient, and what makes a call plain.
#pragma once
#include <ATen/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

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
#include <vector>

#include "direct.h"
#include "gradients.h"
#include "options.h"
#include "walk.h"

namespace fastkd {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The arguments of a Python function, in its order.
using Values = PyObject* const*;

// fastkd.topk_loss (eager_topk.cpp); nothing where the call is not plain.
std::optional<Tensor> topk_loss(Values values);
constexpr Py_ssize_t kTopkValues = 14;

// The functions of the other module (direct.h).
const CpuCalls& calls();

namespace {

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether a tensor's numbers are what its memory holds: wrappers, and views of negatives, have
// other keys.
inline bool is_plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet kUsual(
      {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU,
       c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCPU,
       c10::DispatchKey::AutocastCUDA, c10::DispatchKey::ADInplaceOrView});
  return (tensor.key_set() | kUsual) == kUsual && tensor.layout() == at::kStrided;
}

// The backward pass of a call whose forward pass has written the gradient.
struct GradientNode : torch::autograd::Node {
  SavedVariable student;
  Tensor grad;               // given away by the first call
  double grad_output = 1.0;  // that `grad` was written for
  bool with_terms = false;   // of the loss's numbers only the first has a gradient

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    student.reset_data();
    grad.reset();
    release();
  }

  variable_list apply(variable_list&& grad_outputs) override {
    Tensor factor = std::move(grad_outputs[0]);
    if (!factor.defined()) return {Tensor()};
    // create_graph=True, is_grads_batched=True
    if (at::GradMode::is_enabled() || is_batch(factor)) return {differentiable(factor)};
    // Tensors whose memory does not hold their number.
    if (factor.is_neg() || factor._is_zerotensor()) factor = at::zeros_like(factor).add_(factor);
    if (!is_plain(factor)) return {differentiable(factor)};
    if (with_terms) factor = factor.select(0, 0);
    // With retain_graph=True the first call gives the forward pass's buffer away: a second one,
    // which may not scale it again, starts anew.
    Tensor result;
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // threads may share the graph
      result = std::move(grad);
      grad.reset();
    }
    if (factor.is_cpu()) {
      const double wanted = value_of(factor);
      if (result.defined()) met(wanted, result);
      if (result.defined() && wanted == grad_output) return {result};
    }
    const Tensor logits = student.unpack();
    const bool filled = result.defined() && grad_output == 1.0;
    if (!result.defined()) {
      result = logits.is_cpu() ? gradients::empty_gradient(logits)
                               : at::empty_like(logits, at::MemoryFormat::Contiguous);
    }
    fill(result, factor, logits, filled);
    return {result};
  }

 protected:
  static std::optional<Tensor> if_defined(const Tensor& tensor) {
    return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
  }
  static double value_of(const Tensor& scalar) {
    return scalar.scalar_type() == at::kDouble ? *scalar.const_data_ptr<double>()
                                               : *scalar.const_data_ptr<float>();
  }
  static py::object or_none(const Tensor& tensor) {
    return tensor.defined() ? py::cast(tensor) : py::none();
  }

 private:
  // Lets go of what else is saved.
  virtual void release() = 0;
  // Fills `result` with `factor` times the gradient; `filled`: it holds the gradient already.
  virtual void fill(const Tensor& result, const Tensor& factor, const Tensor& logits,
                    bool filled) = 0;
  // The gradient by differentiable operations.
  virtual Tensor differentiable(const Tensor& factor) = 0;
  // Told of the grad_output that a backward pass on a CPU met.
  virtual void met(double, const Tensor&) {}

  static bool is_batch(const Tensor& factor) {
    return c10::impl::tls_is_dispatch_key_included(
               c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
           factor.key_set().has(c10::DispatchKey::Batched);
  }
};

// A node is held by shared_ptr up to torch 2.13, and by intrusive_ptr from 2.14 on.
template <class N>
auto make_node(const Tensor& student) {
  using Pointer = decltype(torch::autograd::Edge::function);
  const auto with_edges = [&](N* node) {
    node->set_next_edges(torch::autograd::collect_next_edges(student));
    node->student = SavedVariable(student, false);
    return node;
  };
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    auto node = std::make_shared<N>();
    return std::pair<Pointer, N*>{node, with_edges(node.get())};
  } else {
    auto node = c10::make_intrusive<N>();
    auto* raw = with_edges(node.get());
    return std::pair<Pointer, N*>{Pointer(std::move(node)), raw};
  }
}

// The tensor, if it is plain and of a backend with kernels.
inline const Tensor* plain_tensor(PyObject* value, bool cuda) {
  if (!THPVariable_CheckExact(value)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(value);
  const bool has_kernels = tensor.is_cpu() || (cuda && tensor.is_cuda());
  return has_kernels && is_plain(tensor) ? &tensor : nullptr;
}

// A float or int in [low, high], or nothing.
inline std::optional<double> number(PyObject* value, double low, double high) {
  double result;
  if (PyFloat_CheckExact(value)) {
    result = PyFloat_AS_DOUBLE(value);
  } else if (PyLong_CheckExact(value)) {
    result = PyLong_AsDouble(value);
    if (PyErr_Occurred()) PyErr_Clear();
  } else {
    return std::nullopt;
  }
  return result >= low && result <= high ? std::optional<double>(result) : std::nullopt;
}

// An int of 64 bits, or nothing.
inline std::optional<int64_t> integer(PyObject* value) {
  int overflow = 0;
  if (!PyLong_CheckExact(value)) return std::nullopt;
  const long long result = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0 ? std::optional<int64_t>(result) : std::nullopt;
}

inline bool is(PyObject* value, std::string_view text) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_CheckExact(value) ? PyUnicode_AsUTF8AndSize(value, &size) : nullptr;
  if (data == nullptr) PyErr_Clear();  // text that is no text, as "\ud800"
  return data && std::string_view(data, static_cast<size_t>(size)) == text;
}

// Function transforms, tracers, dispatch modes and forward-mode differentiation take the Python
// path.
inline bool is_observed(const Tensor& student, const Tensor& teacher) {
  return !(c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty() ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() || student._fw_grad(0).defined() ||
         teacher._fw_grad(0).defined();
}

inline bool same_rows(const Tensor& labels, const Tensor& student) {
  return labels.sizes() == student.sizes().slice(0, student.dim() - 1);
}

constexpr double kLeast = std::numeric_limits<double>::min();
constexpr double kMost = std::numeric_limits<double>::max();

// (hard_weight, soft_weight) from the two ways to give them, as checks.weights() has them.
inline std::optional<std::pair<double, double>> read_weights(PyObject* alpha, PyObject* hard,
                                                             PyObject* soft, bool has_labels) {
  if (hard == Py_None && soft == Py_None) {
    if (!has_labels) return alpha == Py_None ? std::optional(std::pair(0.0, 1.0)) : std::nullopt;
    const auto share = alpha == Py_None ? std::optional<double>(0.5) : number(alpha, 0, 1);
    return share ? std::optional(std::pair(*share, 1.0 - *share)) : std::nullopt;
  }
  const auto own_hard = hard == Py_None ? std::optional<double>(1.0) : number(hard, 0, kMost);
  const auto own_soft = soft == Py_None ? std::optional<double>(1.0) : number(soft, 0, kMost);
  if (alpha != Py_None || (!has_labels && hard != Py_None) || !own_hard || !own_soft) {
    return std::nullopt;
  }
  return std::pair(*own_hard, *own_soft);
}

inline bool is_logits(const Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

inline bool has_rows(const Tensor& student) {
  return is_logits(student) && student.dim() > 0 && student.size(-1) > 0 &&
         (student.stride(-1) == 1 || student.size(-1) == 1);
}

inline bool are_labels(const std::optional<Tensor>& labels, const Tensor& student) {
  return !labels || (labels->scalar_type() == at::kLong && same_rows(*labels, student) &&
                     labels->device() == student.device());
}

// The options that both losses have, as Python has them.
struct Given {
  PyObject *temperature, *alpha, *hard_weight, *soft_weight, *ignore_index, *reduction,
      *label_smoothing, *normalizer;
};
// And as the ops have them.
struct Usual {
  double temperature, hard_weight, soft_weight, label_smoothing;
  int64_t ignore_index, reduction;
  double normalizer;  // what mean divides by, 0: the rows that count
};
inline std::optional<Usual> read_usual(const Given& given, bool has_labels) {
  const auto temperature = number(given.temperature, kLeast, kMost);
  const auto weights = read_weights(given.alpha, given.hard_weight, given.soft_weight, has_labels);
  const auto smoothing = number(given.label_smoothing, 0, has_labels ? 1 : 0);
  const auto ignore_index = integer(given.ignore_index);
  const bool mean = is(given.reduction, "mean"), counts = given.normalizer == Py_None;
  const auto normalizer =
      counts ? std::optional<double>(0.0) : number(given.normalizer, kLeast, kMost);
  if (!temperature || !weights || !smoothing || !ignore_index || !normalizer ||
      !(mean || (counts && is(given.reduction, "sum")))) {
    return std::nullopt;
  }
  return Usual{*temperature,    weights->first,
               weights->second, *smoothing,
               *ignore_index,   static_cast<int64_t>(mean ? Reduction::kMean : Reduction::kSum),
               *normalizer};
}

inline std::optional<double> divisor(double normalizer) {
  return normalizer > 0 ? std::optional<double>(normalizer) : std::nullopt;
}

inline DType dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

inline bool is_readable(const Tensor& tensor) {
  return tensor.is_contiguous() && is_aligned(tensor.const_data_ptr(), tensor.element_size());
}

// The operands of a call on a CPU; nothing where one of them must be copied for the kernels.
struct Rows {
  Inputs inputs;
  RowStrides grad_stride;  // of a contiguous gradient
};
inline std::optional<Rows> rows_of(const Tensor& student, const Tensor& teacher,
                                   const std::optional<Tensor>& labels) {
  const auto sizes = student.sizes();
  c10::SmallVector<int64_t, 6> grad_strides(sizes.size(), 1);
  for (size_t dim = sizes.size() - 1; dim-- > 0;)
    grad_strides[dim] = grad_strides[dim + 1] * sizes[dim + 1];
  const auto placed = [](const Tensor& logits) {
    return Placed{logits.const_data_ptr(), static_cast<int64_t>(logits.element_size()),
                  logits.strides().data()};
  };
  const auto layout = walk(student.dim(), sizes.data(), placed(student), placed(teacher),
                           grad_strides.data(), false);
  if (!layout || (labels && !is_readable(*labels))) return std::nullopt;
  Rows rows;
  Inputs& in = rows.inputs;
  in.classes = sizes.back();
  in.rows = student.numel() / in.classes;
  in.group_rows = layout->group_rows;
  in.student = student.const_data_ptr();
  in.student_stride = layout->student;
  in.student_dtype = dtype_of(student);
  in.teacher = teacher.const_data_ptr();
  in.teacher_stride = layout->teacher;
  in.teacher_dtype = dtype_of(teacher);
  if (labels) in.labels = labels->const_data_ptr<int64_t>();
  rows.grad_stride = layout->grad;
  return rows;
}

// Inference tensors, which autograd cannot save, are copied by the Python path.
inline bool can_save(const Tensor& tensor) { return !tensor.is_inference(); }
inline bool can_save(const std::optional<Tensor>& tensor) { return !tensor || can_save(*tensor); }

inline Tensor empty_on_cpu(at::IntArrayRef sizes, const Inputs& inputs) {
  const bool in_double = computes_in_double(inputs.student_dtype, inputs.teacher_dtype);
  return Tensor(at::detail::empty_cpu(sizes, in_double ? at::kDouble : at::kFloat));
}

}  // namespace
}  // namespace fastkd
