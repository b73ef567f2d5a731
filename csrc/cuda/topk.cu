// The sparse loss, a CTA for each row: the first sweep sums what the teacher does not list, warp 0
// turns the sums into a row's constants, in double, and the second sweep writes the gradient of the
// classes that are not listed. The listed ones, k of them, and the label are then computed apart in
// double and written over it.
//
// Fused because the student is then read once, and the gradient written once (topk_rows.cuh).
// docs/maths.md, section 13, derives the formulas; csrc/topk_row.h has them.
#include "launch.h"
#include "topk_rows.cuh"

namespace fastkd::cuda {
namespace {

// A row's list, as the threads of its CTA walk it.
template <class A>
struct List {
  const TopkCall& call;
  int64_t index;

  // Calls fn(id, log_prob) for this thread's share of what is listed.
  template <class Fn>
  __device__ __forceinline__ void each(Fn&& fn) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
      const int64_t id = call.indices[index * call.k + i];
      const A log_prob = static_cast<const A*>(call.log_probs)[index * call.k + i];
      if (id < 0 || log_prob == -__builtin_huge_val()) continue;  // padding (topk.h)
      fn(id, static_cast<double>(log_prob));
    }
  }
};

// Sums over a list.
struct ListSums {
  double tempered = 0, hard = 0, teacher = 0;
  double labels = 0;  // how often it has the row's label

  __device__ __forceinline__ void merge_lanes() {
    tempered = lanes_sum(tempered);
    hard = lanes_sum(hard);
    teacher = lanes_sum(teacher);
    labels = lanes_sum(labels);
  }
};

// What warp 0 finds out about a row.
template <class A>
struct Solution {
  bool valid, label_is_listed;
  topk::Summary of;
  topk::Soft soft;
  topk::Gains gains;
  RestWriter<A> rest;
};

// What the warps of a CTA tell each other.
template <class A>
struct Exchange {
  double greatest[32];  // of the list
  Rest<A> rest[32];
  ListSums list[32];
  double values[32];
  Solution<A> solution;
};

// Whether the gradient has a hard term.
__device__ __forceinline__ bool has_hard(const Inputs& in) {
  return in.labels != nullptr && in.hard_weight != 0;
}

template <class A>
__device__ __forceinline__ double gain_of(const TopkCall& call, int64_t index, A scale) {
  const double gain = static_cast<double>(scale);
  if (call.grad_output == nullptr) return gain;
  return gain * static_cast<double>(
                    static_cast<const A*>(call.grad_output)[call.grad_output_per_row ? index : 0]);
}

// The first sweep. Returns whether this thread saw no mistake in the list; leaves `rest` of the
// thread. The map is zero before and after; the barriers are passed by the whole CTA.
template <class Rows>
__device__ __forceinline__ bool scan(const Rows& row, const List<typename Rows::A>& list,
                                     uint32_t* map, Rest<typename Rows::A>& rest,
                                     const Temperature<typename Rows::A>& t, bool smoothing) {
  bool good = true;
  for (int64_t piece = 0; piece < row.pieces(); piece++) {
    if (piece > 0) __syncthreads();
    list.each([&](int64_t id, double) {
      const int64_t bit = id < row.classes() ? row.bit(id, piece) : -1;
      const uint32_t mask = 1u << (bit & 31);
      if (id >= row.classes() || (bit >= 0 && (atomicOr(map + bit / 32, mask) & mask) != 0))
        good = false;
    });
    __syncthreads();
    row.scan(piece, map, rest, t, smoothing);
    __syncthreads();
    list.each([&](int64_t id, double) {
      const int64_t bit = id < row.classes() ? row.bit(id, piece) : -1;
      if (bit >= 0) atomicAnd(map + bit / 32, ~(1u << (bit & 31)));
    });
  }
  return good;
}

// This thread's share of the list's sums, relative to `greatest`. A bad list has no sums.
template <class Rows>
__device__ __forceinline__ ListSums sum_list(const Rows& row, const List<typename Rows::A>& list,
                                             double greatest, int64_t label,
                                             double inverse_temperature) {
  ListSums sums;
  const double near = topk::origin({greatest});
  list.each([&](int64_t id, double log_p) {
    if (id >= row.classes()) return;
    const double offset = static_cast<double>(row.logit(id)) - near;
    sums.tempered += exp(offset * inverse_temperature);
    sums.hard += exp(offset);
    sums.teacher += exp(log_p);
    if (id == label) sums.labels += 1;
  });
  return sums;
}

// Warp 0, from what all warps have left in the exchange.
template <class A>
__device__ __forceinline__ void solve(Exchange<A>& exchange, const TopkCall& call, double greatest,
                                      const Temperature<A>& t, double gain) {
  const int lane = threadIdx.x, warps = blockDim.x / 32;
  Rest<A> rest;
  ListSums list;
  if (lane < warps) rest = exchange.rest[lane], list = exchange.list[lane];
  rest.merge_lanes(t);
  list.merge_lanes();
  if (lane != 0) return;
  // In shared memory step by step: in registers it would spill.
  const Inputs& in = call.forward.args;
  Solution<A>& s = exchange.solution;
  s.of.rest = rest.mass(t);
  s.of.list = {greatest, list.tempered, list.hard};
  s.of.teacher = list.teacher;
  s.of.complete(in, rest.logits);
  s.valid = s.of.listed_well() && s.of.valid();
  s.label_is_listed = list.labels > 0;
  s.soft = topk::soften(in, call.tail, s.of);
  s.gains = topk::gains_of(in, call.tail, s.of, s.soft, gain, has_hard(in));
  s.rest = RestWriter<A>(s.gains, rest, t);
}

// The listed classes' gradients and, returned, this thread's share of their part of the divergence.
template <class Rows>
__device__ __forceinline__ double write_list(const Rows& row, const List<typename Rows::A>& list,
                                             const Solution<typename Rows::A>& s,
                                             const TopkCall& call, int64_t label) {
  const Inputs& in = call.forward.args;
  const double near = topk::origin(s.of.list), inverse_temperature = 1 / in.temperature;
  const double hard = s.gains.hard / s.of.all.hard;
  double value = 0;
  list.each([&](int64_t id, double log_p) {
    const double z = static_cast<double>(row.logit(id));
    const double log_e = (z - near) * inverse_temperature;
    const Element<double> e = topk::listed(s.soft, s.soft.teacher_scale * exp(log_p),
                                           s.soft.student_scale * exp(log_e), log_p, log_e);
    value += e.excess;
    if (call.forward.args.grad == nullptr) return;
    double g = s.gains.soft * (e.diff + s.soft.surplus * e.q) + s.gains.uniform;
    if (has_hard(in)) g += hard * exp(z - s.of.all.max) - (id == label ? s.gains.onehot : 0.0);
    row.store(id, g);
  });
  return value;
}

template <class Rows>
__device__ __forceinline__ void run_row(const Rows& row, const TopkCall& call, int64_t index,
                                        int64_t label, typename Rows::A scale, uint32_t* map,
                                        Exchange<typename Rows::A>& exchange) {
  using A = typename Rows::A;
  const ForwardArgs& args = call.forward.args;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const Temperature<A> t(args, index);
  const List<A> list{call, index};
  double greatest = topk::kNothing;
  list.each([&](int64_t id, double) {
    if (id < args.classes) greatest = max_of(greatest, static_cast<double>(row.logit(id)));
  });
  greatest = lanes_max(greatest);
  if (lane == 0) exchange.greatest[warp] = greatest;

  Rest<A> rest;
  const bool good = scan(row, list, map, rest, t, args.label_smoothing != 0);
  greatest = lanes_max(lane < warps ? exchange.greatest[lane] : topk::kNothing);
  ListSums sums = sum_list(row, list, greatest, label, 1 / args.temperature);
  if (!good) sums.teacher = fill_value(RowKind::kBad);
  rest.merge_lanes(t);
  sums.merge_lanes();
  if (lane == 0) exchange.rest[warp] = rest, exchange.list[warp] = sums;
  __syncthreads();
  if (warp == 0) solve(exchange, call, greatest, t, gain_of(call, index, scale));
  __syncthreads();

  const Solution<A>& s = exchange.solution;
  if (!s.valid) {
    row.fill(static_cast<A>(fill_value(RowKind::kBad)));
    if (threadIdx.x == 0 && args.loss != nullptr)
      static_cast<A*>(args.loss)[index] = static_cast<A>(fill_value(RowKind::kBad));
    return;
  }
  if (args.grad != nullptr) {
    row.write(s.rest, t);
    __syncthreads();
    if (threadIdx.x == 0 && has_hard(args) && !s.label_is_listed)
      row.store(label, topk::label_gradient(args, s.of, s.soft, s.gains,
                                            static_cast<double>(row.logit(label))));
  }
  const double value = lanes_sum(write_list(row, list, s, call, label));
  if (args.loss == nullptr) return;
  if (lane == 0) exchange.values[warp] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < warps; i++) total += exchange.values[i];
  const bool hard = has_hard(args);
  static_cast<A*>(args.loss)[index] =
      static_cast<A>(topk::row_loss(args, call.tail, s.of, s.soft, total, hard,
                                    hard ? static_cast<double>(row.logit(label)) : 0.0));
}

}  // namespace

constexpr int kTopkThreads = 512;
constexpr int kTopkStaticBytes = 6144;  // at most, for the exchange

template <class Rows>
__global__ void __launch_bounds__(kTopkThreads, 1)
    topk_kernel(const __grid_constant__ TopkCall call) {
  using A = typename Rows::A;
  extern __shared__ __align__(128) unsigned char dynamic[];  // vectors of the row, then the map
  alignas(Exchange<A>) __shared__ unsigned char exchanged[sizeof(Exchange<A>)];
  __shared__ int count;
  static_assert(sizeof(exchanged) + sizeof(count) <= kTopkStaticBytes);
  Exchange<A>& exchange = *reinterpret_cast<Exchange<A>*>(exchanged);
  wait_for_previous_kernel();
  allow_next_kernel();
  const ForwardArgs& args = call.forward.args;
  if (call.filled && !call.grad_output_per_row &&
      static_cast<const A*>(call.grad_output)[0] == A(1))
    return;
  const A scale = block_scale<A>(call.forward, &count);
  uint32_t* const map = reinterpret_cast<uint32_t*>(dynamic + call.cached * kVectorBytes);
  for (int64_t i = threadIdx.x; i < call.map_words; i += blockDim.x) map[i] = 0;
  __syncthreads();
  for (int64_t index = blockIdx.x; index < args.rows; index += gridDim.x) {
    const Rows row(call, index, reinterpret_cast<uint4*>(dynamic));
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    if (kind == RowKind::kReal) {
      run_row(row, call, index, label, scale, map, exchange);
      continue;
    }
    row.fill(static_cast<A>(fill_value(kind)));
    if (threadIdx.x == 0 && args.loss != nullptr)
      static_cast<A*>(args.loss)[index] = static_cast<A>(fill_value(kind));
  }
}

namespace {

// grad *= grad_output, where the gradient may be rounded again.
template <class A>
__global__ void __launch_bounds__(256) rescale_kernel(const __grid_constant__ TopkCall call) {
  const ForwardArgs& args = call.forward.args;
  const A* factors = static_cast<const A*>(call.grad_output);
  if (!call.grad_output_per_row && factors[0] == A(1)) return;
  for (int64_t index = blockIdx.x; index < args.rows; index += gridDim.x) {
    const A factor = factors[call.grad_output_per_row ? index : 0];
    const int64_t grad = offset_of(index, args.group_rows, args.grad_stride);
    for (int64_t i = blockIdx.y * blockDim.x + threadIdx.x; i < args.classes;
         i += gridDim.y * blockDim.x)
      store_any(args.grad, args.student_dtype, grad + i,
                load_any<A>(args.grad, args.student_dtype, grad + i) * factor);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// About eight vectors or classes a thread, in whole warps. The registers of a processor hold 512
// threads: two CTAs, one of which sweeps while the other solves, or one where memory holds no two.
int threads_for(int64_t units, bool two_fit) {
  int threads = 32;
  while (threads < (two_fit ? kTopkThreads / 2 : kTopkThreads) && units > 8 * threads) threads *= 2;
  return threads;
}

template <class Rows>
cudaError_t launch_rows(TopkCall call, int64_t vectors, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const ForwardArgs& args = call.forward.args;
  const int64_t room = device.shared_per_block - kTopkStaticBytes;
  call.map_words = ceil_div(kPeelBits + (args.classes < kMapBits ? args.classes : kMapBits), 32);
  const int64_t most = (room - call.map_words * 4) / kVectorBytes;
  call.cached = vectors < most ? vectors : most;
  const int64_t bytes = call.cached * kVectorBytes + call.map_words * 4;
  Launch launch(1, threads_for(vectors > 0 ? vectors : args.classes, 2 * bytes <= room),
                static_cast<int>(bytes), stream);
  if (call.forward.scale_source == ScaleSource::kStats) launch.overlap(device);
  const auto kernel = topk_kernel<Rows>;
  // Always the same number, since several threads may launch.
  if (const cudaError_t error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(room)))
    return error;
  int per_processor = 1;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &per_processor, kernel, static_cast<int>(launch.config.blockDim.x),
          launch.config.dynamicSmemBytes))
    return error;
  const int64_t grid = static_cast<int64_t>(per_processor) * device.processors;
  launch.config.gridDim.x = static_cast<unsigned>(args.rows < grid ? args.rows : grid);
  return launch(kernel, call);
}

// Rows of fewer classes may hold no whole vector (RowLayout).
constexpr int64_t kFewestForVectors = 64;

cudaError_t launch_topk(const TopkCall& call, cudaStream_t stream) {
  const ForwardArgs& args = call.forward.args;
  if (computes_in_double(args.student_dtype, args.teacher_dtype))
    return launch_rows<Elements<double>>(call, 0, stream);
  if (args.classes < kFewestForVectors) return launch_rows<Elements<float>>(call, 0, stream);
  const int64_t vectors = args.classes * size_of(args.student_dtype) / kVectorBytes;
  switch (args.student_dtype) {
    case DType::kBFloat16:
      return launch_rows<Vectors<__nv_bfloat16>>(call, vectors, stream);
    case DType::kFloat16:
      return launch_rows<Vectors<__half>>(call, vectors, stream);
    default:
      return launch_rows<Vectors<float>>(call, vectors, stream);
  }
}

cudaError_t launch_rescale(const TopkCall& call, cudaStream_t stream) {
  const ForwardArgs& args = call.forward.args;
  Launch launch(args.rows < 65536 ? args.rows : 65536, 256, 0, stream);
  const int64_t pieces = ceil_div(args.classes, 8192);
  launch.config.gridDim.y = static_cast<unsigned>(pieces < 65535 ? pieces : 65535);
  return computes_in_double(args.student_dtype, args.teacher_dtype)
             ? launch(rescale_kernel<double>, call)
             : launch(rescale_kernel<float>, call);
}

TopkCall call_of(const TopkArgs& args) {
  TopkCall call = {};
  ForwardArgs& forward = call.forward.args;
  static_cast<Inputs&>(forward) = args;
  if (forward.group_rows <= 0) forward.group_rows = args.rows > 0 ? args.rows : 1;
  forward.teacher = args.student, forward.teacher_stride = args.student_stride;
  forward.loss = args.loss, forward.stats = args.stats;
  forward.grad = args.grad, forward.grad_stride = args.grad_stride;
  forward.reduction = args.reduction, forward.scale = args.scale;
  call.log_probs = args.teacher, call.indices = args.indices, call.k = args.k;
  call.grad_output = args.grad_output, call.grad_output_per_row = args.grad_output_per_row;
  call.tail = args.tail;
  return call;
}

cudaError_t scale_of(TopkCall& call, const void* denominator, cudaStream_t stream) {
  return launch_scale(call.forward, denominator, call.forward.args.rows <= kCountInside, stream);
}

cudaError_t topk_on(const TopkArgs& args, void* total, const void* denominator,
                    cudaStream_t stream) {
  TopkCall call = call_of(args);
  if (const cudaError_t error = scale_of(call, denominator, stream)) return error;
  if (args.rows > 0)
    if (const cudaError_t error = launch_topk(call, stream)) return error;
  if (args.reduction == Reduction::kNone) return cudaSuccess;
  call.forward.total = total;
  return launch_finish(call.forward, stream);
}

cudaError_t topk_backward_on(const TopkArgs& args, bool filled, const void* denominator,
                             cudaStream_t stream) {
  TopkCall call = call_of(args);
  call.filled = filled;
  if (filled && size_of(args.student_dtype) > 2) return launch_rescale(call, stream);
  if (const cudaError_t error = scale_of(call, denominator, stream)) return error;
  return launch_topk(call, stream);
}

}  // namespace

int topk(const TopkArgs& args, void* total, const void* denominator, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  return reported(topk_on(args, total, denominator, static_cast<cudaStream_t>(stream)));
}

int topk_backward(const TopkArgs& args, bool filled, const void* denominator, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  return reported(topk_backward_on(args, filled, denominator, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastkd::cuda
