// Several teachers, or probabilities, as the logits of one, a CTA for each row. A first sweep over
// the row finds what normalises each teacher, a second, which finds them in the L2 cache, mixes
// them; a mean of logits needs no first one. The arithmetic is that of csrc/cpu/mixture.cpp.
#include <cfloat>

#include "../mixture.h"
#include "../numerics.h"
#include "launch.h"
#include "vectors.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kMixtureThreads = 512;
constexpr int kChunk = 8;  // classes that a thread takes at a time: 16 bytes of 16-bit logits

struct MixtureCall {
  MixtureArgs args;  // whose teachers are these:
  MixedTeacher teachers[kMostTeachers];
};

template <class A>
constexpr A kLowest = sizeof(A) == sizeof(float) ? A(-FLT_MAX) : A(-DBL_MAX);

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return static_cast<A>(__int_as_float(static_cast<int>(0xff800000)));
}

// Classes first, first + 1, ... of a row; `nothing` beyond its end.
template <class T, class A>
__device__ __forceinline__ void load_chunk(const T* row, int64_t first, int64_t classes, A nothing,
                                           A (&x)[kChunk]) {
  if constexpr (sizeof(T) <= sizeof(float)) {
    constexpr int kElements = Vector<T>::kElements;
    const T* const chunk = row + first;
    if (first + kChunk <= classes && reinterpret_cast<uintptr_t>(chunk) % kVectorBytes == 0) {
#pragma unroll
      for (int v = 0; v < kChunk / kElements; v++) {
        float elements[kElements];
        Vector<T>::load(reinterpret_cast<const uint4*>(chunk)[v], elements);
#pragma unroll
        for (int i = 0; i < kElements; i++) x[v * kElements + i] = static_cast<A>(elements[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; i++)
    x[i] = first + i < classes ? static_cast<A>(to_acc(row[first + i])) : nothing;
}

// The same of a teacher, as logits.
template <class A>
__device__ __forceinline__ void load_logits(const MixtureArgs& args, const MixedTeacher& teacher,
                                            int64_t row, int64_t first, A (&x)[kChunk]) {
  const int64_t start = offset_of(row, teacher.group_rows, teacher.stride);
  const A nothing = args.probabilities ? A(0) : minus_infinity<A>();
  const auto load = [&](auto* logits) {
    load_chunk(logits + start, first, args.classes, nothing, x);
  };
  switch (teacher.dtype) {
    case DType::kFloat64:
      load(static_cast<const double*>(teacher.logits));
      break;
    case DType::kFloat16:
      load(static_cast<const __half*>(teacher.logits));
      break;
    case DType::kBFloat16:
      load(static_cast<const __nv_bfloat16*>(teacher.logits));
      break;
    case DType::kFloat32:
    default:
      load(static_cast<const float*>(teacher.logits));
  }
  if (!args.probabilities) return;
#pragma unroll
  for (int i = 0; i < kChunk; i++) x[i] = log_of(x[i]);
}

template <class A>
__device__ __forceinline__ void store_chunk(A* row, int64_t first, int64_t classes,
                                            const A (&x)[kChunk]) {
  if constexpr (sizeof(A) == sizeof(float)) {
    uint4* const chunk = reinterpret_cast<uint4*>(row + first);
    if (first + kChunk <= classes && reinterpret_cast<uintptr_t>(chunk) % kVectorBytes == 0) {
      chunk[0] = Vector<float>::store({x[0], x[1], x[2], x[3]});
      chunk[1] = Vector<float>::store({x[4], x[5], x[6], x[7]});
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; i++)
    if (first + i < classes) row[first + i] = x[i];
}

// Exponentials relative to the greatest logit so far, and their sum. NaN makes the sum NaN.
template <class A>
struct Sum {
  A max = kLowest<A>;
  A sum = 0;

  __device__ __forceinline__ void include(const A (&x)[kChunk], A factor) {
    A top = max;
#pragma unroll
    for (int i = 0; i < kChunk; i++) top = max_of(top, x[i]);
    sum *= exp2_of((max - top) * factor);
    max = top;
#pragma unroll
    for (int i = 0; i < kChunk; i++) sum += exp2_of((x[i] - top) * factor);
  }
  __device__ __forceinline__ void include(const Sum& other, A factor) {
    const A top = max_of(max, other.max);
    sum = add_of(mul_of(sum, exp2_of((max - top) * factor)),
                 mul_of(other.sum, exp2_of((other.max - top) * factor)));
    max = top;
  }
  __device__ __forceinline__ void include_lanes(A factor) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      Sum other;
      other.max = __shfl_xor_sync(0xffffffffu, max, step);
      other.sum = __shfl_xor_sync(0xffffffffu, sum, step);
      include(other, factor);
    }
  }
};

// What makes a probability of an exponential: 2^((z - max) * factor + log_scale) is the teacher's
// share times its softmax.
template <class A>
struct Normal {
  A max, log_scale;
};

// Of all teachers, for all threads.
template <class A>
__device__ __forceinline__ void normalize(const MixtureCall& call, int64_t row, A factor,
                                          Sum<A> (*sums)[kMixtureThreads / 32], Normal<A>* normal) {
  const MixtureArgs& args = call.args;
#pragma unroll 1
  for (int64_t k = 0; k < args.count; k++) {
    Sum<A> sum;
#pragma unroll 1
    for (int64_t first = threadIdx.x * kChunk; first < args.classes; first += blockDim.x * kChunk) {
      A x[kChunk];
      load_logits(args, call.teachers[k], row, first, x);
      sum.include(x, factor);
    }
    sum.include_lanes(factor);
    if (threadIdx.x % 32 == 0) sums[k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x < args.count) {
    const int k = threadIdx.x;
    Sum<A> sum = sums[k][0];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; warp++)
      sum.include(sums[k][warp], factor);
    normal[k] = {sum.max, log2_of(quotient_of(static_cast<A>(call.teachers[k].share), sum.sum))};
  }
  __syncthreads();
}

// The logarithm of the sum of the teachers' probabilities, relative to the greatest of them.
template <class A>
__device__ __forceinline__ void mix_chunk(const MixtureCall& call, int64_t row, int64_t first,
                                          A factor, A unit, const Normal<A>* normal,
                                          A (&mixed)[kChunk]) {
  A greatest[kChunk], sums[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; i++) greatest[i] = minus_infinity<A>(), sums[i] = 0;
#pragma unroll 1
  for (int64_t k = 0; k < call.args.count; k++) {
    A x[kChunk];
    load_logits(call.args, call.teachers[k], row, first, x);
    const Normal<A> by = normal[k];
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      const A log = (x[i] - by.max) * factor + by.log_scale;
      const A top = max_of(greatest[i], log);
      // Where every teacher masks the class its sum stays 0, and the logarithm becomes -inf.
      const A base = top > minus_infinity<A>() ? top : A(0);
      sums[i] = sums[i] * exp2_of(greatest[i] - base) + exp2_of(log - base);
      greatest[i] = top;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; i++) mixed[i] = (greatest[i] + log2_of(sums[i])) * unit;
}

template <class A>
__device__ __forceinline__ void average_chunk(const MixtureCall& call, int64_t row, int64_t first,
                                              A scale, A (&mixed)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; i++) mixed[i] = 0;
#pragma unroll 1
  for (int64_t k = 0; k < call.args.count; k++) {
    A x[kChunk];
    load_logits(call.args, call.teachers[k], row, first, x);
    const A share = static_cast<A>(call.teachers[k].share) * scale;
#pragma unroll
    for (int i = 0; i < kChunk; i++) mixed[i] += share * x[i];
  }
}

template <class A>
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_kernel(const __grid_constant__ MixtureCall call) {
  __shared__ Normal<A> normal[kMostTeachers];
  alignas(Sum<A>)
      __shared__ unsigned char of_warps[sizeof(Sum<A>) * kMostTeachers * kMixtureThreads / 32];
  const MixtureArgs& args = call.args;
  const int64_t row = blockIdx.x;
  A t = static_cast<A>(args.temperature), teacher_t = static_cast<A>(args.teacher_temperature);
  if (args.row_temperatures != nullptr) {
    const A* const own = static_cast<const A*>(args.row_temperatures) + row;
    t = own[0], teacher_t = own[args.rows];
  }
  const A factor = quotient_of(static_cast<A>(kLog2E), teacher_t);
  const A unit = static_cast<A>(kLn2) * t, ratio = quotient_of(t, teacher_t);
  const bool linear = args.count == 1 || args.ensemble == Ensemble::kLogits;
  if (!linear)
    normalize(call, row, factor, reinterpret_cast<Sum<A>(*)[kMixtureThreads / 32]>(of_warps),
              normal);
  A* const out = static_cast<A*>(args.mixed) + row * args.classes;
#pragma unroll 1
  for (int64_t first = threadIdx.x * kChunk; first < args.classes; first += blockDim.x * kChunk) {
    A mixed[kChunk];
    linear ? average_chunk(call, row, first, ratio, mixed)
           : mix_chunk(call, row, first, factor, unit, normal, mixed);
    store_chunk(out, first, args.classes, mixed);
  }
}

cudaError_t launch_mixture(const MixtureArgs& args, cudaStream_t stream) {
  MixtureCall call = {args, {}};
  for (int64_t k = 0; k < args.count; k++) {
    call.teachers[k] = args.teachers[k];
    if (call.teachers[k].group_rows <= 0) call.teachers[k].group_rows = args.rows;
  }
  call.args.teachers = nullptr;
  int threads = 32;  // whole warps, with one chunk for each thread where there are so many
  while (threads < kMixtureThreads && threads * kChunk < args.classes) threads += 32;
  Launch launch(args.rows, threads, 0, stream);
  return args.in_double ? launch(mixture_kernel<double>, call)
                        : launch(mixture_kernel<float>, call);
}

}  // namespace

int mixture(const MixtureArgs& args, void* stream) {
  if (args.rows > kMostRows || args.count > kMostTeachers) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.classes == 0) return cudaSuccess;
  return reported(launch_mixture(args, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastkd::cuda
