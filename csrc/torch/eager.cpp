// The module fastkd._eager: the way in for plain eager calls, whose host time is the whole cost of
// a small batch.
//
// Optional. It uses torch's C++ autograd, which has no stable ABI, so it is built from source only,
// carries the version of the torch that it was built with, and is left unused with any other
// (python/fastkd/native.py). It takes a call only when nothing about it needs a thought: plain
// tensors, the usual options, all valid. For anything else it returns None, and the Python path
// (losses.py) checks, explains, or does it.
#include "eager.h"

#include <atomic>

#include "../kernels.h"

namespace fastkd {
namespace {

struct Settings : Options {
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
using BackwardOp = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const std::optional<Tensor>&, const std::optional<Tensor>&, double, double,
                        double, double, double, int64_t, int64_t, double, bool);

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

// 16-bit gradients cannot be scaled afterwards (Cpu::backward), and under a GradScaler, or where
// gradients are accumulated, grad_output is not 1. It seldom changes: so the forward pass writes
// them for the grad_output that the last one met. Where that was wrong they are computed anew, to
// the same bits.
std::atomic<double> last_grad_output{1.0};

bool is_16_bit(const Tensor& tensor) { return tensor.element_size() == 2; }

// On a CPU, past the dispatcher. The gradient, times grad_output, is written where there is memory
// for it.
Tensor run(const Rows& rows, const Settings& settings, const Tensor& grad, double grad_output) {
  ForwardArgs args;
  static_cast<Inputs&>(args) = rows.inputs;
  set_options(settings, &args);
  args.reduction = static_cast<Reduction>(settings.reduction);
  if (grad.defined()) {
    args.grad = grad.mutable_data_ptr();
    args.grad_stride = rows.grad_stride;
    args.grad_output = grad_output;
  }
  const Tensor out =
      settings.with_terms ? empty_on_cpu({1 + kTerms}, args) : empty_on_cpu({}, args);
  calls().forward(args, divisor(settings.normalizer), settings.with_terms, out.mutable_data_ptr());
  return out;
}

bool are_operands(const Tensor& student, const Tensor& teacher,
                  const std::optional<Tensor>& labels) {
  return has_rows(student) && is_logits(teacher) && student.device() == teacher.device() &&
         student.sizes() == teacher.sizes() && are_labels(labels, student);
}

struct LossBackward : GradientNode {
  SavedVariable teacher, labels;
  Tensor stats;  // on CUDA: what the gradient is written from again
  Settings settings;

  std::string name() const override { return "FastKDLossBackward"; }

 private:
  void release() override {
    teacher.reset_data();
    labels.reset_data();
    stats.reset();
  }

  void met(double wanted, const Tensor& result) override {
    if (is_16_bit(result) && wanted != 0 && std::isfinite(wanted)) last_grad_output = wanted;
  }

  void fill(const Tensor& result, const Tensor& factor, const Tensor& logits,
            bool filled) override {
    if (logits.is_cpu()) {
      // Scaling is exact enough in the number type that everything is computed in.
      if (filled && !is_16_bit(result)) return void(result.mul_(factor));
      return write_again(result, factor, logits);
    }
    static const auto backward = op<BackwardOp>("fastkd::loss_backward_");
    backward.call(result, factor, stats, logits, teacher.unpack(), if_defined(labels.unpack()),
                  std::nullopt, settings.temperature, settings.teacher_temperature,
                  settings.hard_weight, settings.soft_weight, settings.label_smoothing,
                  settings.ignore_index, settings.divergence, settings.mix, filled);
  }

  // By the forward pass, to the same bits: the op would want statistics, which that does not leave
  // where it goes past the dispatcher.
  void write_again(const Tensor& result, const Tensor& factor, const Tensor& logits) {
    const Tensor saved_teacher = teacher.unpack();
    const auto saved_labels = if_defined(labels.unpack());
    Settings loss_alone = settings;
    loss_alone.with_terms = false;
    // Hooks may give back something else than they were given to save.
    const bool as_given = is_plain(logits) && is_plain(saved_teacher) &&
                          (!saved_labels || is_plain(*saved_labels)) &&
                          are_operands(logits, saved_teacher, saved_labels) &&
                          logits.sizes() == result.sizes() && logits.dtype() == result.dtype();
    const auto rows = as_given ? rows_of(logits, saved_teacher, saved_labels) : std::nullopt;
    if (!rows) return void(result.copy_(formula(loss_alone, factor)));
    RECORD_FUNCTION("fastkd::loss_backward_", std::vector<c10::IValue>({result, factor, logits}));
    run(*rows, loss_alone, result, value_of(factor));
  }

  Tensor differentiable(const Tensor& factor) override { return formula(settings, factor); }

  Tensor formula(const Settings& s, const Tensor& factor) {
    py::gil_scoped_acquire gil;
    const py::module_ derivatives = py::module_::import("fastkd.derivatives");
    const py::object numbers = derivatives.attr("Settings")(
        s.temperature, s.teacher_temperature, s.hard_weight, s.soft_weight, s.label_smoothing,
        s.ignore_index, s.divergence, s.mix, s.reduction, s.normalizer, s.with_terms);
    return derivatives
        .attr("differentiable_gradient")(student.unpack(), teacher.unpack(),
                                         or_none(labels.unpack()), py::none(), py::none(), numbers,
                                         factor)
        .cast<Tensor>();
  }
};

// Nothing where the logits must be copied for the kernels, or where these fail.
std::optional<Tensor> compute(const Tensor& student, const Tensor& teacher,
                              const std::optional<Tensor>& labels, const Settings& settings,
                              bool with_grad) {
  const auto rows = student.is_cpu() ? rows_of(student, teacher, labels) : std::nullopt;
  if (student.is_cpu() && !rows) return std::nullopt;
  Tensor out, grad, stats;
  const double grad_output = rows && is_16_bit(student) ? last_grad_output.load() : 1.0;
  try {
    if (rows) {
      RECORD_FUNCTION("fastkd::loss", std::vector<c10::IValue>({student, teacher}));
      if (with_grad) grad = gradients::empty_gradient(student);
      out = run(*rows, settings, grad, grad_output);
    } else {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(out, grad, stats) = call_loss(student, teacher, labels, settings, with_grad);
    }
  } catch (const std::exception&) {
    return std::nullopt;  // the Python path finds out why
  }
  if (!with_grad) return out;
  // Only now, for hooks that save may raise, and are to be asked once.
  auto [pointer, node] = make_node<LossBackward>(student);
  node->settings = settings;
  node->with_terms = settings.with_terms;
  node->grad = std::move(grad);
  node->grad_output = grad_output;
  node->stats = std::move(stats);
  node->teacher = SavedVariable(teacher, false);
  if (labels) node->labels = SavedVariable(*labels, false);
  torch::autograd::set_history(out, pointer);
  return out;
}

bool suits(Divergence divergence, const Tensor& student, const std::optional<Tensor>& labels) {
  return divergence != Divergence::kDecoupled || (labels && student.size(-1) > 1);
}

// What losses.py gives, in its order.
enum Value : Py_ssize_t {
  kWithTerms,
  kCuda,
  kDivergences,  // {name: (number, default of mix)} of those that have kernels
  kStudent,
  kTeacher,
  kLabels,
  kOwnTemperature,
  kOwnTeacherTemperature,
  kAlpha,
  kOwnHardWeight,
  kOwnSoftWeight,
  kIgnoreIndex,
  kReduction,
  kLabelSmoothing,
  kClassWeight,
  kNormalizer,
  kDivergence,
  kMix,
  kTeacherForm,
  kTeacherWeights,
  kEnsemble,
  kStandardize,
  kClasses,
  kDim,
  kInplace,
  kTeacherGrad,
  kValues
};

// Whether what is left at its default here is.
bool is_usual(Values values) {
  for (const Value one : {kClassWeight, kMix, kTeacherWeights, kClasses})
    if (values[one] != Py_None) return false;
  return values[kStandardize] == Py_False && values[kInplace] == Py_False &&
         integer(values[kDim]) == -1 && is(values[kTeacherForm], "logits") &&
         is(values[kEnsemble], "probs") &&
         (is(values[kTeacherGrad], "error") || is(values[kTeacherGrad], "ignore"));
}

std::optional<Settings> read_settings(Values values, bool has_labels) {
  PyObject* const name = values[kDivergence];
  PyObject* const divergence =
      PyUnicode_CheckExact(name) ? PyDict_GetItemWithError(values[kDivergences], name) : nullptr;
  const auto usual = read_usual(
      {values[kOwnTemperature], values[kAlpha], values[kOwnHardWeight], values[kOwnSoftWeight],
       values[kIgnoreIndex], values[kReduction], values[kLabelSmoothing], values[kNormalizer]},
      has_labels);
  if (divergence == nullptr || !usual) return std::nullopt;
  PyObject* const own_temperature = values[kOwnTeacherTemperature];
  const auto teacher_temperature = own_temperature == Py_None
                                       ? std::optional<double>(usual->temperature)
                                       : number(own_temperature, kLeast, kMost);
  if (!teacher_temperature) return std::nullopt;
  PyObject* const mix = PyTuple_GET_ITEM(divergence, 1);
  return Settings{{usual->temperature, *teacher_temperature, usual->hard_weight, usual->soft_weight,
                   usual->label_smoothing, usual->ignore_index,
                   integer(PyTuple_GET_ITEM(divergence, 0)).value(),
                   mix == Py_None ? 0.5 : PyFloat_AsDouble(mix)},
                  usual->reduction,
                  usual->normalizer,
                  values[kWithTerms] == Py_True};
}

std::optional<Tensor> loss(Values values) {
  const bool cuda = values[kCuda] == Py_True, has_labels = values[kLabels] != Py_None;
  const Tensor* const student = plain_tensor(values[kStudent], cuda);
  const Tensor* const teacher = plain_tensor(values[kTeacher], cuda);
  const Tensor* const given = has_labels ? plain_tensor(values[kLabels], cuda) : nullptr;
  if (student == nullptr || teacher == nullptr || (has_labels && given == nullptr))
    return std::nullopt;
  const std::optional<Tensor> labels = has_labels ? std::optional(*given) : std::nullopt;
  const bool with_grad = at::GradMode::is_enabled() && student->requires_grad();
  const bool usual = are_operands(*student, *teacher, labels) && !teacher->requires_grad() &&
                     !is_observed(*student, *teacher) && is_usual(values) &&
                     !(with_grad && !(can_save(*teacher) && can_save(labels)));
  if (!usual) return std::nullopt;
  const auto settings = read_settings(values, has_labels);
  if (!settings || !suits(static_cast<Divergence>(settings->divergence), *student, labels)) {
    return std::nullopt;
  }
  py::gil_scoped_release no_gil;
  return compute(*student, *teacher, labels, *settings, with_grad);
}

// As a function of Python's: None where it has nothing.
template <auto kFunction, Py_ssize_t kCount>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
  try {
    const auto result = count == kCount ? kFunction(values) : std::nullopt;
    if (result) return THPVariable_Wrap(*result);
    PyErr_Clear();
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

template <auto kFunction, Py_ssize_t kCount>
void define(py::module_& m, const char* name) {
  static PyMethodDef definition{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<kFunction, kCount>)),
      METH_FASTCALL, nullptr};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
}

// Memory for a contiguous gradient, from gradients.h; None where that has none to give.
py::object gradient(const py::handle& student_object) {
  const Tensor* const student = plain_tensor(student_object.ptr(), false);
  const bool usual = student != nullptr && !c10::impl::TorchDispatchModeTLS::any_modes_set();
  return usual ? py::cast(gradients::empty_gradient(*student)) : py::none();
}

}  // namespace

const CpuCalls& calls() {
  static const CpuCalls* const kCalls = [] {
    const py::capsule capsule = py::module_::import("fastkd._C").attr("cpu_calls");
    return static_cast<const CpuCalls*>(PyCapsule_GetPointer(capsule.ptr(), kCpuCallsCapsule));
  }();
  return *kCalls;
}

PYBIND11_MODULE(_eager, m) {
  m.attr("torch_version") = FASTKD_TORCH_VERSION;
  calls();  // while Python is at hand
  define<&loss, kValues>(m, "loss");
  define<&topk_loss, kTopkValues>(m, "topk_loss");
  m.def("gradient", &gradient);
}

}  // namespace fastkd
