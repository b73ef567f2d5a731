// The sweeps over a row of 16-byte vectors, as the registers, ring, streaming and backward kernels
// run them, and over a few classes at a time, as the strided ones do too.
#pragma once
#include "row.cuh"
#include "vectors.cuh"

namespace fastkd::cuda {

// 16-bit gradients have no use for the last bit of an fp32 exponent.
template <class T>
constexpr bool kFoldScales = sizeof(T) == 2;

// The greatest logits so far. The maxima that the sums refer to follow only when they have fallen
// behind by t.margin: some lane of a warp meets a new maximum in almost every vector, and a rescue
// of the sums costs as much as two classes. Statistics::raise(tops...) ends a sweep.
struct Tops {
  float student = kLowest<float>, teacher = kLowest<float>;
};

// How many of some classes that are loaded together are there: all, or an int.
template <int kCount>
struct All {
  __device__ __forceinline__ constexpr operator int() const { return kCount; }
};

// The classes of `kCount` vectors.
template <class T, int kPower, int kCount, class Temper>
__device__ __forceinline__ void add_vectors(Statistics<float>& stats, Tops& tops,
                                            const uint4 (&student)[kCount],
                                            const uint4 (&teacher)[kCount], const Temper& t) {
  constexpr int kElements = Vector<T>::kElements;
  tops.student = fmaxf(tops.student, Vector<T>::template max<kCount>(student));
  tops.teacher = fmaxf(tops.teacher, Vector<T>::template max<kCount>(teacher));
  if (tops.student > stats.student_max + t.margin || tops.teacher > stats.teacher_max + t.margin)
    stats.raise(tops.student, tops.teacher, t);
  const auto each = [&](auto&& add) {
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      float z[kElements], w[kElements];
      Vector<T>::load(student[k], z);
      Vector<T>::load(teacher[k], w);
#pragma unroll
      for (int i = 0; i < kElements; i++) add(z[i], w[i]);
    }
  };
  if (stats.beyond(t)) {  // rare: huge logits, or none yet that is not masked
    each([&](float z, float w) { stats.add_any<kAtRunTime>(z, w, t); });
  } else {
    each([&](float z, float w) { stats.add<kPower>(z, w, t); });
  }
}
template <class T, int kPower, class Temper>
__device__ __forceinline__ void add_vector(Statistics<float>& stats, Tops& tops, uint4 student,
                                           uint4 teacher, const Temper& t) {
  const uint4 students[1] = {student}, teachers[1] = {teacher};
  add_vectors<T, kPower, 1>(stats, tops, students, teachers, t);
}

// The gradients of the first `count` of some classes, but for what belongs to the label.
template <int kPower, bool kExtra, bool kUniform, int kMost, class A, class Count, class W>
__device__ __forceinline__ void write_classes(const W& writer, const A (&z)[kMost],
                                              const A (&w)[kMost], Count count, A (&g)[kMost],
                                              typename W::Sums& sums) {
  const auto each = [&](auto&& write) {
#pragma unroll
    for (int i = 0; i < kMost; i++)
      if (i < count) g[i] = write(z[i], w[i]);
  };
  if constexpr (W::kGeneral) {
    visit_general(writer.divergence, [&](auto d) {
      each([&](A x, A y) { return writer.template write_as<decltype(d)>(x, y); });
    });
  } else if (writer.apart) {
    each([&](A x, A y) {
      return writer.template write_as<true, kAtRunTime, kExtra, kUniform>(x, y, sums);
    });
  } else {
    each([&](A x, A y) {
      return writer.template write_as<false, kPower, kExtra, kUniform>(x, y, sums);
    });
  }
}
template <class T, int kPower, bool kExtra, bool kUniform = kExtra, class W>
__device__ __forceinline__ uint4 write_vector(const W& writer, uint4 student, uint4 teacher,
                                              typename W::Sums& sums) {
  constexpr int kElements = Vector<T>::kElements;
  float z[kElements], w[kElements], g[kElements];
  Vector<T>::load(student, z);
  Vector<T>::load(teacher, w);
  write_classes<kPower, kExtra, kUniform>(writer, z, w, All<kElements>(), g, sums);
  return Vector<T>::store(g);
}

// The sweep between, of a GeneralWriter. `left_out`: which of the classes is, or -1.
template <int kMost, class A, class Count, class W>
__device__ __forceinline__ void sum_classes(const W& writer, const A (&z)[kMost],
                                            const A (&w)[kMost], Count count, int left_out,
                                            bool extra, typename W::Sums& sums) {
  visit_general(writer.divergence, [&](auto d) {
    using D = decltype(d);
#pragma unroll
    for (int i = 0; i < kMost; i++)
      if (i < count && !(D::kBalance == Balance::kNone && i == left_out))
        writer.template sum_as<D>(z[i], w[i], extra, sums);
  });
}
template <class T, class W>
__device__ __forceinline__ void sum_vector(const W& writer, uint4 student, uint4 teacher,
                                           int left_out, bool extra, typename W::Sums& sums) {
  constexpr int kElements = Vector<T>::kElements;
  float z[kElements], w[kElements];
  Vector<T>::load(student, z);
  Vector<T>::load(teacher, w);
  sum_classes(writer, z, w, All<kElements>(), left_out, extra, sums);
}

template <class T>
__device__ __forceinline__ void add_moments(uint4 student, uint4 teacher, bool squared,
                                            Moments& moments) {
  constexpr int kElements = Vector<T>::kElements;
  float z[kElements], w[kElements];
  Vector<T>::load(student, z);
  Vector<T>::load(teacher, w);
#pragma unroll
  for (int i = 0; i < kElements; i++) moments.add(z[i], w[i], squared);
}

// Pointers to the three tensors' parts of one row, and how they fall into vectors.
template <class T>
struct RowOf {
  const T* student;  // [classes]
  const T* teacher;  // [classes]
  T* grad;           // [classes], or null
  RowLayout layout;
  const uint4* student_vectors;
  const uint4* teacher_vectors;
  uint4* grad_vectors;

  __device__ __forceinline__ RowOf(const Inputs& in, void* grads, RowStrides grad_stride,
                                   int64_t row)
      : student(static_cast<const T*>(in.student) +
                offset_of(row, in.group_rows, in.student_stride)),
        teacher(static_cast<const T*>(in.teacher) +
                offset_of(row, in.group_rows, in.teacher_stride)),
        grad(grads == nullptr
                 ? nullptr
                 : static_cast<T*>(grads) + offset_of(row, in.group_rows, grad_stride)),
        layout(row_layout(student, teacher, grad == nullptr ? student : grad, in.classes)),
        student_vectors(vectors_of(student, layout.begin, layout.student_shift)),
        teacher_vectors(vectors_of(teacher, layout.begin, layout.teacher_shift)),
        grad_vectors(reinterpret_cast<uint4*>(grad + layout.begin)) {}
};

// Writes `value` to the part of a row's gradient that lanes first, first + step, ... of vectors
// [low, high) cover, and with `edges` what lies before and after all vectors.
template <class T>
__device__ __forceinline__ void fill_row(const RowOf<T>& row, float value, int64_t low,
                                         int64_t high, bool edges, int first, int step,
                                         int64_t classes) {
  if (row.grad == nullptr) return;
  float values[Vector<T>::kElements];
#pragma unroll
  for (int i = 0; i < Vector<T>::kElements; i++) values[i] = value;
  const uint4 vector = Vector<T>::store(values);
  for (int64_t i = low + first; i < high; i += step) __stcs(row.grad_vectors + i, vector);
  if (!edges || first >= 32) return;
  const int64_t i = row.layout.peeled(first, classes);
  if (i >= 0) row.grad[i] = from_acc<T>(value);
}

}  // namespace fastkd::cuda
