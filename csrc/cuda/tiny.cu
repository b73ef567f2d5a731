// Rows of at most 128 classes: 8 or 32 lanes share a row and hold it in registers, a class at a
// time. Any dtypes and alignments; bound by the launch rather than by memory.
#include "launch.h"
#include "vectors.cuh"

namespace fastkd::cuda {
namespace {

// One lane's classes of a row: lane, lane + kLanes, ...
struct Slice {
  float z[kTinyPerLane], w[kTinyPerLane];
};

template <int kLanes>
__device__ __forceinline__ Slice load_slice(const Inputs& in, int64_t row, int lane) {
  Slice s;
#pragma unroll
  for (int i = 0; i < kTinyPerLane; i++) {
    const int64_t k = lane + i * kLanes;
    const bool inside = k < in.classes;
    s.z[i] = inside ? load_any<float>(in.student, in.student_dtype,
                                      offset_of(row, in.group_rows, in.student_stride) + k)
                    : -INFINITY;
    s.w[i] = inside ? load_any<float>(in.teacher, in.teacher_dtype,
                                      offset_of(row, in.group_rows, in.teacher_stride) + k)
                    : -INFINITY;
  }
  return s;
}

// All lanes of a warp call this together, also those without a row (kind kIgnored, row < 0).
template <class W, int kLanes>
__device__ __forceinline__ void run_row(const ForwardCall& call, int64_t row, RowKind kind,
                                        int64_t label, float scale, int lane) {
  const ForwardArgs& args = call.args;
  const bool real = kind == RowKind::kReal && row >= 0;
  Slice slice = {};
  float label_logit = 0;
  if (real) {
    slice = load_slice<kLanes>(args, row, lane);
    if (label >= 0)
      label_logit = load_any<float>(args.student, args.student_dtype,
                                    offset_of(row, args.group_rows, args.student_stride) + label);
  }
  const typename W::Temper t(args, real ? row : 0);
  const LeftOut<W::kGeneral> left_out(args, label);
  const auto counted = [&](const float (&x)[kTinyPerLane], int i) {
    return left_out.is(lane + i * kLanes) ? -INFINITY : x[i];
  };
  // A class a lane or four: the maxima of all come first.
  Statistics<float> statistics;
  float student_top = counted(slice.z, 0), teacher_top = counted(slice.w, 0);
#pragma unroll
  for (int i = 1; i < kTinyPerLane; i++) {
    student_top = max_of(student_top, counted(slice.z, i));
    teacher_top = max_of(teacher_top, counted(slice.w, i));
  }
  statistics.raise(lanes_max<kLanes>(student_top), lanes_max<kLanes>(teacher_top), t);
#pragma unroll
  for (int i = 0; i < kTinyPerLane; i++)
    statistics.add_any<kAtRunTime>(counted(slice.z, i), counted(slice.w, i), t);
  statistics.sum_lanes<kLanes>();
  Moments moments;
  if (W::kGeneral && has_moments(args)) {
#pragma unroll
    for (int i = 0; i < kTinyPerLane; i++) moments.add(slice.z[i], slice.w[i], is_unit(args));
    moments.merge_lanes<kLanes>();
  }
  const typename W::Stats stats = W::stats_of(args, real ? row : 0, statistics, moments);
  W writer(call, real ? row : 0, t, stats, scale);
  typename W::Sums sums;
  if constexpr (W::kGeneral) {
#pragma unroll
    for (int i = 0; i < kTinyPerLane; i++)
      if (real && lane + i * kLanes < args.classes && !left_out.is(lane + i * kLanes))
        writer.sum(slice.z[i], slice.w[i], true, sums);
    sums.template merge_lanes<kLanes, true>();
    writer.balance(stats, sums);
  }
  __syncwarp();  // in place: the label's logit is read before it is overwritten
#pragma unroll
  for (int i = 0; i < kTinyPerLane; i++) {
    const int64_t k = lane + i * kLanes;
    if (row < 0 || k >= args.classes) continue;
    float g = fill_value(kind);
    if (real) {
      g = writer.template write<kAtRunTime, true>(slice.z[i], slice.w[i], sums);
      if (k == label) g = writer.at_label(g);
    }
    if (args.grad != nullptr)
      store_any(args.grad, args.student_dtype,
                offset_of(row, args.group_rows, args.grad_stride) + k, g);
  }
  if constexpr (!W::kGeneral) sums.template merge_lanes<kLanes, true>();
  if (lane != 0 || row < 0) return;
  if (real) {
    close_row(args, row, writer, stats, sums, label_logit);
  } else {
    close_row_as(args, row, fill_value(kind));
  }
}

template <class W, int kLanes>
__global__ void __launch_bounds__(kTinyThreads, 1)
    tiny_kernel(const __grid_constant__ ForwardCall call) {
  __shared__ int count;
  __shared__ double slots[32];
  const ForwardArgs& args = call.args;
  wait_for_previous_kernel();
  allow_next_kernel();
  const float scale = block_scale<float>(call, &count);
  const int lane = threadIdx.x % kLanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / kLanes);
  // The loop's bounds are those of the CTA: shuffles need whole warps.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes); first < args.rows;
       first += step) {
    const int64_t mine = first + threadIdx.x / kLanes;
    const int64_t row = mine < args.rows ? mine : -1;
    const int64_t label = row < 0 ? -1 : label_of(args, row);
    run_row<W, kLanes>(call, row, row < 0 ? RowKind::kIgnored : kind_of(args, label), label, scale,
                       lane);
  }
  finish_inside(call, scale, slots);
}

}  // namespace

cudaError_t launch_tiny(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const int64_t wanted = (call.args.rows + plan.rows_per_block - 1) / plan.rows_per_block;
  const int64_t most = static_cast<int64_t>(device.processors) * (2048 / plan.threads);
  Launch launch(wanted < most ? wanted : most, plan.threads, 0, stream);
  if (plan.cluster > 1) launch.cluster(plan.cluster);
  if (call.scale_source == ScaleSource::kStats) launch.overlap(device);
  const auto with = [&](auto writer) {
    using W = typename decltype(writer)::Type;
    return plan.lanes == 8 ? launch(tiny_kernel<W, 8>, call) : launch(tiny_kernel<W, 32>, call);
  };
  return is_hot(call.args) ? with(TypeOf<Writer<float, false>>())
                           : with(TypeOf<GeneralWriter<float>>());
}

}  // namespace fastkd::cuda
