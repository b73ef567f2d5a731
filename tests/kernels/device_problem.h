// One row for the tests of the CUDA kernels' arithmetic (device_arithmetic.cpp), with its exact
// loss and gradient, and the checks of results.
#pragma once
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/forward_call.cuh"
#include "truth.h"

using namespace fastkd;
using namespace fastkd::cuda;

namespace {

using Real = long double;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

int failures = 0, checks = 0;
void check(bool ok, const std::string& what, double got, double want) {
  ++checks;
  if (!ok && ++failures <= 40) {
    std::printf("FAIL %s: got %.9g, want %.9g\n", what.c_str(), got, want);
  }
}
bool close(double got, double want, double absolute, double relative) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= absolute + relative * std::fabs(want);
}

// Return true if long double is more precise than double, which it is not under valgrind.
bool has_truth_for_double() {
  volatile Real one = 1, less = static_cast<Real>(std::numeric_limits<double>::epsilon()) / 4;
  return one + less != one;
}

struct Problem {
  std::string name;
  std::vector<double> z, w;  // numbers that fp32 holds exactly
  double t = 2;
  int64_t label = 0;
  double smoothing = 0;
  double distance = 0;  // approximate difference of the two maxima
};

struct Answer {
  double loss = 0, hard = 0, soft = 0;
  std::vector<double> grad;
};

constexpr double kHardWeight = 0.3, kSoftWeight = 0.7;

Answer exact_answer(const Problem& in) {
  const size_t n = in.z.size();
  const Real t = in.t;
  Real mz = -kInfinity, mw = -kInfinity, sum = 0, hard_sum = 0, teacher_sum = 0, mean = 0;
  for (size_t i = 0; i < n; ++i) {
    mz = std::fmax(mz, Real(in.z[i])), mw = std::fmax(mw, Real(in.w[i]));
  }
  for (size_t i = 0; i < n; ++i) {
    sum += std::exp((in.z[i] - mz) / t), hard_sum += std::exp(in.z[i] - mz);
    teacher_sum += std::exp((in.w[i] - mw) / t);
    mean += (in.z[i] - mz) / static_cast<Real>(n);
  }
  Answer answer;
  Real soft = 0;
  for (size_t i = 0; i < n; ++i) {
    const Real log_q = (in.z[i] - mz) / t - std::log(sum);
    const Real log_p = (in.w[i] - mw) / t - std::log(teacher_sum);
    const Real p = std::exp(log_p), q = std::exp(log_q), d = log_p - log_q;
    soft += p == 0 ? q : p * (d + std::expm1(-d));
    if (in.z[i] == -kInfinity && in.w[i] > -kInfinity) soft = kInfinity;
    const Real target = in.smoothing / static_cast<Real>(n) +
                        (static_cast<int64_t>(i) == in.label ? 1 - in.smoothing : 0);
    answer.grad.push_back(static_cast<double>(
        kHardWeight * (std::exp(in.z[i] - mz) / hard_sum - target) + kSoftWeight * t * (q - p)));
  }
  const Real rest = std::log(hard_sum);
  Real hard = (1 - in.smoothing) * (rest - (in.z[in.label] - mz));
  if (in.smoothing > 0) hard += in.smoothing * (rest - mean);
  answer.hard = static_cast<double>(hard), answer.soft = static_cast<double>(soft);
  answer.loss = static_cast<double>(kHardWeight * hard + kSoftWeight * t * t * soft);
  return answer;
}

}  // namespace
