// Shared memory with its barriers, and copies to shared memory. See README.md.
#include <link.h>

#include <algorithm>
#include <cstring>

#include "grid.h"

namespace fastkd::cuda {
// The kernels' `extern __shared__`.
alignas(128) thread_local unsigned char dynamic[emulation::kMaxDynamicBytes];
}  // namespace fastkd::cuda

namespace emulation {
namespace {

struct Copy {
  Cta* cta;
  uint32_t to;
  const void* from;
  uint32_t bytes;
  Barrier* barrier;
};

std::vector<Copy> copies;

// The memory of all `__shared__` variables, which are the thread-local variables of the program.
struct Block {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};
Block find_shared() {
  Block block;
  fastkd::cuda::dynamic[0] = kUndefined;  // accesses the variable, so that it is allocated
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; i++)
          if (info->dlpi_phdr[i].p_type == PT_TLS)
            *static_cast<Block*>(result) = {static_cast<unsigned char*>(info->dlpi_tls_data),
                                            info->dlpi_phdr[i].p_memsz};
        return 1;  // stop: the program is the first object
      },
      &block);
  return block;
}
const Block& shared() {
  static const Block block = find_shared();
  return block;
}
// Call fn(begin, end) for the parts of the block in use: all but the unused end of the dynamic
// memory.
template <class Fn>
void each_part(Fn&& fn) {
  const size_t dynamic = static_cast<size_t>(fastkd::cuda::dynamic - shared().begin);
  fn(size_t(0), dynamic + launched->dynamic_bytes);
  fn(dynamic + kMaxDynamicBytes, shared().bytes);
}
// An address is the offset in the block, plus (1 + the rank of the CTA) << kRankShift.
constexpr int kRankShift = 24;
Cta& cta_of(uint32_t address) {
  const size_t rank = address >> kRankShift;
  if (rank < 1 || rank > cluster.size()) fail("address %x is in no CTA's shared memory", address);
  return cluster[rank - 1];
}
unsigned char* bytes_at(uint32_t address, size_t bytes) {
  Cta& cta = cta_of(address);
  const size_t offset = address & ((1u << kRankShift) - 1);
  bool inside = false;
  each_part([&](size_t begin, size_t end) { inside |= offset >= begin && offset + bytes <= end; });
  if (!inside) fail("%zu bytes at address %x are outside of shared memory", bytes, address);
  return (in_place == &cta ? shared().begin : cta.shared.data()) + offset;
}
Barrier& barrier_at(uint32_t address) {
  Cta& cta = cta_of(address);
  const auto entry = cta.barriers.find(address);
  if (entry == cta.barriers.end()) fail("no barrier was made at address %x", address);
  return entry->second;
}
void settle(Barrier& barrier) {
  if (barrier.missing < 0) fail("a barrier of %d had more arrivals", barrier.count);
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.count;
  barrier.phase++;
  events++;
}
}  // namespace

size_t shared_bytes() { return shared().bytes; }
void put_in_place(Cta& cta) {
  if (in_place == &cta) return;
  each_part([&](size_t begin, size_t end) {
    if (in_place != nullptr)
      std::memcpy(&in_place->shared[begin], shared().begin + begin, end - begin);
    std::memcpy(shared().begin + begin, &cta.shared[begin], end - begin);
  });
  in_place = &cta;
}
bool copies_are_left() { return !copies.empty(); }
void complete_a_copy() {
  const size_t which = draw(copies.size());
  const Copy copy = copies[which];
  copies[which] = copies.back();
  copies.pop_back();
  std::memcpy(bytes_at(copy.to, copy.bytes), copy.from, copy.bytes);
  copy.barrier->bytes -= copy.bytes;
  if (copy.barrier->bytes < 0) fail("more bytes arrived at a barrier than it expects");
  settle(*copy.barrier);
  events++;
}

uint32_t shared_address_of(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  if (byte < shared().begin || byte >= shared().begin + shared().bytes)
    fail("%p is not in shared memory", p);
  return static_cast<uint32_t>(byte - shared().begin) |
         static_cast<uint32_t>(running->cta->rank + 1) << kRankShift;
}
uint32_t address_in(uint32_t address, int rank) {
  return (address & ((1u << kRankShift) - 1)) | static_cast<uint32_t>(rank + 1) << kRankShift;
}
void store_to_peer(uint32_t address, const void* from, size_t bytes, Place place) {
  yield("no wait", place);
  if (cta_of(address).alive == 0) fail("a store into a CTA that has ended");
  std::memcpy(bytes_at(address, bytes), from, bytes);
}

void barrier_init(uint32_t barrier, int count, Place) {
  bytes_at(barrier, sizeof(uint64_t));
  cta_of(barrier).barriers[barrier] = {count, count, 0, 0};
}
void barrier_arrive(uint32_t barrier, Place place) {
  if (draw(4) == 0) yield("no wait", place);
  if (cta_of(barrier).alive == 0) fail("an arrival in a CTA that has ended");
  Barrier& at = barrier_at(barrier);
  at.missing--;
  settle(at);
  if (draw(4) == 0) yield("no wait", place);
}
void barrier_expect(uint32_t barrier, uint32_t bytes, Place place) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier, place);
}
void barrier_wait(uint32_t barrier, uint32_t parity, Place place) {
  const Barrier& at = barrier_at(barrier);
  if ((at.phase & 1) == parity) wait_for({"barrier_wait", place, &at.phase, parity, 1});
}
void copy_later(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Place place) {
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(bytes_at(to, bytes)) % 16 != 0)
    fail("a bulk copy of %u bytes, from %p: not in units of 16", bytes, from);
  check_device_memory(from, bytes, place);
  std::memset(bytes_at(to, bytes), kUndefined, bytes);
  copies.push_back({&cta_of(to), to, from, bytes, &barrier_at(barrier)});
  if (draw(4) == 0) yield("no wait", place);
}

}  // namespace emulation
