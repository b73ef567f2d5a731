// What a backend does for the ops of library.cpp, once the arguments are plain structs.
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
  Tensor stats;  // acc [kStats * rows + 1]; may be empty when no gradient is asked for
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
  static void backward(const Call& call, const Tensor& stats, const Tensor& grad_output,
                       const Tensor& grad, bool filled);
  // The same of the sparse loss; returns `out`.
  static Tensor topk(TopkCall topk, const Reducing& reducing, const Tensor* grad);
  static void topk_backward(TopkCall topk, const Reducing& reducing, const Tensor& grad_output,
                            const Tensor& grad, bool filled);
  // Mixes teachers into `out`, which is args.mixed.
  static void mix(const MixtureArgs& args, const Tensor& out);
};

struct Cuda {
  static ForwardResult forward(const Call& call, const Reducing& reducing, bool terms,
                               bool with_stats, const Tensor* grad);
  static void backward(const Call& call, const Tensor& stats, const Tensor& grad_output,
                       const Tensor& grad, bool filled);
  // The same of the sparse loss; returns `out`.
  static Tensor topk(TopkCall topk, const Reducing& reducing, const Tensor* grad);
  static void topk_backward(TopkCall topk, const Reducing& reducing, const Tensor& grad_output,
                            const Tensor& grad, bool filled);
  static void mix(const MixtureArgs& args, const Tensor& out);
};

}  // namespace fastkd::glue
