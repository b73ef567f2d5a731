// The threads of a grid on the CPU, for the headers beside this file: they wait for each other, and
// which of those that need not wait goes on is drawn at random. See README.md.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// Where in the kernels something happens, for reports. A default argument has its caller's place.
struct Place {
  const char* file = "";
  int line = 0;
};
#define EMULATION_PLACE ::emulation::Place place = {__builtin_FILE(), __builtin_LINE()}

// ---- what a launch is

struct Launch {
  Index grid, block;
  int cluster = 1;
  size_t dynamic_bytes = 0;
};
constexpr int kMostThreads = 1024;         // of a CTA
constexpr int kMostDynamicBytes = 232448;  // of shared memory, on an H100
// Runs `kernel` once for each thread, and returns when all have ended.
void run(const Launch& launch, const std::function<void()>& kernel);

// ---- what a thread may do. All of it ends the program with a report where it is wrong.

[[noreturn]] void fail(const char* format, ...);
int rank_in_cluster();
int ranks_in_cluster();
// Other threads may go on now.
void yield(const char* what, Place place);

// The warp's lanes of `mask` come together; `mine`, up to 8 bytes, can be read by all of them. The
// result is the array of 32, valid until the next meeting.
const uint64_t* meet_warp(const char* what, unsigned mask, uint64_t mine, Place place);
void meet_block(Place place);
void meet_some(int barrier, int threads, Place place);
void meet_cluster(Place place);

// Shared memory: 32-bit addresses, which name the CTA of a cluster too.
uint32_t shared_address_of(const void* p);
uint32_t address_in(uint32_t address, int rank);
void store_to_peer(uint32_t address, const void* from, size_t bytes, Place place);

// mbarriers. A wait is for the phase of this parity to be over.
void barrier_init(uint32_t barrier, int count, Place place);
void barrier_arrive(uint32_t barrier, Place place);
void barrier_expect(uint32_t barrier, uint32_t bytes, Place place);
void barrier_wait(uint32_t barrier, uint32_t parity, Place place);
// Happens some time later, or in the end when everybody waits. Till then `to` is undefined.
void copy_later(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Place place);

// ---- device memory, between guards of undefined bytes

void* allocate(size_t bytes);
void release(void* p);
void check_guards();
// Ends the program unless all of it lies in one allocation.
void check_device_memory(const void* p, size_t bytes, Place place);

}  // namespace emulation
