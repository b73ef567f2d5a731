// Plan the kernel and launch shape of a problem (plan.h). The plan fixes the order of sums, and so
// the bits of the result (docs/maths.md, section 9).
#include "plan.h"

#include <algorithm>

namespace fastkd::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan tiny(int64_t rows, int64_t classes) {
  Plan plan;
  plan.family = Family::kTiny;
  plan.lanes = classes <= 8 * kTinyPerLane ? 8 : 32;
  // Few rows: larger CTAs, so that eight of them hold all rows.
  const int64_t threads = rows * plan.lanes;
  plan.threads = threads > 8 * 256 && threads <= 8 * kTinyThreads ? kTinyThreads : 256;
  return plan;
}

Plan registers(int64_t rows, int64_t classes, int element) {
  Plan plan;
  plan.family = Family::kRegisters;
  const int64_t per_thread = kRegisterBytes / element;
  if (classes <= 32 * per_thread) {
    plan.lanes = 32;
    // Sixteen warps where that makes the grid one cluster.
    plan.threads = rows > 64 && rows <= 128 ? 512 : 256;
  } else {
    plan.threads = static_cast<int>(ceil_div(ceil_div(classes, per_thread), 32) * 32);
    plan.lanes = plan.threads;
  }
  return plan;
}

Plan streaming(int64_t classes) {
  Plan plan;
  plan.threads = classes >= 8192 ? 512 : classes >= 1024 ? 256 : 64;
  plan.lanes = plan.threads;
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
  return plan;
}

Plan plan_family(int64_t rows, int64_t classes, DType student, DType teacher,
                 const DeviceLimits& device, bool general, bool is_strided) {
  if (is_strided) return strided(rows, classes, device);
  if (classes <= 32 * kTinyPerLane && !computes_in_double(student, teacher))
    return tiny(rows, classes);
  const int element = static_cast<int>(size_of(student));
  if (hot_dtypes(student, teacher) && !general && classes * element <= 256 * kRegisterBytes)
    return registers(rows, classes, element);
  return streaming(classes);
}

}  // namespace

bool hot_dtypes(DType student, DType teacher) {
  return student == teacher && student != DType::kFloat64;
}

Plan make_plan(int64_t rows, int64_t classes, DType student, DType teacher,
               const DeviceLimits& device, bool general, bool is_strided) {
  Plan plan = plan_family(rows, classes, student, teacher, device, general, is_strided);
  plan.rows_per_block = plan.threads / plan.lanes;
  // The CTAs of a grid that is small enough to be one portable cluster can add up the total
  // themselves, which saves a launch.
  const int64_t blocks = std::max<int64_t>(ceil_div(rows, plan.rows_per_block), 1);
  plan.finish_inside = blocks <= std::max(std::min(device.largest_cluster, 8), 1);
  if (plan.finish_inside) plan.cluster = static_cast<int>(blocks);
  return plan;
}

const char* name_of(Family family) {
  constexpr const char* kNames[] = {"tiny", "registers", "streaming", "strided"};
  return kNames[static_cast<int>(family)];
}

}  // namespace fastkd::cuda
