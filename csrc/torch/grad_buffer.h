// Memory for the gradients of CPU calls: the block of a freed gradient is recycled for the next
// gradient. docs/maths.md, section 8, explains when a gradient is written.
//
// Allocators return large blocks to the system, and the page faults of a new block cost more than
// computing the gradient that fills it (docs/performance-log.md). At most one block is cached.
// Gradients of fewer than kLeastBytes, which allocators cache, or of more than kMostBytes use
// torch's own allocator.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>

#include <atomic>
#include <cstdlib>

#include "huge_pages.h"

namespace fastkd::grad_buffer {

constexpr size_t kLeastBytes = size_t{64} << 10;
constexpr size_t kMostBytes = size_t{32} << 20;
constexpr size_t kPage = size_t{4} << 10;

struct Block {
  void* data;
  size_t bytes;
};

// The cached block for the next gradient, or null.
inline std::atomic<Block*> spare{nullptr};

// Cache `block`, and free the block that was cached before.
inline void cache_block(Block* block) {
  Block* const before = spare.exchange(block);
  if (before == nullptr) return;
  std::free(before->data);
  delete before;
}

// Cache the block of a tensor that was freed. Report the block to torch's memory profiler as freed,
// as torch's own allocator does.
inline void release(void* block) {
  c10::profiledCPUMemoryReporter().Delete(static_cast<Block*>(block)->data);
  cache_block(static_cast<Block*>(block));
}

// Return the size of a block for `bytes`: full huge pages, if at most a tenth would be unused. More
// unused memory would add up, because many gradients may be alive at a time.
inline size_t block_bytes(size_t bytes) {
  const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  return rounded - bytes <= bytes / 10 ? rounded : bytes;
}

// Return a block of at least `bytes`, or null if there is no memory. A larger cached block is used
// only if at most a tenth of `bytes` would be unused.
inline Block* take(size_t bytes) {
  Block* const block = spare.exchange(nullptr);
  if (block != nullptr) {
    if (bytes <= block->bytes && block->bytes - bytes <= bytes / 10) return block;
    cache_block(block);
  }
  void* data = nullptr;
  const size_t size = block_bytes(bytes);
  if (posix_memalign(&data, size < kHugePage ? kPage : kHugePage, size) != 0) return nullptr;
  prefer_huge_pages(data, size);
  return new Block{data, size};
}

// Return an uninitialized tensor with the sizes and dtype of `student` and with `strides`.
inline at::Tensor empty_gradient(const at::Tensor& student, at::IntArrayRef strides) {
  const size_t bytes = student.numel() * student.element_size();
  Block* const block = bytes >= kLeastBytes && bytes <= kMostBytes ? take(bytes) : nullptr;
  if (block == nullptr) {
    const auto dtype = student.scalar_type();
    at::Tensor gradient(at::detail::empty_strided_cpu(student.sizes(), strides, dtype));
    prefer_huge_pages(gradient.mutable_data_ptr(), bytes);
    return gradient;
  }
  c10::profiledCPUMemoryReporter().New(block->data, bytes);
  c10::DataPtr data(block->data, block, &release, c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  at::Tensor gradient = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), student.dtype());
  gradient.unsafeGetTensorImpl()->set_sizes_and_strides(student.sizes(), strides);
  return gradient;
}

}  // namespace fastkd::grad_buffer
