// Two small kernels, before and after the kernel of the rows: one counts the labels that are not
// ignored, the other adds up the total (docs/maths.md, section 6). Each is one CTA, or for many
// rows a cluster of CTAs whose first CTA adds up the sums of all: one CTA would take as long as the
// rows (docs/performance-log.md).
#include "launch.h"

namespace fastkd::cuda {
namespace {

constexpr int kCtas = 8;
constexpr int64_t kRowsOfOneCta = 16384;
constexpr int kAtOnce = 16;  // loads of one thread in flight

// Return the sum of `mine` over the CTAs, in their order, in thread 0 of the first CTA.
__device__ __forceinline__ double cluster_sum(double mine, double* sums) {
  const int ctas = cluster_size(), rank = cluster_rank();
  if (ctas == 1) return mine;
  cluster_barrier();  // after this, all CTAs have begun and their shared memory exists
  if (threadIdx.x == 0) store_in(0, sums + rank, mine);
  cluster_barrier();
  if (rank != 0 || threadIdx.x != 0) return 0;
  double sum = 0;
  for (int i = 0; i < ctas; i++) sum += sums[i];
  return sum;
}

__device__ __forceinline__ int64_t first_row() {
  return static_cast<int64_t>(cluster_rank()) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t step_of_rows() {
  return static_cast<int64_t>(cluster_size()) * blockDim.x;
}

template <class A>
__global__ void __launch_bounds__(1024) count_kernel(const __grid_constant__ ForwardCall call) {
  __shared__ double sums[kCtas];
  WarpExchange exchange;
  allow_next_kernel();  // its first loads need no scale
  const bool counts = call.scale_source == ScaleSource::kCount;
  const int mine = counts ? count_labels(call.args, first_row(), step_of_rows()) : 0;
  const double count = cluster_sum(exchange.sum(mine), sums);
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  static_cast<A*>(call.args.stats)[kStats * call.args.rows] =
      counts ? scale_of_count<A>(static_cast<int64_t>(count)) : known_scale<A>(call);
}

template <class A>
__global__ void __launch_bounds__(1024) finish_kernel(const __grid_constant__ ForwardCall call) {
  __shared__ double sums[kCtas];
  WarpExchange exchange;
  wait_for_previous_kernel();
  const A scale = static_cast<const A*>(call.args.stats)[kStats * call.args.rows];
  const int quantity = blockIdx.x / cluster_size();
  const double mine = sum_rows<kAtOnce, A>(call.args, quantity, first_row(), step_of_rows());
  const double sum = cluster_sum(exchange.sum(mine), sums);
  if (cluster_rank() == 0 && threadIdx.x == 0) put_total(call, quantity, scale, sum);
}

// `before`: true if a kernel of this call is launched before and may still run.
cudaError_t launch_clusters(void (*kernel)(ForwardCall), const ForwardCall& call, int clusters,
                            int threads, bool before, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const auto launch = [&](int ctas) {
    Launch launch(clusters * ctas, threads, 0, stream);
    if (ctas > 1) launch.cluster(ctas);
    if (before) launch.overlap(device);
    return launch(kernel, call);
  };
  if (call.args.rows <= kRowsOfOneCta || device.limits().largest_cluster < kCtas) return launch(1);
  const cudaError_t error = launch(kCtas);
  if (!refuses_cluster(error)) return error;
  cudaGetLastError();
  return launch(1);
}

bool in_double(const ForwardCall& call) {
  return computes_in_double(call.args.student_dtype, call.args.teacher_dtype);
}

}  // namespace

cudaError_t compiled_major(int& major) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, finish_kernel<float>);
  if (error == cudaSuccess) major = attributes.ptxVersion / 10;
  return error;
}

cudaError_t launch_count(const ForwardCall& call, cudaStream_t stream) {
  return launch_clusters(in_double(call) ? count_kernel<double> : count_kernel<float>, call, 1,
                         1024, false, stream);
}

cudaError_t launch_finish(const ForwardCall& call, cudaStream_t stream) {
  return launch_clusters(in_double(call) ? finish_kernel<double> : finish_kernel<float>, call,
                         call.args.terms == nullptr ? 1 : 1 + kTerms,
                         call.args.rows <= 2048 ? 256 : 1024, true, stream);
}

}  // namespace fastkd::cuda
