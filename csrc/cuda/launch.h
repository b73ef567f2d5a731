// The launches of all kernels: launch.cu chooses the kernels of a call, and the files that define
// the kernels launch them, so that nvcc compiles the files in parallel. The kernels' files name the
// sections of docs/maths.md.
#pragma once
#include <cuda_runtime.h>

#include "forward_call.cuh"
#include "plan.h"

namespace fastkd::cuda {

cudaError_t launch_tiny(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
cudaError_t launch_registers(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
cudaError_t launch_streaming(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
cudaError_t launch_strided(const ForwardCall& call, const Plan& plan, cudaStream_t stream);
// Choose where the kernels find the scale. `counts_inside`: true if labels are so few that every
// CTA may count them.
cudaError_t launch_scale(ForwardCall& call, const void* denominator, bool counts_inside,
                         cudaStream_t stream);
// Count the labels in one kernel, and store the scale in `stats`: for calls with too many labels
// for every CTA to count.
cudaError_t launch_count(const ForwardCall& call, cudaStream_t stream);
// Add up `total` from the row losses and the scale in `stats`.
cudaError_t launch_finish(const ForwardCall& call, cudaStream_t stream);
cudaError_t launch_backward(const BackwardArgs& args, bool filled, cudaStream_t stream);
// Compute grad *= grad_output, where the gradient may be rounded twice.
cudaError_t launch_rescale(const BackwardArgs& args, cudaStream_t stream);

// Return true if the hot kernels compute the loss: the forward KL, alone or with the teacher's
// entropy, with one temperature for student and teacher. general.cuh has the other objectives.
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

constexpr int64_t kMostRows = (int64_t(1) << 31) - 1;  // the greatest int
// Clear the error that the runtime remembers, so that later calls of the process do not report it.
int reported(cudaError_t error);

// Return true if the error means that the device (a MIG slice, for example) holds no such cluster.
inline bool refuses_cluster(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration || error == cudaErrorInvalidClusterSize;
}

// Set the major compute capability that the loaded code was compiled for.
cudaError_t compiled_major(int& major);

// The current device, queried once per device.
struct Device {
  int processors = 0;
  int major = 0;  // of the code if that is older: code for 8.0 has no clusters
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
    if (size <= 1) return;  // before sm_90 the attribute would be an error
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = static_cast<unsigned>(size);
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  // Let the kernel start while its predecessor ends. It must call wait_for_previous_kernel().
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
