// A warp or a CTA per row, which it holds in registers between the sweeps: rows of 129 to 4096
// classes where there are clusters (the ring takes over), to 8192 (16 bits) where there are none.
#include "launch.h"
#include "rows.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kVectors = kRegisterBytes / kVectorBytes;

// What the warps of a CTA tell each other. Two of each, used in turn: a row needs one barrier for
// each exchange, not two.
struct Exchange {
  Statistics<float> statistics[2][32];
  Sums<float> sums[2][32];
};

// The row's data in one thread, and one peeled class in each lane of its first warp.
struct Held {
  uint4 student[kVectors], teacher[kVectors];
  float peeled_student, peeled_teacher, label_student, label_teacher;
  int64_t peeled;  // class, or -1
};

template <class T>
__device__ __forceinline__ void load_row(const RowOf<T>& row, int64_t label, int lane, int lanes,
                                         int64_t classes, Held& held) {
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = lane + k * lanes;
    if (i >= row.layout.vectors) continue;
    held.student[k] = fetch_once(row.student_vectors, i, row.layout.student_shift);
    held.teacher[k] = fetch_once(row.teacher_vectors, i, row.layout.teacher_shift);
  }
  held.peeled = lane < 32 ? row.layout.peeled(lane, classes) : -1;
  held.peeled_student = held.peeled >= 0 ? to_acc(row.student[held.peeled]) : 0;
  held.peeled_teacher = held.peeled >= 0 ? to_acc(row.teacher[held.peeled]) : 0;
  held.label_student = label >= 0 ? to_acc(row.student[label]) : 0;
  held.label_teacher = label >= 0 ? to_acc(row.teacher[label]) : 0;
}

template <class T, int kPower>
__device__ __forceinline__ Statistics<float> scan_row(const RowOf<T>& row, const Held& held,
                                                      const Temperature<float>& t, int lane,
                                                      int lanes) {
  Statistics<float> stats;
  Tops tops;
#pragma unroll
  for (int k = 0; k < kVectors; k++)
    if (lane + k * lanes < row.layout.vectors)
      add_vector<T, kPower>(stats, tops, held.student[k], held.teacher[k], t);
  stats.raise(tops.student, tops.teacher, t);
  if (held.peeled >= 0) {
    stats.raise(held.peeled_student, held.peeled_teacher, t);
    stats.add_any<kPower>(held.peeled_student, held.peeled_teacher, t);
  }
  stats.merge_lanes(t);
  return stats;
}

template <class T, int kPower, bool kExtra, class W>
__device__ __forceinline__ Sums<float> write_row(const RowOf<T>& row, const Held& held,
                                                 const W& writer, int64_t label, int lane,
                                                 int lanes) {
  Sums<float> sums, unused;
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = lane + k * lanes;
    if (i >= row.layout.vectors) continue;
    const uint4 g = write_vector<T, kPower, kExtra>(writer, held.student[k], held.teacher[k], sums);
    if (row.grad != nullptr) __stcs(row.grad_vectors + i, g);
  }
  if (held.peeled >= 0) {
    float g = writer.template write<kPower, kExtra>(held.peeled_student, held.peeled_teacher, sums);
    if (held.peeled == label) g = writer.at_label(g);
    if (row.grad != nullptr) row.grad[held.peeled] = from_acc<T>(g);
  }
  // The label's class is written again, by the thread that wrote its vector.
  const int inside = static_cast<int>(label) - row.layout.begin;
  const int vector = inside / Vector<T>::kElements;
  if (label >= 0 && inside >= 0 && vector < row.layout.vectors && vector % lanes == lane &&
      row.grad != nullptr)
    row.grad[label] = from_acc<T>(writer.at_label(
        writer.template write<kPower, kExtra>(held.label_student, held.label_teacher, unused)));
  sums.merge_lanes<32, kExtra>();
  return sums;
}

template <class T, bool kExtra, bool kWarpPerRow>
__global__ void __launch_bounds__(kWarpPerRow ? 512 : 256, kWarpPerRow || kExtra ? 1 : 2)
    registers_kernel(const __grid_constant__ ForwardCall call) {
  __shared__ Exchange exchange;
  __shared__ double slots[32];
  __shared__ int count;
  const ForwardArgs& args = call.args;
  allow_next_kernel();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int lane = kWarpPerRow ? threadIdx.x % 32 : threadIdx.x;
  const int lanes = kWarpPerRow ? 32 : blockDim.x;
  const int per_block = kWarpPerRow ? warps : 1;
  float scale = 0;
  bool has_scale = false;
  int turn = 0;
  Temperature<float> t(args, 0);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * per_block; first < args.rows;
       first += static_cast<int64_t>(gridDim.x) * per_block, turn ^= 1) {
    const int64_t index = kWarpPerRow ? first + warp : first;
    const bool inside = index < args.rows;
    const int64_t label = inside ? label_of(args, index) : -1;
    const RowKind kind = inside ? kind_of(args, label) : RowKind::kIgnored;
    const RowOf<T> row(args, args.grad, args.grad_stride, inside ? index : 0);
    Held held;
    if (kind == RowKind::kReal) load_row(row, label, lane, lanes, args.classes, held);
    if (!has_scale) {  // after the first loads have been issued
      wait_for_previous_kernel();
      scale = block_scale<float>(call, &count);
      has_scale = true;
    }
    if (kind != RowKind::kReal) {
      if (!inside) continue;
      fill_row(row, fill_value(kind), 0, row.layout.vectors, true, lane, lanes, args.classes);
      if (lane == 0) close_row_as(args, index, fill_value(kind));
      if (!kWarpPerRow) __syncthreads();
      continue;
    }
    if (args.row_settings != nullptr) t = Temperature<float>(args, index);
    Statistics<float> statistics = t.power == 2
                                       ? scan_row<T, 2>(row, held, t, lane, lanes)
                                       : scan_row<T, kAtRunTime>(row, held, t, lane, lanes);
    if (!kWarpPerRow) {
      if (threadIdx.x % 32 == 0) exchange.statistics[turn][warp] = statistics;
      __syncthreads();
      const int other = threadIdx.x % 32;
      statistics = other < warps ? exchange.statistics[turn][other] : Statistics<float>();
      statistics.merge_lanes(t);
    } else {
      __syncwarp();  // in place: every lane has read the label's logit
    }
    const RowStats<float> stats(statistics);
    const Writer<float, kFoldScales<T>> writer(call, index, t, stats, scale);
    Sums<float> sums =
        t.power == 2 ? write_row<T, 2, kExtra>(row, held, writer, label, lane, lanes)
                     : write_row<T, kAtRunTime, kExtra>(row, held, writer, label, lane, lanes);
    if (!kWarpPerRow) {
      if (threadIdx.x % 32 == 0) exchange.sums[turn][warp] = sums;
      __syncthreads();
      if (warp != 0) continue;
      const int other = threadIdx.x % 32;
      sums = other < warps ? exchange.sums[turn][other] : Sums<float>();
      sums.merge_lanes<32, kExtra>();
    }
    if (lane == 0) close_row(args, index, writer, stats, sums, held.label_student);
  }
  finish_inside(call, scale, slots);
}

template <class T, bool kExtra>
cudaError_t launch_as(const ForwardCall& call, const Plan& plan, Launch& launch, int processors) {
  const auto kernel =
      plan.lanes == 32 ? registers_kernel<T, kExtra, true> : registers_kernel<T, kExtra, false>;
  int per_processor = 1;
  if (const cudaError_t error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, plan.threads, 0))
    return error;
  const unsigned most = static_cast<unsigned>(per_processor * processors);
  if (launch.config.gridDim.x > most) launch.config.gridDim.x = most;
  return launch(kernel, call);
}

}  // namespace

cudaError_t launch_registers(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const int64_t blocks = (call.args.rows + plan.rows_per_block - 1) / plan.rows_per_block;
  Launch launch(blocks < (1 << 20) ? blocks : 1 << 20, plan.threads, 0, stream);
  if (plan.cluster > 1) launch.cluster(plan.cluster);
  if (call.scale_source == ScaleSource::kStats) launch.overlap(device);
  const auto with = [&](auto example) {
    using T = decltype(example);
    return wants_extra(call.args) ? launch_as<T, true>(call, plan, launch, device.processors)
                                  : launch_as<T, false>(call, plan, launch, device.processors);
  };
  switch (call.args.student_dtype) {
    case DType::kBFloat16:
      return with(__nv_bfloat16());
    case DType::kFloat16:
      return with(__half());
    default:
      return with(float());
  }
}

}  // namespace fastkd::cuda
