// Logits of a mixture of teachers, or of one teacher's probabilities, computed by one CTA for each
// row. The first sweep over the row computes the normalization of each teacher. The second sweep
// mixes the logits, which are then in L2. A mean of logits, or one teacher, needs no first sweep.
// The formulas are those of csrc/cpu/mixture.cpp (docs/maths.md, section 12).
#include "../mixture.h"
#include "../numerics.h"
#include "launch.h"

namespace fastkd::cuda {
namespace {

constexpr int kMixtureThreads = 512;
template <class A>
constexpr int kChunk = 32 / sizeof(A);  // classes that a thread takes at a time

struct MixtureCall {
  MixtureArgs args;  // args.teachers is null: kernels read `teachers`
  MixedTeacher teachers[kMostTeachers];
};

// Call fn(first) for each chunk of this thread. A chunk has the classes first, first + blockDim.x,
// ...
template <class A, class Fn>
__device__ __forceinline__ void for_chunks(int64_t classes, Fn&& fn) {
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < classes; first += kChunk<A> * blockDim.x) fn(first);
}

// Load a chunk of a teacher's logits, or the logarithms of a teacher's probabilities. Classes
// beyond the end of the row get -inf.
template <class A>
__device__ __forceinline__ void load_logits(const MixtureArgs& args, const MixedTeacher& teacher,
                                            int64_t row, int64_t first, A (&x)[kChunk<A>]) {
  const int64_t start = offset_of(row, teacher.group_rows, teacher.stride);
  with_dtype(teacher.dtype, [&](auto as) {
    const auto* logits = static_cast<const decltype(as)*>(teacher.logits) + start;
#pragma unroll
    for (int i = 0; i < kChunk<A>; i++) {
      const int64_t k = first + i * blockDim.x;
      x[i] = k < args.classes ? static_cast<A>(to_acc(logits[k])) : A(-INFINITY);
    }
  });
  if (!args.probabilities) return;
#pragma unroll
  for (int i = 0; i < kChunk<A>; i++)
    if (first + i * blockDim.x < args.classes) x[i] = log_of(x[i]);
}

// A sum of exponentials, relative to the greatest logit so far. NaN among the logits makes the sum
// NaN.
template <class A>
struct Sum {
  A max = kLowest<A>;
  A sum = 0;

  __device__ __forceinline__ void include(const A (&x)[kChunk<A>], A factor) {
    A top = max;
#pragma unroll
    for (int i = 0; i < kChunk<A>; i++) top = max_of(top, x[i]);
    sum *= exp2_of((max - top) * factor);
    max = top;
#pragma unroll
    for (int i = 0; i < kChunk<A>; i++) sum += exp2_of((x[i] - top) * factor);
  }
  __device__ __forceinline__ void include(const Sum& other, A factor) {
    const A top = max_of(max, other.max);
    sum = add_of(mul_of(sum, exp2_of((max - top) * factor)),
                 mul_of(other.sum, exp2_of((other.max - top) * factor)));
    max = top;
  }
  // Merge the sums of a warp; all lanes get the result.
  __device__ __forceinline__ void merge_lanes(A factor) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      Sum other;
      other.max = __shfl_xor_sync(0xffffffffu, max, step);
      other.sum = __shfl_xor_sync(0xffffffffu, sum, step);
      include(other, factor);
    }
  }
};

// Normalization of a teacher: for a logit z, 2^((z - max) * factor + log_scale) is the teacher's
// share times the teacher's softmax.
template <class A>
struct Normal {
  A max, log_scale;
};

// Write the normalization of every teacher to shared memory.
template <class A>
__device__ __forceinline__ void normalize(const MixtureCall& call, int64_t row, A factor,
                                          Normal<A>* normal) {
  WarpExchange exchange;
#pragma unroll 1
  for (int64_t k = 0; k < call.args.count; k++) {
    Sum<A> sum;
    for_chunks<A>(call.args.classes, [&](int64_t first) {
      A x[kChunk<A>];
      load_logits(call.args, call.teachers[k], row, first, x);
      sum.include(x, factor);
    });
    sum.merge_lanes(factor);
    sum = exchange.share(sum);
    sum.merge_lanes(factor);
    if (threadIdx.x == 0)
      normal[k] = {sum.max, log2_of(quotient_of(static_cast<A>(call.teachers[k].share), sum.sum))};
  }
  __syncthreads();
}

// Compute the mixed logits of a chunk: t times the logarithm of the sum over teachers of share
// times probability. The sum is relative to the greatest summand of each class, so that nothing
// overflows.
template <class A>
__device__ __forceinline__ void mix_chunk(const MixtureCall& call, int64_t row, int64_t first,
                                          A factor, A unit, const Normal<A>* normal,
                                          A (&mixed)[kChunk<A>]) {
  A greatest[kChunk<A>], sums[kChunk<A>];
#pragma unroll
  for (int i = 0; i < kChunk<A>; i++) greatest[i] = A(-INFINITY), sums[i] = 0;
#pragma unroll 1
  for (int64_t k = 0; k < call.args.count; k++) {
    A x[kChunk<A>];
    load_logits(call.args, call.teachers[k], row, first, x);
    const Normal<A> teacher = normal[k];
#pragma unroll
    for (int i = 0; i < kChunk<A>; i++) {
      const A log = (x[i] - teacher.max) * factor + teacher.log_scale;
      const A top = max_of(greatest[i], log);
      // If every teacher masks the class, the class's sum stays 0, and its logarithm becomes -inf.
      const A base = top > A(-INFINITY) ? top : A(0);
      sums[i] = sums[i] * exp2_of(greatest[i] - base) + exp2_of(log - base);
      greatest[i] = top;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk<A>; i++) mixed[i] = (greatest[i] + log2_of(sums[i])) * unit;
}

template <class A>
__device__ __forceinline__ void average_chunk(const MixtureCall& call, int64_t row, int64_t first,
                                              A scale, A (&mixed)[kChunk<A>]) {
#pragma unroll
  for (int i = 0; i < kChunk<A>; i++) mixed[i] = 0;
#pragma unroll 1
  for (int64_t k = 0; k < call.args.count; k++) {
    A x[kChunk<A>];
    load_logits(call.args, call.teachers[k], row, first, x);
    const A share = static_cast<A>(call.teachers[k].share) * scale;
#pragma unroll
    for (int i = 0; i < kChunk<A>; i++) mixed[i] += share * x[i];
  }
}

template <class A>
__global__ void __launch_bounds__(kMixtureThreads, 1)
    mixture_kernel(const __grid_constant__ MixtureCall call) {
  __shared__ Normal<A> normal[kMostTeachers];
  const MixtureArgs& args = call.args;
  const int64_t row = blockIdx.x;
  A t = static_cast<A>(args.temperature), teacher_t = static_cast<A>(args.teacher_temperature);
  if (args.row_temperatures != nullptr) {
    const A* const temperatures = static_cast<const A*>(args.row_temperatures) + row;
    t = temperatures[0], teacher_t = temperatures[args.rows];
  }
  const A factor = quotient_of(static_cast<A>(kLog2E), teacher_t);
  const A unit = static_cast<A>(kLn2) * t, ratio = quotient_of(t, teacher_t);
  const bool linear = args.count == 1 || args.ensemble == Ensemble::kLogits;
  if (!linear) normalize(call, row, factor, normal);
  A* const out = static_cast<A*>(args.mixed) + row * args.classes;
  for_chunks<A>(args.classes, [&](int64_t first) {
    A mixed[kChunk<A>];
    linear ? average_chunk(call, row, first, ratio, mixed)
           : mix_chunk(call, row, first, factor, unit, normal, mixed);
#pragma unroll
    for (int i = 0; i < kChunk<A>; i++)
      if (first + i * blockDim.x < args.classes) out[first + i * blockDim.x] = mixed[i];
  });
}

cudaError_t launch_mixture(const MixtureArgs& args, cudaStream_t stream) {
  MixtureCall call = {args, {}};
  for (int64_t k = 0; k < args.count; k++) {
    call.teachers[k] = args.teachers[k];
    if (call.teachers[k].group_rows <= 0) call.teachers[k].group_rows = args.rows;
  }
  call.args.teachers = nullptr;
  int threads = 32;  // full warps, with about one chunk for each thread
  while (threads < kMixtureThreads && threads * kChunk<float> < args.classes) threads += 32;
  return launch(args.in_double ? mixture_kernel<double> : mixture_kernel<float>,
                dim3(static_cast<unsigned>(args.rows)), threads, 0, stream, call);
}

}  // namespace

int mixture(const MixtureArgs& args, void* stream) {
  if (args.rows > kMostRows || args.count > kMostTeachers) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.classes == 0) return cudaSuccess;
  return clear_error(launch_mixture(args, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastkd::cuda
