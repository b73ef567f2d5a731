// Memory for the gradients of CPU calls: the block that one gradient leaves is used by the next.
//
// Allocators return large blocks to the system, and the fresh pages of the next block cost more
// than the gradient that fills them: 1024 x 4096 in bf16, loss and backward, takes 2.2 ms without
// and 1.7 ms with this (Zen 4, two cores, docs/performance-log.md). One block is kept, of whole
// huge pages but for its tail; smaller and larger gradients get what torch gives them.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>

#include <atomic>
#include <cstdlib>

#include "huge_pages.h"

namespace fastkd::grad_buffer {

constexpr size_t kMostBytes = size_t{32} << 20;

struct Block {
  void* data;
  size_t bytes;
};

// The block that the next gradient may take, or null.
inline std::atomic<Block*> spare{nullptr};

inline void keep(Block* block) {
  Block* const before = spare.exchange(block);
  if (before == nullptr) return;
  std::free(before->data);
  delete before;
}

// Called when the last tensor that uses the block is gone. As with torch's own allocator, memory
// that no tensor uses does not count in torch's memory profile.
inline void release(void* block) {
  c10::profiledCPUMemoryReporter().Delete(static_cast<Block*>(block)->data);
  keep(static_cast<Block*>(block));
}

// Return a block of `bytes`, or null where there is no memory. A spare block that is larger is
// taken only where little of it would lie idle.
inline Block* take(size_t bytes) {
  Block* const block = spare.exchange(nullptr);
  if (block != nullptr) {
    if (bytes <= block->bytes && block->bytes - bytes <= bytes / 16) return block;
    keep(block);
  }
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) return nullptr;
  prefer_huge_pages(data, bytes);
  return new Block{data, bytes};
}

// Return a tensor of the sizes and dtype of `student`, with these strides.
inline at::Tensor empty_gradient(const at::Tensor& student, at::IntArrayRef strides) {
  const size_t bytes = student.numel() * student.element_size();
  Block* const block = bytes >= kHugePage && bytes <= kMostBytes ? take(bytes) : nullptr;
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
