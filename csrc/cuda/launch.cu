// The functions forward() and backward() of kernels.h. forward() chooses the kernels of a call by
// the length and the strides of rows. This choice and the number of CTAs that the device runs at a
// time fix the order of sums, and so the bits (docs/maths.md, section 9).
#include "launch.h"

namespace fastkd::cuda {

cudaError_t count_processors(int& processors) {
  int ordinal = 0;
  if (const cudaError_t error = cudaGetDevice(&ordinal)) return error;
  return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal);
}

int clear_error(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

namespace {

template <class Args>
Args with_groups(Args args) {
  if (args.group_rows <= 0) args.group_rows = args.rows > 0 ? args.rows : 1;
  return args;
}

// Greatest size, in bytes, of a student's row that one warp computes: four vectors for each lane. A
// CTA computes longer rows.
constexpr int64_t kWarpBytes = 2048;

cudaError_t forward_on(const ForwardArgs& args, void* total, const void* denominator,
                       cudaStream_t stream) {
  ForwardCall call;
  call.args = with_groups(args);
  call.total = args.reduction == Reduction::kNone ? nullptr : total;
  call.constants = make_constants(args.divergence, args.mix);
  if (const cudaError_t error = launch_scale(call, denominator, stream)) return error;
  if (args.rows == 0)
    return call.total == nullptr ? cudaSuccess : launch_finish(call, 0, 1, stream);
  if (is_strided(args)) return launch_strided(call, stream);
  const int64_t bytes = args.classes * size_of(args.student_dtype);
  return bytes <= kWarpBytes ? launch_short_rows(call, stream) : launch_long_rows(call, stream);
}

}  // namespace

int forward(const ForwardArgs& args, void* total, const void* denominator, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  return clear_error(forward_on(args, total, denominator, static_cast<cudaStream_t>(stream)));
}

int backward(const BackwardArgs& args, bool filled, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.classes == 0) return cudaSuccess;
  return clear_error(launch_backward(with_groups(args), filled, static_cast<cudaStream_t>(stream)));
}

const char* describe(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace fastkd::cuda
