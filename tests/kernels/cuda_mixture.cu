// Check the CUDA kernel of mixtures against the definition of a mixture in double on the host,
// without torch. The program prints one line per failed case and a summary; the exit status is the
// number of failed cases, at most 90, or 99 after a CUDA error. `cuda_mixture --short` runs a
// reduced set, for compute-sanitizer and for the emulation.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "../../csrc/mixture.h"
#include "device_support.h"

namespace {

struct Case {
  int64_t rows = 5, classes = 100;
  std::vector<DType> dtypes = {DType::kBFloat16, DType::kBFloat16};  // one for each teacher
  Ensemble ensemble = Ensemble::kProbs;
  bool probabilities = false, in_double = false, row_temperatures = false;
  double temperature = 2, teacher_temperature = 2;
  // pad, offset: padding of each row and offset of the first row, in elements, for teachers after
  // the first. group_rows: rows of a group, for every teacher; 0: all rows are one group.
  int64_t pad = 0, offset = 0, group_rows = 0;
  double spread = 3, base = 0;  // standard deviation of the logits; number added to all logits
  bool masked = false, nan = false, infinite = false, nothing = false;
  std::string name;
};

double share_of(const Case& c, size_t k) {
  const double count = static_cast<double>(c.dtypes.size());
  return 2 * static_cast<double>(k + 1) / (count * (count + 1));
}

// Return the mixture's log-probabilities of one row from each teacher's logits or probabilities;
// NaN for an invalid row.
std::vector<double> reference_row(const Case& c, const std::vector<std::vector<double>>& logits,
                                  double teacher_temperature) {
  const size_t n = static_cast<size_t>(c.classes);
  std::vector<double> mixed(n, c.ensemble == Ensemble::kLogits ? 0.0 : -kInfinity);
  for (size_t k = 0; k < logits.size(); k++) {
    std::vector<double> x(logits[k]);
    bool poisoned = false;
    for (double& v : x) {
      if (c.probabilities) v = std::log(v);
      poisoned |= std::isnan(v) || v == kInfinity;
      v /= teacher_temperature;
    }
    double all = *std::max_element(x.begin(), x.end());
    if (poisoned || all == -kInfinity) return std::vector<double>(n, NAN);
    if (c.ensemble == Ensemble::kLogits) {
      for (size_t i = 0; i < n; i++) mixed[i] += share_of(c, k) * x[i];
      continue;
    }
    all = log_sum(x);
    for (size_t i = 0; i < n; i++)
      mixed[i] = log_sum({mixed[i], std::log(share_of(c, k)) + x[i] - all});
  }
  const double all = log_sum(mixed);
  for (double& v : mixed) v = all > -kInfinity ? v - all : NAN;
  return mixed;
}

double number_of(const Case& c, Random& random, int64_t row, int64_t i, size_t k) {
  if (c.nan && row == 1 && i == c.classes / 2 && k == 0) return NAN;
  if (c.infinite && row == 2 && i == c.classes - 1) return kInfinity;
  const bool masked =
      (c.masked && (i % 3 == 0 || (k > 0 && i % 5 == 1))) || (c.nothing && row == 3 && k == 0);
  const double x = c.spread * random.normal() + c.base;
  if (c.probabilities) return masked ? 0.0 : std::exp(x) / static_cast<double>(c.classes);
  return masked ? -kInfinity : x;
}

int failures_of(const Case& c) {
  const DType acc = c.in_double ? DType::kFloat64 : DType::kFloat32;
  const size_t count = c.dtypes.size();
  std::vector<std::unique_ptr<Buffer>> memory;
  std::vector<MixedTeacher> teachers(count);
  std::vector<std::vector<std::vector<double>>> logits_of_rows(static_cast<size_t>(c.rows));
  Random random{static_cast<uint64_t>(c.classes * 1000003 + c.rows)};
  for (size_t k = 0; k < count; k++) {
    MixedTeacher& teacher = teachers[k];
    const int64_t pad = k > 0 ? c.pad : 0, offset = k > 0 ? c.offset : 0;
    const int64_t group = c.group_rows > 0 ? c.group_rows : c.rows;
    teacher.dtype = c.dtypes[k], teacher.group_rows = c.group_rows, teacher.share = share_of(c, k);
    teacher.stride.row = c.classes + pad;
    teacher.stride.group = group * teacher.stride.row + 5;
    const int64_t extent = (c.rows + group - 1) / group * teacher.stride.group + c.classes;
    memory.push_back(
        std::make_unique<Buffer>(extent * size_of(teacher.dtype), offset * size_of(teacher.dtype)));
    char* const host = memory.back()->host.data();
    for (int64_t row = 0; row < c.rows; row++) {
      std::vector<double> of_row;
      for (int64_t i = 0; i < c.classes; i++) {
        const int64_t at = row_offset(row, group, teacher.stride) + i;
        store(host, teacher.dtype, at, number_of(c, random, row, i, k));
        of_row.push_back(load(host, teacher.dtype, at));
      }
      logits_of_rows[static_cast<size_t>(row)].push_back(of_row);
    }
    memory.back()->up();
    teacher.logits = memory.back()->at();
  }
  Buffer mixed(c.rows * c.classes * size_of(acc)), temperatures(2 * c.rows * size_of(acc));
  const auto temperature = [&](int64_t row, double t) {
    return c.row_temperatures ? t + 0.25 * static_cast<double>(row) : t;
  };
  for (int64_t row = 0; row < c.rows; row++) {
    store(temperatures.host.data(), acc, row, temperature(row, c.temperature));
    store(temperatures.host.data(), acc, c.rows + row, temperature(row, c.teacher_temperature));
  }
  temperatures.up();
  check(cudaMemset(mixed.at(), 0xff, mixed.host.size()), "poison");
  MixtureArgs args;
  args.rows = c.rows, args.classes = c.classes, args.in_double = c.in_double;
  args.teachers = teachers.data(), args.count = static_cast<int64_t>(count);
  args.probabilities = c.probabilities, args.ensemble = c.ensemble;
  args.temperature = c.temperature, args.teacher_temperature = c.teacher_temperature;
  args.row_temperatures = c.row_temperatures ? temperatures.at() : nullptr;
  args.mixed = mixed.at();
  check(cuda::mixture(args, nullptr), c.name.c_str());
  check(cudaDeviceSynchronize(), c.name.c_str());
  mixed.down();
  const std::vector<char> first = mixed.host;
  check(cuda::mixture(args, nullptr), "again");
  mixed.down();
  if (std::memcmp(first.data(), mixed.host.data(), first.size()) != 0) {
    std::printf("FAIL %s: not the same again\n", c.name.c_str());
    return 1;
  }
  // The mixture is compared as log softmax at the student's temperature. The tolerance is the
  // rounding error of the logits, since the log softmax is a difference of logits.
  for (int64_t row = 0; row < c.rows; row++) {
    const double t = temperature(row, c.temperature);
    const std::vector<double> want = reference_row(c, logits_of_rows[static_cast<size_t>(row)],
                                                   temperature(row, c.teacher_temperature));
    std::vector<double> got;
    double size = 1;
    for (int64_t i = 0; i < c.classes; i++) {
      got.push_back(load(mixed.host.data(), acc, row * c.classes + i) / t);
      if (std::isfinite(got.back())) size = std::fmax(size, std::fabs(got.back()));
    }
    const auto any = [&](auto&& is) { return std::any_of(got.begin(), got.end(), is); };
    const bool poisoned = any([](double x) { return x != x; });
    if (std::isnan(want[0]) && (args.count == 1 || c.ensemble == Ensemble::kLogits)) {
      // The kernel checks neither one teacher nor a mean of logits for invalid rows; the loss does.
      if (poisoned || any([](double x) { return x == kInfinity; }) || log_sum(got) == -kInfinity)
        continue;
      std::printf("FAIL %s: row %lld hides what is no answer\n", c.name.c_str(),
                  static_cast<long long>(row));
      return 1;
    }
    const double all = poisoned ? 0 : log_sum(got);
    for (int64_t i = 0; i < c.classes; i++) {
      if (close(got[i] - all, want[i], size * (c.in_double ? 1e-14 : 1e-6), 0)) continue;
      std::printf("FAIL %s [V=%lld, %d teachers]: row %lld class %lld: got %.9g, want %.9g\n",
                  c.name.c_str(), static_cast<long long>(c.classes), static_cast<int>(count),
                  static_cast<long long>(row), static_cast<long long>(i), got[i] - all, want[i]);
      return 1;
    }
  }
  return 0;
}

void test(Case c, const char* name) {
  c.name = name;
  total_cases++, total_failures += failures_of(c) > 0;
}

constexpr DType kAll[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64};
constexpr Ensemble kEnsembles[] = {Ensemble::kProbs, Ensemble::kLogits};

void sizes(bool brief) {
  for (const int64_t classes : {1, 2, 7, 8, 9, 33, 255, 256, 257, 1000, 4096, 5003, 50257}) {
    if (brief && classes > 5003) continue;
    for (const DType dtype : kAll)
      for (const Ensemble ensemble : kEnsembles)
        for (const size_t count : {1, 2, 3}) {
          Case c;
          c.classes = classes, c.ensemble = ensemble, c.dtypes.assign(count, dtype);
          c.in_double = dtype == DType::kFloat64;
          test(c, "sizes");
        }
  }
}

void options() {
  for (const int64_t classes : {10, 1000})
    for (const Ensemble ensemble : kEnsembles) {
      Case c;
      c.classes = classes, c.ensemble = ensemble;
      c.dtypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
      test(c, "types");
      Case d = c;
      d.pad = 3, d.offset = 1, d.group_rows = 2, test(d, "rows apart");
      d = c, d.pad = 8 - classes % 8, d.offset = 8, test(d, "aligned rows apart");
      d = c, d.probabilities = true, test(d, "probabilities");
      d = c, d.probabilities = true, d.masked = true, test(d, "probabilities of zero");
      d = c, d.row_temperatures = true, test(d, "temperatures of rows");
      d = c, d.teacher_temperature = 0.7, test(d, "two temperatures");
      d = c, d.masked = true, test(d, "masked classes");
      d = c, d.nan = true, test(d, "nan");
      d = c, d.infinite = true, test(d, "infinite");
      d = c, d.nothing = true, test(d, "no class");
      d = c, d.in_double = true, test(d, "in double");
      d = c, d.base = 1e4, test(d, "far from zero");
      d = c, d.spread = 40, test(d, "confident");
      d = c, d.dtypes.assign(cuda::kMostTeachers, DType::kFloat32), test(d, "many teachers");
      d = c, d.dtypes = {DType::kFloat32}, d.probabilities = true, test(d, "one's probabilities");
    }
}

void refusals() {
  MixtureArgs args;
  args.rows = args.classes = 1, args.count = cuda::kMostTeachers + 1;
  total_cases += 2;
  if (cuda::mixture(args, nullptr) == 0) total_failures++, std::printf("FAIL too many teachers\n");
  args.rows = 0, args.count = 1;
  if (cuda::mixture(args, nullptr) != 0) total_failures++, std::printf("FAIL no rows\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 0;
  const bool brief = argc > 1 && std::strcmp(argv[1], "--short") == 0;
  sizes(brief), options(), refusals();
  return outcome();
}
