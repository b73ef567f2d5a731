// The launches of all kernels: launch.cu decides which of them a call takes, and the files that
// define the kernels launch them, so that nvcc compiles them side by side.
#pragma once
#include <cuda_runtime.h>

#include "forward_call.cuh"
#include "plan.h"

namespace fastkd::cuda {

cudaError_t launch_tiny(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
cudaError_t launch_registers(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
cudaError_t launch_streaming(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
cudaError_t launch_strided(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
// Settles where the kernels find the scale. `counts_inside`: the labels are so few that every CTA
// may count them.
cudaError_t launch_scale(ForwardCall& call, const void* denominator, bool counts_inside,
                         cudaStream_t stream);
// One CTA: leaves the scale in `stats`, for calls with too many labels to count in passing.
cudaError_t launch_count(const ForwardCall& call, cudaStream_t stream);
// Adds up `total` from the row losses and the scale in `stats`.
cudaError_t launch_finish(const ForwardCall& call, cudaStream_t stream);
cudaError_t launch_backward(const BackwardArgs& args, bool filled, cudaStream_t stream);
// grad *= grad_output, where the gradient may be rounded twice.
cudaError_t launch_rescale(const BackwardArgs& args, cudaStream_t stream);

// Return true if the hot kernels have the loss: the forward KL, alone or with the teacher's
// entropy, with one temperature for student and teacher. general.cuh has all else.
inline bool is_hot(const Inputs& in) {
  return is_one_sweep(in.divergence) && in.divergence != Divergence::kDecoupled &&
         in.temperature == in.teacher_temperature;
}
// Return true if a tensor's classes are not adjacent, so that strided kernels run.
template <class Args>
bool is_strided(const Args& args) {
  return args.student_stride.classes != 1 || args.teacher_stride.classes != 1 ||
         (args.grad != nullptr && args.grad_stride.classes != 1);
}

constexpr int64_t kMostRows = (int64_t(1) << 31) - 1;  // what an int counts
// The runtime remembers an error until it is asked for it: nobody else shall find ours.
int reported(cudaError_t error);

// Return true if the error is that the device (a slice of one, say) holds no such cluster.
inline bool refuses_cluster(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration || error == cudaErrorInvalidClusterSize;
}

// The major compute capability that the loaded code was compiled for.
cudaError_t compiled_major(int& major);

// The device that is current, asked once per device.
struct Device {
  int processors = 0;
  int major = 0;  // of the code where that is older: compiled for 8.0, it knows no clusters
  DeviceLimits limits() const { return {processors, major >= 9 ? 8 : 1}; }
};
cudaError_t current_device(Device& device);

// A launch with its attributes; the arguments must be exactly the kernel's.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  Launch(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
  }
  Launch(const Launch&) = delete;  // `config` points into it
  void cluster(int size) {
    if (size <= 1) return;  // before sm_90 the attribute is an error
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = static_cast<unsigned>(size);
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  // The kernel may start while its predecessor ends: it must call wait_for_previous_kernel().
  void overlap(const Device& device) {
    if (device.major < 9) return;
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  template <class... Parameters>
  cudaError_t operator()(void (*kernel)(Parameters...), const Parameters&... arguments) {
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  }
};

}  // namespace fastkd::cuda
