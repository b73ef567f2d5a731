// Device functions that all kernels share. Arithmetic functions have one name for fp32 and fp64, so
// that a kernel is one template over both types. Reductions within a warp have a fixed order, as
// docs/maths.md, section 9, requires. Inline assembly is in ptx.cuh.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "fastkd's CUDA kernels need compute capability 8.0 or newer: choose it with CUDAARCHS"
#endif
#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels.h"
#if defined(__CUDACC__)
#include "ptx.cuh"
#else
#include <ptx.h>  // from tests/kernels/emulation, in tests that run the kernels on the CPU
#endif

namespace fastkd::cuda {

__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_of(double a, double b, double c) { return fma(a, b, c); }
// Multiply without fusing the product with a sum, because forward and backward kernels must round
// products alike.
__device__ __forceinline__ float mul_of(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul_of(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add_of(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add_of(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double reciprocal_of(double x) { return 1.0 / x; }
// Return a / b, correctly rounded except in rare cases. b must be neither 0 nor near the ends of
// float's range. The operator / would call a subroutine, around which registers spill.
__device__ __forceinline__ float quotient_of(float a, float b) {
  float r = reciprocal_of(b);
  r = fmaf(fmaf(-b, r, 1.0f), r, r);
  const float q = __fmul_rn(a, r);
  return fmaf(fmaf(-b, q, a), r, q);
}
__device__ __forceinline__ double quotient_of(double a, double b) { return a / b; }
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float magnitude_of(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude_of(double x) { return fabs(x); }

// Return the maximum, or the sum in a fixed order, over each group of `kLanes` adjacent lanes.
template <int kLanes = 32, class A>
__device__ __forceinline__ A lanes_max(A x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = max_of(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <int kLanes = 32, class A>
__device__ __forceinline__ A lanes_sum(A x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = add_of(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Exchange of values among the warps of a CTA, through shared memory. Two sets of slots alternate,
// so that one barrier per exchange is enough.
struct WarpExchange {
  int turn = 0;

  // Return `mine` of warp i's lane 0 in lane i of every warp. Lanes beyond the number of warps get
  // `otherwise`.
  template <class S>
  __device__ __forceinline__ S share(const S& mine, const S& otherwise = S()) {
    __shared__ __align__(16) unsigned char bytes[2 * 32 * sizeof(S)];
    S* const slots = reinterpret_cast<S*>(bytes) + turn * 32;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) slots[threadIdx.x / 32] = mine;
    __syncthreads();
    turn ^= 1;
    return lane < warps ? slots[lane] : otherwise;
  }
  // Return the sum over all threads, in an order that depends only on the number of threads.
  __device__ __forceinline__ double sum(double x) { return lanes_sum(share(lanes_sum(x))); }
};

// Return row_offset() by a 32-bit division, because a 64-bit division is a call, around which
// registers spill. 32 bits hold every row below kMostRows (launch.h).
__device__ __forceinline__ int64_t offset_of(int64_t row, int64_t group_rows, RowStrides stride) {
  if (row < group_rows) return row * stride.row;
  const uint32_t group = static_cast<uint32_t>(row) / static_cast<uint32_t>(group_rows);
  return group * stride.group + (row - group * group_rows) * stride.row;
}

}  // namespace fastkd::cuda
