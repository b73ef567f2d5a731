// Declarations of the functions that launch kernels. launch.cu chooses the forward kernels of a
// call. Each file that defines kernels also launches these kernels, so that the files compile in
// parallel. docs/maths.md derives the results of rows in sections 2, 3 and 10, and the totals in
// section 6.
#pragma once
#include <cuda_runtime.h>

#include "forward_call.cuh"

namespace fastkd::cuda {

// Compute the rows of a call, and the call's total. launch_short_rows() lets 8 or 32 lanes of a
// warp share a row, and launch_long_rows() all threads of a CTA. launch_strided() accepts classes
// of any stride, and lets one or eight threads compute a row.
cudaError_t launch_short_rows(const ForwardCall& call, cudaStream_t stream);
cudaError_t launch_long_rows(const ForwardCall& call, cudaStream_t stream);
cudaError_t launch_strided(const ForwardCall& call, cudaStream_t stream);
// Set where the kernels find the scale (ScaleSource). If there are too many labels for every CTA to
// count, or no rows, launch kernels that store the scale.
cudaError_t launch_scale(ForwardCall& call, const void* denominator, cudaStream_t stream);
// Write `total` from the scale in `stats` and the sums of `ctas` CTAs (add_up_rows()), each of
// which computed `rows_at_once` rows at a time.
cudaError_t launch_finish(const ForwardCall& call, int64_t ctas, int rows_at_once,
                          cudaStream_t stream);
cudaError_t launch_backward(const BackwardArgs& args, bool filled, cudaStream_t stream);

// Return true if the hot kernels compute the loss: the forward KL or the soft cross entropy, with
// one temperature for student and teacher. If false, kernels with a GeneralWriter (general.cuh)
// compute the loss.
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

constexpr int kStridedThreads = 256;
constexpr int64_t kMostRows = (int64_t(1) << 31) - 1;  // the greatest int
// Return `error`, and clear the error that the runtime keeps, so that later calls of the process do
// not report the error again.
int clear_error(cudaError_t error);

// Set `processors` to the number of streaming multiprocessors (SMs) of the current device.
cudaError_t count_processors(int& processors);

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Replace `ctas`, a number of rows, by the number of CTAs that compute `rows_at_once` rows at a
// time. The result is at most the number of CTAs that the device runs at a time.
template <class Kernel>
cudaError_t count_ctas(Kernel* kernel, int rows_at_once, int threads, int shared_bytes,
                       int64_t& ctas) {
  int processors = 0, per_processor = 0;
  if (const cudaError_t error = count_processors(processors)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &per_processor, kernel, threads, static_cast<size_t>(shared_bytes)))
    return error;
  const int64_t most = static_cast<int64_t>(per_processor) * processors;
  ctas = (ctas + rows_at_once - 1) / rows_at_once;
  if (ctas > most) ctas = most;
  return cudaSuccess;
}

}  // namespace fastkd::cuda
