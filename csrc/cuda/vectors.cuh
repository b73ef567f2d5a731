// Conversion of logits between the stored dtype and the compute type: single elements, and vectors
// of 16 bytes, which a thread loads or stores at once.
//
// At most 7 elements lie before a row's first aligned vector, and at most 7 after the last vector.
// A separate thread computes each of these elements.
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
// A vector: 16 bytes of elements of type T, which load() unpacks and store() packs.
constexpr int kVectorBytes = 16;
template <class T>
struct Vector {
  static constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kPerWord = kElements / 4;

  static __device__ __forceinline__ void load(uint4 v, float (&x)[kElements]) {
    unpack(v.x, x, T());
    unpack(v.y, x + kPerWord, T());
    unpack(v.z, x + 2 * kPerWord, T());
    unpack(v.w, x + 3 * kPerWord, T());
  }
  static __device__ __forceinline__ uint4 store(const float (&x)[kElements]) {
    return {pack(x, T()), pack(x + kPerWord, T()), pack(x + 2 * kPerWord, T()),
            pack(x + 3 * kPerWord, T())};
  }
};

// The division of a row into vectors, which are aligned in memory. Short rows may have no vector.
struct RowLayout {
  int begin;  // number of classes before the first vector
  int64_t vectors;
  int tail;  // number of classes after the last vector
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
