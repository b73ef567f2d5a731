// Shared code of the CUDA kernels' tests: numbers of every type, random numbers, and memory on host
// and device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../../csrc/kernels.h"

using namespace fastkd;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check(int status, const char* what) {
  if (status == 0) return;
  std::printf("FAIL %s: %s (%d)\n", what, cuda::describe(status), status);
  std::exit(99);
}

double load(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(p)[i];
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(p)[i]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}
void store(void* p, DType dtype, int64_t i, double x) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(p)[i] = x;
      break;
    case DType::kFloat16:
      static_cast<__half*>(p)[i] = __float2half_rn(static_cast<float>(x));
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(static_cast<float>(x));
      break;
    default:
      static_cast<float*>(p)[i] = static_cast<float>(x);
  }
}

// A generator of numbers that depend only on the seed.
struct Random {
  uint64_t state;
  double uniform() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(state >> 11) / 9007199254740992.0;
  }
  double normal() {
    return std::sqrt(-2 * std::log(uniform() + 1e-18)) * std::cos(6.283185307179586 * uniform());
  }
};

// Host memory and its copy on the device, `offset` bytes into an allocation.
struct Buffer {
  std::vector<char> host;
  char* device = nullptr;
  int64_t offset = 0;
  explicit Buffer(int64_t bytes, int64_t off = 0) : host(static_cast<size_t>(bytes)), offset(off) {
    check(cudaMalloc(&device, static_cast<size_t>(bytes + off + 16)), "cudaMalloc");
  }
  ~Buffer() { cudaFree(device); }
  Buffer(const Buffer&) = delete;
  void* at() { return device + offset; }
  void up() { check(cudaMemcpy(at(), host.data(), host.size(), cudaMemcpyHostToDevice), "up"); }
  void down() { check(cudaMemcpy(host.data(), at(), host.size(), cudaMemcpyDeviceToHost), "down"); }
};

int total_failures = 0, total_cases = 0;

bool has_device() {
  int devices = 0;
  const bool is_available = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  if (!is_available) std::printf("SKIP: no CUDA device\n");
  return is_available;
}

// Print the summary, and return the exit status of a test.
int outcome() {
  std::printf("%s: %d of %d cases failed\n", total_failures ? "FAIL" : "PASS", total_failures,
              total_cases);
  return total_failures > 90 ? 90 : total_failures;
}

inline double log_sum(const std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  if (!(max > -kInfinity)) return -kInfinity;
  double sum = 0;
  for (const double v : x) sum += std::exp(v - max);
  return max + std::log(sum);
}

bool close(double got, double want, double absolute, double relative) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= absolute + relative * std::fabs(want);
}

}  // namespace
