// The module fastkd._eager: autograd of the fused losses, memory for their gradients, and calls
// with bound arguments, in C++.
//
// The module is optional and only adds speed: python/fastkd/_core/autograd.py implements the same
// autograd in Python (docs/maths.md, section 8). torch's C++ autograd has no stable ABI, so the
// module fits only the torch of its build. The module records the version of torch, and
// python/fastkd/_core/native.py calls register_kernels() only if the version matches.
//
// Each loss `op` of library.cpp and topk.cpp has three more ops. `op_into` writes the gradient in
// the forward pass. `op_backward_` scales or writes the gradient in the backward pass.
// `op_gradient` computes the gradient by differentiable operations. All four ops take the arguments
// of `op`, which this file reads from the schema of `op`.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "../kernels.h"
#include "grad_buffer.h"
#include "gradient_strides.h"

namespace fastkd {
namespace {

namespace py = pybind11;
using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

c10::OperatorHandle find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fastkd::" + name).c_str(), "");
}

struct Ops {
  enum class Kind { kNumber, kNumbers, kTensor, kTensors };

  Ops(const std::string& name, bool strided)
      : loss(find_op(name)),
        loss_into(find_op(name + "_into")),
        backward(find_op(name + "_backward_")),
        gradient(find_op(name + "_gradient")),
        has_stats(loss_into.schema().returns().size() == 2),
        strided(strided) {
    for (const c10::Argument& argument : loss.schema().arguments()) {
      const std::string type = argument.type()->str();
      if (argument.name() == "reduction") reduction = kinds.size();
      kinds.push_back(type == "Tensor" || type == "Tensor?" ? Kind::kTensor
                      : type == "Tensor[]"                  ? Kind::kTensors
                      : type == "float[]"                   ? Kind::kNumbers
                                                            : Kind::kNumber);
    }
  }

  bool is_per_row(c10::ArrayRef<IValue> arguments) const {
    return arguments[reduction].toInt() == static_cast<int64_t>(Reduction::kNone);
  }

  c10::OperatorHandle loss, loss_into, backward, gradient;
  bool has_stats;           // true if `loss_into` returns statistics for `backward`
  bool strided;             // `loss_into` can write a gradient whose classes are not adjacent
  std::vector<Kind> kinds;  // kinds of the arguments of the loss
  size_t reduction = 0;     // index of the argument `reduction`
};

// Append the tensors among `arguments` to `tensors`, and return the other arguments as scalars. An
// argument of one tensor becomes a bool, which is true if the tensor is present. A list becomes its
// length, followed by its numbers if it holds numbers.
std::vector<IValue> take_tensors(const Ops& ops, c10::ArrayRef<IValue> arguments,
                                 variable_list* tensors) {
  std::vector<IValue> numbers;
  numbers.reserve(arguments.size());
  tensors->reserve(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (ops.kinds[i] == Ops::Kind::kTensor) {
      numbers.emplace_back(arguments[i].isTensor());
      if (arguments[i].isTensor()) tensors->push_back(arguments[i].toTensor());
    } else if (arguments[i].isList()) {
      const auto list = arguments[i].toListRef();
      numbers.emplace_back(static_cast<int64_t>(list.size()));
      for (const IValue& value : list)
        value.isTensor() ? tensors->push_back(value.toTensor()) : numbers.push_back(value);
    } else {
      numbers.push_back(arguments[i]);
    }
  }
  return numbers;
}

// Return the arguments of the loss: the inverse of take_tensors().
Stack join_tensors(const Ops& ops, const Tensor* tensors, c10::ArrayRef<IValue> numbers) {
  Stack arguments;
  auto number = numbers.begin();
  for (const Ops::Kind kind : ops.kinds) {
    if (kind == Ops::Kind::kTensor) {
      arguments.push_back((number++)->toBool() ? IValue(*tensors++) : IValue());
    } else if (kind == Ops::Kind::kTensors) {
      const int64_t count = (number++)->toInt();
      arguments.emplace_back(std::vector<Tensor>(tensors, tensors + count));
      tensors += count;
    } else if (kind == Ops::Kind::kNumbers) {
      std::vector<double> list(static_cast<size_t>((number++)->toInt()));
      for (double& value : list) value = (number++)->toDouble();
      arguments.emplace_back(std::move(list));
    } else {
      arguments.push_back(*number++);
    }
  }
  return arguments;
}

// Call an op with `first`, then `arguments`, which are those of a loss, then `last`. Return the
// op's results.
Stack call(const c10::OperatorHandle& op, Stack first, const Stack& arguments, Stack last = {}) {
  first.reserve(first.size() + arguments.size() + last.size());
  first.insert(first.end(), arguments.begin(), arguments.end());
  first.insert(first.end(), last.begin(), last.end());
  op.callBoxed(first);
  return first;
}

Tensor empty_gradient(const Ops& ops, const Tensor& student) {
  static const auto op = find_op("empty_gradient").typed<Tensor(const Tensor&, bool)>();
  return op.call(student, ops.strided);
}

// Return true if the tensor's memory may be read and written directly. Return false while
// operations are traced or recorded, and for tensor subclasses and batched tensors.
bool is_writable(const Tensor& tensor) {
  constexpr c10::DispatchKeySet kDense(
      {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU,
       c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCPU,
       c10::DispatchKey::AutocastCUDA, c10::DispatchKey::ADInplaceOrView});
  return (tensor.key_set() | kDense) == kDense && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Return true if `tensor` is a batch of gradients (is_grads_batched=True), or if any transform of
// torch.func, such as vmap, is active.
bool is_batch(const Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::Batched) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool is_one(const Tensor& factor) {
  if (!factor.is_cpu() || factor.numel() != 1) return false;
  return factor.scalar_type() == at::kDouble ? *factor.const_data_ptr<double>() == 1
                                             : *factor.const_data_ptr<float>() == 1;
}

// Reshape `factor`, one number for each row, so that it broadcasts over the classes of `student`.
Tensor as_column(const Tensor& factor, const Tensor& student) {
  auto sizes = student.sizes().vec();
  sizes.back() = 1;
  return factor.reshape(sizes);
}

template <class T>
struct FusedLoss : torch::autograd::Function<T> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward()

  // Compute the loss. `stack`: the arguments of the loss on top, `student` among them. The op that
  // is called takes these arguments from the stack.
  static Tensor forward(AutogradContext* ctx, const Tensor& student, Stack* stack) {
    const Ops& ops = T::ops();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto arguments = torch::jit::last(*stack, ops.kinds.size());
    variable_list tensors;
    auto numbers = take_tensors(ops, arguments, &tensors);
    IValue grad;
    if (!ops.is_per_row(arguments)) grad = empty_gradient(ops, student);
    const bool calls_into = ops.has_stats || grad.isTensor();
    if (calls_into)
      stack->insert(stack->end() - static_cast<std::ptrdiff_t>(arguments.size()), grad);
    if (ops.has_stats) stack->emplace_back(true);
    (calls_into ? ops.loss_into : ops.loss).callBoxed(*stack);
    if (ops.has_stats) tensors.push_back(torch::jit::pop(*stack).toTensor());
    ctx->saved_data["numbers"] = c10::ivalue::Tuple::create(std::move(numbers));
    ctx->save_for_backward(std::move(tensors));
    // `grad` is not a saved tensor: the first backward pass scales `grad` in place and returns it.
    ctx->saved_data["grad"] = std::move(grad);
    return torch::jit::pop(*stack).toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Ops& ops = T::ops();
    const variable_list saved = ctx->get_saved_variables();
    const auto numbers = ctx->saved_data["numbers"].toTupleRef().elements().asArrayRef();
    Tensor factor = grad_outputs[0];
    // With terms, only the loss, the first entry of the result, has a gradient. `with_terms` is the
    // last argument of each loss.
    if (numbers.back().toBool()) factor = factor.select(0, 0);
    return {gradient(ops, saved, numbers, factor, &ctx->saved_data["grad"]), Tensor()};
  }

 private:
  // Return `factor` times the gradient. `cached`: the gradient for a factor of 1, or None.
  static Tensor gradient(const Ops& ops, const variable_list& saved, c10::ArrayRef<IValue> numbers,
                         const Tensor& factor, IValue* cached) {
    const Tensor& student = saved[0];
    const auto arguments = [&] { return join_tensors(ops, saved.data(), numbers); };
    if (is_batch(factor)) {
      const Stack all = arguments();
      const Tensor one = at::ones(factor.sizes(), factor.options());
      const Tensor unscaled = call(ops.gradient, {one}, all)[0].toTensor();
      const bool per_row = ops.is_per_row(all);
      return unscaled.mul(per_row ? as_column(factor, student) : factor).to(student.scalar_type());
    }
    if (at::GradMode::is_enabled()) return call(ops.gradient, {factor}, arguments())[0].toTensor();
    Tensor grad = cached->isTensor() ? std::exchange(*cached, IValue()).toTensor() : Tensor();
    // Compiled autograd calls this function on a copy of the saved data, which shares `grad`, and
    // again on the original data. `grad` is therefore scaled in place only if nothing shares
    // `grad`.
    const bool is_unshared = is_writable(factor) && grad.defined() && grad.use_count() == 1;
    if (grad.defined() && !is_unshared) {
      if (student.scalar_type() != at::kHalf) return grad.mul(factor).to(student.scalar_type());
      // Recompute an fp16 gradient: `factor` may be a loss scale, which cannot restore numbers that
      // have underflowed.
      grad = Tensor();
    }
    const bool filled = grad.defined();  // false also in a second backward pass (retain_graph=True)
    if (filled && is_one(factor)) return grad;
    if (!filled) grad = empty_gradient(ops, student);
    Stack first{grad, factor.contiguous()};
    if (ops.has_stats) first.emplace_back(saved.back());
    call(ops.backward, std::move(first), arguments(), {filled});
    return grad;
  }
};

struct FastKDLoss : FusedLoss<FastKDLoss> {
  static const Ops& ops() {
    static const Ops kOps("loss", true);
    return kOps;
  }
};

struct FastKDTopkLoss : FusedLoss<FastKDTopkLoss> {
  static const Ops& ops() {
    static const Ops kOps("topk_loss", false);
    return kOps;
  }
};

// Run the loss: with autograd if the student requires a gradient, else without.
template <class T>
void loss_with_autograd(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const Tensor& student = torch::jit::peek(*stack, 0, count).toTensor();
  if (!(at::GradMode::is_enabled() && student.requires_grad())) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.callBoxed(*stack);
  }
  torch::jit::push(*stack, T::apply(Tensor(student), stack));
}

// The op of a loss with all arguments bound except some tensors. torch.ops converts and checks
// each of the op's arguments in every call, which takes longer than a small loss itself.
class PreparedCall {
 public:
  // Bind the arguments. `arguments`: the op's arguments, in the order of the schema, with None or
  // an empty list for the unbound tensors. `places`: the indices of the unbound tensors among
  // `arguments`.
  PreparedCall(const std::string& name, const py::tuple& arguments, std::vector<size_t> places)
      : op_(find_op(name)), places_(std::move(places)) {
    const auto& schema = op_.schema().arguments();
    TORCH_CHECK_VALUE(arguments.size() == schema.size(), name, " has ", schema.size(),
                      " arguments");
    for (size_t i = 0; i < schema.size(); ++i) {
      const py::handle value = arguments[i];
      arguments_.push_back(value.is_none() ? IValue()
                                           : torch::jit::toIValue(value, schema[i].type()));
    }
  }

  // Call the op. `tensors`: a tensor or None for each place. If the op takes a list at the place,
  // the tensor becomes the only element of the list.
  Tensor operator()(const py::args& tensors) const {
    TORCH_CHECK_VALUE(tensors.size() == places_.size(), "expected ", places_.size(), " tensors");
    Stack stack;
    stack.reserve(arguments_.size() + 2);  // the autograd kernel adds two arguments
    stack = arguments_;
    for (size_t i = 0; i < places_.size(); ++i) {
      if (tensors[i].is_none()) continue;
      const auto tensor = tensors[i].cast<Tensor>();
      const bool list =
          op_.schema().arguments()[places_[i]].type()->kind() == at::TypeKind::ListType;
      stack[places_[i]] = list ? IValue(std::vector<Tensor>{tensor}) : IValue(tensor);
    }
    const py::gil_scoped_release no_gil;
    op_.callBoxed(stack);
    return stack[0].toTensor();
  }

 private:
  c10::OperatorHandle op_;
  std::vector<size_t> places_;
  Stack arguments_;
};

Tensor empty_cpu_gradient(const Tensor& student, bool strided) {
  TORCH_CHECK(student.dim() >= 1, "student logits must have at least one dimension");
  c10::SmallVector<int64_t, 6> strides(static_cast<size_t>(student.dim()));
  gradient_strides(student.dim(), student.sizes().data(), student.strides().data(), strided,
                   strides.data());
  return grad_buffer::empty_gradient(student, strides);
}

// Register the autograd kernels and empty_gradient for the rest of the process.
void register_kernels() {
  using torch::Library;
  static auto* const autograd =
      new Library(Library::IMPL, "fastkd", c10::DispatchKey::Autograd, "eager.cpp", 0);
  autograd->impl("loss",
                 torch::CppFunction::makeFromBoxedFunction<&loss_with_autograd<FastKDLoss>>());
  autograd->impl("topk_loss",
                 torch::CppFunction::makeFromBoxedFunction<&loss_with_autograd<FastKDTopkLoss>>());
  static auto* const memory =
      new Library(Library::IMPL, "fastkd", c10::DispatchKey::CPU, "eager.cpp", 0);
  memory->impl("empty_gradient", &empty_cpu_gradient);
}

}  // namespace

PYBIND11_MODULE(_eager, m) {
  m.attr("torch_version") = FASTKD_TORCH_VERSION;
  m.def("register_kernels", &register_kernels);
  py::class_<PreparedCall>(m, "PreparedCall")
      .def(py::init<const std::string&, const py::tuple&, std::vector<size_t>>())
      .def("__call__", torch::wrap_pybind_function(&PreparedCall::operator()));
}

}  // namespace fastkd
