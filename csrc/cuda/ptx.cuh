// Instructions that have no CUDA C++ intrinsic: approximations of exponential and reciprocal, and
// for sm_90 clusters and overlapping launches. Other inline assembly is only in device_element()
// (writer.cuh). docs/maths.md, section 3, needs exponentials of base 2 and reciprocals. Tests that
// run the kernels on the CPU replace this file by tests/kernels/emulation/ptx.h.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastkd::cuda {

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Everything below exists from sm_90 on; older targets compile empty bodies that no plan reaches.

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Wait for the results of the previous kernel, in a kernel that was launched to overlap it.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return static_cast<int>(size);
}
// Synchronize all threads of all CTAs; memory written before is visible after it.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // an aligned barrier needs converged warps, also after a branch that one lane took
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// Write to the shared memory of another CTA of the cluster, at the address that `slot` has in this
// CTA.
__device__ __forceinline__ void store_in(int rank, double* slot, double x) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(slot)), "r"(rank));
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(address), "d"(x) : "memory");
#endif
}

}  // namespace fastkd::cuda
