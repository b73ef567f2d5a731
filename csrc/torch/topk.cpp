// The ops of the sparse loss (docs/maths.md, section 13): schemas and checks. cpu.cpp and cuda.cpp
// call the kernels. The autograd kernel is in eager.cpp or python/fastkd/_core/autograd.py. Shapes
// for tracing, and the formula for second derivatives and for devices without these kernels, are in
// python/fastkd/_core/topk.py.
#include "backends.h"

namespace fastkd::glue {
namespace {

// A call of the sparse loss, and the tensors that keep its list alive.
struct TopkCall {
  Call call;
  Tensor indices, log_probs;
  TopkArgs args;
};

// The arguments that all ops of the sparse loss share, in the order of FASTKD_TOPK below.
struct TopkArguments {
  Tensor student, indices, log_probs;
  std::optional<Tensor> labels, row_settings;
  Inputs settings;
  int64_t tail, estimator;
  Reducing reducing;
  bool with_terms;

  explicit TopkArguments(ArgumentReader* in)
      : student(in->take<Tensor>()), indices(in->take<Tensor>()), log_probs(in->take<Tensor>()) {
    in->take(&labels, &row_settings, &reducing.denominator, &settings.temperature);
    settings.teacher_temperature = settings.temperature;
    in->take_settings(&settings);
    in->take(&tail, &estimator);
    reducing.take_from(in);
    in->take(&with_terms);
  }

  TopkCall prepare_call(const Tensor* grad) const {
    STD_TORCH_CHECK(
        indices.dim() == student.dim() && log_probs.dim() == student.dim() && student.dim() >= 1,
        "indices and log_probs must have the rank of the student logits");
    // The student is also passed as the teacher, because a sparse teacher needs no layout.
    TopkCall topk{prepare(student, student, labels, settings, false, grad), indices, log_probs, {}};
    Inputs& in = topk.call.inputs;
    in.teacher_dtype = dtype_of(log_probs, "log_probs");
    topk.call.take_row_settings(row_settings);
    const int64_t k = indices.size(indices.dim() - 1);
    STD_TORCH_CHECK(k > 0, "indices and log_probs must list one class at least");
    topk.indices = checked_rows(indices, student, ScalarType::Long, in.rows, "indices", k);
    topk.log_probs =
        checked_rows(log_probs, student, acc_type(in_double(in)), in.rows, "log_probs", k);
    in.teacher = topk.log_probs.const_data_ptr();
    topk.args.k = k;
    topk.args.indices = static_cast<const int64_t*>(topk.indices.const_data_ptr());
    topk.args.tail = checked_enum(tail, Tail::kIgnore, "tail");
    topk.args.estimator = checked_enum(estimator, Estimator::kK3, "estimator");
    STD_TORCH_CHECK(topk.args.estimator == Estimator::kNone || k == 1,
                    "an estimator takes one class of each row");
    STD_TORCH_CHECK(is_sparse_divergence(in.divergence), "the sparse loss has no divergence ",
                    kDivergenceNames[static_cast<int>(in.divergence)]);
    STD_TORCH_CHECK(topk.args.tail != Tail::kIgnore || in.divergence == Divergence::kForwardKL,
                    "tail ignore is of the forward KL alone");
    return topk;
  }
};

// Compute the loss. `grad`: the gradient's memory, or null.
Tensor forward(const TopkArguments& arguments, const Tensor* grad) {
  const Reducing& reducing = arguments.reducing;
  TopkCall topk = arguments.prepare_call(grad);
  check_reducing(reducing, topk.call, grad != nullptr);
  const int64_t fields = arguments.with_terms ? 1 + kTopkTerms : 1;
  const Outputs outputs = set_outputs(topk.call, reducing, fields, grad, &topk.args);
  if (arguments.with_terms)
    topk.args.terms = static_cast<char*>(topk.args.loss) + topk.args.rows * acc_bytes(topk.args);
  backend_of(topk.call.student).topk(topk.call, topk.args, reducing, outputs);
  return outputs.out;
}

void topk_loss(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  return_results(stack, forward(TopkArguments(&in), nullptr));
}

void topk_loss_into(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<Tensor>();
  return_results(stack, forward(TopkArguments(&in), &grad));
}

void topk_loss_backward_(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const auto grad = in.take<Tensor>(), grad_output = in.take<Tensor>();
  const TopkArguments arguments(&in);
  const Reducing& reducing = arguments.reducing;
  const bool filled = in.take<bool>();
  TopkCall topk = arguments.prepare_call(&grad);
  check_reducing(reducing, topk.call, false);
  check_grad_output(topk.call, reducing, grad_output, filled);
  set_gradient(topk.call, grad_output, grad, &topk.args);
  backend_of(topk.call.student)
      .topk_backward(topk.call, topk.args, reducing, grad_output, grad, filled);
}

}  // namespace

#define FASTKD_TOPK                                                                          \
  "Tensor student, Tensor indices, Tensor log_probs, Tensor? labels, Tensor? row_settings, " \
  "Tensor? denominator, float temperature, float hard_weight, float soft_weight, float "     \
  "label_smoothing, int ignore_index, int divergence, float mix, int tail, int estimator, "  \
  "int reduction, float normalizer, bool with_terms"

// indices: int64 [..., k]. log_probs: acc [..., k]. row_settings: as in library.cpp, with two equal
// temperatures for each row. The result is acc [] or [rows], or with terms [1 + kTopkTerms] or [1 +
// kTopkTerms, rows]. The ops are like those of library.cpp, but have no stats: the backward pass
// recomputes the sums from the logits.
STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  m.def("topk_loss(" FASTKD_TOPK ") -> Tensor");
  m.def("topk_loss_into(Tensor(a!) grad, " FASTKD_TOPK ") -> Tensor");
  m.def("topk_loss_backward_(Tensor(a!) grad, Tensor grad_output, " FASTKD_TOPK
        ", bool filled) -> ()");
  m.def("topk_loss_gradient(Tensor grad_output, " FASTKD_TOPK ") -> Tensor");
}

#undef FASTKD_TOPK

void add_topk_loss(torch::stable::detail::StableLibrary& m) {
  m.impl("topk_loss", &topk_loss);
  m.impl("topk_loss_into", &topk_loss_into);
  m.impl("topk_loss_backward_", &topk_loss_backward_);
}
STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { add_topk_loss(m); }
#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { add_topk_loss(m); }
#endif

}  // namespace fastkd::glue
