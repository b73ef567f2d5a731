// The sparse loss as ops: schemas, checks, and for CPU tensors the threads. Shapes for tracing, the
// autograd formulas, and the formula for devices without these kernels are in
// python/fastkd/sparse.py.
#include <atomic>
#include <vector>

#include "cpu.h"

namespace fastkd::glue {
namespace {

TopkCall prepare_topk(const Tensor& student, const Tensor& indices, const Tensor& log_probs,
                      const std::optional<Tensor>& labels, const Options& options, int64_t tail,
                      const Tensor* grad) {
  // One tensor's rows are walked like those of two that are laid out alike.
  TopkCall topk{prepare(student, student, labels, std::nullopt, options, false, grad, false),
                readable(indices),
                readable(log_probs),
                {}};
  Call& call = topk.call;
  Inputs& in = call.inputs;
  in.teacher_dtype = dtype_of(log_probs, "log_probs");
  call.acc = computes_in_double(in.student_dtype, in.teacher_dtype) ? ScalarType::Double
                                                                    : ScalarType::Float;
  STD_TORCH_CHECK(log_probs.scalar_type() == call.acc, "log_probs has the wrong dtype");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices has the wrong dtype");
  STD_TORCH_CHECK(indices.dim() == student.dim() && log_probs.dim() == student.dim(),
                  "indices and log_probs must have the rank of the student logits");
  topk.args.k = indices.size(indices.dim() - 1);
  STD_TORCH_CHECK(indices.numel() == in.rows * topk.args.k && log_probs.numel() == indices.numel(),
                  "indices and log_probs must have k entries for each row of logits");
  in.teacher = topk.log_probs.const_data_ptr();
  static_cast<Inputs&>(topk.args) = in;
  topk.args.indices = static_cast<const int64_t*>(topk.indices.const_data_ptr());
  topk.args.tail = static_cast<Tail>(tail);
  return topk;
}

void run(const TopkArgs& args) {
  const cpu::Kernels& kernels = cpu::kernels();
  std::atomic<int64_t> first_bad{args.rows};
  torch::stable::parallel_for(
      0, args.rows, grain_rows(args.classes), [&](int64_t begin, int64_t end) {
        std::vector<uint64_t> listed(static_cast<size_t>(cpu::bitmap_words(args.classes)));
        const int64_t bad = kernels.topk(args, begin, end, listed.data());
        int64_t before = first_bad.load();
        while (bad >= 0 && bad < before && !first_bad.compare_exchange_weak(before, bad)) continue;
      });
  STD_TORCH_CHECK(first_bad == args.rows,
                  "indices must be different classes of the student's, or negative, and log_probs "
                  "the logarithms of their probabilities; not so in row ",
                  first_bad.load());
}

template <class Backend>
std::tuple<Tensor, Tensor> topk_loss(const Tensor& student, const Tensor& indices,
                                     const Tensor& log_probs, std::optional<Tensor> labels,
                                     std::optional<Tensor> denominator, double temperature,
                                     double hard_weight, double soft_weight, double label_smoothing,
                                     int64_t ignore_index, int64_t tail, int64_t reduction,
                                     double normalizer, bool with_grad) {
  const TopkCall topk = prepare_topk(
      student, indices, log_probs, labels,
      {temperature, temperature, hard_weight, soft_weight, label_smoothing, ignore_index, 0, 0.5},
      tail, nullptr);
  const Reducing reducing{static_cast<Reduction>(reduction), normalizer, denominator};
  const bool filled = with_grad && reducing.reduction != Reduction::kNone;
  const Tensor grad = filled ? empty_grad(topk.call) : nothing(topk.call);
  return {Backend::topk(topk, reducing, filled ? &grad : nullptr), grad};
}

Tensor topk_loss_into(const Tensor& grad, const Tensor& student, const Tensor& indices,
                      const Tensor& log_probs, std::optional<Tensor> labels,
                      std::optional<Tensor> denominator, double temperature, double hard_weight,
                      double soft_weight, double label_smoothing, int64_t ignore_index,
                      int64_t tail, int64_t reduction, double normalizer) {
  STD_TORCH_CHECK(static_cast<Reduction>(reduction) != Reduction::kNone,
                  "a gradient is written for reduction mean or sum");
  const TopkCall topk = prepare_topk(
      student, indices, log_probs, labels,
      {temperature, temperature, hard_weight, soft_weight, label_smoothing, ignore_index, 0, 0.5},
      tail, &grad);
  return Cpu::topk(topk, {static_cast<Reduction>(reduction), normalizer, denominator}, &grad);
}

template <class Backend>
void topk_loss_backward_(const Tensor& grad, const Tensor& grad_output, const Tensor& student,
                         const Tensor& indices, const Tensor& log_probs,
                         std::optional<Tensor> labels, std::optional<Tensor> denominator,
                         double temperature, double hard_weight, double soft_weight,
                         double label_smoothing, int64_t ignore_index, int64_t tail,
                         int64_t reduction, double normalizer, bool filled) {
  const TopkCall topk = prepare_topk(
      student, indices, log_probs, labels,
      {temperature, temperature, hard_weight, soft_weight, label_smoothing, ignore_index, 0, 0.5},
      tail, &grad);
  Backend::topk_backward(topk, {static_cast<Reduction>(reduction), normalizer, denominator},
                         grad_output, grad, filled);
}

}  // namespace

void run_topk(TopkArgs args, Reduction reduction, std::optional<double> divisor, void* out) {
  args.scale = scale_of(reduction, divisor, count_rows(args));
  const RowLosses losses(args, reduction, 1, out);
  args.loss = losses.loss();
  run(args);
  losses.add_up(args.scale);
}

Tensor Cpu::topk(TopkCall topk, const Reducing& reducing, const Tensor* grad) {
  TopkArgs& args = topk.args;
  const Tensor out = empty_out(topk.call, false, reducing.reduction == Reduction::kNone);
  if (grad) {
    args.grad = grad->mutable_data_ptr();
    prefer_huge_pages(args.grad, gradient_bytes(args));
    args.grad_stride = topk.call.grad_stride;
  }
  run_topk(args, reducing.reduction, given_divisor(reducing), out.mutable_data_ptr());
  return out;
}

void Cpu::topk_backward(TopkCall topk, const Reducing& reducing, const Tensor& grad_output,
                        const Tensor& grad, bool filled) {
  TopkArgs& args = topk.args;
  if (filled) {
    if (number(grad_output) == 1.0) return;
    // 16-bit gradients are computed anew instead, as in Cpu::backward.
    if (size_of(args.student_dtype) > 2) return multiply_(grad, grad_output);
  }
  args.scale = scale_of(reducing.reduction, given_divisor(reducing), count_rows(args));
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_per_row = grad_output.dim() == 1;
  args.grad = grad.mutable_data_ptr();
  prefer_huge_pages(args.grad, gradient_bytes(args));
  args.grad_stride = topk.call.grad_stride;
  run(args);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // indices [..., k] int64 and log_probs [..., k] acc; out: acc [] or [rows]; grad: the student's
  // shape, or [0] where none is written.
  m.def(
      "topk_loss(Tensor student, Tensor indices, Tensor log_probs, Tensor? labels, "
      "Tensor? denominator, float temperature, float hard_weight, float soft_weight, "
      "float label_smoothing, int ignore_index, int tail, int reduction, float normalizer, "
      "bool with_grad) -> (Tensor out, Tensor grad)");
  // The same with the gradient written into a contiguous `grad`, on CPUs.
  m.def(
      "topk_loss_into(Tensor(a!) grad, Tensor student, Tensor indices, Tensor log_probs, "
      "Tensor? labels, Tensor? denominator, float temperature, float hard_weight, "
      "float soft_weight, float label_smoothing, int ignore_index, int tail, int reduction, "
      "float normalizer) -> Tensor");
  // Fills grad with grad_output times the gradient, from the logits once more; `filled`: grad holds
  // it for grad_output = 1 already.
  m.def(
      "topk_loss_backward_(Tensor(a!) grad, Tensor grad_output, Tensor student, Tensor indices, "
      "Tensor log_probs, Tensor? labels, Tensor? denominator, float temperature, "
      "float hard_weight, float soft_weight, float label_smoothing, int ignore_index, int tail, "
      "int reduction, float normalizer, bool filled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("topk_loss", TORCH_BOX(&topk_loss<Cpu>));
  m.impl("topk_loss_into", TORCH_BOX(&topk_loss_into));
  m.impl("topk_loss_backward_", TORCH_BOX(&topk_loss_backward_<Cpu>));
}

#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("topk_loss", TORCH_BOX(&topk_loss<Cuda>));
  m.impl("topk_loss_backward_", TORCH_BOX(&topk_loss_backward_<Cuda>));
}
#endif

}  // namespace fastkd::glue
