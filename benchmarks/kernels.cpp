// Time the CPU kernels alone, on one thread, without torch: `make kernel-bench`. A figure is the
// nanoseconds for each class of each row, in the fastest of many calls on the same rows. The rows
// are in the caches, except perhaps those of the last shape, whose logits and gradient take 25 MB
// in fp32.
//
//   cpu_speed [ISA]     avx512, avx2, ...; default: the best that this processor runs
//
// To compare two versions, build each and run both in turns: a shared machine's clock drifts.
#include "../csrc/kernels.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using namespace fastkd;
using Clock = std::chrono::steady_clock;

struct Shape {
  int64_t rows, classes;
};
struct Way {
  const char* name;
  Divergence divergence;
  bool gradient, half;
  double noise;  // standard deviation of student - teacher
};

constexpr Shape kShapes[] = {{64, 128}, {32, 200}, {8, 1000}, {4, 4096}, {2, 32000}, {16, 128256}};
constexpr Way kWays[] = {
    {"forward KL", Divergence::kForwardKL, true, false, 2.0},
    {"near its teacher", Divergence::kForwardKL, true, false, 0.1},
    {"loss alone", Divergence::kForwardKL, false, false, 2.0},
    {"bf16", Divergence::kForwardKL, true, true, 2.0},
    {"soft cross entropy", Divergence::kSoftCrossEntropy, true, false, 2.0},
    {"reverse KL", Divergence::kReverseKL, true, false, 2.0},
    {"JSD", Divergence::kJensenShannon, true, false, 2.0},
};
constexpr double kT = 4.0, kAlpha = 0.1, kSeconds = 0.15;

// Return the numbers truncated to bf16.
std::vector<uint16_t> halves(const std::vector<float>& values) {
  std::vector<uint16_t> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::copy_n(reinterpret_cast<const char*>(&values[i]), sizeof(bits),
                reinterpret_cast<char*>(&bits));
    result[i] = static_cast<uint16_t>(bits >> 16);
  }
  return result;
}

double nanoseconds(const Shape& shape, const Way& way) {
  const size_t size = static_cast<size_t>(shape.rows * shape.classes);
  const size_t rows = static_cast<size_t>(shape.rows);
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> teacher(size), student(size), gradient(size), loss(rows);
  std::vector<float> stats(static_cast<size_t>(kStats) * rows + 1);
  std::vector<int64_t> labels(rows);
  for (size_t i = 0; i < size; ++i) {
    teacher[i] = 2.5f * normal(random);
    student[i] = teacher[i] + static_cast<float>(way.noise) * normal(random);
  }
  for (int64_t& label : labels) label = static_cast<int64_t>(random()) % shape.classes;
  const std::vector<uint16_t> half_student = halves(student), half_teacher = halves(teacher);

  ForwardArgs args;
  args.rows = args.group_rows = shape.rows;
  args.classes = shape.classes;
  args.student_stride.row = args.teacher_stride.row = args.grad_stride.row = shape.classes;
  args.student = way.half ? static_cast<const void*>(half_student.data()) : student.data();
  args.teacher = way.half ? static_cast<const void*>(half_teacher.data()) : teacher.data();
  if (way.half) args.student_dtype = args.teacher_dtype = DType::kBFloat16;
  args.labels = labels.data();
  args.temperature = args.teacher_temperature = kT;
  args.hard_weight = kAlpha;
  args.soft_weight = 1 - kAlpha;
  args.divergence = way.divergence;
  args.loss = loss.data();
  args.stats = stats.data();
  args.grad = way.gradient ? gradient.data() : nullptr;

  double least = 1e9;
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                   std::chrono::duration<double>(kSeconds));
  for (Clock::time_point start = Clock::now(); start < end; start = Clock::now()) {
    cpu::kernels().forward(args, 0, shape.rows);
    least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return 1e9 * least / static_cast<double>(size);
}

}  // namespace

int main(int count, char** given) {
  if (count > 2 || (count == 2 && !cpu::select(given[1]))) {
    std::fprintf(stderr, "cpu_speed [ISA]; this processor runs:");
    for (const cpu::Kernels* const* each = cpu::available(); *each != nullptr; ++each) {
      std::fprintf(stderr, " %s", (*each)->name);
    }
    std::fprintf(stderr, "\n");
    return 2;
  }
  std::printf("%s, one thread, fp32, t = %g, nanoseconds a class\n", cpu::kernels().name, kT);
  std::printf("%-20s", "");
  for (const Shape& shape : kShapes) {
    std::printf("%6lld x %-7lld", static_cast<long long>(shape.rows),
                static_cast<long long>(shape.classes));
  }
  std::printf("\n");
  for (const Way& way : kWays) {
    std::printf("%-20s", way.name);
    for (const Shape& shape : kShapes) std::printf("%8.3f        ", nanoseconds(shape, way));
    std::printf("\n");
  }
  return 0;
}
