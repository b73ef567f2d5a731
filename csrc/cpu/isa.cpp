// The list of compiled kernels that this processor can run, and the choice among these kernels.
// Results may differ in the last bits between instruction sets (docs/maths.md, section 9).
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(FASTKD_HAS_AVX)
#include <cpuid.h>
#endif

#include "../kernels.h"

namespace fastkd::cpu {

namespace baseline {
Kernels make_kernels(const char* name);
}
#if defined(FASTKD_HAS_AVX)
namespace avx2 {
Kernels make_kernels(const char* name);
}
namespace avx512 {
Kernels make_kernels(const char* name);
}
#endif

namespace {

#if defined(FASTKD_HAS_AVX)
// Return true if the processor has F16C, which virtual machines may hide while AVX2 is visible. GCC
// 10's __builtin_cpu_supports() does not know F16C.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

struct Registry {
  Kernels kernels[4] = {};
  const Kernels* best_first[5] = {};
  int count = 0;
  std::atomic<const Kernels*> chosen{nullptr};

  void add(const Kernels& k) {
    kernels[count] = k;
    best_first[count] = &kernels[count];
    ++count;
  }

  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(kernels[i].name, name) == 0) return &kernels[i];
    }
    return nullptr;
  }

  // Register the available kernels. Each make_kernels() is called only if the processor has the
  // instructions, because the function itself may use these instructions.
  Registry() {
#if defined(FASTKD_HAS_AVX)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                          has_f16c();
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      add(avx512::make_kernels("avx512"));
    }
    if (has_avx2) add(avx2::make_kernels("avx2"));
#endif
    add(baseline::make_kernels("default"));
    const char* wanted = std::getenv("FASTKD_CPU_CAPABILITY");
    const Kernels* named = wanted != nullptr ? find(wanted) : nullptr;
    chosen = named != nullptr ? named : &kernels[0];
  }
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

Sums total(const Sums* of_segments, int64_t segments) {
  Sums result = {};
  for (int64_t i = segments; i-- > 0;) {
    result.slope += of_segments[i].slope;
    result.classes += of_segments[i].classes;
  }
  return result;
}

const Kernels& kernels() { return *registry().chosen.load(std::memory_order_relaxed); }

const Kernels* const* available() { return registry().best_first; }

bool select(const char* name) {
  const Kernels* named = registry().find(name);
  if (named != nullptr) registry().chosen.store(named, std::memory_order_relaxed);
  return named != nullptr;
}

}  // namespace fastkd::cpu
