// The ops on CUDA tensors. Nothing here waits for the device: what depends on data is left to the
// kernels.
#include <torch/csrc/stable/accelerator.h>

#include "backends.h"

// Resolved at run time through libtorch.so; null where torch is a CPU build, so that one binary
// serves both.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastkd::glue {
namespace {

using torch::stable::accelerator::DeviceGuard;

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check(int status) {
  STD_TORCH_CHECK(status == 0, "fastkd's CUDA kernel failed to launch: ", cuda::describe(status));
}

template <class Args>
void set_reduction(Args& args, const Reducing& reducing) {
  args.reduction = reducing.reduction;
  if (args.reduction == Reduction::kMean && !reducing.denominator && reducing.normalizer > 0) {
    args.reduction = Reduction::kSum;
    args.scale = 1.0 / reducing.normalizer;
  }
}

const void* denominator_of(const Reducing& reducing) {
  return reducing.denominator ? reducing.denominator->const_data_ptr() : nullptr;
}

}  // namespace

ForwardResult Cuda::forward(const Call& call, const Reducing& reducing, bool terms,
                            bool /*with_stats*/, const Tensor* grad) {
  const DeviceGuard guard(call.student.get_device_index());
  ForwardArgs args;
  static_cast<Inputs&>(args) = call.inputs;
  set_reduction(args, reducing);
  const bool per_row = args.reduction == Reduction::kNone;
  ForwardResult result{empty_out(call, terms, per_row), empty_stats(call)};
  const Tensor values = per_row ? result.out : empty_out(call, terms, true);
  args.loss = values.mutable_data_ptr();
  if (terms) args.terms = static_cast<char*>(args.loss) + args.rows * acc_size(call);
  args.stats = result.stats.mutable_data_ptr();
  if (grad) {
    args.grad = grad->mutable_data_ptr();
    args.grad_stride = call.grad_stride;
  }
  check(cuda::forward(args, per_row ? nullptr : result.out.mutable_data_ptr(),
                      denominator_of(reducing), current_stream(call.student)));
  return result;
}

void Cuda::backward(const Call& call, const BackwardArgs& args, const Reducing& /*reducing*/,
                    const Tensor& /*grad_output*/, const Tensor& /*grad*/, bool filled) {
  const DeviceGuard guard(call.student.get_device_index());
  check(cuda::backward(args, filled, current_stream(call.student)));
}

Tensor Cuda::topk(TopkCall topk, const Reducing& reducing, const Tensor* grad) {
  const Call& call = topk.call;
  const DeviceGuard guard(call.student.get_device_index());
  TopkArgs& args = topk.args;
  set_reduction(args, reducing);
  const bool per_row = args.reduction == Reduction::kNone;
  const Tensor out = empty_out(call, false, per_row), stats = empty_stats(call);
  const Tensor values = per_row ? out : empty_out(call, false, true);
  args.loss = values.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  if (grad) {
    args.grad = grad->mutable_data_ptr();
    args.grad_stride = call.grad_stride;
  }
  check(cuda::topk(args, per_row ? nullptr : out.mutable_data_ptr(), denominator_of(reducing),
                   current_stream(call.student)));
  return out;
}

void Cuda::topk_backward(TopkCall topk, const Reducing& reducing, const Tensor& grad_output,
                         const Tensor& grad, bool filled) {
  const Call& call = topk.call;
  const DeviceGuard guard(call.student.get_device_index());
  TopkArgs& args = topk.args;
  set_reduction(args, reducing);
  const Tensor stats = empty_stats(call);
  args.stats = stats.mutable_data_ptr();
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_per_row = grad_output.dim() == 1;
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = call.grad_stride;
  check(cuda::topk_backward(args, filled, denominator_of(reducing), current_stream(call.student)));
}

void Cuda::mix(const MixtureArgs& args, const Tensor& out) {
  const DeviceGuard guard(out.get_device_index());
  check(cuda::mixture(args, current_stream(out)));
}

}  // namespace fastkd::glue
