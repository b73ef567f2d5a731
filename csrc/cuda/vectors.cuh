// Rows of logits as 16-byte vectors, for any alignment of student, teacher and gradient. Loads and
// stores only: the formulas of docs/maths.md are in writer.cuh and general.cuh.
//
// The vectors are aligned to the gradient's memory, so that every store is one aligned vector. A
// vector of an input with another alignment is combined from two neighboring vectors (about two
// instructions per element, and no further memory traffic). The elements before the first vector
// and after the last (at most 15 each) are peeled: one lane an element.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../dtypes.h"
#include "device.cuh"
#include "plan.h"

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
// Return the greater elements of two words. NaN is dropped; the sums of exponentials keep it.
template <class Pair>
__device__ __forceinline__ uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  const Pair v = __hmax2(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b, float) {
  return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
}
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b, __nv_bfloat16) {
  return max_of_pairs<__nv_bfloat162>(a, b);
}
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b, __half) {
  return max_of_pairs<__half2>(a, b);
}

// 16 bytes of T.
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
  static __device__ __forceinline__ float max(uint4 v) {
    float x[kOfWord];
    unpack(max_of_words(max_of_words(v.x, v.y, T()), max_of_words(v.z, v.w, T()), T()), x, T());
    return kOfWord == 1 ? x[0] : fmaxf(x[0], x[kOfWord - 1]);
  }
};

// Return the 16 bytes that begin `shift` (1 to 15) bytes into a and continue in b.
__device__ __forceinline__ uint4 shifted(uint4 a, uint4 b, int shift) {
  const bool two = shift & 8, one = shift & 4;
  const uint32_t c0 = two ? a.z : a.x, c1 = two ? a.w : a.y, c2 = two ? b.x : a.z;
  const uint32_t c3 = two ? b.y : a.w, c4 = two ? b.z : b.x, c5 = two ? b.w : b.y;
  const uint32_t d0 = one ? c1 : c0, d1 = one ? c2 : c1, d2 = one ? c3 : c2;
  const uint32_t d3 = one ? c4 : c3, d4 = one ? c5 : c4;
  const int bits = (shift & 3) * 8;
  return {__funnelshift_r(d0, d1, bits), __funnelshift_r(d1, d2, bits),
          __funnelshift_r(d2, d3, bits), __funnelshift_r(d3, d4, bits)};
}
// Load vector i of an input. `vectors` is aligned, and the input begins `shift` bytes after it.
// `kLast`: no thread reads the vector again.
template <bool kLast>
__device__ __forceinline__ uint4 fetch(const uint4* vectors, int64_t i, int shift) {
  const uint4 a = kLast ? __ldcs(vectors + i) : vectors[i];
  if (shift == 0) return a;
  return shifted(a, kLast ? __ldcs(vectors + i + 1) : vectors[i + 1], shift);
}

constexpr int kPeelLanes = 16;  // for the head, and as many for the tail

// The division of a row into vectors. Only vectors that lie inside the aligned part of all three
// tensors count, so no load reads beyond a row. Short rows may have no vector.
struct RowLayout {
  int begin;          // first class in a vector: also the length of the head
  int64_t vectors;    // whole vectors
  int tail;           // classes after the last vector
  int student_shift;  // bytes from an aligned address to the student's class `begin`
  int teacher_shift;

  // Return the class that lane `lane` of the peeling warp works on, or -1.
  __device__ __forceinline__ int64_t peeled(int lane, int64_t classes) const {
    if (lane < kPeelLanes) return lane < begin ? lane : -1;
    return lane - kPeelLanes < tail ? classes - tail + lane - kPeelLanes : -1;
  }
};

template <class T>
__device__ __forceinline__ RowLayout row_layout(const T* student, const T* teacher, const T* grad,
                                                int64_t classes) {
  constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(T)), kMask = kElements - 1;
  const auto position = [](const T* p) {  // index of the element within its 16-byte vector
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T)) & kMask;
  };
  const int s = position(student), t = position(teacher), g = position(grad);
  const int first_s = -s & kMask, first_t = -t & kMask;
  int begin = -g & kMask;
  if (first_s > begin || first_t > begin) begin += kElements;
  const int count = static_cast<int>(classes & kMask);
  const int last = max((s + count) & kMask, (t + count) & kMask);
  if (begin > classes) begin = static_cast<int>(classes);
  const int64_t inside = classes - last - begin;
  const int64_t vectors = inside > 0 ? inside / kElements : 0;
  constexpr int kBytes = static_cast<int>(sizeof(T));
  return {begin, vectors, static_cast<int>(classes - begin - vectors * kElements),
          ((s + begin) & kMask) * kBytes, ((t + begin) & kMask) * kBytes};
}
// The aligned vectors from which `fetch` combines the row's vectors.
template <class T>
__device__ __forceinline__ const uint4* vectors_of(const T* row, int64_t begin, int shift) {
  return reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row + begin) - shift);
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
