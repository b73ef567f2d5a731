// Instructions that have no CUDA C++ intrinsic: approximations of 2^x and of reciprocals
// (docs/maths.md, sections 3 and 4). Tests that run the kernels on the CPU replace this file by
// tests/kernels/emulation/ptx.h.
#pragma once
#include <cuda_runtime.h>

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

}  // namespace fastkd::cuda
