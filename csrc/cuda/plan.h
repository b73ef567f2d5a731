// Which kernel runs a problem, and with what shape. Plain C++: no CUDA, no torch, so that a test
// can ask for the plan of any problem on any device.
//
// Five families. Where classes are adjacent, by where a row lives between the two sweeps over it:
//   tiny       a few lanes a row, a few classes a lane; any dtypes
//   registers  a warp or a CTA a row, 16-byte vectors held in registers; equal 2- and 4-byte dtypes
//   ring       a cluster of 1 to 16 CTAs a row, the row's slices in shared memory; the same, sm_90+
//   streaming  a CTA a row, read twice (the second time from L2 where it fits); everything else
// And where they are not:
//   strided    a thread a row, or up to eight, and a warp for rows that are adjacent; any dtypes
#pragma once
#include <cstdint>

#include "../dtypes.h"

namespace fastkd::cuda {

enum class Family : int32_t { kTiny, kRegisters, kRing, kStreaming, kStrided };

struct DeviceLimits {
  int processors = 132;          // SMs
  int shared_per_block = 49152;  // bytes, with the opt-in
  int largest_cluster = 1;       // CTAs; 1 where there are no clusters (before sm_90)
  bool ring = false;             // whether the ring may be planned (kRingPlanned)
};

struct Plan {
  Family family = Family::kStreaming;
  int lanes = 0;               // threads that share one row (of one CTA, for the ring)
  int threads = 0;             // per CTA
  int rows_per_block = 1;      // rows that one CTA works on at a time
  int cluster = 1;             // CTAs per row (ring), or of the whole grid (finish_inside)
  int stages = 0;              // ring: stages of shared memory
  int shared_bytes = 0;        // ring: dynamic shared memory per CTA
  bool finish_inside = false;  // the whole grid is one cluster, which also writes the total
};

// Sizes that planner and kernels must agree on.
constexpr int kVectorBytes = 16;
constexpr int kTinyPerLane = 4;     // classes held by a lane
constexpr int kTinyThreads = 512;   // of a CTA at most: with 1024 the kernels would spill
constexpr int kRegisterBytes = 64;  // of one input, held by a thread: 16 registers
constexpr int kRingGroups = 4;      // groups of warps that take turns with the rows
constexpr int kRingWarps = 4;       // per group
constexpr int kRingVectors = 2;     // per thread and stage
constexpr int kRingMaxStages = 32;
template <int kGroups>
constexpr int kRingClosers = (kGroups + 1) / 2;  // warps that close the rows of two groups each
template <int kGroups, int kWarps>               // consumers, closers, the producer and the filler
constexpr int kRingThreadsOf = (kGroups * kWarps + kRingClosers<kGroups> + 2) * 32;
constexpr int kRingThreads = kRingThreadsOf<kRingGroups, kRingWarps>;
// One input's share of a stage: the vectors, and one more for inputs that are shifted against the
// gradient.
constexpr int ring_stage_vectors(int warps, int vectors) { return warps * 32 * vectors; }
constexpr int ring_stage_bytes(int warps, int vectors) {
  return 2 * (ring_stage_vectors(warps, vectors) + 1) * kVectorBytes;
}
constexpr int kRingStaticBytes = 12288;  // at most, for barriers and exchanges
constexpr int kStridedThreads = 256;
constexpr int kStridedParts = 8;     // threads that share a row, at most
constexpr int kStridedClasses = 24;  // of a row, that one thread takes before others share it
constexpr int kStridedFill = 512;    // threads of a processor, below which more share a row
constexpr int kStridedFewest = 8;    // classes that are left to each of them then

// Rows of which the largest number of labels is counted by every CTA for itself; beyond, a kernel
// of its own counts them first.
constexpr int64_t kCountInside = 32768;

// The ring has passed an emulation of its protocol on the CPU, but has not yet run on a GPU in this
// form, where a mistake in it could hang: until it has (benchmarks/results/PENDING.md), the planner
// leaves it out, and registers and streaming take its problems.
constexpr bool kRingPlanned = false;

bool hot_dtypes(DType student, DType teacher);
// `general`: for what the hot kernels leave out (general.cuh), which registers do not have.
// `strided`: the classes of some tensor are not adjacent.
Plan make_plan(int64_t rows, int64_t classes, DType student, DType teacher,
               const DeviceLimits& device, bool general = false, bool strided = false);
const char* name_of(Family family);

}  // namespace fastkd::cuda
