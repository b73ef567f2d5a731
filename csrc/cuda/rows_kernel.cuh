// The forward kernel of every family: value and gradient of a row in two sweeps over it (three for
// divergences whose slopes must be summed first), and the row's losses, terms and statistics. One
// kernel, because a row is then read from memory once and its gradient written once: the second
// sweep finds the row in registers, L1 or L2. A family is a view of the row (row_views.cuh) and a
// team of threads that share it. Derivations: docs/maths.md, sections 2, 3 and 10.
#pragma once
#include <type_traits>

#include "launch.h"
#include "sweeps.cuh"

namespace fastkd::cuda {

// Teams. merge(x, rule) gives every thread of a row the sum of its threads' values, in an order
// that depends on the launch only. `rule`: the second argument of x.add().

// kLanes adjacent lanes of a warp share a row.
template <int kLanes>
struct LaneTeam {
  static constexpr bool kWholeWarps = kLanes == 32;  // no other row waits for this one
  static constexpr int kSharedBytes = 0;
  Place place;

  __device__ __forceinline__ explicit LaneTeam(int)
      : place{static_cast<int>(blockDim.x) / kLanes, static_cast<int>(threadIdx.x) / kLanes,
              static_cast<int>(threadIdx.x) % kLanes, kLanes} {}
  template <class S, class Rule>
  __device__ __forceinline__ void merge(S& x, const Rule& rule) {
    x.template merge_lanes<kLanes>(rule);
  }
  // Order the reads of a row by its threads before their writes.
  __device__ __forceinline__ void order() const { __syncwarp(); }
};

// A CTA shares one row.
struct BlockTeam {
  static constexpr bool kWholeWarps = true;
  static constexpr int kSharedBytes = 0;
  Place place;
  WarpExchange exchange;

  __device__ __forceinline__ explicit BlockTeam(int)
      : place{1, 0, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)} {}
  template <class S, class Rule>
  __device__ __forceinline__ void merge(S& x, const Rule& rule) {
    x.template merge_lanes<32>(rule);
    x = exchange.share(x);
    x.template merge_lanes<32>(rule);
  }
  __device__ __forceinline__ void order() const {}  // merge() has a barrier
};

// `parts` threads share a row, each in a different warp: neighboring lanes have neighboring rows.
template <class A>
struct TileTeam {
  static constexpr bool kWholeWarps = false;
  static constexpr int kSlotsBytes = kStridedThreads * 8 * static_cast<int>(sizeof(A));
  static constexpr int kSharedBytes = 2 * kSlotsBytes;
  Place place;
  int turn = 0;

  __device__ __forceinline__ explicit TileTeam(int parts)
      : place{static_cast<int>(blockDim.x) / parts, 0, 0, parts} {
    place.row = static_cast<int>(threadIdx.x) % place.rows;
    place.part = static_cast<int>(threadIdx.x) / place.rows;
  }
  // Two sets of slots alternate: one barrier is enough.
  template <class S, class Rule>
  __device__ __forceinline__ void merge(S& x, const Rule& rule) {
    if (place.parts == 1) return;
    static_assert(kStridedThreads * sizeof(S) <= kSlotsBytes);
    extern __shared__ __align__(128) unsigned char dynamic[];
    S* const slots = reinterpret_cast<S*>(dynamic + turn * kSlotsBytes);
    slots[threadIdx.x] = x;
    __syncthreads();
    turn ^= 1;
    x = S();
    const S* const first = slots + place.row;
    const S* const end = first + place.parts * place.rows;
    if constexpr (std::is_same_v<S, Statistics<A>>)  // maxima first: each sum is then scaled once
      for (const S* part = first; part < end; part += place.rows)
        x.raise(part->student_max, part->teacher_max, rule);
    for (const S* part = first; part < end; part += place.rows) x.add(*part, rule);
  }
  __device__ __forceinline__ void order() const {}
};

template <class Row, class Team, class W, bool kExtra>
__device__ __forceinline__ void run_row(const ForwardCall& call, Team& team, Row& row,
                                        int64_t index, int64_t label, bool real,
                                        typename Row::A scale) {
  using A = typename Row::A;
  const ForwardArgs& args = call.args;
  // Copy the loops for each power, in kernels whose speed matters.
  const auto with_power_of = [&](int power, auto&& fn) {
    if constexpr (Row::kHot && !W::kGeneral && !kExtra) {
      with_power(power, fn);
    } else {
      fn(std::integral_constant<int, kAtRunTime>());
    }
  };
  // Read the label's logit before the gradient may overwrite it.
  const A label_logit = real && label >= 0 ? row.student_at(label) : A(0);
  const Temperature<A> t(args, index, W::kGeneral);
  // The sums of kDecoupled leave the label out.
  const auto left_out = [&](const auto& chunk) {
    return W::kGeneral && args.divergence == Divergence::kDecoupled ? chunk.place_of(label) : -1;
  };
  Statistics<A> statistics;
  with_power_of(t.power,
                [&](auto power) { statistics = scan<decltype(power)::value>(row, t, left_out); });
  team.merge(statistics, t);
  Moments moments;
  if constexpr (W::kGeneral) {
    if (has_moments(args)) {
      moments = moments_of(row, is_unit(args));
      team.merge(moments, t);
    }
  }
  const typename W::Stats stats(args, index, statistics, moments);
  W writer(call, index, t, stats, scale);
  constexpr SumKind kKind = W::kGeneral ? SumKind::kSlopes
                            : kExtra    ? SumKind::kTerms
                                        : SumKind::kValue;
  Sums<A> sums, unused;
  if constexpr (W::kGeneral) {
    sums = sum(row, writer, left_out, wants_extra(args));
    team.merge(sums, SumKindOf<kKind>());
    writer.balance(stats, sums);
  }
  team.order();
  with_power_of(t.power, [&](auto power) {
    write<decltype(power)::value, kExtra, kExtra>(row, writer, label, W::kGeneral ? unused : sums);
  });
  if constexpr (!W::kGeneral) team.merge(sums, SumKindOf<kKind>());
  if (real && team.place.part == 0) close_row(args, index, writer, stats, sums, label_logit);
}

template <class Row, class Team, class W, bool kExtra, int kThreads, int kResident>
__global__ void __launch_bounds__(kThreads, kResident)
    rows_kernel(const __grid_constant__ ForwardCall call, const int lanes) {
  using A = typename Row::A;
  const ForwardArgs& args = call.args;
  wait_for_previous_kernel();
  allow_next_kernel();
  WarpExchange exchange;
  const A scale = block_scale<A>(call, exchange);
  Team team(lanes);
  const int64_t step = static_cast<int64_t>(gridDim.x) * team.place.rows;
  // The loop's bounds are the same for all threads of the CTA, because barriers and shuffles need
  // all of them.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * team.place.rows; first < args.rows;
       first += step) {
    const bool inside = first + team.place.row < args.rows;
    const int64_t index = inside ? first + team.place.row : 0;
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    const bool real = inside && kind == RowKind::kReal;
    Row row(args, index, team.place, 0, args.classes);
    if (real) {
      row.hold();
    } else {
      const A value = static_cast<A>(fill_value(kind));
      if (inside) row.fill(value);
      if (inside && team.place.part == 0) close_row_as(args, index, value);
      if (Team::kWholeWarps) continue;
      row.clear();  // no row, but its threads take part in barriers and shuffles
    }
    run_row<Row, Team, W, kExtra>(call, team, row, index, label, real, scale);
  }
  finish_inside(call, scale, exchange);
}

// Launch a rows_kernel with as many CTAs as the rows need, or as the device holds at a time.
template <class Row, class Team, class W, bool kExtra, int kThreads, int kResident>
cudaError_t launch_rows(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const auto kernel = rows_kernel<Row, Team, W, kExtra, kThreads, kResident>;
  const int threads = plan.threads < kThreads ? plan.threads : kThreads;
  const int shared = plan.lanes > 1 ? Team::kSharedBytes : 0;
  int per_processor = 1;
  if (const cudaError_t error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared))
    return error;
  const int64_t blocks = (call.args.rows + plan.rows_per_block - 1) / plan.rows_per_block;
  const int64_t most = static_cast<int64_t>(per_processor) * device.processors;
  Launch launch(blocks < most || call.finish_inside ? blocks : most, threads, shared, stream);
  launch.cluster(call.finish_inside ? plan.cluster : 1);
  if (call.scale_source == ScaleSource::kStats) launch.overlap(device);
  return launch(kernel, call, plan.lanes);
}

// Call fn with the writer of a call, and with true if more than loss and gradient is summed.
template <class Row, class Fn>
cudaError_t with_writer(const ForwardArgs& args, Fn&& fn) {
  using A = typename Row::A;
  if (!is_hot(args)) return fn(TypeOf<GeneralWriter<A>>(), std::true_type());
  // AnyDtypes is rare: only the general kernel is compiled for it.
  if constexpr (Row::kHot)
    if (!wants_extra(args)) return fn(TypeOf<Writer<A>>(), std::false_type());
  return fn(TypeOf<Writer<A>>(), std::true_type());
}

}  // namespace fastkd::cuda
