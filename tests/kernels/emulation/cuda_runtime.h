// CUDA C++ for g++: the keywords, and a part of the device functions and of the runtime. This
// folder is first on the include path, so that the kernels' sources compile unchanged.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simt.h"

// ---- keywords. Shared memory is thread_local: no other storage class makes a function's variable
// static and may follow `extern`. The emulator swaps the contents when it switches CTAs.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct dim3 : emulation::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Index{x, y, z} {}
};
extern emulation::Index threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

// ---- functions of several threads

inline void __syncthreads(EMULATION_PLACE) { emulation::meet_block(place); }
inline void __syncwarp(unsigned mask = ~0u, EMULATION_PLACE) {
  emulation::meet_warp("__syncwarp", mask, 0, place);
}
inline void __nanosleep(unsigned, EMULATION_PLACE) { emulation::yield("__nanosleep", place); }
inline void __threadfence() {}

namespace emulation {
template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) <= 8 && sizeof(From) <= 8);
  To to{};
  std::memcpy(&to, &from, std::min(sizeof(to), sizeof(from)));
  return to;
}
template <class T>
T from_lane(const char* what, unsigned mask, T x, unsigned lane, Place place) {
  return bits_as<T>(meet_warp(what, mask, bits_as<uint64_t>(x), place)[lane % 32]);
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T x, int lane, EMULATION_PLACE) {
  return emulation::from_lane("__shfl_sync", mask, x, static_cast<unsigned>(lane), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int step, EMULATION_PLACE) {
  const unsigned lane = threadIdx.x ^ static_cast<unsigned>(step);
  return emulation::from_lane("__shfl_xor_sync", mask, x, lane, place);
}
inline int __reduce_add_sync(unsigned mask, int x, EMULATION_PLACE) {
  const uint64_t* all =
      emulation::meet_warp("__reduce_add_sync", mask, emulation::bits_as<uint64_t>(x), place);
  int sum = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) sum += emulation::bits_as<int>(all[i]);
  return sum;
}
inline int atomicAdd(int* to, int x) {
  const int before = *to;
  *to += x;
  return before;
}
inline unsigned atomicOr(unsigned* to, unsigned x) {
  const unsigned before = *to;
  *to |= x;
  return before;
}
inline unsigned atomicAnd(unsigned* to, unsigned x) {
  const unsigned before = *to;
  *to &= x;
  return before;
}

// ---- functions of one thread

template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
inline float __int_as_float(int x) { return emulation::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, int shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
// Compiled without contraction, so that each operation is rounded separately.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }

// ---- the runtime of one synchronous device, like a MIG slice of an H100

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,
};
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    emulation::Index clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaFree(void* p);
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(emulation::allocate(bytes));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

namespace emulation {
// Return the error of a launch that the runtime would refuse, or describe the launch in `launch`.
cudaError_t launch_of(const cudaLaunchConfig_t& config, const void* kernel, Launch& launch);
}  // namespace emulation
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  emulation::Launch launch;
  const cudaError_t error =
      emulation::launch_of(*config, reinterpret_cast<const void*>(kernel), launch);
  if (error == cudaSuccess) emulation::run(launch, [&] { kernel(arguments...); });
  return error;
}
