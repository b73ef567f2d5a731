// Replacement of csrc/cuda/ptx.cuh with the same functions, for the emulator.
#pragma once
#include "simt.h"

namespace fastkd::cuda {

// Flush subnormal results to 0. The last bit is that of libm, not of the hardware.
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? x * 0 : x; }
inline float exp2_of(float x) { return flushed(exp2f(x)); }
inline float reciprocal_of(float x) { return flushed(1 / x); }

inline uint32_t shared_address(const void* p) { return emulation::shared_address_of(p); }

// One kernel runs at a time: overlapping kernels are not emulated.
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

inline int cluster_rank() { return emulation::rank_in_cluster(); }
inline int cluster_size() { return emulation::ranks_in_cluster(); }
inline void cluster_barrier(EMULATION_PLACE) { emulation::meet_cluster(place); }

inline void store_in(int rank, double* slot, double x, EMULATION_PLACE) {
  const uint32_t address = emulation::address_in(shared_address(slot), rank);
  emulation::store_to_peer(address, &x, sizeof(x), place);
}

}  // namespace fastkd::cuda
