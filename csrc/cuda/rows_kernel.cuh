// The forward kernel, which computes gradient, loss, terms and statistics of each row. The kernel
// sweeps over a row twice, or three or four times with a GeneralWriter (general.cuh). The later
// sweeps find the row in L1 or L2, so that the row is read from memory once. The kernel is a
// template over a view of the row (row_views.cuh) and a team of threads that share the row.
// Derivations: docs/maths.md, sections 2, 3 and 10.
#pragma once
#include <type_traits>

#include "launch.h"
#include "sweeps.cuh"

namespace fastkd::cuda {

// Teams: the threads that share a row. merge(x, rule) gives each thread of a row the sum of x over
// all threads of that row. `rule` is the last argument of x's members merge_lanes() and add(). The
// order of the sum depends only on the launch.

// kLanes adjacent lanes of a warp share a row.
template <int kLanes>
struct LaneTeam {
  static constexpr bool kWholeWarps = kLanes == 32;  // the threads of a warp share one row
  static constexpr int kSharedBytes = 0;
  Place place;

  __device__ __forceinline__ explicit LaneTeam(int)
      : place{static_cast<int>(blockDim.x) / kLanes, static_cast<int>(threadIdx.x) / kLanes,
              static_cast<int>(threadIdx.x) % kLanes, kLanes} {}
  template <class S, class Rule>
  __device__ __forceinline__ void merge(S& x, const Rule& rule) {
    x.template merge_lanes<kLanes>(rule);
  }
  // Complete all reads of a row before any thread writes to that row.
  __device__ __forceinline__ void order() const { __syncwarp(); }
};

// All threads of a CTA share one row.
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

// Threads of different warps share a row, so that neighboring lanes have neighboring rows.
template <class A>
struct TileTeam {
  static constexpr bool kWholeWarps = false;
  static constexpr int kSharedBytes = kStridedThreads * 8 * static_cast<int>(sizeof(A));
  Place place;

  __device__ __forceinline__ explicit TileTeam(int parts)
      : place{static_cast<int>(blockDim.x) / parts, 0, 0, parts} {
    place.row = static_cast<int>(threadIdx.x) % place.rows;
    place.part = static_cast<int>(threadIdx.x) / place.rows;
  }
  template <class S, class Rule>
  __device__ __forceinline__ void merge(S& x, const Rule& rule) {
    if (place.parts == 1) return;
    static_assert(kStridedThreads * sizeof(S) <= kSharedBytes);
    extern __shared__ __align__(128) unsigned char dynamic[];
    S* const slots = reinterpret_cast<S*>(dynamic);
    __syncthreads();
    slots[threadIdx.x] = x;
    __syncthreads();
    x = S();
    for (int part = 0; part < place.parts; part++)
      x.add(slots[part * place.rows + place.row], rule);
  }
  __device__ __forceinline__ void order() const {}
};

template <class Row, class Team, class W, bool kExtra>
__device__ __forceinline__ void run_row(const ForwardCall& call, Team& team, Row& row,
                                        int64_t index, int64_t label, bool real,
                                        typename Row::A scale) {
  using A = typename Row::A;
  const ForwardArgs& args = call.args;
  // Compile a copy of the loops for each power, but only in hot kernels without the sums of
  // add_extra().
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
  constexpr std::bool_constant<W::kGeneral || kExtra> kAllSums{};
  Sums<A> sums, unused;
  if constexpr (W::kGeneral) {
    sums = sum(row, writer, left_out, wants_extra(args));
    team.merge(sums, kAllSums);
    writer.set_shares(stats, sums);
  }
  team.order();
  with_power_of(t.power, [&](auto power) {
    write<decltype(power)::value, kExtra, kExtra>(row, writer, label, W::kGeneral ? unused : sums);
  });
  if constexpr (!W::kGeneral) team.merge(sums, kAllSums);
  if (real && team.place.part == 0) close_row(args, index, writer, stats, sums, label_logit);
}

template <class Row, class Team, class W, bool kExtra, int kThreads, int kResident>
__global__ void __launch_bounds__(kThreads, kResident)
    rows_kernel(const __grid_constant__ ForwardCall call, const int lanes) {
  using A = typename Row::A;
  const ForwardArgs& args = call.args;
  WarpExchange exchange;
  const A scale = block_scale<A>(call, exchange);
  Team team(lanes);
  const int64_t step = static_cast<int64_t>(gridDim.x) * team.place.rows;
  // All threads of the CTA run this loop equally often, because barriers and shuffles need every
  // thread.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * team.place.rows; first < args.rows;
       first += step) {
    const bool inside = first + team.place.row < args.rows;
    const int64_t index = inside ? first + team.place.row : 0;
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    const bool real = inside && kind == RowKind::kReal;
    Row row(args, index, team.place, 0, args.classes);
    if (!real) {
      const A value = static_cast<A>(fill_value(kind));
      if (inside) row.fill(value);
      if (inside && team.place.part == 0) close_row_as(args, index, value);
      if (Team::kWholeWarps) continue;
      row.clear();  // threads without a row take part in barriers and shuffles
    }
    run_row<Row, Team, W, kExtra>(call, team, row, index, label, real, scale);
  }
  add_up_rows<A>(call, team.place.rows, exchange);
}

// Call fn with TypeOf<W> for the call's writer type W, and with std::true_type if the kernel has
// the sums of add_extra(), else std::false_type.
template <class Row, class Fn>
cudaError_t with_writer(const ForwardArgs& args, Fn&& fn) {
  using A = typename Row::A;
  if (!is_hot(args)) return fn(TypeOf<GeneralWriter<A>>(), std::true_type());
  // Calls with AnyDtypes are rare or have few classes, so their kernels always have the sums of
  // add_extra().
  if constexpr (Row::kHot)
    if (!wants_extra(args)) return fn(TypeOf<Writer<A>>(), std::false_type());
  return fn(TypeOf<Writer<A>>(), std::true_type());
}

// Launch the rows_kernel of a call with at most kThreads threads, and then, if a total is wanted,
// the kernel that adds up the total. `lanes`: the number of threads that share a row, or 0 for all
// threads of a CTA.
template <class Row, class Team, int kThreads>
cudaError_t launch_team(const ForwardCall& call, int lanes, int threads, cudaStream_t stream) {
  return with_writer<Row>(call.args, [&](auto writer, auto extra) {
    using W = typename decltype(writer)::Type;
    // fp64 doubles the registers that a thread needs, and so does the sweep that sums slopes.
    constexpr bool kWide = sizeof(typename Row::A) == 8;
    constexpr int kMost = kWide || W::kGeneral ? 256 : kThreads;
    // kResident: the number of CTAs that must fit in a multiprocessor's registers.
    constexpr bool kFewRegisters = !decltype(extra)::value && Row::kChunk <= 4;
    constexpr int kResident = kWide || kThreads > 256 ? 1 : kFewRegisters ? 3 : 2;
    const auto kernel = rows_kernel<Row, Team, W, decltype(extra)::value, kMost, kResident>;
    const int block = threads < kMost ? threads : kMost;
    const int rows_at_once = lanes > 0 ? block / lanes : 1;
    const int shared = lanes > 1 ? Team::kSharedBytes : 0;
    int64_t ctas = call.args.rows;
    if (const cudaError_t error = count_ctas(kernel, rows_at_once, block, shared, ctas))
      return error;
    const dim3 grid(static_cast<unsigned>(ctas));
    const cudaError_t error = launch(kernel, grid, block, shared, stream, call, lanes);
    if (error != cudaSuccess || call.total == nullptr) return error;
    return launch_finish(call, ctas, rows_at_once, stream);
  });
}

}  // namespace fastkd::cuda
