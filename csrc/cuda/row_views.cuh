// Views of one row of student, teacher and gradient. A view decides which thread loads and stores
// which classes, a chunk at a time. The sweeps (sweeps.cuh; docs/maths.md, sections 2 and 3) are
// therefore one code for all layouts and dtypes. Each sweep loads the row again. There are two
// views:
//   VectorRow   vectors of 16 bytes: adjacent classes of one 16- or 32-bit dtype, aligned alike
//   ElementRow  one class at a time: any dtypes, strides and alignments
// One thread both reads and writes a class, so that the gradient may overwrite the student.
#pragma once
#include <type_traits>

#include "forward_call.cuh"
#include "vectors.cuh"

namespace fastkd::cuda {

// The count or the step of a chunk, as a compile-time constant. A partial chunk has an int as its
// count.
template <int kCount>
struct Constant {
  __device__ __forceinline__ constexpr operator int() const { return kCount; }
};

// The place of a thread in a CTA, which computes `rows` rows at a time. The thread is number `part`
// of the `parts` threads that share row number `row`. These threads take the row's chunks in turn.
struct Place {
  int rows, row, part, parts;
};

// The classes of a chunk: first, first + step, ...
template <int kMost_, class Count, class Step>
struct ChunkClasses {
  static constexpr int kMost = kMost_;
  int64_t first;
  Count count;
  Step step;

  // Return the label's position in the chunk, or -1. Rows must have fewer than 2^31 classes.
  __device__ __forceinline__ int place_of(int64_t label) const {
    const int inside = static_cast<int>(label - first);
    if (static_cast<unsigned>(inside) >= static_cast<unsigned>(kMost * step)) return -1;
    if constexpr (std::is_same_v<Step, Constant<1>>) return inside;
    int place = -1;
#pragma unroll
    for (int i = 0; i < kMost; i++)
      if (i < count && inside == i * step) place = i;
    return place;
  }
};
// A chunk of classes that are loaded one by one. for_each() calls fn(z, w, i) for each class except
// the class at position `without`.
template <class A, int kMost, class Count, class Step>
struct ElementChunk : ChunkClasses<kMost, Count, Step> {
  A z[kMost], w[kMost];

  template <class Fn>
  __device__ __forceinline__ void for_each(int without, Fn&& fn) const {
#pragma unroll
    for (int i = 0; i < kMost; i++)
      if (i < this->count && i != without) fn(z[i], w[i], i);
  }
};
template <class T>
struct VectorChunk
    : ChunkClasses<Vector<T>::kElements, Constant<Vector<T>::kElements>, Constant<1>> {
  static constexpr int kElements = Vector<T>::kElements;
  int64_t index;  // index of the vector in the row
  uint4 student, teacher;

  template <class Fn>
  __device__ __forceinline__ void for_each(int without, Fn&& fn) const {
    float z[kElements], w[kElements];
    Vector<T>::load(student, z);
    Vector<T>::load(teacher, w);
#pragma unroll
    for (int i = 0; i < kElements; i++)
      if (i != without) fn(z[i], w[i], i);
  }
};

// A row of one dtype, in which the vectors of student, teacher and gradient begin at the same class
// (has_equal_alignment()).
template <class T>
struct VectorRow {
  using A = float;
  static constexpr bool kHot = true;
  static constexpr int kChunk = Vector<T>::kElements;

  const T *student, *teacher;
  T* grad;  // or null
  int64_t classes;
  RowLayout layout;
  Place place;

  // `begin`, `count`: the first class, and the number of classes, that the view covers.
  template <class Args>
  __device__ __forceinline__ VectorRow(const Args& args, int64_t row, const Place& at,
                                       int64_t begin, int64_t count)
      : student(static_cast<const T*>(args.student) +
                offset_of(row, args.group_rows, args.student_stride) + begin),
        teacher(static_cast<const T*>(args.teacher) +
                offset_of(row, args.group_rows, args.teacher_stride) + begin),
        grad(args.grad == nullptr ? nullptr
                                  : static_cast<T*>(args.grad) +
                                        offset_of(row, args.group_rows, args.grad_stride) + begin),
        classes(count),
        layout(row_layout(student, classes)),
        place(at) {}

  __device__ __forceinline__ float student_at(int64_t i) const { return to_acc(student[i]); }
  __device__ __forceinline__ void store_at(int64_t i, float g) const { grad[i] = from_acc<T>(g); }

  // Call fn with each chunk of this thread. kLast: load with the hint that no later sweep reads the
  // classes.
  template <bool kLast, int kUnroll, class Fn>
  __device__ __forceinline__ void for_chunks(Fn&& fn) const {
    const auto* const students = reinterpret_cast<const uint4*>(student + layout.begin);
    const auto* const teachers = reinterpret_cast<const uint4*>(teacher + layout.begin);
#pragma unroll kUnroll
    for (int64_t i = place.part; i < layout.vectors; i += place.parts)
      fn(VectorChunk<T>{{layout.begin + i * kChunk, {}, {}},
                        i,
                        kLast ? __ldcs(students + i) : students[i],
                        kLast ? __ldcs(teachers + i) : teachers[i]});
    const int64_t i = peeled();
    if (i < 0) return;
    fn(ElementChunk<float, 1, Constant<1>, Constant<1>>{
        {i, {}, {}}, {to_acc(student[i])}, {to_acc(teacher[i])}});
  }
  template <class C>
  __device__ __forceinline__ void store(const C& chunk, const float (&g)[C::kMost]) const {
    if (grad == nullptr) return;
    if constexpr (C::kMost == 1) {
      store_at(chunk.first, g[0]);
    } else {
      __stcs(grad_vectors() + chunk.index, Vector<T>::store(g));
    }
  }
  __device__ __forceinline__ void fill(float value) const {
    if (grad == nullptr) return;
    for (int64_t i = place.part; i < classes; i += place.parts) store_at(i, value);
  }
  // Set the number of classes to 0, so that the sweeps do nothing.
  __device__ __forceinline__ void clear() {
    layout.vectors = classes = layout.begin = layout.tail = 0;
  }

 private:
  __device__ __forceinline__ uint4* grad_vectors() const {
    return reinterpret_cast<uint4*>(grad + layout.begin);
  }
  // Return this thread's class before or after all vectors, or -1.
  __device__ __forceinline__ int64_t peeled() const {
    if (place.part < layout.begin) return place.part;
    const int place_in_tail = place.part - kChunk;
    return place_in_tail >= 0 && place_in_tail < layout.tail ? classes - layout.tail + place_in_tail
                                                             : -1;
  }
};

// The classes of one row of one tensor, addressed in bytes.
struct Strip {
  char* first;  // or null
  int64_t step;

  __device__ __forceinline__ Strip(const void* data, DType dtype, const Inputs& in, int64_t row,
                                   RowStrides stride, int64_t begin) {
    const int element = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    step = stride.classes * element;
    first = static_cast<char*>(const_cast<void*>(data));
    if (data != nullptr) first += offset_of(row, in.group_rows, stride) * element + begin * step;
  }
  __device__ __forceinline__ char* at(int64_t k) const { return first + k * step; }
};

// Dtypes of an ElementRow's tensors. SameDtype: T for all three tensors. AnyDtypes: the dtypes in
// the arguments. Acc is the compute type.
template <class T_>
struct SameDtype {
  using T = T_;
  using A = float;
  static constexpr bool kHot = true;
  static constexpr int kChunk = Vector<T>::kElements;

  template <class Fn>
  static __device__ __forceinline__ void with(DType, Fn&& fn) {
    fn(T());
  }
};
template <class Acc>
struct AnyDtypes {
  using A = Acc;
  static constexpr bool kHot = false;
  static constexpr int kChunk = kVectorBytes / static_cast<int>(sizeof(A));

  template <class Fn>
  static __device__ __forceinline__ void with(DType dtype, Fn&& fn) {
    with_dtype(dtype, fn);
  }
};

// A type, passed as an argument.
template <class T>
struct TypeOf {
  using Type = T;
};
template <class E>
struct ElementRow {
  using A = typename E::A;
  static constexpr bool kHot = E::kHot;
  static constexpr int kChunk = E::kChunk;

  Strip student, teacher, grad;
  DType student_dtype, teacher_dtype;
  int64_t classes;
  Place place;

  template <class Args>
  __device__ __forceinline__ ElementRow(const Args& args, int64_t row, const Place& at,
                                        int64_t begin, int64_t count)
      : student(args.student, args.student_dtype, args, row, args.student_stride, begin),
        teacher(args.teacher, args.teacher_dtype, args, row, args.teacher_stride, begin),
        grad(args.grad, args.student_dtype, args, row, args.grad_stride, begin),
        student_dtype(args.student_dtype),
        teacher_dtype(args.teacher_dtype),
        classes(count),
        place(at) {}

  __device__ __forceinline__ A student_at(int64_t i) const {
    return load_any<A>(student.at(i), student_dtype, 0);
  }
  __device__ __forceinline__ void store_at(int64_t i, A g) const {
    store_any(grad.at(i), student_dtype, 0, g);
  }

  template <bool kLast, int, class Fn>
  __device__ __forceinline__ void for_chunks(Fn&& fn) const {
    const auto visit = [&](int64_t first, auto count) {
      ElementChunk<A, kChunk, decltype(count), int> chunk;
      chunk.first = first, chunk.count = count, chunk.step = place.parts;
      load<kLast>(student, student_dtype, chunk, chunk.z);
      load<kLast>(teacher, teacher_dtype, chunk, chunk.w);
      fn(chunk);
    };
    int64_t first = place.part;
#pragma unroll 1
    for (; first + (kChunk - 1) * place.parts < classes; first += kChunk * place.parts)
      visit(first, Constant<kChunk>());
    if (first >= classes) return;
    int count = 1;
#pragma unroll
    for (int i = 1; i < kChunk; i++) count += first + i * place.parts < classes;
    visit(first, count);
  }
  template <class C>
  __device__ __forceinline__ void store(const C& chunk, const A (&g)[C::kMost]) const {
    if (grad.first == nullptr) return;
    E::with(student_dtype, [&](auto as) {
      using T = decltype(as);
      char* at = grad.at(chunk.first);
#pragma unroll
      for (int i = 0; i < kChunk; i++, at += chunk.step * grad.step)
        if (i < chunk.count) __stcs(reinterpret_cast<T*>(at), from_acc<T>(g[i]));
    });
  }
  __device__ __forceinline__ void fill(A value) const {
    if (grad.first == nullptr) return;
    for (int64_t i = place.part; i < classes; i += place.parts) store_at(i, value);
  }
  __device__ __forceinline__ void clear() { classes = 0; }
  __device__ __forceinline__ void rescale(A factor) const {
    for (int64_t i = place.part; i < classes; i += place.parts)
      store_at(i, load_any<A>(grad.at(i), student_dtype, 0) * factor);
  }

 private:
  // Load a chunk; classes beyond the row are 0. All loads are issued before a value is used.
  template <bool kLast, class C>
  static __device__ __forceinline__ void load(const Strip& strip, DType dtype, const C& chunk,
                                              A (&x)[kChunk]) {
    E::with(dtype, [&](auto as) {
      using T = decltype(as);
      const char* at = strip.at(chunk.first);
      T raw[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; i++, at += chunk.step * strip.step) {
        raw[i] = T();
        if (i < chunk.count)
          raw[i] = kLast ? __ldcs(reinterpret_cast<const T*>(at)) : *reinterpret_cast<const T*>(at);
      }
#pragma unroll
      for (int i = 0; i < kChunk; i++) x[i] = static_cast<A>(to_acc(raw[i]));
    });
  }
};

// Return true if corresponding classes of student, teacher and gradient, all of one dtype, have
// equal positions in 16-byte vectors.
template <class Args>
bool has_equal_alignment(const Args& args) {
  const auto differs = [&](const void* data, RowStrides stride) {
    const int64_t element = size_of(args.student_dtype);
    const auto distance =
        reinterpret_cast<intptr_t>(data) - reinterpret_cast<intptr_t>(args.student);
    const int64_t row = (stride.row - args.student_stride.row) * element;
    const int64_t group = (stride.group - args.student_stride.group) * element;
    return (distance | row | (args.group_rows < args.rows ? group : 0)) % kVectorBytes != 0;
  };
  return !differs(args.teacher, args.teacher_stride) &&
         (args.grad == nullptr || !differs(args.grad, args.grad_stride));
}

// Call fn with TypeOf<Row>, where Row is the view type that fits the call's dtypes and layout.
template <bool kStrided, class Args, class Fn>
cudaError_t with_row(const Args& args, Fn&& fn) {
  if (computes_in_double(args.student_dtype, args.teacher_dtype))
    return fn(TypeOf<ElementRow<AnyDtypes<double>>>());
  if (args.student_dtype != args.teacher_dtype || !(kStrided || has_equal_alignment(args)))
    return fn(TypeOf<ElementRow<AnyDtypes<float>>>());
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    return fn(TypeOf<std::conditional_t<kStrided, ElementRow<SameDtype<T>>, VectorRow<T>>>());
  };
  if (args.student_dtype == DType::kBFloat16) return with(__nv_bfloat16());
  return args.student_dtype == DType::kFloat16 ? with(__half()) : with(float());
}

}  // namespace fastkd::cuda
