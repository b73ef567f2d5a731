// The choice of a problem's kernel and launch shape. C++ without CUDA and torch, so that a test can
// ask for the plan of any problem on any device. The plan fixes the order of sums (docs/maths.md,
// section 9).
//
// Four families of kernels. For adjacent classes:
//   tiny       a few lanes a row, a few classes a lane; any dtypes
//   registers  a warp or a CTA a row, 16-byte vectors held in registers; equal 2- and 4-byte dtypes
//   streaming  a CTA a row, read twice (the second time from L2 where it fits); everything else
// For classes that are not adjacent:
//   strided    a thread a row, or up to eight, and a warp for rows that are adjacent; any dtypes
#pragma once
#include <cstdint>

#include "../dtypes.h"

namespace fastkd::cuda {

enum class Family : int32_t { kTiny, kRegisters, kStreaming, kStrided };

struct DeviceLimits {
  int processors = 132;     // SMs
  int largest_cluster = 1;  // CTAs; 1 where there are no clusters (before sm_90)
};

struct Plan {
  Family family = Family::kStreaming;
  int lanes = 0;               // threads that share one row
  int threads = 0;             // per CTA
  int rows_per_block = 1;      // rows that one CTA works on at a time
  int cluster = 1;             // CTAs of the whole grid (finish_inside)
  bool finish_inside = false;  // the whole grid is one cluster, which also writes the total
};

// Sizes on which planner and kernels must agree.
constexpr int kVectorBytes = 16;
constexpr int kTinyPerLane = 4;     // classes of one lane
constexpr int kTinyThreads = 512;   // most threads of a CTA: with 1024 the kernels would spill
constexpr int kRegisterBytes = 64;  // of one input, in the registers of a thread: 16 registers
constexpr int kStridedThreads = 256;
constexpr int kStridedParts = 8;  // most threads that share a row
constexpr int kStridedClasses =
    24;  // classes that one thread takes before several threads share a row
constexpr int kStridedFill =
    512;  // threads of a processor; below this number, more threads share a row
constexpr int kStridedFewest = 8;  // least classes of each thread that shares a row

// Every CTA counts at most this number of labels; a separate kernel counts more.
constexpr int64_t kCountInside = 2048;

bool hot_dtypes(DType student, DType teacher);
// Return the plan of a problem. `general`: true for objectives that the hot kernels do not compute
// (general.cuh), for which there are no registers kernels. `strided`: true if the classes of some
// tensor are not adjacent.
Plan make_plan(int64_t rows, int64_t classes, DType student, DType teacher,
               const DeviceLimits& device, bool general = false, bool strided = false);
const char* name_of(Family family);

}  // namespace fastkd::cuda
