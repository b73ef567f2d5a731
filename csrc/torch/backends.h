// The backends of the ops of library.cpp, which take arguments as plain structs.
#pragma once
#include <optional>

#include "../topk.h"
#include "arguments.h"

namespace fastkd::glue {

struct Reducing {
  Reduction reduction;
  double normalizer;                  // where positive, mean divides by it
  std::optional<Tensor> denominator;  // acc, one number on the inputs' device: mean divides by it
};

struct ForwardResult {
  Tensor out;    // acc [], [1 + kTerms], [rows] or [1 + kTerms, rows]
  Tensor stats;  // acc [kStats * rows + 1]; may be empty without `with_stats`
};

// The arguments of a sparse loss, and the tensors that keep them alive.
struct TopkCall {
  Call call;
  Tensor indices, log_probs;
  TopkArgs args;
};

struct Cpu {
  // `grad`: where to write the gradient, or null. `with_stats`: a backward call will follow.
  static ForwardResult forward(const Call& call, const Reducing& reducing, bool terms,
                               bool with_stats, const Tensor* grad);
  // `filled`: grad holds the gradient for grad_output = 1 already.
  static void backward(const Call& call, const BackwardArgs& args, const Reducing& reducing,
                       const Tensor& grad_output, const Tensor& grad, bool filled);
  // The forward pass of the sparse loss, which returns `out`, and its backward pass.
  static Tensor topk(TopkCall topk, const Reducing& reducing, const Tensor* grad);
  static void topk_backward(TopkCall topk, const Reducing& reducing, const Tensor& grad_output,
                            const Tensor& grad, bool filled);
  // Mixes teachers into `out`, which is args.mixed.
  static void mix(const MixtureArgs& args, const Tensor& out);
};

struct Cuda {
  static ForwardResult forward(const Call& call, const Reducing& reducing, bool terms,
                               bool with_stats, const Tensor* grad);
  static void backward(const Call& call, const BackwardArgs& args, const Reducing& reducing,
                       const Tensor& grad_output, const Tensor& grad, bool filled);
  static Tensor topk(TopkCall topk, const Reducing& reducing, const Tensor* grad);
  static void topk_backward(TopkCall topk, const Reducing& reducing, const Tensor& grad_output,
                            const Tensor& grad, bool filled);
  static void mix(const MixtureArgs& args, const Tensor& out);
};

// The teachers of an op, as logits or probabilities. If `shares` is empty, there is one teacher,
// and `tensors` holds its logits.
struct Teachers {
  std::vector<Tensor> tensors;             // each (..., C), of one shape
  std::optional<Tensor> row_temperatures;  // acc [2, rows], replaces the two temperatures
  std::vector<double> shares;
  bool probabilities;
  int64_t ensemble;
  double temperature, teacher_temperature;
};

// The arguments of a mixture, and the tensors that keep them alive.
struct Mixture {
  MixtureArgs args;
  std::vector<MixedTeacher> teachers;
  std::vector<Tensor> kept;
};
Mixture make_mixture(const Teachers& teachers, bool in_double);

// Like prepare(), with a mixture instead of a teacher. The mixture must outlive the call.
Call prepare_mixed(const Tensor& student, const Mixture& mixture,
                   const std::optional<Tensor>& labels, const std::optional<Tensor>& row_settings,
                   const Options& options, const Tensor* grad);

// Return `value` as the enum `E`, whose last member is `last`.
template <class E>
E checked_enum(int64_t value, E last, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= static_cast<int64_t>(last), name, " has no member ",
                  value);
  return static_cast<E>(value);
}

inline Reducing take_reducing(ArgumentReader* in, std::optional<Tensor> denominator) {
  const int64_t reduction = in->take<int64_t>();
  const double normalizer = in->take<double>();
  return {checked_enum(reduction, Reduction::kMean, "reduction"), normalizer,
          std::move(denominator)};
}

// Throw unless the reduction is valid, goes with a gradient if `with_grad`, and its denominator has
// the dtype and device of the loss of `call`.
void check_reducing(const Reducing& reducing, const Call& call, bool with_grad);

// Throw unless `grad_output` has the dimensions of the loss. A gradient that is `filled` is scaled,
// by one number.
void check_grad_output(const Tensor& grad_output, const Reducing& reducing, bool filled);

}  // namespace fastkd::glue
