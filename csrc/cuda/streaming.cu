// A CTA per row, which it reads twice: for GPUs without clusters, rows that fit on no chip, fp64,
// and students and teachers of different dtypes. The second read is served by L2 while the rows in
// flight fit there.
#include "launch.h"
#include "rows.cuh"

namespace fastkd::cuda {
namespace {

// How a thread walks its part of a row. Vectors<T>: both inputs are T, 16 bytes at a time.
// Elements<A>: any dtypes, computed in A, one class at a time.
template <class T>
struct Vectors {
  using A = float;
  static constexpr bool kFold = kFoldScales<T>, kPowers = true;
  const ForwardArgs& args;
  RowOf<T> row;

  __device__ __forceinline__ Vectors(const ForwardArgs& a, int64_t index)
      : args(a), row(a, a.grad, a.grad_stride, index) {}
  __device__ __forceinline__ float student(int64_t i) const { return to_acc(row.student[i]); }
  __device__ __forceinline__ float teacher(int64_t i) const { return to_acc(row.teacher[i]); }
  __device__ __forceinline__ void store(int64_t i, float g) const {
    if (row.grad != nullptr) row.grad[i] = from_acc<T>(g);
  }
  __device__ __forceinline__ bool owns(int64_t i) const {
    const int64_t inside = i - row.layout.begin;
    if (inside < 0 || i >= args.classes - row.layout.tail) return peeled() == i;
    return inside / Vector<T>::kElements % blockDim.x == threadIdx.x;
  }
  __device__ __forceinline__ int64_t peeled() const {
    return threadIdx.x < 32 ? row.layout.peeled(threadIdx.x, args.classes) : -1;
  }
  __device__ __forceinline__ int64_t first_of(int64_t vector) const {
    return row.layout.begin + vector * Vector<T>::kElements;
  }
  template <int kPower, class Temper, class Out>
  __device__ __forceinline__ void scan(Statistics<float>& stats, const Temper& t,
                                       const Out& left_out) const {
    Tops tops;
#pragma unroll 2
    for (int64_t i = threadIdx.x; i < row.layout.vectors; i += blockDim.x) {
      uint4 z = fetch(row.student_vectors, i, row.layout.student_shift);
      uint4 w = fetch(row.teacher_vectors, i, row.layout.teacher_shift);
      left_out.template mask<T>(z, first_of(i));
      left_out.template mask<T>(w, first_of(i));
      add_vector<T, kPower>(stats, tops, z, w, t);
    }
    stats.raise(tops.student, tops.teacher, t);
    const int64_t i = peeled();
    if (i < 0 || left_out.is(i)) return;
    stats.raise(student(i), teacher(i), t);
    stats.add_any<kPower>(student(i), teacher(i), t);
  }
  template <class W, class Out>
  __device__ __forceinline__ void sum(const W& writer, const Out& left_out, bool extra,
                                      typename W::Sums& sums) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < row.layout.vectors; i += blockDim.x)
      sum_vector<T>(writer, fetch(row.student_vectors, i, row.layout.student_shift),
                    fetch(row.teacher_vectors, i, row.layout.teacher_shift),
                    left_out.among(first_of(i), Vector<T>::kElements), extra, sums);
    const int64_t i = peeled();
    if (i >= 0 && !left_out.is(i)) writer.sum(student(i), teacher(i), extra, sums);
  }
  __device__ __forceinline__ void add_moments(Moments& moments) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < row.layout.vectors; i += blockDim.x)
      cuda::add_moments<T>(fetch(row.student_vectors, i, row.layout.student_shift),
                           fetch(row.teacher_vectors, i, row.layout.teacher_shift), is_unit(args),
                           moments);
    const int64_t i = peeled();
    if (i >= 0) moments.add(student(i), teacher(i), is_unit(args));
  }
  template <int kPower, bool kExtra, class W>
  __device__ __forceinline__ void write(const W& writer, typename W::Sums& sums) const {
    constexpr int kUnroll = W::kGeneral ? 1 : 2;
#pragma unroll kUnroll
    for (int64_t i = threadIdx.x; i < row.layout.vectors; i += blockDim.x) {
      const uint4 g = write_vector<T, kPower, kExtra>(
          writer, fetch_once(row.student_vectors, i, row.layout.student_shift),
          fetch_once(row.teacher_vectors, i, row.layout.teacher_shift), sums);
      if (row.grad != nullptr) __stcs(row.grad_vectors + i, g);
    }
    const int64_t i = peeled();
    if (i >= 0) store(i, writer.template write<kPower, kExtra>(student(i), teacher(i), sums));
  }
  __device__ __forceinline__ void fill(float value) const {
    fill_row(row, value, 0, row.layout.vectors, true, threadIdx.x, blockDim.x, args.classes);
  }
};

template <class Acc>
struct Elements {
  using A = Acc;
  static constexpr bool kFold = false, kPowers = false;
  const ForwardArgs& args;
  int64_t student_offset, teacher_offset, grad_offset;

  __device__ __forceinline__ Elements(const ForwardArgs& a, int64_t index)
      : args(a),
        student_offset(offset_of(index, a.group_rows, a.student_stride)),
        teacher_offset(offset_of(index, a.group_rows, a.teacher_stride)),
        grad_offset(offset_of(index, a.group_rows, a.grad_stride)) {}
  __device__ __forceinline__ A student(int64_t i) const {
    return load_any<A>(args.student, args.student_dtype, student_offset + i);
  }
  __device__ __forceinline__ A teacher(int64_t i) const {
    return load_any<A>(args.teacher, args.teacher_dtype, teacher_offset + i);
  }
  __device__ __forceinline__ void store(int64_t i, A g) const {
    if (args.grad != nullptr) store_any(args.grad, args.student_dtype, grad_offset + i, g);
  }
  __device__ __forceinline__ bool owns(int64_t i) const { return i % blockDim.x == threadIdx.x; }
  template <int kPower, class Temper, class Out>
  __device__ __forceinline__ void scan(Statistics<A>& stats, const Temper& t,
                                       const Out& left_out) const {
#pragma unroll 2
    for (int64_t i = threadIdx.x; i < args.classes; i += blockDim.x) {
      if (left_out.is(i)) continue;
      const A z = student(i), w = teacher(i);
      stats.raise(z, w, t);
      stats.template add_any<kPower>(z, w, t);
    }
  }
  template <class W, class Out>
  __device__ __forceinline__ void sum(const W& writer, const Out& left_out, bool extra,
                                      typename W::Sums& sums) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < args.classes; i += blockDim.x)
      if (!left_out.is(i)) writer.sum(student(i), teacher(i), extra, sums);
  }
  __device__ __forceinline__ void add_moments(Moments& moments) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < args.classes; i += blockDim.x)
      moments.add(student(i), teacher(i), is_unit(args));
  }
  template <int kPower, bool kExtra, class W>
  __device__ __forceinline__ void write(const W& writer, typename W::Sums& sums) const {
    constexpr int kUnroll = W::kGeneral ? 1 : 2;
#pragma unroll kUnroll
    for (int64_t i = threadIdx.x; i < args.classes; i += blockDim.x)
      store(i, writer.template write<kPower, kExtra>(student(i), teacher(i), sums));
  }
  __device__ __forceinline__ void fill(A value) const {
    for (int64_t i = threadIdx.x; i < args.classes; i += blockDim.x) store(i, value);
  }
};

template <class A, class S, bool kGeneral>
struct Exchange {
  Statistics<A> statistics[2][32];
  S sums[2][32];
};
template <class A, class S>
struct Exchange<A, S, true> : Exchange<A, S, false> {
  Moments moments[32];  // between two writes lie the barriers of the other two
};

// fp64 needs twice the registers, and so does the sweep between.
template <class Rows, class W>
constexpr int kStreamingThreads = sizeof(typename Rows::A) == 8 || W::kGeneral ? 256 : 512;

template <class Rows, class W, bool kExtra>
__global__ void __launch_bounds__((kStreamingThreads<Rows, W>), 1)
    streaming_kernel(const __grid_constant__ ForwardCall call) {
  using A = typename Rows::A;
  __shared__ Exchange<A, typename W::Sums, W::kGeneral> exchange;
  __shared__ double slots[32];
  __shared__ int count;
  const ForwardArgs& args = call.args;
  wait_for_previous_kernel();
  allow_next_kernel();
  const A scale = block_scale<A>(call, &count);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  int turn = 0;
  for (int64_t index = blockIdx.x; index < args.rows; index += gridDim.x, turn ^= 1) {
    const Rows row(args, index);
    const int64_t label = label_of(args, index);
    const RowKind kind = kind_of(args, label);
    if (kind != RowKind::kReal) {
      row.fill(static_cast<A>(fill_value(kind)));
      if (threadIdx.x == 0) close_row_as(args, index, static_cast<A>(fill_value(kind)));
      __syncthreads();
      continue;
    }
    const typename W::Temper t(args, index);
    // Read before the barrier, since the gradient may overwrite them.
    const A label_student = label >= 0 ? row.student(label) : A(0);
    const A label_teacher = label >= 0 ? row.teacher(label) : A(0);
    // Copies of the loops for each power, where their speed is all that counts.
    const auto sweep = [&](auto&& fn) {
      if constexpr (Rows::kPowers && !W::kGeneral && !kExtra) {
        with_power(t.power, fn);
      } else {
        fn(PowerConstant<kAtRunTime>());
      }
    };
    const LeftOut<W::kGeneral> left_out(args, label);
    Statistics<A> statistics;
    sweep([&](auto power) { row.template scan<power.value>(statistics, t, left_out); });
    statistics.merge_lanes(t);
    if (lane == 0) exchange.statistics[turn][warp] = statistics;
    __syncthreads();
    statistics = lane < warps ? exchange.statistics[turn][lane] : Statistics<A>();
    statistics.merge_lanes(t);

    Moments moments;
    if constexpr (W::kGeneral) {
      if (has_moments(args)) {
        row.add_moments(moments);
        moments.merge_lanes();
        if (lane == 0) exchange.moments[warp] = moments;
        __syncthreads();
        moments = lane < warps ? exchange.moments[lane] : Moments();
        moments.merge_lanes();
      }
    }
    const typename W::Stats stats = W::stats_of(args, index, statistics, moments);
    W writer(call, index, t, stats, scale);
    typename W::Sums sums, unused;
    const auto exchanged = [&] {
      if (lane == 0) exchange.sums[turn][warp] = sums;
      __syncthreads();
      sums = lane < warps ? exchange.sums[turn][lane] : typename W::Sums();
    };
    if constexpr (W::kGeneral) {
      row.sum(writer, left_out, wants_extra(args), sums);
      sums.template merge_lanes<32, true>();
      exchanged();
      sums.template merge_lanes<32, true>();
      writer.balance(stats, sums);
    }
    sweep([&](auto power) {
      row.template write<power.value, kExtra>(writer, W::kGeneral ? unused : sums);
    });
    if (label >= 0 && row.owns(label))
      row.store(label, writer.at_label(writer.template write<kAtRunTime, kExtra>(
                           label_student, label_teacher, unused)));
    if constexpr (!W::kGeneral) {
      sums.template merge_lanes<32, kExtra>();
      exchanged();
      if (warp != 0) continue;
      sums.template merge_lanes<32, kExtra>();
    }
    if (threadIdx.x == 0) close_row(args, index, writer, stats, sums, label_student);
  }
  finish_inside(call, scale, slots);
}

template <class Rows, class W, bool kExtra>
cudaError_t launch_with(const ForwardCall& call, Launch& launch, int processors) {
  const auto kernel = streaming_kernel<Rows, W, kExtra>;
  if (launch.config.blockDim.x > kStreamingThreads<Rows, W>)
    launch.config.blockDim.x = kStreamingThreads<Rows, W>;
  int per_processor = 1;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &per_processor, kernel, static_cast<int>(launch.config.blockDim.x), 0))
    return error;
  const int64_t most = static_cast<int64_t>(per_processor) * processors;
  launch.config.gridDim.x = static_cast<unsigned>(call.args.rows < most ? call.args.rows : most);
  return launch(kernel, call);
}

template <class Rows>
cudaError_t launch_as(const ForwardCall& call, Launch& launch, int processors) {
  using A = typename Rows::A;
  using Hot = Writer<A, Rows::kFold>;
  if (!is_hot(call.args))
    return launch_with<Rows, GeneralWriter<A>, true>(call, launch, processors);
  return wants_extra(call.args) ? launch_with<Rows, Hot, true>(call, launch, processors)
                                : launch_with<Rows, Hot, false>(call, launch, processors);
}

}  // namespace

cudaError_t launch_streaming(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const ForwardArgs& args = call.args;
  Launch launch(1, plan.threads, 0, stream);
  if (plan.cluster > 1) launch.cluster(plan.cluster);
  if (call.scale_source == ScaleSource::kStats) launch.overlap(device);
  if (computes_in_double(args.student_dtype, args.teacher_dtype))
    return launch_as<Elements<double>>(call, launch, device.processors);
  if (!hot_dtypes(args.student_dtype, args.teacher_dtype))
    return launch_as<Elements<float>>(call, launch, device.processors);
  switch (args.student_dtype) {
    case DType::kBFloat16:
      return launch_as<Vectors<__nv_bfloat16>>(call, launch, device.processors);
    case DType::kFloat16:
      return launch_as<Vectors<__half>>(call, launch, device.processors);
    default:
      return launch_as<Vectors<float>>(call, launch, device.processors);
  }
}

}  // namespace fastkd::cuda
