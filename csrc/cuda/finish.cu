// Kernels for the scale and the total of a call (docs/maths.md, section 6). count_kernel and
// scale_kernel, if needed, run before the rows' kernel, and finish_kernel runs after the rows'
// kernel. The kernels are separate, because the CTAs of one kernel do not wait for each other.
#include "launch.h"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 256;
// Greatest number of labels for which every CTA of the rows' kernel counts all labels. If there are
// more labels, count_kernel counts the labels.
constexpr int64_t kCountInside = 2048;
constexpr int kCountCtas = 64;

// Write each CTA's count of labels that are not ignored to the beginning of `stats`, which is
// scratch memory until the rows' kernel runs.
template <class A>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ ForwardCall call) {
  WarpExchange exchange;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int count = count_labels(call.args, first, static_cast<int64_t>(gridDim.x) * blockDim.x);
  const double sum = exchange.sum(count);
  if (threadIdx.x == 0) static_cast<A*>(call.args.stats)[blockIdx.x] = static_cast<A>(sum);
}

// Store the scale in `stats`, from the counts of `ctas` CTAs if labels were counted.
template <class A>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ ForwardCall call, const int ctas) {
  WarpExchange exchange;
  A* const stats = static_cast<A*>(call.args.stats);
  const int cta = static_cast<int>(threadIdx.x);
  const double count = exchange.sum(cta < ctas ? static_cast<double>(stats[cta]) : 0.0);
  if (threadIdx.x != 0) return;
  stats[kStats * call.args.rows] = call.scale_source == ScaleSource::kCount
                                       ? scale_of_count<A>(static_cast<int64_t>(count))
                                       : known_scale<A>(call);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ ForwardCall call, const int64_t ctas,
                  const int rows_at_once) {
  WarpExchange exchange;
  const int quantity = static_cast<int>(blockIdx.x);
  const A* const values = values_of<A>(call.args, quantity);
  double sum = 0;
  for (int64_t cta = threadIdx.x; cta < ctas; cta += blockDim.x)
    sum += static_cast<double>(values[cta * rows_at_once]);
  sum = exchange.sum(sum);
  if (threadIdx.x != 0) return;
  // If all rows are ignored, the mean's denominator may be 0 and the scale infinite. The total is
  // then 0.
  const A scale = static_cast<const A*>(call.args.stats)[kStats * call.args.rows];
  static_cast<A*>(call.total)[quantity] =
      sum == 0 ? A(0) : static_cast<A>(sum * static_cast<double>(scale));
}

bool in_double(const ForwardCall& call) {
  return computes_in_double(call.args.student_dtype, call.args.teacher_dtype);
}

}  // namespace

cudaError_t launch_scale(ForwardCall& call, const void* denominator, cudaStream_t stream) {
  const ForwardArgs& args = call.args;
  call.denominator = denominator;
  if (args.reduction == Reduction::kMean) {
    if (denominator != nullptr) {
      call.scale_source = ScaleSource::kDenominator;
    } else if (args.labels == nullptr) {
      call.args.scale = 1.0 / static_cast<double>(args.rows > 0 ? args.rows : 1);
    } else {
      call.scale_source = ScaleSource::kCount;
    }
  }
  const bool counts = call.scale_source == ScaleSource::kCount;
  if (args.rows > 0 && !(counts && args.rows > kCountInside)) return cudaSuccess;
  int ctas = 0;
  if (args.rows > 0) {
    ctas = kCountCtas;
    const auto kernel = in_double(call) ? count_kernel<double> : count_kernel<float>;
    if (const cudaError_t error = launch(kernel, dim3(kCountCtas), kThreads, 0, stream, call))
      return error;
  }
  const auto kernel = in_double(call) ? scale_kernel<double> : scale_kernel<float>;
  const cudaError_t error = launch(kernel, dim3(1), kThreads, 0, stream, call, ctas);
  call.scale_source = ScaleSource::kStats;
  return error;
}

cudaError_t launch_finish(const ForwardCall& call, int64_t ctas, int rows_at_once,
                          cudaStream_t stream) {
  const auto quantities = static_cast<unsigned>(call.quantities());
  return launch(in_double(call) ? finish_kernel<double> : finish_kernel<float>, dim3(quantities),
                kThreads, 0, stream, call, ctas, rows_at_once);
}

}  // namespace fastkd::cuda
