// The ops of the sparse loss: schemas, checks, and the CPU kernels' work split among threads. The
// autograd kernel is in eager.cpp or python/fastkd/_core/autograd.py. Shapes for tracing, the
// differentiable gradient, and the formula for devices without these kernels are in
// python/fastkd/_core/topk.py.
#include <atomic>
#include <vector>

#include "cpu.h"

namespace fastkd::glue {
namespace {

// The arguments that all ops of the sparse loss share, in the order of FASTKD_TOPK below.
struct TopkArguments {
  Tensor student, indices, log_probs;
  std::optional<Tensor> labels, row_settings;
  Options options;
  int64_t tail, estimator;
  Reducing reducing;

  explicit TopkArguments(ArgumentReader* in)
      : student(in->take<Tensor>()),
        indices(in->take<Tensor>()),
        log_probs(in->take<Tensor>()),
        labels(in->take<std::optional<Tensor>>()),
        row_settings(in->take<std::optional<Tensor>>()) {
    const auto denominator = in->take<std::optional<Tensor>>();
    const double temperature = in->take<double>();
    options = {temperature,        temperature,         in->take<double>(),  in->take<double>(),
               in->take<double>(), in->take<int64_t>(), in->take<int64_t>(), in->take<double>()};
    tail = in->take<int64_t>();
    estimator = in->take<int64_t>();
    reducing = take_reducing(in, denominator);
  }

  TopkCall prepare_call(const Tensor* grad) const {
    STD_TORCH_CHECK(
        indices.dim() == student.dim() && log_probs.dim() == student.dim() && student.dim() >= 1,
        "indices and log_probs must have the rank of the student logits");
    // The student is passed as the teacher, too, because a sparse teacher needs no layout.
    TopkCall topk{prepare(student, student, labels, std::nullopt, options, false, grad),
                  indices,
                  log_probs,
                  {}};
    Call& call = topk.call;
    Inputs& in = call.inputs;
    in.teacher_dtype = dtype_of(log_probs, "log_probs");
    call.acc = computes_in_double(in.student_dtype, in.teacher_dtype) ? ScalarType::Double
                                                                      : ScalarType::Float;
    check_reducing(reducing, call, false);
    take_row_settings(&call, row_settings);
    const int64_t k = indices.size(indices.dim() - 1);
    STD_TORCH_CHECK(k > 0, "indices and log_probs must list one class at least");
    topk.indices = checked_rows(indices, student, ScalarType::Long, in.rows, "indices", k);
    topk.log_probs = checked_rows(log_probs, student, call.acc, in.rows, "log_probs", k);
    topk.args.k = k;
    in.teacher = topk.log_probs.const_data_ptr();
    static_cast<Inputs&>(topk.args) = in;
    topk.args.indices = static_cast<const int64_t*>(topk.indices.const_data_ptr());
    topk.args.tail = checked_enum(tail, Tail::kIgnore, "tail");
    topk.args.estimator = checked_enum(estimator, Estimator::kK3, "estimator");
    STD_TORCH_CHECK(topk.args.estimator == Estimator::kNone || k == 1,
                    "an estimator takes one class of each row");
    STD_TORCH_CHECK(is_sparse_divergence(in.divergence), "the sparse loss has no divergence ",
                    kDivergenceNames[options.divergence]);
    STD_TORCH_CHECK(topk.args.tail != Tail::kIgnore || in.divergence == Divergence::kForwardKL,
                    "tail ignore is of the forward KL alone");
    return topk;
  }
};

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
void topk_loss(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const TopkArguments arguments(&in);
  return_results(stack,
                 Backend::topk(arguments.prepare_call(nullptr), arguments.reducing, nullptr));
}

template <class Backend>
void topk_loss_into(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<Tensor>();
  const TopkArguments arguments(&in);
  const TopkCall topk = arguments.prepare_call(&grad);
  check_reducing(arguments.reducing, topk.call, true);
  return_results(stack, Backend::topk(topk, arguments.reducing, &grad));
}

template <class Backend>
void topk_loss_backward_(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<Tensor>(), grad_output = in.take<Tensor>();
  const TopkArguments arguments(&in);
  const bool filled = in.take<bool>();
  check_grad_output(grad_output, arguments.reducing, filled);
  const TopkCall topk = arguments.prepare_call(&grad);
  backward_args(topk.call, nullptr, grad_output, grad);  // called for its checks alone
  Backend::topk_backward(topk, arguments.reducing, grad_output, grad, filled);
}

}  // namespace

Tensor Cpu::topk(TopkCall topk, const Reducing& reducing, const Tensor* grad) {
  TopkArgs& args = topk.args;
  const Tensor out = empty_out(topk.call, false, reducing.reduction == Reduction::kNone);
  if (grad) {
    args.grad = grad->mutable_data_ptr();
    args.grad_stride = topk.call.grad_stride;
  }
  args.scale = scale_of(reducing, count_rows(args));
  const RowLosses losses(args, reducing.reduction, 1, out.mutable_data_ptr());
  args.loss = losses.loss();
  run(args);
  losses.add_up(args.scale);
  return out;
}

void Cpu::topk_backward(TopkCall topk, const Reducing& reducing, const Tensor& grad_output,
                        const Tensor& grad, bool filled) {
  TopkArgs& args = topk.args;
  if (filled && scale_filled(args, grad_output, grad)) return;
  args.scale = scale_of(reducing, count_rows(args));
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_per_row = grad_output.dim() == 1;
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = topk.call.grad_stride;
  run(args);
}

#define FASTKD_TOPK                                                                          \
  "Tensor student, Tensor indices, Tensor log_probs, Tensor? labels, Tensor? row_settings, " \
  "Tensor? denominator, float temperature, float hard_weight, float soft_weight, float "     \
  "label_smoothing, int ignore_index, int divergence, float mix, int tail, int estimator, "  \
  "int reduction, float normalizer"

// indices: int64 [..., k]. log_probs: acc [..., k]. row_settings: as in library.cpp, with two equal
// temperatures for each row. The result is acc [] or [rows]. The ops are
// like those of library.cpp, but have no stats: the backward pass reads the logits again.
STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  m.def("topk_loss(" FASTKD_TOPK ") -> Tensor");
  m.def("topk_loss_into(Tensor(a!) grad, " FASTKD_TOPK ") -> Tensor");
  m.def("topk_loss_backward_(Tensor(a!) grad, Tensor grad_output, " FASTKD_TOPK
        ", bool filled) -> ()");
  m.def("topk_loss_gradient(Tensor grad_output, " FASTKD_TOPK ") -> Tensor");
}

#undef FASTKD_TOPK

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("topk_loss", &topk_loss<Cpu>);
  m.impl("topk_loss_into", &topk_loss_into<Cpu>);
  m.impl("topk_loss_backward_", &topk_loss_backward_<Cpu>);
}

#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("topk_loss", &topk_loss<Cuda>);
  m.impl("topk_loss_into", &topk_loss_into<Cuda>);
  m.impl("topk_loss_backward_", &topk_loss_backward_<Cuda>);
}
#endif

}  // namespace fastkd::glue
