// The way in for plain eager calls of the sparse loss, as eager.cpp is for those with all logits.
#include "../topk.h"
#include "eager.h"

namespace fastkd {
namespace {

// The numbers of a call, as the op's schema has them (topk.cpp).
struct TopkSettings {
  double temperature, hard_weight, soft_weight, label_smoothing;
  int64_t ignore_index, tail, reduction;
  double normalizer;
};

using TopkOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                          const std::optional<Tensor>&,
                                          const std::optional<Tensor>&, double, double, double,
                                          double, int64_t, int64_t, int64_t, double, bool);
using TopkIntoOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const std::optional<Tensor>&, const std::optional<Tensor>&, double,
                          double, double, double, int64_t, int64_t, int64_t, double);
using BackwardOp = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const std::optional<Tensor>&, const std::optional<Tensor>&, double, double,
                        double, double, int64_t, int64_t, int64_t, double, bool);

struct Lists {
  const Tensor &indices, &log_probs;
  std::optional<Tensor> labels;
};

std::tuple<Tensor, Tensor> call_topk(const Tensor& student, const Lists& lists,
                                     const TopkSettings& s, bool with_grad) {
  static const auto loss = op<TopkOp>("fastkd::topk_loss");
  return loss.call(student, lists.indices, lists.log_probs, lists.labels, std::nullopt,
                   s.temperature, s.hard_weight, s.soft_weight, s.label_smoothing, s.ignore_index,
                   s.tail, s.reduction, s.normalizer, with_grad);
}

Tensor call_topk_into(const Tensor& grad, const Tensor& student, const Lists& lists,
                      const TopkSettings& s) {
  static const auto loss_into = op<TopkIntoOp>("fastkd::topk_loss_into");
  return loss_into.call(grad, student, lists.indices, lists.log_probs, lists.labels, std::nullopt,
                        s.temperature, s.hard_weight, s.soft_weight, s.label_smoothing,
                        s.ignore_index, s.tail, s.reduction, s.normalizer);
}

struct TopkLossBackward : GradientNode {
  SavedVariable indices, log_probs, labels;
  TopkSettings settings;

  std::string name() const override { return "FastKDTopkLossBackward"; }

 private:
  void release() override {
    indices.reset_data();
    log_probs.reset_data();
    labels.reset_data();
  }

  void fill(const Tensor& result, const Tensor& factor, const Tensor& logits,
            bool filled) override {
    static const auto backward = op<BackwardOp>("fastkd::topk_loss_backward_");
    const TopkSettings& s = settings;
    backward.call(result, factor, logits, indices.unpack(), log_probs.unpack(),
                  if_defined(labels.unpack()), std::nullopt, s.temperature, s.hard_weight,
                  s.soft_weight, s.label_smoothing, s.ignore_index, s.tail, s.reduction,
                  s.normalizer, filled);
  }

  Tensor differentiable(const Tensor& factor) override {
    py::gil_scoped_acquire gil;
    const py::module_ sparse = py::module_::import("fastkd.sparse");
    const TopkSettings& s = settings;
    const py::object numbers =
        sparse.attr("Settings")(s.temperature, s.hard_weight, s.soft_weight, s.label_smoothing,
                                s.ignore_index, s.tail, s.reduction, s.normalizer);
    return sparse
        .attr("differentiable_gradient")(student.unpack(), indices.unpack(), log_probs.unpack(),
                                         or_none(labels.unpack()), py::none(), numbers, factor)
        .cast<Tensor>();
  }
};

Tensor differentiable_topk(const Tensor& student, const Lists& lists,
                           const TopkSettings& settings) {
  auto [pointer, node] = make_node<TopkLossBackward>(student);
  node->settings = settings;
  node->indices = SavedVariable(lists.indices, false);
  node->log_probs = SavedVariable(lists.log_probs, false);
  if (lists.labels) node->labels = SavedVariable(*lists.labels, false);
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (student.is_cpu()) {
      node->grad = gradients::empty_gradient(student);
      out = call_topk_into(node->grad, student, lists, settings);
    } else {
      std::tie(out, node->grad) = call_topk(student, lists, settings, true);
    }
  }
  torch::autograd::set_history(out, pointer);
  return out;
}

// In the order in which sparse.py gives them.
std::optional<TopkSettings> read_settings(const py::args& options, bool has_labels) {
  const auto temperature = number(options[1], kLeast, kMost);
  const auto weights = read_weights(options[2], options[3], options[4], has_labels);
  const py::object tail = options[0], reduction = options[6];
  const auto ignore_index = integer(options[5]);
  const auto smoothing = number(options[7], 0, has_labels ? 1 : 0);
  const auto normalizer = read_normalizer(options[8]);
  const bool mean = is(reduction, "mean"), sum = is(reduction, "sum");
  const bool ghost = is(tail, "ghost"), renormalize = is(tail, "renormalize");
  if (!temperature || !weights || !smoothing || !normalizer ||
      !(mean || (sum && options[8].is_none())) || !(ghost || renormalize || is(tail, "ignore")) ||
      !ignore_index) {
    return std::nullopt;
  }
  const Tail of_rest = ghost ? Tail::kGhost : renormalize ? Tail::kRenormalize : Tail::kIgnore;
  return TopkSettings{*temperature, weights->first, weights->second,
                      *smoothing,   *ignore_index,  static_cast<int64_t>(of_rest),
                      mean ? 2 : 1, *normalizer};
}

bool are_lists(const Lists& lists, const Tensor& student) {
  const Tensor &indices = lists.indices, &log_probs = lists.log_probs;
  const bool in_double =
      student.scalar_type() == at::kDouble || log_probs.scalar_type() == at::kDouble;
  return indices.scalar_type() == at::kLong && is_logits(log_probs) &&
         log_probs.scalar_type() == (in_double ? at::kDouble : at::kFloat) &&
         indices.layout() == at::kStrided && indices.sizes() == log_probs.sizes() &&
         indices.dim() == student.dim() && indices.size(-1) > 0 &&
         indices.sizes().slice(0, indices.dim() - 1) ==
             student.sizes().slice(0, student.dim() - 1) &&
         indices.device() == student.device() && log_probs.device() == student.device() &&
         !log_probs.requires_grad();
}

// What autograd cannot save.
bool is_inference(const Lists& lists) {
  return lists.indices.is_inference() || lists.log_probs.is_inference() ||
         (lists.labels && lists.labels->is_inference());
}

}  // namespace

py::object topk_loss(const py::handle& student_object, const py::handle& indices_object,
                     const py::handle& log_probs_object, const py::handle& labels_object, bool cuda,
                     const py::args& options) {
  const bool has_labels = !labels_object.is_none();
  if (!is_plain(student_object) || !is_plain(indices_object) || !is_plain(log_probs_object) ||
      (has_labels && !is_plain(labels_object)))
    return py::none();
  const Tensor& student = THPVariable_Unpack(student_object.ptr());
  Lists lists{THPVariable_Unpack(indices_object.ptr()), THPVariable_Unpack(log_probs_object.ptr()),
              std::nullopt};
  if (has_labels) lists.labels = THPVariable_Unpack(labels_object.ptr());
  const bool with_grad = at::GradMode::is_enabled() && student.requires_grad();
  const bool usual = !is_observed(student, lists.log_probs) && are_rows(student, cuda) &&
                     are_lists(lists, student) && are_labels(lists.labels, student) &&
                     !(with_grad && is_inference(lists));
  if (!usual) return py::none();
  const auto settings = read_settings(options, has_labels);
  if (!settings) return py::none();
  Tensor out;
  {
    py::gil_scoped_release no_gil;
    out = with_grad ? differentiable_topk(student, lists, *settings)
                    : std::get<0>(call_topk(student, lists, *settings, false));
  }
  return py::cast(out);
}

}  // namespace fastkd
