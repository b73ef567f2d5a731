// The instances of the ring that the library holds, and how its launches are sized.
#include <map>
#include <mutex>
#include <tuple>

#include "ring_kernel.cuh"

namespace fastkd::cuda {

// Asked of the driver, never computed: GPCs of 16 and 18 SMs make "SMs / cluster" overshoot, and
// the clusters left over run as a second wave at half the speed (H100, 2026-11).
cudaError_t resident_clusters(const void* kernel, const cudaLaunchConfig_t& config, int cluster,
                              int* clusters) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  static std::map<std::tuple<int, const void*>, size_t> granted;  // dynamic shared memory
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& count = known[{device, kernel, cluster, config.dynamicSmemBytes}];
  if (count == 0) {
    size_t& bytes = granted[{device, kernel}];
    if (config.dynamicSmemBytes > bytes) {
      bytes = config.dynamicSmemBytes;
      if (const cudaError_t error = cudaFuncSetAttribute(
              kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
        return error;
    }
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
      return error;
    if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &config))
      return error;
  }
  *clusters = count;
  return cudaSuccess;
}

cudaError_t launch_ring(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  const bool extra = wants_extra(call.args);
  const auto with = [&](auto example) {
    using T = decltype(example);
    using W = Writer<float, kFoldScales<T>>;
    // Terms and the sweep between take more registers than four groups leave to a thread.
    if (!is_hot(call.args))
      return launch_ring_as<T, GeneralWriter<float>, true, kRingGroups - 1, kRingWarps,
                            kRingVectors>(call, plan, stream);
    return extra ? launch_ring_as<T, W, true, kRingGroups - 1, kRingWarps, kRingVectors>(call, plan,
                                                                                         stream)
                 : launch_ring_as<T, W, false, kRingGroups, kRingWarps, kRingVectors>(call, plan,
                                                                                      stream);
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
