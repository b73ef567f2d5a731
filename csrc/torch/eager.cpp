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

struct LossBackward : GradientNode {
  SavedVariable teacher, labels;
  Tensor stats;  // for the following calls, and where scaling `grad` would not be exact
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
    static const auto backward = op<BackwardOp>("fastkd::loss_backward_");
    backward.call(result, factor, stats, logits, teacher.unpack(), if_defined(labels.unpack()),
                  std::nullopt, settings.temperature, settings.teacher_temperature,
                  settings.hard_weight, settings.soft_weight, settings.label_smoothing,
                  settings.ignore_index, settings.divergence, settings.mix, filled);
  }

  Tensor differentiable(const Tensor& factor) override {
    py::gil_scoped_acquire gil;
    const py::module_ derivatives = py::module_::import("fastkd.derivatives");
    const py::object numbers = derivatives.attr("Settings")(
        settings.temperature, settings.teacher_temperature, settings.hard_weight,
        settings.soft_weight, settings.label_smoothing, settings.ignore_index, settings.divergence,
        settings.mix, settings.reduction, settings.normalizer, settings.with_terms);
    return derivatives
        .attr("differentiable_gradient")(student.unpack(), teacher.unpack(),
                                         or_none(labels.unpack()), py::none(), py::none(), numbers,
                                         factor)
        .cast<Tensor>();
  }
};

Tensor differentiable_loss(const Tensor& student, const Tensor& teacher,
                           const std::optional<Tensor>& labels, const Settings& settings) {
  auto [pointer, node] = make_node<LossBackward>(student);
  node->settings = settings;
  node->with_terms = settings.with_terms;
  node->teacher = SavedVariable(teacher, false);
  if (labels) node->labels = SavedVariable(*labels, false);
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (student.is_cpu()) {
      node->grad = gradients::empty_gradient(student);
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

bool suits(Divergence divergence, const Tensor& student, const std::optional<Tensor>& labels) {
  return divergence != Divergence::kDecoupled || (labels && student.size(-1) > 1);
}

// In the order in which losses.py gives them.
std::optional<Settings> read_settings(const py::args& options, bool has_labels, bool with_terms) {
  const py::object own_temperature = options[1], given_normalizer = options[8];
  const py::object reduction = options[6], mix = options[10];
  const auto ignore_index = integer(options[5]);
  const auto temperature = number(options[0], kLeast, kMost);
  const auto teacher_temperature =
      own_temperature.is_none() ? temperature : number(own_temperature, kLeast, kMost);
  const auto weights = read_weights(options[2], options[3], options[4], has_labels);
  const auto smoothing = number(options[7], 0, 1);
  const auto normalizer = read_normalizer(given_normalizer);
  const bool mean = is(reduction, "mean"), sum = is(reduction, "sum");
  if (!temperature || !teacher_temperature || !weights || !smoothing || !normalizer ||
      !(mean || (sum && given_normalizer.is_none())) || !ignore_index) {
    return std::nullopt;
  }
  return Settings{*temperature,
                  *teacher_temperature,
                  weights->first,
                  weights->second,
                  *smoothing,
                  *ignore_index,
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
  const bool usual = are_rows(student, cuda) && is_logits(teacher) &&
                     student.device() == teacher.device() && student.sizes() == teacher.sizes() &&
                     !teacher.requires_grad() && !is_observed(student, teacher) &&
                     are_labels(labels, student);
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
  return usual ? py::cast(gradients::empty_gradient(student)) : py::none();
}

}  // namespace

PYBIND11_MODULE(_eager, m) {
  m.attr("torch_version") = FASTKD_TORCH_VERSION;
  m.def("loss", &loss);
  m.def("topk_loss", &topk_loss);
  m.def("gradient", &gradient);
}

}  // namespace fastkd
