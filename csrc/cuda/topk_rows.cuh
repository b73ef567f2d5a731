// A row of the sparse loss as one CTA walks it: the map of its listed classes, the first sweep's
// sums over the others, and the second sweep's gradient of the others.
//
// The row is read once from memory: the first sweep leaves in shared memory what fits there, and
// the second finds the rest in L2.
#pragma once
#include "../topk_row.h"
#include "row.cuh"
#include "rows.cuh"

namespace fastkd::cuda {

// A call of the sparse loss as the kernels see it.
struct TopkCall {
  ForwardCall forward;      // its teacher is the student once more
  const void* log_probs;    // acc [rows, k]
  const int64_t* indices;   // [rows, k]
  const void* grad_output;  // acc, one number or [rows], or null: 1
  bool grad_output_per_row;
  bool filled;  // grad holds the gradient for grad_output = 1
  topk::Comparison how;
  int64_t k;
  int64_t cached;     // vectors of a row that shared memory has room for
  int64_t map_words;  // and the map of its listed classes
};

// Exponents of a row's logits relative to its maximum m (row.cuh has the arithmetic):
// (z - origin) * slope + bias, where one of origin and bias is 0.
template <class A>
struct Exponents {
  A origin = 0, bias = 0, own_bias = 0;

  Exponents() = default;
  __device__ __forceinline__ Exponents(A m, const Temperature<A>& t) {
    if (m <= t.limit && m >= -t.limit) {
      bias = -mul_of(m, t.slope);
      own_bias = -mul_of(m, static_cast<A>(kLog2E));
    } else {
      origin = m;
    }
  }
  // 2^ of it at temperature t and at 1.
  __device__ __forceinline__ void at(A z, const Temperature<A>& t, A& tempered, A& hard) const {
    const A offset = z - origin;
    tempered = exp2_of(fma_of(offset, t.slope, bias));
    hard =
        power_of<kAtRunTime>(tempered, fma_of(offset, static_cast<A>(kLog2E), own_bias), t.power);
  }
};

// Sums over the classes that are not listed.
template <class A>
struct Rest {
  A max = kLowest<A>, tempered = 0, hard = 0;
  double logits = 0;  // the sum of all logits, listed ones too; for label smoothing alone
  Exponents<A> exponents;

  __device__ __forceinline__ void raise(A to, const Temperature<A>& t) {
    if (!(to > max)) return;
    const A change = reference_change(max, to, t.slope, t.limit);
    const A hard_change = t.power > 0 ? change * static_cast<A>(t.power)
                                      : reference_change(max, to, static_cast<A>(kLog2E), t.limit);
    tempered = mul_of(tempered, exp2_of(change));
    hard = mul_of(hard, exp2_of(hard_change));
    max = to;
    exponents = Exponents<A>(max, t);
  }
  // Some of the row's classes, of which `bits` tells the listed ones. The maximum follows when it
  // has fallen behind by t.margin.
  template <int kCount>
  __device__ __forceinline__ void add(A (&z)[kCount], uint32_t bits, const Temperature<A>& t,
                                      bool smoothing) {
    if (smoothing) {
      const A near = max > kLowest<A> ? max : A(0);
      A sum = 0;
#pragma unroll
      for (int i = 0; i < kCount; i++) sum += z[i] - near;
      logits += static_cast<double>(sum) + kCount * static_cast<double>(near);
    }
    if (bits != 0) {
#pragma unroll
      for (int i = 0; i < kCount; i++)
        if (bits >> i & 1) z[i] = -INFINITY;
    }
    A top = z[0];
#pragma unroll
    for (int i = 1; i < kCount; i++) top = max_of(top, z[i]);
    if (top > max + t.margin) raise(top, t);
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      A e, own;
      exponents.at(z[i], t, e, own);
      tempered += e;
      hard += own;
    }
  }
  // All lanes get the sums of the warp.
  __device__ __forceinline__ void merge_lanes(const Temperature<A>& t) {
    raise(lanes_max(max), t);
    tempered = lanes_sum(tempered);
    hard = lanes_sum(hard);
    logits = lanes_sum(logits);
  }
  // The factors that make sums relative to the maximum of sums relative to its reference.
  __device__ __forceinline__ double to_max(const Temperature<A>& t) const {
    return exp2_of(-static_cast<double>(reference_error(max, t.slope, t.limit)));
  }
  __device__ __forceinline__ double hard_to_max(const Temperature<A>& t) const {
    const double error =
        t.power > 0 ? t.power * static_cast<double>(reference_error(max, t.slope, t.limit))
                    : static_cast<double>(reference_error(max, static_cast<A>(kLog2E), t.limit));
    return exp2_of(-error);
  }
  // NaN is something.
  __device__ __forceinline__ bool nothing() const { return tempered == A(0); }
  __device__ __forceinline__ topk::Mass mass(const Temperature<A>& t) const {
    if (nothing()) return {};
    return {static_cast<double>(max), tempered * to_max(t), hard * hard_to_max(t)};
  }
};

// The gradient of a class that is neither listed nor the label.
template <class A>
struct RestWriter {
  Exponents<A> exponents;
  A soft, hard, uniform;

  RestWriter() = default;
  __device__ __forceinline__ RestWriter(const topk::Gains& gains, const Rest<A>& rest,
                                        const Temperature<A>& t)
      : soft(0), hard(0), uniform(static_cast<A>(gains.uniform)) {
    if (rest.nothing()) return;
    exponents = Exponents<A>(rest.max, t);
    soft = static_cast<A>(gains.rest * rest.to_max(t));
    hard = static_cast<A>(gains.rest_hard * rest.hard_to_max(t));
  }
  __device__ __forceinline__ A at(A z, const Temperature<A>& t) const {
    A e, own;
    exponents.at(z, t, e, own);
    return fma_of(soft, e, fma_of(hard, own, uniform));
  }
};

// One bit for each of so many classes; longer rows are scanned in pieces.
constexpr int64_t kMapBits = 1 << 18;
// Bits before those of the vectors: one for each lane of the peeling warp.
constexpr int kPeelBits = 32;
static_assert(2 * kPeelLanes == kPeelBits, "a word of the map");

__device__ __forceinline__ bool is_marked(const uint32_t* map, int64_t bit) {
  return map[bit / 32] >> (bit % 32) & 1;
}

// How a CTA walks a row. Vectors<T>: 16 bytes at a time. Elements<A>: any dtype, computed in A, one
// class at a time.
//
// A piece is what one map tells of. bit() is a class' place in the map of a piece, or -1 if it
// belongs to another.
template <class T>
struct Vectors {
  using A = float;
  static constexpr int kElements = Vector<T>::kElements;
  static constexpr int64_t kPiece = kMapBits / kElements;  // in vectors
  static constexpr int kBatch = 4;                         // loads of a thread in flight

  const TopkCall& call;
  RowOf<T> row;
  uint4* cache;

  __device__ __forceinline__ Vectors(const TopkCall& c, int64_t index, uint4* shared)
      : call(c),
        row(c.forward.args, c.forward.args.grad, c.forward.args.grad_stride, index),
        cache(shared) {}
  __device__ __forceinline__ int64_t classes() const { return call.forward.args.classes; }
  __device__ __forceinline__ int64_t pieces() const {
    const int64_t count = (row.layout.vectors + kPiece - 1) / kPiece;
    return count > 0 ? count : 1;
  }
  __device__ __forceinline__ int64_t bit(int64_t id, int64_t piece) const {
    const int64_t tail = classes() - row.layout.tail;
    if (id < row.layout.begin) return piece == 0 ? id : -1;
    if (id >= tail) return piece == 0 ? kPeelLanes + id - tail : -1;
    const int64_t inside = id - row.layout.begin - piece * kPiece * kElements;
    return inside >= 0 && inside < kPiece * kElements ? kPeelBits + inside : -1;
  }
  __device__ __forceinline__ float logit(int64_t id) const { return to_acc(row.student[id]); }
  __device__ __forceinline__ void store(int64_t id, double g) const {
    row.grad[id] = from_acc<T>(static_cast<float>(g));
  }
  __device__ __forceinline__ int64_t peeled() const {
    return threadIdx.x < 32 ? row.layout.peeled(threadIdx.x, classes()) : -1;
  }
  // The bits of a vector, given its place in the piece.
  static __device__ __forceinline__ uint32_t bits_of(const uint32_t* map, int i) {
    const int bit = kPeelBits + i * kElements;
    return map[bit / 32] >> (bit % 32) & ((1u << kElements) - 1);
  }
  __device__ __forceinline__ void scan(int64_t piece, const uint32_t* map, Rest<float>& rest,
                                       const Temperature<float>& t, bool smoothing) const {
    const int low = static_cast<int>(piece * kPiece);
    const int high = static_cast<int>(min(row.layout.vectors, (piece + 1) * kPiece));
    const int step = static_cast<int>(blockDim.x), cached = static_cast<int>(call.cached);
    for (int first = low + threadIdx.x; first < high; first += kBatch * step) {
      uint4 v[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int i = first + b * step;
        if (i < high) v[b] = fetch(row.student_vectors, i, row.layout.student_shift);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int i = first + b * step;
        if (i >= high) continue;
        if (i < cached) cache[i] = v[b];
        float z[kElements];
        Vector<T>::load(v[b], z);
        rest.add(z, bits_of(map, i - low), t, smoothing);
      }
    }
    const int64_t i = piece == 0 ? peeled() : -1;
    if (i < 0) return;
    float z[1] = {logit(i)};
    rest.add(z, is_marked(map, threadIdx.x), t, smoothing);
  }
  __device__ __forceinline__ void write(const RestWriter<float>& writer,
                                        const Temperature<float>& t) const {
    const int vectors = static_cast<int>(row.layout.vectors);
    const int step = static_cast<int>(blockDim.x), cached = static_cast<int>(call.cached);
    for (int first = threadIdx.x; first < vectors; first += kBatch * step) {
      uint4 v[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int i = first + b * step;
        if (i >= vectors) continue;
        v[b] = i < cached ? cache[i] : fetch_once(row.student_vectors, i, row.layout.student_shift);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int i = first + b * step;
        if (i >= vectors) continue;
        float z[kElements];
        Vector<T>::load(v[b], z);
#pragma unroll
        for (int e = 0; e < kElements; e++) z[e] = writer.at(z[e], t);
        __stcs(row.grad_vectors + i, Vector<T>::store(z));
      }
    }
    const int64_t i = peeled();
    if (i >= 0) row.grad[i] = from_acc<T>(writer.at(logit(i), t));
  }
  __device__ __forceinline__ void fill(float value) const {
    fill_row(row, value, 0, row.layout.vectors, true, threadIdx.x, blockDim.x, classes());
  }
};

template <class Acc>
struct Elements {
  using A = Acc;

  const TopkCall& call;
  int64_t student_offset, grad_offset;

  __device__ __forceinline__ Elements(const TopkCall& c, int64_t index, uint4*)
      : call(c),
        student_offset(offset_of(index, c.forward.args.group_rows, c.forward.args.student_stride)),
        grad_offset(offset_of(index, c.forward.args.group_rows, c.forward.args.grad_stride)) {}
  __device__ __forceinline__ int64_t classes() const { return call.forward.args.classes; }
  __device__ __forceinline__ int64_t pieces() const {
    return (classes() + kMapBits - 1) / kMapBits;
  }
  __device__ __forceinline__ int64_t bit(int64_t id, int64_t piece) const {
    return id / kMapBits == piece ? id % kMapBits : -1;
  }
  __device__ __forceinline__ A logit(int64_t id) const {
    const ForwardArgs& args = call.forward.args;
    return load_any<A>(args.student, args.student_dtype, student_offset + id);
  }
  __device__ __forceinline__ void store(int64_t id, double g) const {
    const ForwardArgs& args = call.forward.args;
    store_any(args.grad, args.student_dtype, grad_offset + id, static_cast<A>(g));
  }
  __device__ __forceinline__ void scan(int64_t piece, const uint32_t* map, Rest<A>& rest,
                                       const Temperature<A>& t, bool smoothing) const {
    const int64_t low = piece * kMapBits;
    const int64_t high = min(classes(), low + kMapBits);
    for (int64_t i = low + threadIdx.x; i < high; i += blockDim.x) {
      A z[1] = {logit(i)};
      rest.add(z, is_marked(map, i - low), t, smoothing);
    }
  }
  __device__ __forceinline__ void write(const RestWriter<A>& writer,
                                        const Temperature<A>& t) const {
    for (int64_t i = threadIdx.x; i < classes(); i += blockDim.x) store(i, writer.at(logit(i), t));
  }
  __device__ __forceinline__ void fill(A value) const {
    if (call.forward.args.grad == nullptr) return;
    for (int64_t i = threadIdx.x; i < classes(); i += blockDim.x) store(i, value);
  }
};

}  // namespace fastkd::cuda
