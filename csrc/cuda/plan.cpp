#include "plan.h"

#include <algorithm>

namespace fastkd::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The CTAs of a grid that is small enough to be one portable cluster can add up the total
// themselves, which saves a launch.
void finish_inside_if_small(Plan& plan, int64_t rows, const DeviceLimits& device) {
  const int64_t blocks = ceil_div(rows, plan.rows_per_block);
  if (blocks > std::min(device.largest_cluster, 8) && blocks > 1) return;
  plan.finish_inside = true;
  plan.cluster = static_cast<int>(std::max<int64_t>(blocks, 1));
}

Plan tiny(int64_t rows, int64_t classes, const DeviceLimits& device) {
  Plan plan;
  plan.family = Family::kTiny;
  plan.lanes = classes <= 8 * kTinyPerLane ? 8 : 32;
  // Few rows: larger CTAs, so that eight of them hold all rows.
  const int64_t threads = rows * plan.lanes;
  plan.threads = threads > 8 * 256 && threads <= 8 * kTinyThreads ? kTinyThreads : 256;
  plan.rows_per_block = plan.threads / plan.lanes;
  finish_inside_if_small(plan, rows, device);
  return plan;
}

Plan registers(int64_t rows, int64_t classes, int element, const DeviceLimits& device) {
  Plan plan;
  plan.family = Family::kRegisters;
  const int64_t per_thread = kRegisterBytes / element;
  if (classes <= 32 * per_thread) {
    plan.lanes = 32;
    // Sixteen warps where that makes the grid one cluster.
    plan.threads = rows > 64 && rows <= 128 ? 512 : 256;
    plan.rows_per_block = plan.threads / 32;
  } else {
    plan.threads = static_cast<int>(ceil_div(ceil_div(classes, per_thread), 32) * 32);
    plan.lanes = plan.threads;
  }
  finish_inside_if_small(plan, rows, device);
  return plan;
}

// How many CTAs share a row, measured on an H100 (docs/performance-log.md): two and a half
// rows in the ring keep its groups busy and the copies of the next rows in flight; few rows are
// spread wider.
Plan ring(int64_t rows, int64_t classes, int element, const DeviceLimits& device) {
  Plan plan;
  const int stage = ring_stage_bytes(kRingWarps, kRingVectors);
  const int stages = std::min(kRingMaxStages, (device.shared_per_block - kRingStaticBytes) / stage);
  const int64_t row_bytes = 2 * classes * element;
  const int64_t vectors = classes * element / kVectorBytes;
  const auto stages_of = [&](int cluster) {
    return ceil_div(ceil_div(vectors, cluster), ring_stage_vectors(kRingWarps, kRingVectors));
  };
  int cluster = 1;
  while (cluster < device.largest_cluster && 5 * stages_of(cluster) > 2 * stages) cluster *= 2;
  while (cluster < device.largest_cluster && rows * cluster * 2 <= device.processors &&
         row_bytes / cluster > 16384)
    cluster *= 2;
  if (stages < 2 || stages_of(cluster) > stages) return plan;  // fits nowhere: streaming
  plan.family = Family::kRing;
  plan.cluster = cluster;
  plan.stages = stages;
  plan.threads = kRingThreads;
  plan.lanes = kRingWarps * 32;
  plan.shared_bytes = stages * stage;
  return plan;
}

// The threads that a processor holds read 6 KB of fp32 logits for each class that one of them
// takes: kStridedClasses are what L1 keeps until the second sweep.
Plan strided(int64_t rows, int64_t classes, const DeviceLimits& device) {
  Plan plan;
  plan.family = Family::kStrided;
  plan.threads = kStridedThreads;
  plan.lanes = 1;
  const auto shares = [&](int lanes) {
    if (classes > lanes * kStridedClasses) return true;
    return rows * lanes < static_cast<int64_t>(device.processors) * kStridedFill &&
           classes > lanes * kStridedFewest;
  };
  while (plan.lanes < kStridedParts && shares(plan.lanes)) plan.lanes *= 2;
  plan.rows_per_block = plan.threads / plan.lanes;
  finish_inside_if_small(plan, rows, device);
  return plan;
}

}  // namespace

bool hot_dtypes(DType student, DType teacher) {
  return student == teacher && student != DType::kFloat64;
}

Plan make_plan(int64_t rows, int64_t classes, DType student, DType teacher,
               const DeviceLimits& device, bool general, bool is_strided) {
  if (is_strided) return strided(rows, classes, device);
  if (classes <= 32 * kTinyPerLane && !computes_in_double(student, teacher))
    return tiny(rows, classes, device);
  Plan plan;
  if (hot_dtypes(student, teacher)) {
    const int element = static_cast<int>(size_of(student));
    const int64_t widest = 256 * (kRegisterBytes / element);
    const bool clusters = device.ring && device.largest_cluster > 1;
    // A ring beats registers as soon as a row is long enough to amortise its barriers.
    if (!general && classes <= (clusters ? widest / 2 : widest))
      return registers(rows, classes, element, device);
    if (clusters && classes > widest / 2) plan = ring(rows, classes, element, device);
  }
  if (plan.family == Family::kRing) return plan;
  plan.family = Family::kStreaming;
  plan.threads = classes >= 8192 ? 512 : classes >= 1024 ? 256 : 64;
  plan.lanes = plan.threads;
  finish_inside_if_small(plan, rows, device);
  return plan;
}

const char* name_of(Family family) {
  switch (family) {
    case Family::kTiny:
      return "tiny";
    case Family::kRegisters:
      return "registers";
    case Family::kRing:
      return "ring";
    case Family::kStrided:
      return "strided";
    case Family::kStreaming:
    default:
      return "streaming";
  }
}

}  // namespace fastkd::cuda
