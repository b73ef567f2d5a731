// The kernels of backward(), which write the gradient for a grad_output. The kernels recompute the
// gradient from the logits and the row statistics of forward. For grad_output = 1, the gradient has
// the bits that forward writes. If forward has written an fp32 or fp64 gradient, or a gradient over
// the student, the kernels scale that gradient in place. If forward has written the gradient and
// grad_output is 1, the kernels return at once. Derivations: docs/maths.md, sections 2, 3, 7 and 8.
#include "launch.h"
#include "sweeps.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kClassesOfPiece = 4096;  // least classes of a CTA, if several CTAs share a row
constexpr int64_t kMostPieces = 32768;

struct BackwardCall {
  BackwardArgs args;
  bool filled;  // grad holds the gradient for grad_output = 1
  int lanes;    // threads of a CTA that share a row: 1 or all of them
  Constants constants;
};

template <class A>
__device__ __forceinline__ A grad_output_of(const BackwardArgs& args, int64_t row) {
  return static_cast<const A*>(args.grad_output)[args.grad_output_per_row ? row : 0];
}

// Call fn(place, row, grad_output) for each row of this thread whose gradient must be written.
template <class A, class Fn>
__device__ __forceinline__ void for_rows(const BackwardCall& call, Fn&& fn) {
  const BackwardArgs& args = call.args;
  if (call.filled && !args.grad_output_per_row && grad_output_of<A>(args, 0) == A(1)) return;
  const int rows = kThreads / call.lanes;
  const Place place = {
      rows, static_cast<int>(threadIdx.x) % rows,
      static_cast<int>(blockIdx.y * call.lanes) + static_cast<int>(threadIdx.x) / rows,
      static_cast<int>(gridDim.y) * call.lanes};
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * rows + place.row; index < args.rows;
       index += static_cast<int64_t>(gridDim.x) * rows) {
    const A grad_output = grad_output_of<A>(args, index);
    if (!call.filled || grad_output != A(1)) fn(place, index, grad_output);
  }
}

template <class Row, class W>
__global__ void __launch_bounds__(kThreads, (sizeof(typename Row::A) == 8 ? 1 : 2))
    backward_kernel(const __grid_constant__ BackwardCall call) {
  using A = typename Row::A;
  const BackwardArgs& args = call.args;
  const A* stats_of_rows = static_cast<const A*>(args.stats);
  const A scale = stats_of_rows[kStats * args.rows];
  for_rows<A>(call, [&](const Place& place, int64_t index, A grad_output) {
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    const Row row(args, index, place, 0, args.classes);
    if (kind != RowKind::kReal) {
      row.fill(static_cast<A>(fill_value(kind)));
      return;
    }
    typename W::Stats stats;
    stats.load(stats_of_rows, args.rows, index);
    W writer(call, index, Temperature<A>(args, index, W::kGeneral), stats, scale * grad_output);
    if constexpr (W::kGeneral)
      writer.set_shares(stats_of_rows[kSlopeSum * args.rows + index],
                        stats_of_rows[kClassCount * args.rows + index]);
    Sums<A> unused;
    write<kAtRunTime, false, true>(row, writer, label, unused);
  });
}

// Multiply grad by grad_output. Rows whose label is ignored or out of range keep the gradient 0 or
// NaN, even if grad_output is infinite.
template <class A>
__global__ void __launch_bounds__(kThreads)
    rescale_kernel(const __grid_constant__ BackwardCall call) {
  const BackwardArgs& args = call.args;
  for_rows<A>(call, [&](const Place& place, int64_t index, A grad_output) {
    if (kind_of(args, label_of(args, index)) != RowKind::kReal) return;
    ElementRow<AnyDtypes<A>>(args, index, place, 0, args.classes).rescale(grad_output);
  });
}

cudaError_t launch_pieces(void (*kernel)(BackwardCall), BackwardCall call, cudaStream_t stream) {
  int processors = 0;
  if (const cudaError_t error = count_processors(processors)) return error;
  const BackwardArgs& args = call.args;
  const int64_t ctas = static_cast<int64_t>(processors) * 8;
  int64_t pieces = 1;
  call.lanes = is_strided(args) ? 1 : kThreads;
  while (args.rows * pieces < ctas && args.classes / (2 * pieces) >= kClassesOfPiece &&
         pieces < kMostPieces)
    pieces *= 2;
  const int64_t rows = kThreads / call.lanes, blocks = (args.rows + rows - 1) / rows;
  const int64_t most = ctas / pieces + 1;
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most),
                  static_cast<unsigned>(pieces));
  return launch(kernel, grid, kThreads, 0, stream, call);
}

cudaError_t launch_rescale(const BackwardArgs& args, cudaStream_t stream) {
  const BackwardCall call = {args, true, 1, {}};
  return launch_pieces(computes_in_double(args.student_dtype, args.teacher_dtype)
                           ? rescale_kernel<double>
                           : rescale_kernel<float>,
                       call, stream);
}

template <bool kStrided>
cudaError_t launch_writers(const BackwardCall& call, cudaStream_t stream) {
  return with_row<kStrided>(call.args, [&](auto view) {
    using Row = typename decltype(view)::Type;
    using A = typename Row::A;
    return launch_pieces(is_hot(call.args) ? backward_kernel<Row, Writer<A>>
                                           : backward_kernel<Row, GeneralWriter<A>>,
                         call, stream);
  });
}

}  // namespace

cudaError_t launch_backward(const BackwardArgs& args, bool filled, cudaStream_t stream) {
  if (filled && (size_of(args.student_dtype) > 2 || args.grad == args.student))
    return launch_rescale(args, stream);
  const BackwardCall call = {args, filled, 1, make_constants(args.divergence, args.mix)};
  return is_strided(args) ? launch_writers<true>(call, stream)
                          : launch_writers<false>(call, stream);
}

}  // namespace fastkd::cuda
