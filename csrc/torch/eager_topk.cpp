// The way in for plain eager calls of the sparse loss, as eager.cpp is for those with all logits.
#include "eager.h"

namespace fastkd {
namespace {

struct TopkSettings : Usual {
  Tail tail;
};

using TopkOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                          const std::optional<Tensor>&,
                                          const std::optional<Tensor>&, double, double, double,
                                          double, int64_t, int64_t, int64_t, double, bool);
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
                   static_cast<int64_t>(s.tail), s.reduction, s.normalizer, with_grad);
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
                  s.soft_weight, s.label_smoothing, s.ignore_index, static_cast<int64_t>(s.tail),
                  s.reduction, s.normalizer, filled);
  }

  Tensor differentiable(const Tensor& factor) override {
    py::gil_scoped_acquire gil;
    const py::module_ sparse = py::module_::import("fastkd.sparse");
    const TopkSettings& s = settings;
    const py::object numbers = sparse.attr("Settings")(
        s.temperature, s.hard_weight, s.soft_weight, s.label_smoothing, s.ignore_index,
        static_cast<int64_t>(s.tail), s.reduction, s.normalizer);
    return sparse
        .attr("differentiable_gradient")(student.unpack(), indices.unpack(), log_probs.unpack(),
                                         or_none(labels.unpack()), py::none(), numbers, factor)
        .cast<Tensor>();
  }
};

// On a CPU, past the dispatcher; `grad` is written where it is defined.
Tensor run(const Rows& rows, const Lists& lists, const TopkSettings& settings, const Tensor& grad) {
  TopkArgs args;
  static_cast<Inputs&>(args) = rows.inputs;
  args.teacher = lists.log_probs.const_data_ptr();
  args.teacher_dtype = dtype_of(lists.log_probs);
  args.indices = lists.indices.const_data_ptr<int64_t>();
  args.k = lists.indices.size(-1);
  args.tail = settings.tail;
  const TopkSettings& s = settings;
  set_options({s.temperature, s.temperature, s.hard_weight, s.soft_weight, s.label_smoothing,
               s.ignore_index, 0, 0.5},
              &args);
  if (grad.defined()) {
    args.grad = grad.mutable_data_ptr();
    args.grad_stride = rows.grad_stride;
  }
  const Tensor out = empty_on_cpu({}, args);
  calls().topk(args, static_cast<Reduction>(settings.reduction), divisor(settings.normalizer),
               out.mutable_data_ptr());
  return out;
}

// Nothing where what is given must be copied for the kernels, or where these fail.
std::optional<Tensor> compute(const Tensor& student, const Lists& lists,
                              const TopkSettings& settings, bool with_grad) {
  std::optional<Rows> rows;
  if (student.is_cpu()) {
    rows = rows_of(student, student, lists.labels);
    if (!rows || !is_readable(lists.indices) || !is_readable(lists.log_probs)) return std::nullopt;
  }
  Tensor out, grad;
  try {
    if (rows) {
      RECORD_FUNCTION("fastkd::topk_loss",
                      std::vector<c10::IValue>({student, lists.indices, lists.log_probs}));
      if (with_grad) grad = gradients::empty_gradient(student);
      out = run(*rows, lists, settings, grad);
    } else {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(out, grad) = call_topk(student, lists, settings, with_grad);
    }
  } catch (const std::exception&) {
    return std::nullopt;  // the Python path finds out why
  }
  if (!with_grad) return out;
  // Only now, as in eager.cpp.
  auto [pointer, node] = make_node<TopkLossBackward>(student);
  node->settings = settings;
  node->grad = std::move(grad);
  node->indices = SavedVariable(lists.indices, false);
  node->log_probs = SavedVariable(lists.log_probs, false);
  if (lists.labels) node->labels = SavedVariable(*lists.labels, false);
  torch::autograd::set_history(out, pointer);
  return out;
}

// What sparse.py gives, in its order.
enum Value : Py_ssize_t {
  kCuda,
  kStudent,
  kIndices,
  kLogProbs,
  kLabels,
  kTail,
  kOwnTemperature,
  kAlpha,
  kOwnHardWeight,
  kOwnSoftWeight,
  kIgnoreIndex,
  kReduction,
  kLabelSmoothing,
  kNormalizer,
  kValues
};
static_assert(kValues == kTopkValues);

std::optional<TopkSettings> read_settings(Values values, bool has_labels) {
  const auto usual = read_usual(
      {values[kOwnTemperature], values[kAlpha], values[kOwnHardWeight], values[kOwnSoftWeight],
       values[kIgnoreIndex], values[kReduction], values[kLabelSmoothing], values[kNormalizer]},
      has_labels);
  const bool ghost = is(values[kTail], "ghost"), renormalize = is(values[kTail], "renormalize");
  if (!usual || !(ghost || renormalize || is(values[kTail], "ignore"))) return std::nullopt;
  const Tail of_rest = ghost ? Tail::kGhost : renormalize ? Tail::kRenormalize : Tail::kIgnore;
  return TopkSettings{*usual, of_rest};
}

bool are_lists(const Lists& lists, const Tensor& student) {
  const Tensor &indices = lists.indices, &log_probs = lists.log_probs;
  const bool in_double =
      student.scalar_type() == at::kDouble || log_probs.scalar_type() == at::kDouble;
  return indices.scalar_type() == at::kLong && is_logits(log_probs) &&
         log_probs.scalar_type() == (in_double ? at::kDouble : at::kFloat) &&
         indices.sizes() == log_probs.sizes() && indices.dim() == student.dim() &&
         indices.size(-1) > 0 &&
         indices.sizes().slice(0, indices.dim() - 1) ==
             student.sizes().slice(0, student.dim() - 1) &&
         indices.device() == student.device() && log_probs.device() == student.device() &&
         !log_probs.requires_grad();
}

bool can_save_all(const Lists& lists) {
  return can_save(lists.indices) && can_save(lists.log_probs) && can_save(lists.labels);
}

}  // namespace

std::optional<Tensor> topk_loss(Values values) {
  const bool cuda = values[kCuda] == Py_True, has_labels = values[kLabels] != Py_None;
  const Tensor* const student = plain_tensor(values[kStudent], cuda);
  const Tensor* const indices = plain_tensor(values[kIndices], cuda);
  const Tensor* const log_probs = plain_tensor(values[kLogProbs], cuda);
  const Tensor* const labels = has_labels ? plain_tensor(values[kLabels], cuda) : nullptr;
  if (student == nullptr || indices == nullptr || log_probs == nullptr ||
      (has_labels && labels == nullptr))
    return std::nullopt;
  const Lists lists{*indices, *log_probs, has_labels ? std::optional(*labels) : std::nullopt};
  const bool with_grad = at::GradMode::is_enabled() && student->requires_grad();
  const bool usual = !is_observed(*student, *log_probs) && has_rows(*student) &&
                     are_lists(lists, *student) && are_labels(lists.labels, *student) &&
                     !(with_grad && !can_save_all(lists));
  if (!usual) return std::nullopt;
  const auto settings = read_settings(values, has_labels);
  if (!settings) return std::nullopt;
  py::gil_scoped_release no_gil;
  return compute(*student, lists, *settings, with_grad);
}

}  // namespace fastkd
