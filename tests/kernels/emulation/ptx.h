// The twin of csrc/cuda/ptx.cuh: the same functions, for the emulator.
#pragma once
#include "simt.h"

namespace fastkd::cuda {

// Subnormal results are flushed. The last bit is libm's, not the hardware's.
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? x * 0 : x; }
inline float exp2_of(float x) { return flushed(exp2f(x)); }
inline float reciprocal_of(float x) { return flushed(1 / x); }

inline void named_barrier(int id, int threads, EMULATION_PLACE) {
  emulation::meet_some(id, threads, place);
}
inline uint32_t shared_address(const void* p) { return emulation::shared_address_of(p); }

// One kernel runs at a time: what overlaps is not emulated.
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

inline int cluster_rank() { return emulation::rank_in_cluster(); }
inline int cluster_size() { return emulation::ranks_in_cluster(); }
inline void cluster_barrier(EMULATION_PLACE) { emulation::meet_cluster(place); }

inline void store_in(int rank, double* slot, double x, EMULATION_PLACE) {
  const uint32_t address = emulation::address_in(shared_address(slot), rank);
  emulation::store_to_peer(address, &x, sizeof(x), place);
}

inline void barrier_init(uint64_t* bar, int count, EMULATION_PLACE) {
  emulation::barrier_init(shared_address(bar), count, place);
}
inline void barriers_are_ready() {}
inline void barrier_wait(uint64_t* bar, uint32_t parity, EMULATION_PLACE) {
  emulation::barrier_wait(shared_address(bar), parity, place);
}
inline void barrier_wait_cluster(uint64_t* bar, uint32_t parity, EMULATION_PLACE) {
  emulation::barrier_wait(shared_address(bar), parity, place);
}
inline void barrier_arrive(uint64_t* bar, EMULATION_PLACE) {
  emulation::barrier_arrive(shared_address(bar), place);
}
inline void barrier_expect(uint64_t* bar, uint32_t bytes, EMULATION_PLACE) {
  emulation::barrier_expect(shared_address(bar), bytes, place);
}
inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* bar, EMULATION_PLACE) {
  emulation::copy_later(shared_address(to), from, bytes, shared_address(bar), place);
}
inline uint32_t peer_address(uint32_t address, int rank) {
  return emulation::address_in(address, rank);
}
inline void peer_store(uint32_t address, float4 v, EMULATION_PLACE) {
  emulation::store_to_peer(address, &v, sizeof(v), place);
}
inline void peer_arrive(uint32_t bar, EMULATION_PLACE) { emulation::barrier_arrive(bar, place); }

}  // namespace fastkd::cuda
