// The backends of the ops (CPU and CUDA): one interface that takes the arguments as structs. This
// file also declares mixtures of teachers (docs/maths.md, section 12).
#pragma once
#include <optional>
#include <vector>

#include "arguments.h"

namespace fastkd::glue {

// A backend computes the ops on one type of device, and writes results to the caller's memory.
struct Backend {
  virtual void forward(const Call& call, ForwardArgs args, const Reducing& reducing,
                       const Outputs& outputs) const = 0;
  // Compute the gradient. `filled`: true if `grad` already holds the gradient for grad_output = 1.
  virtual void backward(const Call& call, const BackwardArgs& args, const Reducing& reducing,
                        const Tensor& grad_output, const Tensor& grad, bool filled) const = 0;
  virtual void topk(const Call& call, TopkArgs args, const Reducing& reducing,
                    const Outputs& outputs) const = 0;
  virtual void topk_backward(const Call& call, TopkArgs args, const Reducing& reducing,
                             const Tensor& grad_output, const Tensor& grad, bool filled) const = 0;
  // Write the mixture of teachers to args.mixed, which is the memory of `out`.
  virtual void mix(const MixtureArgs& args, const Tensor& out) const = 0;

 protected:
  ~Backend() = default;
};

const Backend& cpu_backend();
const Backend& cuda_backend();
inline const Backend& backend_of(const Tensor& tensor) {
#if FASTKD_WITH_CUDA
  if (!tensor.is_cpu()) return cuda_backend();
#endif
  static_cast<void>(tensor);
  return cpu_backend();
}

// The teachers of an op, as logits or probabilities, and their mixture. If `shares` is empty, there
// is one teacher, whose logits are tensors[0]. `args` points into the other members.
struct Mixture {
  std::vector<Tensor> tensors;             // each (..., C), of one shape
  std::optional<Tensor> row_temperatures;  // acc [2, rows], replaces the temperatures in `args`
  std::vector<double> shares;
  int64_t ensemble = 0;
  std::vector<MixedTeacher> teachers;
  MixtureArgs args;

  explicit Mixture(ArgumentReader* reader);
  // Check and lay out the teachers, and complete `args` but for `mixed`.
  void prepare(bool in_double);
};

}  // namespace fastkd::glue
