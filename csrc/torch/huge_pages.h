// Advice to Linux to use huge pages for memory that is about to be written, such as a gradient
// (docs/maths.md, section 8).
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd {

constexpr size_t kHugePage = size_t{2} << 20;

// Ask for huge pages. Without the advice, Linux clears a large tensor's pages at the first touch, 4
// KB at a time, which takes longer than computing the gradient. Only huge pages inside the memory
// are advised, so that neighboring memory is not affected. If the advice is not followed, nothing
// changes.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (start + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastkd
