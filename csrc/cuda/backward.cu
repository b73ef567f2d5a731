// The gradient for a grad_output that forward did not know: element by element, from the row
// statistics that forward left. Where the gradient is in place already and grad_output is 1, the
// kernel returns at once.
#include "strided.cuh"

namespace fastkd::cuda {
namespace {

struct BackwardCall {
  BackwardArgs args;
  bool filled;          // grad holds the gradient for grad_output = 1
  bool rescales;        // then multiply it, instead of computing it anew
  int log_pieces;       // a row is cut into 2^this many pieces, one CTA each: blockIdx.y
  Constants constants;  // of the divergence
};

template <class A>
__device__ __forceinline__ A grad_output_of(const BackwardArgs& args, int64_t row) {
  return static_cast<const A*>(args.grad_output)[args.grad_output_per_row ? row : 0];
}

// The part of `count` things that belongs to one piece of a row.
struct Piece {
  int64_t low, high;
  __device__ __forceinline__ Piece(int64_t count, int log_pieces) {
    const int64_t per = (count + (int64_t(1) << log_pieces) - 1) >> log_pieces;
    low = min(count, blockIdx.y * per);
    high = min(count, low + per);
  }
};

// Both inputs are T: 16 bytes at a time, exactly as the forward kernels do it.
template <class T>
struct Vectors {
  using A = float;
  static constexpr bool kFold = kFoldScales<T>;

  template <class W>
  static __device__ __forceinline__ void write(const BackwardArgs& args, int64_t index,
                                               int64_t label, int log_pieces, const W& writer) {
    const RowOf<T> row(args, args.grad, args.grad_stride, index);
    const Piece part(row.layout.vectors, log_pieces);
    typename W::Sums unused;
    const int64_t inside = label - row.layout.begin, of = inside / Vector<T>::kElements;
    const bool mends = label >= 0 && inside >= 0 && of >= part.low && of < part.high &&
                       (of - part.low) % blockDim.x == threadIdx.x;
    const float label_student = mends ? to_acc(row.student[label]) : 0;  // before it is overwritten
    constexpr int kUnroll = W::kGeneral ? 1 : 2;
#pragma unroll kUnroll
    for (int64_t i = part.low + threadIdx.x; i < part.high; i += blockDim.x)
      row.grad_vectors[i] = write_vector<T, kAtRunTime, false, true>(
          writer, fetch(row.student_vectors, i, row.layout.student_shift),
          fetch(row.teacher_vectors, i, row.layout.teacher_shift), unused);
    if (mends)
      row.grad[label] = from_acc<T>(writer.at_label(writer.template write<kAtRunTime, false, true>(
          label_student, to_acc(row.teacher[label]), unused)));
    const int64_t i =
        blockIdx.y == 0 && threadIdx.x < 32 ? row.layout.peeled(threadIdx.x, args.classes) : -1;
    if (i < 0) return;
    const float g = writer.template write<kAtRunTime, false, true>(to_acc(row.student[i]),
                                                                   to_acc(row.teacher[i]), unused);
    row.grad[i] = from_acc<T>(i == label ? writer.at_label(g) : g);
  }
};

// Any dtypes, one class at a time.
template <class Acc>
struct Elements {
  using A = Acc;
  static constexpr bool kFold = false;

  template <class W>
  static __device__ __forceinline__ void write(const BackwardArgs& args, int64_t index,
                                               int64_t label, int log_pieces, const W& writer) {
    const Piece part(args.classes, log_pieces);
    const int64_t student = offset_of(index, args.group_rows, args.student_stride);
    const int64_t teacher = offset_of(index, args.group_rows, args.teacher_stride);
    const int64_t grad = offset_of(index, args.group_rows, args.grad_stride);
    typename W::Sums unused;
    for (int64_t i = part.low + threadIdx.x; i < part.high; i += blockDim.x) {
      const A g = writer.template write<kAtRunTime, false, true>(
          load_any<A>(args.student, args.student_dtype, student + i),
          load_any<A>(args.teacher, args.teacher_dtype, teacher + i), unused);
      store_any(args.grad, args.student_dtype, grad + i, i == label ? writer.at_label(g) : g);
    }
  }
};

// grad *= factor, or grad = value.
template <class A>
__device__ __forceinline__ void rescale_piece(const BackwardArgs& args, int64_t index,
                                              int log_pieces, A factor, bool fills, A value) {
  const Piece part(args.classes, log_pieces);
  const int64_t grad = offset_of(index, args.group_rows, args.grad_stride);
  for (int64_t i = part.low + threadIdx.x; i < part.high; i += blockDim.x)
    store_any(args.grad, args.student_dtype, grad + i,
              fills ? value : load_any<A>(args.grad, args.student_dtype, grad + i) * factor);
}

template <class Rows, class W>
__global__ void __launch_bounds__(256, 2)
    backward_kernel(const __grid_constant__ BackwardCall call) {
  using A = typename Rows::A;
  const BackwardArgs& args = call.args;
  if (call.filled && !args.grad_output_per_row && grad_output_of<A>(args, 0) == A(1)) return;
  const A* stats_of_rows = static_cast<const A*>(args.stats);
  const A scale = stats_of_rows[kStats * args.rows];
  for (int64_t index = blockIdx.x; index < args.rows; index += gridDim.x) {
    const A factor = grad_output_of<A>(args, index);
    if (call.filled && factor == A(1)) continue;
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    if (kind != RowKind::kReal) {  // 0 stays 0 and NaN stays NaN, whatever grad_output is
      if (!call.filled)
        rescale_piece<A>(args, index, call.log_pieces, factor, true,
                         static_cast<A>(fill_value(kind)));
      continue;
    }
    if (call.rescales) {
      rescale_piece<A>(args, index, call.log_pieces, factor, false, A(0));
      continue;
    }
    typename W::Stats stats;
    stats.load(stats_of_rows, args.rows, index);
    W writer(call, index, typename W::Temper(args, index), stats, scale * factor);
    if constexpr (W::kGeneral)
      writer.balance(stats_of_rows[kSlopeSum * args.rows + index],
                     stats_of_rows[kClassCount * args.rows + index]);
    Rows::write(args, index, label, call.log_pieces, writer);
  }
}

// The same of rows whose classes are not adjacent, as strided.cu walks them.
template <class E, class W>
__global__ void __launch_bounds__(kStridedThreads, (sizeof(typename E::A) == 8 ? 1 : 2))
    strided_backward_kernel(const __grid_constant__ BackwardCall call, const int parts) {
  using A = typename E::A;
  const BackwardArgs& args = call.args;
  if (call.filled && !args.grad_output_per_row && grad_output_of<A>(args, 0) == A(1)) return;
  const A* stats_of_rows = static_cast<const A*>(args.stats);
  const A scale = stats_of_rows[kStats * args.rows];
  const Place place(parts);
  const int64_t step = static_cast<int64_t>(gridDim.x) * place.rows;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * place.rows + place.row; index < args.rows;
       index += step) {
    const A factor = grad_output_of<A>(args, index);
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    if (call.filled && (factor == A(1) || kind != RowKind::kReal)) continue;
    const StridedRow<E> row(args, place, index, label, kind, true);
    if (call.rescales) {
      row.rescale(factor);
      continue;
    }
    typename W::Stats stats;
    stats.load(stats_of_rows, args.rows, index);
    W writer(call, index, typename W::Temper(args, index), stats, scale * factor);
    if constexpr (W::kGeneral)
      writer.balance(stats_of_rows[kSlopeSum * args.rows + index],
                     stats_of_rows[kClassCount * args.rows + index]);
    typename W::Sums unused;
    row.template write<kAtRunTime, false, true>(writer, unused);
  }
}

template <class E>
cudaError_t launch_strided_as(const BackwardCall& call, const Device& device, cudaStream_t stream) {
  const BackwardArgs& args = call.args;
  const Plan plan = make_plan(args.rows, args.classes, args.student_dtype, args.teacher_dtype,
                              device.limits(), !is_hot(args), true);
  const int64_t wanted = (args.rows + plan.rows_per_block - 1) / plan.rows_per_block;
  const int64_t most = static_cast<int64_t>(device.processors) * 8;
  Launch launch(wanted < most ? wanted : most, plan.threads, 0, stream);
  using A = typename E::A;
  return is_hot(args) ? launch(strided_backward_kernel<E, Writer<A, E::kFold>>, call, plan.lanes)
                      : launch(strided_backward_kernel<E, GeneralWriter<A>>, call, plan.lanes);
}

template <class Rows>
cudaError_t launch_as(const BackwardCall& call, int processors, cudaStream_t stream) {
  const int64_t most = (static_cast<int64_t>(processors) * 8 >> call.log_pieces) + 1;
  Launch launch(call.args.rows < most ? call.args.rows : most, 256, 0, stream);
  launch.config.gridDim.y = 1u << call.log_pieces;
  using A = typename Rows::A;
  return is_hot(call.args) ? launch(backward_kernel<Rows, Writer<A, Rows::kFold>>, call)
                           : launch(backward_kernel<Rows, GeneralWriter<A>>, call);
}

}  // namespace

cudaError_t launch_backward(const BackwardArgs& args, bool filled, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  BackwardCall call = {args, filled, false, 0, make_constants(args.divergence, args.mix)};
  call.rescales = filled && (size_of(args.student_dtype) > 2 || args.grad == args.student);
  if (is_strided(args))
    return with_elements(args, [&](auto elements) {
      return launch_strided_as<typename decltype(elements)::Type>(call, device, stream);
    });
  // Enough pieces to fill the device, of at least 4096 classes.
  while (args.rows << call.log_pieces < device.processors * 8 &&
         args.classes >> (call.log_pieces + 1) >= 4096)
    call.log_pieces++;
  if (computes_in_double(args.student_dtype, args.teacher_dtype))
    return launch_as<Elements<double>>(call, device.processors, stream);
  // As forward did, so that the gradient is the same bit for bit: rows that the tiny kernel takes
  // do not fold the scales.
  if (!hot_dtypes(args.student_dtype, args.teacher_dtype) || args.classes <= 32 * kTinyPerLane)
    return launch_as<Elements<float>>(call, device.processors, stream);
  switch (args.student_dtype) {
    case DType::kBFloat16:
      return launch_as<Vectors<__nv_bfloat16>>(call, device.processors, stream);
    case DType::kFloat16:
      return launch_as<Vectors<__half>>(call, device.processors, stream);
    default:
      return launch_as<Vectors<float>>(call, device.processors, stream);
  }
}

}  // namespace fastkd::cuda
