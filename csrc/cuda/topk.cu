// The sparse loss, computed by one CTA for each row. The first sweep sums the exponentials of the
// classes that the teacher does not list (the rest). One thread then computes the row's constants
// from the sums, in double. The second sweep writes the gradient of the rest to all classes. The
// gradients of the listed classes and of the label, computed in double, then overwrite the gradient
// of the rest.
//
// One kernel runs both sweeps, so that the student is read from memory once: the second sweep finds
// the student in L2. docs/maths.md, section 13, derives the formulas, which are in csrc/topk_row.h.
#include "launch.h"
#include "topk_list.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kTopkThreads = 256;
// Greatest number of bits of the map of listed classes, which has one bit for each class. Longer
// rows are scanned in pieces of kMapBits classes.
constexpr int64_t kMapBits = 1 << 18;

// Return the maximum over the threads of a CTA. All threads must call this function.
__device__ __forceinline__ double max_of_cta(WarpExchange& exchange, double x) {
  return lanes_max(exchange.share(lanes_max(x), static_cast<double>(topk::kMinusInfinity)));
}

// Return the number of 32-bit words to allocate: those of the map, and at least one more, because
// bits_of() reads two neighboring words.
FASTKD_HOST_DEVICE int64_t map_words(int64_t classes) {
  return (classes < kMapBits ? classes : kMapBits) / 32 + 2;
}

template <class A>
__device__ __forceinline__ topk::RowOptions options_of(const ForwardArgs& args, int64_t index) {
  // A setting of the call is a double, and a setting of a row is of type A.
  const auto number = [&](RowSetting which, double otherwise) {
    return args.row_settings == nullptr
               ? otherwise
               : static_cast<double>(setting_of<A>(args, which, index, otherwise));
  };
  const double hard = number(kHardWeight, args.hard_weight);
  return {number(kTemperature, args.temperature),
          hard,
          number(kSoftWeight, args.soft_weight),
          args.label_smoothing,
          static_cast<double>(args.classes),
          args.labels != nullptr && (hard != 0 || args.terms != nullptr)};
}

template <class A>
__device__ __forceinline__ double gain_of(const TopkCall& call, int64_t index, A scale) {
  const double gain = static_cast<double>(scale);
  if (call.grad_output == nullptr) return gain;
  return gain * static_cast<double>(
                    static_cast<const A*>(call.grad_output)[call.grad_output_per_row ? index : 0]);
}

// Return the bits of a chunk's classes. A vector's bits may lie in two neighboring words.
template <class C>
__device__ __forceinline__ uint32_t bits_of(const uint32_t* map, const C& chunk) {
  const int first = static_cast<int>(chunk.first);
  if constexpr (std::is_same_v<decltype(chunk.step), Constant<1>>)
    return __funnelshift_r(map[first / 32], map[first / 32 + 1], first % 32);
  uint32_t bits = 0;
  chunk.for_each(-1, [&](auto, auto, int i) {
    const int bit = first + i * chunk.step;
    bits |= (map[bit / 32] >> (bit % 32) & 1) << i;
  });
  return bits;
}

// Run the first sweep, and return true if this thread's share of the list is valid. `rest`: this
// thread's sums. The map is all zeros before and after the call. All threads of the CTA must call
// this function, which has barriers.
template <class Row>
__device__ __forceinline__ bool scan_rest(const ForwardArgs& logits, int64_t index,
                                          const Place& place, const List<typename Row::A>& list,
                                          uint32_t* map, Rest<typename Row::A>& rest,
                                          const Temperature<typename Row::A>& t) {
  bool good = true;
  for (int64_t begin = 0; begin < logits.classes; begin += kMapBits) {
    const int64_t count = min(kMapBits, logits.classes - begin);
    const auto for_each = [&](auto&& fn) {  // calls fn(word, mask)
      list.for_each([&](int64_t id, double) {
        const int64_t bit = id - begin;
        if (bit >= 0 && bit < count) fn(map + bit / 32, 1u << (bit % 32));
        if (id >= logits.classes) good = false;
      });
    };
    if (begin > 0) __syncthreads();
    for_each([&](uint32_t* word, uint32_t mask) { good &= (atomicOr(word, mask) & mask) == 0; });
    __syncthreads();
    const Row piece(logits, index, place, begin, count);
    piece.template for_chunks<false, 4>([&](const auto& chunk) {
      rest.include(chunk, bits_of(map, chunk), t, logits.label_smoothing != 0);
    });
    __syncthreads();
    for_each([&](uint32_t* word, uint32_t mask) { atomicAnd(word, ~mask); });
  }
  return good;
}

// Complete the row's sums of exponentials, and set the scales of the row's probabilities. Only one
// thread calls this function. Each step stores its result in `s`, in shared memory, because
// registers would spill.
template <class A>
__device__ __forceinline__ void soften(Solution<A>& s, const TopkCall& call, int64_t index,
                                       const Rest<A>& rest, const ListSums& list, double greatest) {
  s.row = options_of<A>(call.forward.args, index);
  s.summary.rest = rest.mass();
  s.summary.list = {greatest, list.tempered, list.hard};
  s.summary.teacher = list.teacher, s.summary.count = list.count;
  s.summary.complete(s.row, rest.logits);
  s.valid = s.summary.has_valid_list() && s.summary.valid();
  s.label_is_listed = list.labels > 0;
  s.soft = topk::soften(call.comparison, s.row, s.summary);
}

// Add the rest to the sums of the soft term, and set the constants of the gradient. Only one thread
// calls this function.
template <class A>
__device__ __forceinline__ void solve(Solution<A>& s, const TopkCall& call, const Rest<A>& rest,
                                      const topk::SoftSums& sums, double gain) {
  s.sums = sums;
  const auto& constants = constants_in<double>(call.forward.constants);
  visit(call.comparison.divergence, [&](auto divergence) {
    topk::include_rest<decltype(divergence)>(call.comparison, constants, s.summary, &s.sums,
                                             &s.soft);
  });
  s.gains = topk::gains_of(s.row, s.summary, s.soft, gain);
  s.rest = RestWriter<A>(s.gains, rest);
}

// Write `value` as the loss and the terms of a row: 0 if the row is ignored, NaN if it is invalid.
template <class A>
__device__ __forceinline__ void put_constant(const ForwardArgs& args, int64_t index, A value) {
  if (threadIdx.x != 0) return;
  if (args.loss != nullptr) static_cast<A*>(args.loss)[index] = value;
  for (int i = 0; i < kTopkTerms && args.terms != nullptr; i++)
    static_cast<A*>(args.terms)[i * args.rows + index] = value;
}

// Write the loss, and the terms if the call has terms. All threads of the CTA must call this
// function, which has barriers.
template <class Row>
__device__ __forceinline__ void write_results(const Row& row, const List<typename Row::A>& list,
                                              const TopkCall& call, int64_t label,
                                              const Temperature<typename Row::A>& t,
                                              const Solution<typename Row::A>& s,
                                              WarpExchange& exchange) {
  using A = typename Row::A;
  const ForwardArgs& args = call.forward.args;
  const bool has_terms = args.terms != nullptr;
  double weighted_offsets = 0, agreements = 0;
  if (has_terms) {
    // The exponentials are relative to `origin`, which may be up to t.margin below the greatest
    // logit (Rest::include()).
    const A origin = static_cast<A>(s.summary.all.max);
    A sum = 0, top = A(-INFINITY);
    row.template for_chunks<true, 4>([&](const auto& chunk) {
      // The lower bound prevents 0 * -inf.
      chunk.for_each(-1, [&](A z, A, int) {
        top = max_of(top, z);
        const A offset = max_of(z - origin, kLowest<A>);
        sum = fma_of(exp2_of(mul_of(offset, t.slope)), offset, sum);
      });
    });
    double most = topk::kMinusInfinity;
    list.for_each([&](int64_t, double log_p) { most = max_of(most, log_p); });
    most = max_of_cta(exchange, most);
    const double max = max_of_cta(exchange, static_cast<double>(top));
    list.for_each([&](int64_t id, double log_p) {
      if (log_p == most && static_cast<double>(row.student_at(id)) == max) agreements = 1;
    });
    weighted_offsets = exchange.sum(static_cast<double>(sum));
    agreements = exchange.sum(agreements);
  }
  if (threadIdx.x != 0) return;
  const double soft = topk::soft_term(call.comparison, s.soft, s.sums);
  const double hard = topk::hard_term(
      s.row, s.summary, s.row.hard ? static_cast<double>(row.student_at(label)) : 0.0);
  if (args.loss != nullptr)
    static_cast<A*>(args.loss)[list.index] = static_cast<A>(topk::row_loss(s.row, hard, soft));
  if (!has_terms) return;
  topk::for_terms(call.comparison, s.row, s.summary, s.sums, hard, soft, weighted_offsets,
                  agreements > 0, [&](int term, double value) {
                    static_cast<A*>(args.terms)[term * args.rows + list.index] =
                        static_cast<A>(value);
                  });
}

// If the call has a gradient, run the second sweep, and then overwrite the gradients of the listed
// classes and of the label.
template <class Row>
__device__ __forceinline__ void write_gradient(const Row& row, const List<typename Row::A>& list,
                                               const TopkCall& call, int64_t label,
                                               const Temperature<typename Row::A>& t,
                                               const Solution<typename Row::A>& s) {
  using A = typename Row::A;
  if (call.forward.args.grad != nullptr) {
    row.template for_chunks<true, 4>([&](const auto& chunk) {
      A g[std::decay_t<decltype(chunk)>::kMost];
      chunk.for_each(-1, [&](A z, A, int i) { g[i] = s.rest.at(z, t); });
      row.store(chunk, g);
    });
    __syncthreads();
    if (threadIdx.x == 0 && s.gains.onehot != 0 && !s.label_is_listed)
      row.store_at(
          label, static_cast<A>(topk::label_gradient(s.row, s.summary, s.gains,
                                                     static_cast<double>(row.student_at(label)))));
    write_list(row, list, s, call, label);
  }
}

template <class Row>
__device__ __forceinline__ void run_row(const Row& row, const ForwardArgs& logits,
                                        const TopkCall& call, int64_t index, int64_t label,
                                        typename Row::A scale, uint32_t* map,
                                        Solution<typename Row::A>& solution,
                                        WarpExchange& exchange) {
  using A = typename Row::A;
  const ForwardArgs& args = call.forward.args;
  const Temperature<A> t(args, index);
  const List<A> list{call, index};
  double greatest = topk::kMinusInfinity;
  list.for_each([&](int64_t id, double) {
    if (id < args.classes) greatest = max_of(greatest, static_cast<double>(row.student_at(id)));
  });
  greatest = max_of_cta(exchange, greatest);
  Rest<A> rest;
  const bool good = scan_rest<Row>(logits, index, row.place, list, map, rest, t);
  ListSums sums = sum_list(row, list, greatest, label, 1 / options_of<A>(args, index).temperature);
  if (!good) sums.teacher = fill_value(RowKind::kBad);
  rest.merge_lanes(t);
  rest = exchange.share(rest);
  sums.merge_lanes();
  sums = exchange.share(sums);
  if (threadIdx.x < 32) {
    rest.merge_lanes(t);
    sums.merge_lanes();
    if (threadIdx.x == 0) soften(solution, call, index, rest, sums, greatest);
  }
  __syncthreads();
  if (solution.valid) {
    const topk::SoftSums mine = sum_listed(row, list, solution, call);
    const topk::SoftSums listed = {exchange.sum(mine.value), exchange.sum(mine.slope),
                                   exchange.sum(mine.entropy)};
    if (threadIdx.x == 0) solve(solution, call, rest, listed, gain_of(call, index, scale));
    __syncthreads();
    write_results(row, list, call, label, t, solution, exchange);
    return write_gradient(row, list, call, label, t, solution);
  }
  row.fill(static_cast<A>(fill_value(RowKind::kBad)));
  put_constant(args, index, static_cast<A>(fill_value(RowKind::kBad)));
}

// Return `args` with the student as the teacher, because views need a teacher. The sparse loss
// ignores that teacher's logits.
FASTKD_HOST_DEVICE ForwardArgs with_student_twice(ForwardArgs args) {
  args.teacher = args.student, args.teacher_dtype = args.student_dtype;
  args.teacher_stride = args.student_stride;
  return args;
}

}  // namespace

template <class Row>
__global__ void __launch_bounds__(kTopkThreads, 2)
    topk_kernel(const __grid_constant__ TopkCall call) {
  using A = typename Row::A;
  extern __shared__ __align__(128) unsigned char dynamic[];  // the map of listed classes
  __shared__ __align__(16) unsigned char solved[sizeof(Solution<A>)];
  WarpExchange exchange;
  const ForwardArgs& args = call.forward.args;
  if (call.filled && !call.grad_output_per_row &&
      static_cast<const A*>(call.grad_output)[0] == A(1))
    return;
  const A scale = block_scale<A>(call.forward, exchange);
  uint32_t* const map = reinterpret_cast<uint32_t*>(dynamic);
  for (int64_t i = threadIdx.x; i < map_words(args.classes); i += blockDim.x) map[i] = 0;
  __syncthreads();
  const Place place = {1, 0, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  const ForwardArgs logits = with_student_twice(args);
  for (int64_t index = blockIdx.x; index < args.rows; index += gridDim.x) {
    const Row row(logits, index, place, 0, args.classes);
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    if (kind == RowKind::kReal) {
      run_row(row, logits, call, index, label, scale, map, *reinterpret_cast<Solution<A>*>(solved),
              exchange);
      continue;
    }
    row.fill(static_cast<A>(fill_value(kind)));
    put_constant(args, index, static_cast<A>(fill_value(kind)));
  }
  add_up_rows<A>(call.forward, 1, exchange);
}

namespace {

template <class Row>
cudaError_t launch_view(const TopkCall& call, cudaStream_t stream) {
  const ForwardArgs& args = call.forward.args;
  // Choose full warps, with about 64 classes for each thread.
  int threads = 32;
  while (threads < kTopkThreads && args.classes > 64 * threads) threads *= 2;
  const int map_bytes = static_cast<int>(map_words(args.classes) * 4);
  const auto kernel = topk_kernel<Row>;
  int64_t ctas = args.rows;
  if (const cudaError_t error = count_ctas(kernel, 1, threads, map_bytes, ctas)) return error;
  const dim3 grid(static_cast<unsigned>(ctas));
  const cudaError_t error = launch(kernel, grid, threads, map_bytes, stream, call);
  if (error != cudaSuccess || call.forward.total == nullptr) return error;
  return launch_finish(call.forward, ctas, 1, stream);
}

cudaError_t launch_topk(TopkCall& call, const void* denominator, cudaStream_t stream) {
  if (const cudaError_t error = launch_scale(call.forward, denominator, stream)) return error;
  if (call.forward.args.rows == 0)
    return call.forward.total == nullptr ? cudaSuccess : launch_finish(call.forward, 0, 1, stream);
  if (computes_in_double(call.forward.args.student_dtype, call.forward.args.teacher_dtype))
    return launch_view<ElementRow<AnyDtypes<double>>>(call, stream);
  return with_row<false>(with_student_twice(call.forward.args), [&](auto view) {
    return launch_view<typename decltype(view)::Type>(call, stream);
  });
}

TopkCall call_of(const TopkArgs& args) {
  TopkCall call = {};
  call.forward.terms = kTopkTerms;
  ForwardArgs& forward = call.forward.args;
  static_cast<Inputs&>(forward) = args;
  if (forward.group_rows <= 0) forward.group_rows = args.rows > 0 ? args.rows : 1;
  forward.loss = args.loss, forward.terms = args.terms, forward.stats = args.stats;
  forward.grad = args.grad, forward.grad_stride = args.grad_stride;
  forward.reduction = args.reduction, forward.scale = args.scale;
  call.log_probs = args.teacher, call.indices = args.indices, call.k = args.k;
  call.grad_output = args.grad_output, call.grad_output_per_row = args.grad_output_per_row;
  call.comparison = topk::Comparison(args);
  forward.divergence = Divergence::kForwardKL;  // not read: call.comparison has the divergence
  call.forward.constants = make_constants(args.divergence, args.mix);
  return call;
}

}  // namespace

int topk(const TopkArgs& args, void* total, const void* denominator, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  TopkCall call = call_of(args);
  if (args.reduction != Reduction::kNone) call.forward.total = total;
  return clear_error(launch_topk(call, denominator, static_cast<cudaStream_t>(stream)));
}

int topk_backward(const TopkArgs& args, bool filled, const void* denominator, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  TopkCall call = call_of(args);
  call.filled = filled;
  return clear_error(launch_topk(call, denominator, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastkd::cuda
