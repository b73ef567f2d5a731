// The two tiny kernels before and after the rows: counting labels, and adding up the total.
#include "launch.h"

namespace fastkd::cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(1024) count_kernel(const __grid_constant__ ForwardCall call) {
  __shared__ int count;
  allow_next_kernel();  // its first loads need no scale
  block_scale<A>(call, &count);
}

template <class A>
__global__ void __launch_bounds__(1024) finish_kernel(const __grid_constant__ ForwardCall call) {
  __shared__ double slots[32];
  wait_for_previous_kernel();
  const A scale = static_cast<const A*>(call.args.stats)[kStats * call.args.rows];
  finish_total<A>(call, blockIdx.x, scale, slots);
}

}  // namespace

cudaError_t compiled_major(int& major) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, finish_kernel<float>);
  if (error == cudaSuccess) major = attributes.ptxVersion / 10;
  return error;
}

cudaError_t launch_count(const ForwardCall& call, cudaStream_t stream) {
  Launch launch(1, 1024, 0, stream);
  return computes_in_double(call.args.student_dtype, call.args.teacher_dtype)
             ? launch(count_kernel<double>, call)
             : launch(count_kernel<float>, call);
}

cudaError_t launch_finish(const ForwardCall& call, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  Launch launch(call.args.terms == nullptr ? 1 : 1 + kTerms, call.args.rows <= 2048 ? 256 : 1024, 0,
                stream);
  launch.overlap(device);
  return computes_in_double(call.args.student_dtype, call.args.teacher_dtype)
             ? launch(finish_kernel<double>, call)
             : launch(finish_kernel<float>, call);
}

}  // namespace fastkd::cuda
