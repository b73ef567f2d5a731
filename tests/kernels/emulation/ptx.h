// Replacement of csrc/cuda/ptx.cuh with the same functions, for the emulator.
#pragma once
#include "simt.h"

namespace fastkd::cuda {

// Flush subnormal results to 0. The last bit of a result is libm's, not the hardware's.
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? x * 0 : x; }
inline float exp2_of(float x) { return flushed(exp2f(x)); }
inline float reciprocal_of(float x) { return flushed(1 / x); }

}  // namespace fastkd::cuda
