// Memory for the gradients of plain CPU calls: what one call's gradient leaves is used by the next.
//
// Allocators give large blocks back to the system, and the fresh pages of the next one cost more
// than computing the gradient that fills them; small pages cost once more, when a gradient that has
// left the caches is written again (docs/performance-log.md). So one block of huge pages is kept,
// of at most kMostKept bytes; a call that wants more takes what torch gives it.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>

#include <atomic>
#include <cstdlib>

#include "huge_pages.h"

namespace fastkd::gradients {

// What is smaller stays in malloc's own lists.
constexpr size_t kLeastKept = size_t{64} << 10;
// What is larger glibc, too, maps anew each time.
constexpr size_t kMostKept = size_t{32} << 20;

struct Block {
  void* data;
  size_t bytes;
};

inline std::atomic<Block*> spare_block{nullptr};  // of all that include this

inline void keep(Block* block) {
  Block* const before = spare_block.exchange(block);
  if (before == nullptr) return;
  std::free(before->data);
  delete before;
}

// What a tensor calls that needs its memory no longer. torch's profiler is told as by torch's own
// allocator: a gradient is memory in use, a spare block is not.
inline void give_back(void* block) {
  c10::profiledCPUMemoryReporter().Delete(static_cast<Block*>(block)->data);
  keep(static_cast<Block*>(block));
}

// Whole huge pages of at least `bytes`, and not many more; null where there is no memory.
inline Block* take(size_t bytes) {
  const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Block* const spare = spare_block.exchange(nullptr);
  if (spare != nullptr) {
    if (whole <= spare->bytes && spare->bytes < 2 * whole) return spare;
    keep(spare);
  }
  void* const data = std::aligned_alloc(kHugePage, whole);
  if (data == nullptr) return nullptr;
  prefer_huge_pages(data, whole);
  return new Block{data, whole};
}

// A new contiguous tensor of the shape and dtype of `student`.
inline at::Tensor empty_gradient(const at::Tensor& student) {
  const size_t bytes = student.nbytes();
  Block* const block = bytes >= kLeastKept && bytes <= kMostKept ? take(bytes) : nullptr;
  if (block == nullptr) {
    at::Tensor gradient(at::detail::empty_cpu(student.sizes(), student.scalar_type()));
    prefer_huge_pages(gradient.mutable_data_ptr(), bytes);
    return gradient;
  }
  c10::profiledCPUMemoryReporter().New(block->data, bytes);
  c10::DataPtr data(block->data, block, &give_back, c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  at::Tensor gradient = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), student.dtype());
  gradient.unsafeGetTensorImpl()->set_sizes_contiguous(student.sizes());
  return gradient;
}

}  // namespace fastkd::gradients
