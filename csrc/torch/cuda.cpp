// The ops on CUDA tensors. This file never synchronizes: the kernels handle everything that depends
// on data, such as the number of rows that are not ignored (docs/maths.md, section 6).
#include <torch/csrc/stable/accelerator.h>

#include "backends.h"

// The symbol is resolved at run time through libtorch.so. In a CPU build of torch the symbol is
// null, so that one binary serves both builds.
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

struct CudaBackend final : Backend {
  void forward(const Call& call, ForwardArgs args, const Reducing& reducing,
               const Outputs& outputs) const override {
    launch(call, cuda::forward, args, reducing, outputs);
  }

  void backward(const Call& call, const BackwardArgs& args, const Reducing&, const Tensor&,
                const Tensor&, bool filled) const override {
    const DeviceGuard guard(call.student.get_device_index());
    check(cuda::backward(args, filled, current_stream(call.student)));
  }

  void topk(const Call& call, TopkArgs args, const Reducing& reducing,
            const Outputs& outputs) const override {
    const Tensor stats = call.empty_stats();
    args.stats = stats.mutable_data_ptr();
    launch(call, cuda::topk, args, reducing, outputs);
  }

  void topk_backward(const Call& call, TopkArgs args, const Reducing& reducing, const Tensor&,
                     const Tensor&, bool filled) const override {
    const DeviceGuard guard(call.student.get_device_index());
    const Tensor stats = call.empty_stats();
    args.stats = stats.mutable_data_ptr();
    set_reduction(&args, reducing);
    check(
        cuda::topk_backward(args, filled, denominator_of(reducing), current_stream(call.student)));
  }

  void mix(const MixtureArgs& args, const Tensor& out) const override {
    const DeviceGuard guard(out.get_device_index());
    check(cuda::mixture(args, current_stream(out)));
  }

 private:
  template <class Args>
  static void set_reduction(Args* args, const Reducing& reducing) {
    args->reduction = reducing.reduction;
    if (args->reduction == Reduction::kMean && !reducing.denominator && reducing.normalizer > 0) {
      args->reduction = Reduction::kSum;
      args->scale = 1.0 / reducing.normalizer;
    }
  }

  static const void* denominator_of(const Reducing& reducing) {
    return reducing.denominator ? reducing.denominator->const_data_ptr() : nullptr;
  }

  template <class Args>
  static void launch(const Call& call, int (*kernel)(const Args&, void*, const void*, void*),
                     Args& args, const Reducing& reducing, const Outputs& outputs) {
    const DeviceGuard guard(call.student.get_device_index());
    set_reduction(&args, reducing);
    check(kernel(args, reducing.per_row() ? nullptr : outputs.out.mutable_data_ptr(),
                 denominator_of(reducing), current_stream(call.student)));
  }
};

}  // namespace

const Backend& cuda_backend() {
  static const CudaBackend kBackend;
  return kBackend;
}

}  // namespace fastkd::glue
