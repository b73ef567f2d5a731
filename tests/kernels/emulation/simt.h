// Threads of a grid on the CPU, for the headers in this folder. Threads wait for each other, and
// the next warp to run is drawn at random from the warps that can run. See README.md.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// A position in the kernels' sources, for reports. EMULATION_PLACE is a default
// argument with the position of the caller.
struct Place {
  const char* file = "";
  int line = 0;
};
#define EMULATION_PLACE ::emulation::Place place = {__builtin_FILE(), __builtin_LINE()}

// ---- launches

struct Launch {
  Index grid, block;
  int cluster = 1;
  size_t dynamic_bytes = 0;
};
constexpr int kMaxThreads = 1024;         // of a CTA
constexpr int kMaxDynamicBytes = 232448;  // of shared memory, on an H100
// Run `kernel` once for each thread, and return when all threads have ended.
void run(const Launch& launch, const std::function<void()>& kernel);

// ---- operations of a thread; an invalid operation ends the program with a report

[[noreturn]] void fail(const char* format, ...);
int rank_in_cluster();
int ranks_in_cluster();
// Let other threads run.
void yield(const char* what, Place place);

// Wait for the warp's lanes of `mask`, and return an array of the 32 lanes' `value`. The array is
// valid until the lane's next call.
const uint64_t* meet_warp(const char* what, unsigned mask, uint64_t value, Place place);
void meet_block(Place place);
void meet_some(int barrier, int threads, Place place);
void meet_cluster(Place place);

// Return a 32-bit address in shared memory, which includes the CTA's rank in its cluster.
uint32_t shared_address_of(const void* p);
uint32_t address_in(uint32_t address, int rank);
void store_to_peer(uint32_t address, const void* from, size_t bytes, Place place);

// mbarriers. A wait ends when the phase of the given parity is over.
void barrier_init(uint32_t barrier, int count, Place place);
void barrier_arrive(uint32_t barrier, Place place);
void barrier_expect(uint32_t barrier, uint32_t bytes, Place place);
void barrier_wait(uint32_t barrier, uint32_t parity, Place place);
// Copy later, at the latest when all threads wait. Until then `to` is undefined.
void copy_later(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Place place);

// ---- device memory, between guards of undefined bytes

void* allocate(size_t bytes);
void release(void* p);
void check_guards();
// End the program unless all `bytes` lie in one allocation.
void check_device_memory(const void* p, size_t bytes, Place place);

}  // namespace emulation
