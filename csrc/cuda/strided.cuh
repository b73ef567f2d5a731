// Rows whose classes are not adjacent, as those of (N, C, H, W): how a thread walks one, a few
// classes at a time. The threads of a warp have neighbouring rows, so that what they load of a
// class is one piece of memory.
#pragma once
#include "launch.h"
#include "rows.cuh"

namespace fastkd::cuda {

// One tensor's classes of one row, in bytes.
struct Strip {
  char* first = nullptr;
  int64_t step = 0;

  Strip() = default;
  __device__ __forceinline__ Strip(const void* data, int64_t element, const Inputs& in, int64_t row,
                                   RowStrides stride)
      : first(static_cast<char*>(const_cast<void*>(data)) +
              offset_of(row, in.group_rows, stride) * element),
        step(stride.classes * element) {}
  __device__ __forceinline__ char* at(int64_t k) const { return first + k * step; }
};

// The classes of a strip from k on; zeros for those that are not there or not `wanted`. `kLast`:
// nobody reads them again.
template <class T, bool kLast, int kChunk, class A, class Count>
__device__ __forceinline__ void load_as(const Strip& strip, int64_t k, Count count, bool wanted,
                                        A (&x)[kChunk]) {
  const char* at = strip.at(k);
  T raw[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; i++, at += strip.step) {
    raw[i] = T();
    if (wanted && i < count)
      raw[i] = kLast ? __ldcs(reinterpret_cast<const T*>(at)) : *reinterpret_cast<const T*>(at);
  }
#pragma unroll
  for (int i = 0; i < kChunk; i++) x[i] = static_cast<A>(to_acc(raw[i]));
}

// What the tensors hold: SameDtype, T all three; AnyDtypes, whatever they say, computed in Acc. Of
// kChunk classes all are loaded before the first is looked at.
template <class T>
struct SameDtype {
  using A = float;
  static constexpr bool kHot = true, kFold = kFoldScales<T>;
  static constexpr int kChunk = Vector<T>::kElements;

  static __device__ __forceinline__ int64_t size(DType) { return sizeof(T); }
  template <bool kLast, class Count>
  static __device__ __forceinline__ void load(const Strip& strip, DType, int64_t k, Count count,
                                              bool wanted, float (&x)[kChunk]) {
    load_as<T, kLast>(strip, k, count, wanted, x);
  }
  static __device__ __forceinline__ void store(char* at, DType, float x) {
    __stcs(reinterpret_cast<T*>(at), from_acc<T>(x));
  }
};
template <class Acc>
struct AnyDtypes {
  using A = Acc;
  static constexpr bool kHot = false, kFold = false;
  static constexpr int kChunk = kVectorBytes / static_cast<int>(sizeof(A));

  static __device__ __forceinline__ int64_t size(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  }
  template <bool kLast, class Count>
  static __device__ __forceinline__ void load(const Strip& strip, DType dtype, int64_t k,
                                              Count count, bool wanted, A (&x)[kChunk]) {
    switch (dtype) {
      case DType::kFloat64:
        return load_as<double, kLast>(strip, k, count, wanted, x);
      case DType::kFloat16:
        return load_as<__half, kLast>(strip, k, count, wanted, x);
      case DType::kBFloat16:
        return load_as<__nv_bfloat16, kLast>(strip, k, count, wanted, x);
      case DType::kFloat32:
      default:
        return load_as<float, kLast>(strip, k, count, wanted, x);
    }
  }
  static __device__ __forceinline__ void store(char* at, DType dtype, A x) {
    store_any(at, dtype, 0, x);
  }
};
// Calls fn with what a call's tensors hold.
template <class Fn>
cudaError_t with_elements(const Inputs& in, Fn&& fn) {
  if (computes_in_double(in.student_dtype, in.teacher_dtype))
    return fn(TypeOf<AnyDtypes<double>>());
  if (!hot_dtypes(in.student_dtype, in.teacher_dtype)) return fn(TypeOf<AnyDtypes<float>>());
  switch (in.student_dtype) {
    case DType::kBFloat16:
      return fn(TypeOf<SameDtype<__nv_bfloat16>>());
    case DType::kFloat16:
      return fn(TypeOf<SameDtype<__half>>());
    default:
      return fn(TypeOf<SameDtype<float>>());
  }
}

// Where a thread is: in a row of a tile of rows, and in one of the parts that share its classes,
// which take turns with its chunks.
struct Place {
  int rows, parts;  // of the tile
  int row, part;

  __device__ __forceinline__ explicit Place(int parts_of_row)
      : rows(static_cast<int>(blockDim.x) / parts_of_row),
        parts(parts_of_row),
        row(static_cast<int>(threadIdx.x) % rows),
        part(static_cast<int>(threadIdx.x) / rows) {}
};

// A row as one thread meets it. Of rows that are not `real` nothing is read: they are computed as
// if all logits were 0, in step with the warp's others, and their gradient is filled.
template <class E>
struct StridedRow {
  using A = typename E::A;
  static constexpr int kChunk = E::kChunk;
  Strip student, teacher, grad;  // grad is empty where none is to be written
  DType student_dtype, teacher_dtype;
  int64_t classes, label;
  bool real;
  A otherwise;
  int part, parts;

  template <class Args>
  __device__ __forceinline__ StridedRow(const Args& args, const Place& place, int64_t row,
                                        int64_t of_label, RowKind kind, bool writes)
      : student(args.student, E::size(args.student_dtype), args, row, args.student_stride),
        teacher(args.teacher, E::size(args.teacher_dtype), args, row, args.teacher_stride),
        student_dtype(args.student_dtype),
        teacher_dtype(args.teacher_dtype),
        classes(args.classes),
        label(of_label),
        real(kind == RowKind::kReal),
        otherwise(static_cast<A>(fill_value(kind))),
        part(place.part),
        parts(place.parts) {
    if (writes && args.grad != nullptr)
      grad = Strip(args.grad, E::size(student_dtype), args, row, args.grad_stride);
  }

  // Calls fn with the first class of each chunk of this part, and with the number of its classes.
  template <class Fn>
  __device__ __forceinline__ void for_chunks(Fn&& fn) const {
    int64_t k = static_cast<int64_t>(part) * kChunk;
#pragma unroll 1
    for (; k + kChunk <= classes; k += parts * kChunk) fn(k, All<kChunk>());
    if (k < classes) fn(k, static_cast<int>(classes - k));
  }
  template <bool kLast, class Count>
  __device__ __forceinline__ void load(int64_t k, Count count, A (&z)[kChunk],
                                       A (&w)[kChunk]) const {
    E::template load<kLast>(student, student_dtype, k, count, real, z);
    E::template load<kLast>(teacher, teacher_dtype, k, count, real, w);
  }
  __device__ __forceinline__ A label_logit() const {
    return real && label >= 0 ? load_any<A>(student.at(label), student_dtype, 0) : A(0);
  }

  // The first sweep. The maxima follow the greatest logits as they do in add_vectors().
  template <int kPower, class Temper, class Out>
  __device__ __forceinline__ void scan(const Temper& t, const Out& left_out,
                                       Statistics<A>& stats) const {
    A student_top = stats.student_max, teacher_top = stats.teacher_max;
    for_chunks([&](int64_t k, auto count) {
      A z[kChunk], w[kChunk];
      load<false>(k, count, z, w);
      const int out = left_out.among(k, kChunk);
      const auto each = [&](auto&& fn) {
#pragma unroll
        for (int i = 0; i < kChunk; i++)
          if (i < count && i != out) fn(z[i], w[i]);
      };
      each([&](A x, A y) {
        student_top = max_of(student_top, x);
        teacher_top = max_of(teacher_top, y);
      });
      if (student_top > stats.student_max + t.margin || teacher_top > stats.teacher_max + t.margin)
        stats.raise(student_top, teacher_top, t);
      if (stats.beyond(t)) {
        each([&](A x, A y) { stats.template add_any<kAtRunTime>(x, y, t); });
      } else {
        each([&](A x, A y) { stats.template add<kPower>(x, y, t); });
      }
    });
    stats.raise(student_top, teacher_top, t);
  }
  // The sweep between, of a GeneralWriter.
  template <class W, class Out>
  __device__ __forceinline__ void sum(const W& writer, const Out& left_out, bool extra,
                                      typename W::Sums& sums) const {
    for_chunks([&](int64_t k, auto count) {
      A z[kChunk], w[kChunk];
      load<false>(k, count, z, w);
      sum_classes(writer, z, w, count, left_out.among(k, kChunk), extra, sums);
    });
  }
  __device__ __forceinline__ void add_moments(bool squared, Moments& moments) const {
    for_chunks([&](int64_t k, auto count) {
      A z[kChunk], w[kChunk];
      load<false>(k, count, z, w);
#pragma unroll
      for (int i = 0; i < kChunk; i++)
        if (i < count) moments.add(z[i], w[i], squared);
    });
  }
  template <int kPower, bool kExtra, bool kUniform, class W>
  __device__ __forceinline__ void write(const W& writer, typename W::Sums& sums) const {
    for_chunks([&](int64_t k, auto count) {
      A z[kChunk], w[kChunk], g[kChunk];
      load<true>(k, count, z, w);
      write_classes<kPower, kExtra, kUniform>(writer, z, w, count, g, sums);
      const int64_t inside = label - k;
#pragma unroll
      for (int i = 0; i < kChunk; i++)
        if (i == inside) g[i] = writer.at_label(g[i]);
      store(k, count, g);
    });
  }
  // grad *= factor.
  __device__ __forceinline__ void rescale(A factor) const {
    for_chunks([&](int64_t k, auto count) {
      A g[kChunk];
      E::template load<true>(grad, student_dtype, k, count, grad.first != nullptr, g);
#pragma unroll
      for (int i = 0; i < kChunk; i++) g[i] *= factor;
      store(k, count, g);
    });
  }
  template <class Count>
  __device__ __forceinline__ void store(int64_t k, Count count, const A (&g)[kChunk]) const {
    if (grad.first == nullptr) return;
    char* at = grad.at(k);
#pragma unroll
    for (int i = 0; i < kChunk; i++, at += grad.step)
      if (i < count) E::store(at, student_dtype, real ? g[i] : otherwise);
  }
};

}  // namespace fastkd::cuda
