// Elements of logits, alone and as 16-byte vectors. The formulas of docs/maths.md are in writer.cuh
// and general.cuh.
//
// The elements of a row before its first aligned vector and after its last (at most 7 each) are
// computed alone: one thread an element.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../dtypes.h"
#include "device.cuh"

namespace fastkd::cuda {

__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class A>
__device__ __forceinline__ T from_acc(A x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(static_cast<float>(x));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(static_cast<float>(x));
  if constexpr (std::is_arithmetic_v<T>) return static_cast<T>(x);
}

// Unpack a 32-bit word of a vector into one or two elements.
__device__ __forceinline__ void unpack(uint32_t word, float* x, float) {
  x[0] = __uint_as_float(word);
}
__device__ __forceinline__ void unpack(uint32_t word, float* x, __nv_bfloat16) {
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack(uint32_t word, float* x, __half) {
  const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&word));
  x[0] = f.x;
  x[1] = f.y;
}
__device__ __forceinline__ uint32_t pack(const float* x, float) { return __float_as_uint(x[0]); }
__device__ __forceinline__ uint32_t pack(const float* x, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack(const float* x, __half) {
  const __half2 pair = __floats2half2_rn(x[0], x[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// 16 bytes of T.
constexpr int kVectorBytes = 16;
template <class T>
struct Vector {
  static constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kOfWord = kElements / 4;

  static __device__ __forceinline__ void load(uint4 v, float (&x)[kElements]) {
    unpack(v.x, x, T());
    unpack(v.y, x + kOfWord, T());
    unpack(v.z, x + 2 * kOfWord, T());
    unpack(v.w, x + 3 * kOfWord, T());
  }
  static __device__ __forceinline__ uint4 store(const float (&x)[kElements]) {
    return {pack(x, T()), pack(x + kOfWord, T()), pack(x + 2 * kOfWord, T()),
            pack(x + 3 * kOfWord, T())};
  }
};

// The division of a row into vectors, which are aligned in memory. Short rows may have no vector.
struct RowLayout {
  int begin;        // first class in a vector: also the length of the head
  int64_t vectors;  // whole vectors
  int tail;         // classes after the last vector
};

template <class T>
__device__ __forceinline__ RowLayout row_layout(const T* row, int64_t classes) {
  constexpr int kElements = Vector<T>::kElements;
  const int begin =
      -static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (kElements - 1);
  if (begin >= classes) return {static_cast<int>(classes), 0, 0};
  const int64_t vectors = (classes - begin) / kElements;
  return {begin, vectors, static_cast<int>(classes - begin - vectors * kElements)};
}

// Call fn with a value of the type that `dtype` names.
template <class Fn>
__device__ __forceinline__ void with_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat64:
      return fn(double());
    case DType::kFloat16:
      return fn(__half());
    case DType::kBFloat16:
      return fn(__nv_bfloat16());
    case DType::kFloat32:
    default:
      return fn(float());
  }
}
// Load one element of any dtype.
template <class A>
__device__ __forceinline__ A load_any(const void* p, DType dtype, int64_t i) {
  A x;
  with_dtype(dtype,
             [&](auto as) { x = static_cast<A>(to_acc(static_cast<const decltype(as)*>(p)[i])); });
  return x;
}
template <class A>
__device__ __forceinline__ void store_any(void* p, DType dtype, int64_t i, A x) {
  with_dtype(dtype, [&](auto as) { static_cast<decltype(as)*>(p)[i] = from_acc<decltype(as)>(x); });
}

}  // namespace fastkd::cuda
