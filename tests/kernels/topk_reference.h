// The sparse loss of one row by its definition, in double on the host (docs/maths.md, section 13).
#pragma once
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/topk.h"
#include "device_support.h"

namespace {

enum class Mistake { kNone, kTwice, kOutOfRange, kTooMuch, kNaN };

struct Case {
  int64_t rows = 5, classes = 100, k = 10;
  DType student = DType::kBFloat16;
  bool wide_lists = false;  // log-probabilities in fp64
  Tail tail = Tail::kGhost;
  Divergence divergence = Divergence::kForwardKL;
  double mix = 0.3;
  Estimator estimator = Estimator::kNone;
  bool row_settings = false;  // temperatures and weights for each row
  double temperature = 2, hard_weight = 0.3, soft_weight = 0.7, smoothing = 0;
  int student_offset = 0, grad_offset = 0;  // elements off a 256-byte boundary
  int64_t student_pad = 0, grad_pad = 0;    // padding of a row, in elements
  int64_t group_rows = 0;
  bool labels = true, ignored = true, bad_label = false;
  bool gradient = true;
  Reduction reduction = Reduction::kMean;
  double noise = 1;      // standard deviation of student - teacher
  double base = 0;       // added to all logits of the student
  double gap = 0;        // added to the student's listed classes
  double mass = 0;       // sum of the listed probabilities; 0 leaves the sum unchanged
  double padding = 0.2;  // share of the list's entries that are padding, 0 to 1
  bool masked_rest = false, masked_list = false, impossible = false, nan = false;
  Mistake mistake = Mistake::kNone;  // made in every second row
  std::string name;
};

struct Row {
  std::vector<double> z, log_p;
  std::vector<int64_t> ids;
  int64_t label = -1;
  bool ignored = false;
};
struct Reference {
  double loss = 0, terms[kTopkTerms] = {};
  std::vector<double> grad;
};

double x_log_ratio(double x, double log_a, double log_b) {
  return x == 0 ? 0 : x * (log_a - log_b);
}

struct Term {
  // slope: q times the derivative with respect to q. kK1 has the slope of the policy gradient.
  double value, slope;
};
// Return value and slope of a divergence or an estimator at one class, by the papers' formulas.
Term term_of(const Case& c, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q), d = log_p - log_q;
  if (c.estimator == Estimator::kK1) return {-d, -d};
  if (c.estimator == Estimator::kK2) return {d * d / 2, -d};
  if (c.estimator == Estimator::kK3) return {std::expm1(d) - d, -std::expm1(d)};
  const double a = c.mix, b = 1 - c.mix;
  const Term forward = {x_log_ratio(p, log_p, log_q), -p};
  const double q_ratio = x_log_ratio(q, log_q, log_p);
  switch (c.divergence) {
    case Divergence::kSoftCrossEntropy:
      return {x_log_ratio(p, 0, log_q), -p};
    case Divergence::kReverseKL:
      return {q_ratio, q_ratio + q};
    case Divergence::kSymmetricKL:
      return {a * forward.value + b * q_ratio, -a * p + b * (q_ratio + q)};
    case Divergence::kJensenShannon: {
      const double log_m = std::log(a * p + b * q);
      const double of_q = b * x_log_ratio(q, log_q, log_m);
      return {a * x_log_ratio(p, log_p, log_m) + of_q, of_q};
    }
    case Divergence::kSkewedForwardKL: {
      const double m = a * p + b * q;
      return {x_log_ratio(p, log_p, std::log(m)), m == 0 ? 0 : -b * p * q / m};
    }
    case Divergence::kSkewedReverseKL: {
      const double m = a * q + b * p, value = x_log_ratio(q, log_q, std::log(m));
      return {value, m == 0 ? 0 : value + q - a * q * q / m};
    }
    case Divergence::kTotalVariation:
      return {std::fabs(p - q) / 2, p == q ? 0 : q > p ? q / 2 : -q / 2};
    default:
      return forward;
  }
}

bool is_list(const Case& c, const Row& row) {
  std::vector<char> seen(static_cast<size_t>(c.classes));
  double mass = 0;
  for (size_t i = 0; i < row.ids.size(); i++) {
    if (row.ids[i] < 0) continue;
    if (row.ids[i] >= c.classes || seen[static_cast<size_t>(row.ids[i])]++) return false;
    mass += std::exp(row.log_p[i]);
  }
  return mass <= 1.1;
}

// Compute loss, terms and gradient of a row by docs/maths.md, section 13.
Reference reference_row(const Case& c, Row row) {
  Reference r;
  r.grad.assign(row.z.size(), 0.0);
  if (row.ignored) return r;
  for (size_t i = 0; i < row.ids.size(); i++)
    if (row.log_p[i] == -kInfinity) row.ids[i] = -1;  // padding
  bool poisoned = !is_list(c, row) || (c.labels && (row.label < 0 || row.label >= c.classes));
  for (const double z : row.z) poisoned |= std::isnan(z) || z == kInfinity;
  // Subtract the maximum: the loss depends only on differences of logits, and large logits divided
  // by t would lose digits.
  const double top = *std::max_element(row.z.begin(), row.z.end());
  for (double& z : row.z) z -= top > -kInfinity ? top : 0;
  const double t = c.temperature;
  std::vector<double> tempered(row.z), rest(row.z), listed;
  for (double& z : tempered) z /= t;
  for (double& z : rest) z /= t;
  double P = 0;
  for (size_t i = 0; i < row.ids.size() && !poisoned; i++) {
    if (row.ids[i] < 0) continue;
    listed.push_back(tempered[row.ids[i]]);
    rest[row.ids[i]] = -kInfinity;
    P += std::exp(row.log_p[i]);
  }
  const double all = log_sum(tempered);
  if (poisoned || all == -kInfinity) {
    r.loss = NAN;
    for (double& term : r.terms) term = NAN;
    for (double& g : r.grad) g = NAN;
    return r;
  }
  const bool estimates = c.estimator != Estimator::kNone;
  const bool renormalize = !estimates && c.tail == Tail::kRenormalize;
  const bool ghost = !estimates && c.tail == Tail::kGhost;
  const double log_q_rest = log_sum(rest) - all;
  const bool has_ghost = ghost && log_q_rest > -kInfinity;
  const bool has_floor =
      c.divergence == Divergence::kReverseKL || c.divergence == Divergence::kSymmetricKL;
  const bool wide = c.student == DType::kFloat64 || c.wide_lists;
  const double least = has_floor ? (wide ? 0x1p-53 : 0x1p-24) : 0;
  const double p_rest = has_ghost ? std::fmax(least, 1 - P) : 0;
  const double student_of = renormalize && !listed.empty() ? log_sum(listed) : all;
  const bool adds_up = estimates || c.tail == Tail::kIgnore || p_rest == 1 - P;
  const double teacher_of = adds_up ? 0 : std::log(P / (1 - p_rest));
  const bool soft = estimates ? !listed.empty() : adds_up || P > 0;
  Term sums = {0, 0};
  double entropy = x_log_ratio(p_rest, 0, std::log(p_rest)), most = -kInfinity;
  std::vector<double> slopes(row.z.size());
  for (size_t i = 0; i < row.ids.size(); i++)
    if (row.ids[i] >= 0) most = std::fmax(most, row.log_p[i]);
  for (size_t i = 0; i < row.ids.size(); i++) {
    if (row.ids[i] < 0) continue;
    const double log_p = row.log_p[i] - teacher_of;
    entropy -= std::exp(log_p) * log_p;
    if (row.log_p[i] == most && row.z[row.ids[i]] == 0) r.terms[kAgreement] = 1;
  }
  r.terms[kTeacherEntropy] = estimates ? NAN : entropy;
  if (estimates) r.terms[kAgreement] = NAN;
  for (const double z : tempered)
    r.terms[kStudentEntropy] -= x_log_ratio(std::exp(z - all), z - all, 0);
  if (!listed.empty()) r.terms[kStudentMass] = std::exp(log_sum(listed) - all);
  r.terms[kTeacherMass] = P;
  for (size_t i = 0; i < row.ids.size() && soft; i++) {
    const int64_t id = row.ids[i];
    if (id < 0) continue;
    const Term term = term_of(c, row.log_p[i] - teacher_of, tempered[id] - student_of);
    sums.value += term.value, sums.slope += slopes[id] = term.slope;
  }
  const Term of_rest = has_ghost ? term_of(c, std::log(p_rest), log_q_rest) : Term{0, 0};
  sums.value += of_rest.value, sums.slope += of_rest.slope;
  double value = soft ? sums.value : 0;
  for (int64_t j = 0; j < c.classes && soft; j++) {
    const bool is_listed = rest[j] == -kInfinity && tempered[j] > -kInfinity;
    const double q = std::exp(tempered[j] - (is_listed ? student_of : all));
    // With Tail::kGhost, the unlisted classes share one slope, in proportion to q.
    const double share = has_ghost ? std::exp(tempered[j] - all - log_q_rest) : 0;
    const bool in_rest = !is_listed && slopes[j] == 0;
    const double slope = in_rest ? share * of_rest.slope : slopes[j];
    r.grad[j] = c.soft_weight * t * (slope - (in_rest && renormalize ? 0 : q * sums.slope));
  }
  r.terms[kSoft] = value;
  r.loss = c.soft_weight == 0 ? 0 : c.soft_weight * t * t * value;
  if (!c.labels) return r;
  const double lse = log_sum(row.z);
  double mean = 0;
  for (const double z : row.z) mean += (z - lse) / static_cast<double>(c.classes);
  r.terms[kHard] = (c.smoothing == 1 ? 0 : (1 - c.smoothing) * (lse - row.z[row.label])) -
                   (c.smoothing == 0 ? 0 : c.smoothing * mean);
  if (c.hard_weight == 0) return r;
  r.loss += c.hard_weight * r.terms[kHard];
  for (int64_t j = 0; j < c.classes; j++)
    r.grad[j] +=
        c.hard_weight * (std::exp(row.z[j] - lse) - c.smoothing / static_cast<double>(c.classes) -
                         (j == row.label ? 1 - c.smoothing : 0));
  return r;
}

}  // namespace
