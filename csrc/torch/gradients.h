// Memory for the gradients of plain CPU calls: what one call's gradient leaves is used by the next.
//
// Allocators give large blocks back to the system, and the fresh pages of the next one cost more
// than computing the gradient that fills them (docs/performance-log.md). So one block is kept, of
// at most kMostKept bytes; without it a call takes what torch gives it.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>

#include <atomic>
#include <cstdlib>

namespace fastkd {
namespace {

// What is smaller stays in malloc's own lists.
constexpr size_t kLeastKept = size_t{64} << 10;
// What is larger glibc, too, maps anew each time.
constexpr size_t kMostKept = size_t{32} << 20;

struct Block {
  void* data;
  size_t bytes;
};

std::atomic<Block*> spare_block{nullptr};

void keep(void* block) {
  Block* const before = spare_block.exchange(static_cast<Block*>(block));
  if (before == nullptr) return;
  std::free(before->data);
  delete before;
}

// At least `bytes`, and less than twice as many; null where there is no memory.
Block* take(size_t bytes) {
  Block* const spare = spare_block.exchange(nullptr);
  if (spare != nullptr) {
    if (bytes <= spare->bytes && spare->bytes < 2 * bytes) return spare;
    keep(spare);
  }
  constexpr size_t kAlignment = 64;
  const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* const data = std::aligned_alloc(kAlignment, whole);
  return data != nullptr ? new Block{data, whole} : nullptr;
}

// A new contiguous tensor of the shape and dtype of `student`.
at::Tensor empty_gradient(const at::Tensor& student) {
  const size_t bytes = student.nbytes();
  Block* const block = bytes >= kLeastKept && bytes <= kMostKept ? take(bytes) : nullptr;
  if (block == nullptr) return at::empty_like(student, at::MemoryFormat::Contiguous);
  c10::DataPtr data(block->data, block, &keep, c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  at::Tensor gradient = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), student.dtype());
  gradient.unsafeGetTensorImpl()->set_sizes_contiguous(student.sizes());
  return gradient;
}

}  // namespace
}  // namespace fastkd
