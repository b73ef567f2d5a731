// The choice of a problem's kernel and launch shape. Plain C++: no CUDA, no torch, so that a test
// can ask for the plan of any problem on any device.
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

// Sizes that planner and kernels must agree on.
constexpr int kVectorBytes = 16;
constexpr int kTinyPerLane = 4;     // classes of a lane
constexpr int kTinyThreads = 512;   // of a CTA at most: with 1024 the kernels would spill
constexpr int kRegisterBytes = 64;  // of one input, held by a thread: 16 registers
constexpr int kStridedThreads = 256;
constexpr int kStridedParts = 8;     // threads that share a row, at most
constexpr int kStridedClasses = 24;  // of a row, that one thread takes before others share it
constexpr int kStridedFill = 512;    // threads of a processor, below which more share a row
constexpr int kStridedFewest = 8;    // classes that are left to each of them then

// Up to so many labels are counted by every CTA for itself; more are counted first, by a kernel of
// its own.
constexpr int64_t kCountInside = 2048;

bool hot_dtypes(DType student, DType teacher);
// `general`: for what the hot kernels leave out (general.cuh), which registers do not have.
// `strided`: the classes of some tensor are not adjacent.
Plan make_plan(int64_t rows, int64_t classes, DType student, DType teacher,
               const DeviceLimits& device, bool general = false, bool strided = false);
const char* name_of(Family family);

}  // namespace fastkd::cuda
