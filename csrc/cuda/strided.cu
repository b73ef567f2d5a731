// A thread per row, or a few that share its classes: rows whose classes are not adjacent while the
// rows themselves are, as in (N, C, H, W). The logits are read twice, the second time from L1 or L2
// while the rows in flight fit there. Any dtypes and strides.
#include <type_traits>

#include "strided.cuh"

namespace fastkd::cuda {
namespace {

// What the threads that share a row tell each other, a slot each.
template <class W, class A, bool kGeneral = W::kGeneral>
struct Exchange {
  Statistics<A> tops[kStridedThreads], statistics[kStridedThreads];
  typename W::Sums sums[kStridedThreads];
};
template <class W, class A>
struct Exchange<W, A, true> : Exchange<W, A, false> {
  Moments moments[kStridedThreads];
};

// Calls fn with the entries of all threads that share this one's row, in their order.
template <class T, class Fn>
__device__ __forceinline__ void for_parts(const T (&entries)[kStridedThreads], const Place& place,
                                          Fn&& fn) {
  for (int i = 0; i < place.parts; i++) fn(entries[i * place.rows + place.row]);
}
template <class W, class A, class Temper>
__device__ __forceinline__ void merge(Exchange<W, A>& exchange, const Place& place, const Temper& t,
                                      Statistics<A>& statistics) {
  exchange.tops[threadIdx.x] = statistics;
  __syncthreads();
  A student_top = kLowest<A>, teacher_top = kLowest<A>;
  for_parts(exchange.tops, place, [&](const Statistics<A>& other) {
    student_top = max_of(student_top, other.student_max);
    teacher_top = max_of(teacher_top, other.teacher_max);
  });
  statistics.raise(student_top, teacher_top, t);
  exchange.statistics[threadIdx.x] = statistics;
  __syncthreads();
  statistics.student_sum = statistics.hard_sum = statistics.teacher_sum = A(0);
  for_parts(exchange.statistics, place, [&](const Statistics<A>& other) {
    statistics.student_sum += other.student_sum;
    statistics.hard_sum += other.hard_sum;
    statistics.teacher_sum += other.teacher_sum;
  });
}
template <class S>
__device__ __forceinline__ void merge(S (&entries)[kStridedThreads], const Place& place, S& sums) {
  entries[threadIdx.x] = sums;
  __syncthreads();
  sums = S();
  for_parts(entries, place, [&](const S& other) { sums.add(other); });
}

}  // namespace

// Calls fn with the power, as a constant where a kernel has copies of its loops for it.
template <bool kCopies, class Fn>
__device__ __forceinline__ void with_power_in(int power, Fn&& fn) {
  if constexpr (kCopies) {
    with_power(power, fn);
  } else {
    fn(PowerConstant<kAtRunTime>());
  }
}

// CTAs that a processor is to hold, for which registers are left. With chunks of eight a third
// would make the loops spill (232 bytes, sm_100).
template <class E, bool kExtra>
constexpr int kResident = sizeof(typename E::A) == 8 ? 1
                          : kExtra || E::kChunk > 4  ? 2
                                                     : 3;

template <class E, class W, bool kExtra>
__global__ void __launch_bounds__(kStridedThreads, (kResident<E, kExtra>))
    strided_kernel(const __grid_constant__ ForwardCall call, const int parts) {
  using A = typename E::A;
  extern __shared__ __align__(128) unsigned char dynamic[];  // an Exchange, where there are parts
  __shared__ double slots[32];
  __shared__ int count;
  auto& exchange = *reinterpret_cast<Exchange<W, A>*>(dynamic);
  const ForwardArgs& args = call.args;
  wait_for_previous_kernel();
  allow_next_kernel();
  const A scale = block_scale<A>(call, &count);
  const Place place(parts);
  const int64_t step = static_cast<int64_t>(gridDim.x) * place.rows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * place.rows; first < args.rows;
       first += step) {
    const bool inside = first + place.row < args.rows;
    const int64_t index = inside ? first + place.row : 0;
    const int64_t label = label_of(args, index);
    const RowKind kind = inside ? kind_of(args, label) : RowKind::kIgnored;
    const StridedRow<E> row(args, place, index, label, kind, inside);
    const A label_logit = row.label_logit();  // before the gradient may overwrite it
    const typename W::Temper t(args, index);
    const LeftOut<W::kGeneral> left_out(args, label);
    Statistics<A> statistics;
    with_power_in<E::kHot && !kExtra>(t.power, [&](auto power) {
      row.template scan<decltype(power)::value>(t, left_out, statistics);
    });
    if (parts > 1) merge(exchange, place, t, statistics);
    Moments moments;
    if constexpr (W::kGeneral) {
      if (has_moments(args)) {
        row.add_moments(is_unit(args), moments);
        if (parts > 1) merge(exchange.moments, place, moments);
      }
    }
    const typename W::Stats stats = W::stats_of(args, index, statistics, moments);
    W writer(call, index, t, stats, scale);
    typename W::Sums sums, unused;
    if constexpr (W::kGeneral) {
      row.sum(writer, left_out, wants_extra(args), sums);
      if (parts > 1) merge(exchange.sums, place, sums);
      writer.balance(stats, sums);
    }
    with_power_in<E::kHot && !kExtra>(t.power, [&](auto power) {
      row.template write<decltype(power)::value, kExtra, kExtra>(writer,
                                                                 W::kGeneral ? unused : sums);
    });
    if constexpr (!W::kGeneral)
      if (parts > 1) merge(exchange.sums, place, sums);
    if (place.part != 0 || !inside) continue;
    if (row.real) {
      close_row(args, index, writer, stats, sums, label_logit);
    } else {
      close_row_as(args, index, row.otherwise);
    }
  }
  finish_inside(call, scale, slots);
}

namespace {

template <class E, class W, bool kExtra>
cudaError_t launch_as(const ForwardCall& call, const Plan& plan, Launch& launch, int processors) {
  const auto kernel = strided_kernel<E, W, kExtra>;
  if (plan.lanes > 1) launch.config.dynamicSmemBytes = sizeof(Exchange<W, typename E::A>);
  int per_processor = 1;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &per_processor, kernel, plan.threads, launch.config.dynamicSmemBytes))
    return error;
  const unsigned most = static_cast<unsigned>(per_processor * processors);
  if (launch.config.gridDim.x > most) launch.config.gridDim.x = most;
  return launch(kernel, call, plan.lanes);
}

}  // namespace

cudaError_t launch_strided(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const int64_t blocks = (call.args.rows + plan.rows_per_block - 1) / plan.rows_per_block;
  Launch launch(blocks, plan.threads, 0, stream);
  if (plan.finish_inside) launch.cluster(plan.cluster);
  if (call.scale_source == ScaleSource::kStats) launch.overlap(device);
  return with_elements(call.args, [&](auto elements) {
    using E = typename decltype(elements)::Type;
    using Hot = Writer<typename E::A, E::kFold>;
    const auto with = [&](auto writer, auto extra) {
      return launch_as<E, typename decltype(writer)::Type, decltype(extra)::value>(
          call, plan, launch, device.processors);
    };
    if (!is_hot(call.args)) return with(TypeOf<GeneralWriter<typename E::A>>(), std::true_type());
    // Dtypes that differ are rare: one kernel fewer to compile.
    if constexpr (E::kHot)
      if (!wants_extra(call.args)) return with(TypeOf<Hot>(), std::false_type());
    return with(TypeOf<Hot>(), std::true_type());
  });
}

}  // namespace fastkd::cuda
