// What device.cuh offers, on the CPU, for a warp of one lane: so that the arithmetic of row.cuh can
// be tested where there is no GPU (tests/kernels/device_arithmetic.cpp). No product includes it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

#define __device__
#define __forceinline__ inline

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
struct OneThread {
  unsigned x;
};
constexpr OneThread threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};
inline void __syncthreads() {}
inline void __syncwarp() {}
inline void __threadfence() {}
inline int __reduce_add_sync(unsigned, int x) { return x; }
inline void atomicAdd(int* to, int x) { *to += x; }
template <class T>
T __ldcg(const T* p) {
  return *p;
}

namespace fastkd::cuda {

// Subnormal results are flushed, as ex2.approx.ftz and rcp.approx.ftz do.
inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? x * 0 : x; }
inline float exp2_of(float x) { return flushed(std::exp2(x)); }
inline double exp2_of(double x) { return std::exp2(x); }
inline float reciprocal_of(float x) { return flushed(1 / x); }
inline double reciprocal_of(double x) { return 1 / x; }
// Names for one rounded operation each; the test is compiled without contraction.
template <class A>
A log2_of(A x) {
  return std::log2(x);
}
template <class A>
A log_of(A x) {
  return std::log(x);
}
template <class A>
A fma_of(A a, A b, A c) {
  return std::fma(a, b, c);
}
template <class A>
A mul_of(A a, A b) {
  return a * b;
}
template <class A>
A add_of(A a, A b) {
  return a + b;
}
template <class A>
A quotient_of(A a, A b) {
  return a / b;
}
template <class A>
A max_of(A a, A b) {
  return std::fmax(a, b);
}
template <class A>
A magnitude_of(A x) {
  return std::fabs(x);
}
template <int kLanes = 32, class A>
A lanes_max(A x) {
  return x;
}
template <int kLanes = 32, class A>
A lanes_sum(A x) {
  return x;
}
inline void cluster_barrier() {}

}  // namespace fastkd::cuda
