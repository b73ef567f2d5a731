// The ring's kernel and its launch. See ring.cuh.
#pragma once
#include "ring_rows.cuh"

namespace fastkd::cuda {

template <class T, class W, bool kExtra, int kGroups, int kWarps, int kVectors, int kBlocks>
__global__ void __launch_bounds__((kRingThreadsOf<kGroups, kWarps>), kBlocks)
    ring_kernel(const __grid_constant__ ForwardCall call, const __grid_constant__ RingShape shape) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char dynamic[];
  using Shared = RingShared<W, kGroups, kWarps>;
  static_assert(sizeof(Shared) <= kRingStaticBytes);
  __shared__ __align__(alignof(Shared)) unsigned char shared_bytes[sizeof(Shared)];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  auto* ring = reinterpret_cast<RingStage<T, kWarps, kVectors>*>(dynamic);
  const ForwardArgs& args = call.args;
  const int rank = cluster_rank(), ranks = cluster_size();
  const int warp = threadIdx.x / 32;
  constexpr int kConsumers = kGroups * kWarps, kClosers = kRingClosers<kGroups>;
  if (threadIdx.x == 0) {
    for (int i = 0; i < shape.stages; i++) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kWarps);
    }
    for (int g = 0; g < kGroups; g++) {
      barrier_init(&shared.scanned[g], kWarps);
      barrier_init(&shared.ready[g], 1);
      for (int i = 0; i < 2; i++) barrier_init(&shared.exchanged[g][i], ranks);
      shared.pending[g].row = -1;
    }
    for (RingInfo& info : shared.infos) info.sequence = -1;
    shared.count = 0;
    barriers_are_ready();
  }
  cluster_barrier();
  allow_next_kernel();
  const int64_t first = blockIdx.x / ranks, step = gridDim.x / ranks;
  if (warp == kConsumers + kClosers) {
    produce(args, shape, shared, ring, rank, ranks, first, step);
  } else if (warp == kConsumers + kClosers + 1) {
    fill<T>(args, rank, ranks, first, step);
  } else {
    wait_for_previous_kernel();
    float scale;
    if (call.scale_source == ScaleSource::kCount) {
      const int count = __reduce_add_sync(
          0xffffffffu, count_labels(args, threadIdx.x, (kConsumers + kClosers) * 32));
      if (threadIdx.x % 32 == 0) atomicAdd(&shared.count, count);
      named_barrier(1, (kConsumers + kClosers) * 32);
      scale = scale_of_count<float>(shared.count);
    } else {
      scale = known_scale<float>(call);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0 && call.scale_source != ScaleSource::kStats)
      static_cast<float*>(args.stats)[kStats * args.rows] = scale;
    if (warp < kConsumers) {
      consume<T, W, kExtra>(args, shape, shared, ring);
    } else {
      close_rows<T, W, kExtra>(call, shape, shared, warp - kConsumers, kClosers, kWarps, rank,
                               ranks, scale);
    }
  }
  __syncwarp();
  cluster_barrier();  // nobody leaves while a peer may still write to its shared memory
#endif
}

// The clusters of this launch that the current device holds at a time; cached.
cudaError_t resident_clusters(const void* kernel, const cudaLaunchConfig_t& config, int cluster,
                              int* clusters);

template <class T, class W, bool kExtra, int kGroups, int kWarps, int kVectors, int kBlocks = 1>
cudaError_t launch_ring_as(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  const auto kernel = ring_kernel<T, W, kExtra, kGroups, kWarps, kVectors, kBlocks>;
  constexpr int kStage = ring_stage_vectors(kWarps, kVectors);
  const int64_t vectors = call.args.classes / Vector<T>::kElements;
  const int64_t slice = (vectors + plan.cluster - 1) / plan.cluster;
  RingShape shape;
  shape.stages = plan.stages;
  shape.chunks = static_cast<int>(slice > kStage ? (slice + kStage - 1) / kStage : 1);
  Launch launch(plan.cluster, (kRingThreadsOf<kGroups, kWarps>), plan.shared_bytes, stream);
  launch.cluster(plan.cluster);
  if (shape.chunks > shape.stages) return cudaErrorInvalidValue;  // it would never end
  int clusters = 0;
  if (const cudaError_t error = resident_clusters(reinterpret_cast<const void*>(kernel),
                                                  launch.config, plan.cluster, &clusters))
    return error;
  if (clusters == 0) return cudaErrorInvalidClusterSize;
  if (clusters > call.args.rows) clusters = static_cast<int>(call.args.rows);
  launch.config.gridDim.x = static_cast<unsigned>(clusters * plan.cluster);
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  if (call.scale_source == ScaleSource::kStats) launch.overlap(device);
  return launch(kernel, call, shape);
}

}  // namespace fastkd::cuda
