// Functions of the CUDA runtime, for the emulator. Launches are accepted or refused as by a MIG
// slice of an H100.
#include <cstdlib>
#include <map>

#include "cuda_runtime.h"

namespace {

constexpr int kProcessors = 4;
constexpr int kDefaultDynamicBytes = 48 * 1024;  // bytes of shared memory that need no attribute
constexpr int kPortableCluster = 8, kLargestCluster = 16;
constexpr unsigned kMaxGridY = 65535;  // CTAs of a grid along y

struct Granted {
  int dynamic_bytes = kDefaultDynamicBytes;
  int cluster = kPortableCluster;
};
std::map<const void*, Granted> granted;

// Return the cluster size of a launch; 0 if the launch has no such attribute.
int cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; i++)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      return static_cast<int>(config.attrs[i].val.clusterDim.x);
  return 0;
}

// Allocations in device memory, by the address of their first byte.
constexpr size_t kGuard = 4096, kAlign = 256;
constexpr unsigned char kGuardByte = 0xff;
std::map<const unsigned char*, size_t> allocations;

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
  }
  return "unknown error";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulation::kMaxDynamicBytes
                                                                : kProcessors;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  emulation::check_device_memory(kind == cudaMemcpyHostToDevice ? to : from, bytes, {});
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  emulation::check_device_memory(to, bytes, {});
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  emulation::release(p);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > emulation::kMaxDynamicBytes) return cudaErrorInvalidValue;
    granted[kernel].dynamic_bytes = value;
  } else {
    granted[kernel].cluster = value != 0 ? kLargestCluster : kPortableCluster;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const int cluster = cluster_of(*config);
  // A launch without a cluster size is an error, too (cuda_runtime_api.h).
  if (cluster == 0 || cluster > granted[kernel].cluster) return cudaErrorInvalidClusterSize;
  *clusters = std::max(1, kProcessors / cluster);
  return cudaSuccess;
}

namespace emulation {

cudaError_t launch_of(const cudaLaunchConfig_t& config, const void* kernel, Launch& launch) {
  launch.grid = config.gridDim, launch.block = config.blockDim;
  launch.cluster = std::max(1, cluster_of(config)), launch.dynamic_bytes = config.dynamicSmemBytes;
  const unsigned cluster = static_cast<unsigned>(launch.cluster);
  if (launch.cluster > granted[kernel].cluster) return cudaErrorInvalidClusterSize;
  if (launch.grid.x % cluster != 0 || launch.grid.x == 0 || launch.grid.y == 0 ||
      launch.grid.y > kMaxGridY || launch.grid.z != 1 || launch.block.x == 0 ||
      launch.block.x > kMaxThreads || launch.block.y != 1 || launch.block.z != 1)
    return cudaErrorInvalidConfiguration;
  if (static_cast<int>(launch.dynamic_bytes) > granted[kernel].dynamic_bytes)
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

void* allocate(size_t bytes) {
  auto* block = static_cast<unsigned char*>(
      std::aligned_alloc(kAlign, (bytes + 2 * kGuard + kAlign - 1) / kAlign * kAlign));
  std::memset(block, kGuardByte, bytes + 2 * kGuard);
  allocations[block + kGuard] = bytes;
  return block + kGuard;
}
void release(void* p) {
  if (p == nullptr) return;
  check_guards();
  if (allocations.erase(static_cast<unsigned char*>(p)) != 1) fail("cudaFree of %p", p);
  std::free(static_cast<unsigned char*>(p) - kGuard);
}
void check_guards() {
  for (const auto& [begin, bytes] : allocations)
    for (size_t i = 0; i < kGuard; i++)
      if ((begin - kGuard)[i] != kGuardByte || begin[bytes + i] != kGuardByte)
        fail("a write outside of the %zu bytes at %p", bytes, static_cast<const void*>(begin));
}
void check_device_memory(const void* p, size_t bytes, Place place) {
  const auto* first = static_cast<const unsigned char*>(p);
  auto allocation = allocations.upper_bound(first);
  if (allocation == allocations.begin() ||
      (--allocation, first + bytes > allocation->first + allocation->second))
    fail("%zu bytes at %p are in no allocation, %s:%d", bytes, p, place.file, place.line);
}

}  // namespace emulation
