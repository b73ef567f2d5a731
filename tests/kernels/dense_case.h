// One case for the tests of the CUDA kernels: a call, and the comparison of its results with a
// reference on the host, in double or (truth.h) in long double. Results are loss and terms with
// their totals, scale, and the gradients of forward and of all forms of backward.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "device_support.h"
#include "truth.h"

using namespace fastkd;

namespace {

struct Case {
  int64_t rows = 3, classes = 100;
  DType student = DType::kBFloat16, teacher = DType::kBFloat16;
  double temperature = 2, hard_weight = 0.3, soft_weight = 0.7, smoothing = 0;
  int student_offset = 0, teacher_offset = 0, grad_offset = 0;  // elements off a 256-byte boundary
  int64_t student_pad = 0, teacher_pad = 0, grad_pad = 0;       // padding of a row, in elements
  int64_t group_rows = 0;
  bool student_pixels = false, teacher_pixels = false;  // rows adjacent instead of classes
  bool labels = true, ignored = true, bad_label = false, row_settings = false;
  bool terms = false, in_place = false, no_grad = false, infinities = false, nan = false;
  Reduction reduction = Reduction::kMean;
  double noise = 1;                           // standard deviation of student - teacher
  double student_base = 0, teacher_base = 0;  // added to all logits
  bool underflows =
      false;  // a class that the student masks and whose teacher probability underflows
  double above = 0, teacher_above = 0;  // added to the label's logits
  double factor = 1;                    // multiplies all logits
  double outlier = 0;                   // added to the student's logit of a class in the middle
  bool zeros = false;                   // rows of zeros: of the student, of the teacher, of both
  bool both_mask = false;               // every fifth class
  bool alone = false;  // all classes but the label are masked: by the student, the teacher, both
  Divergence divergence = Divergence::kForwardKL;
  double mix = 0.3;
  double teacher_temperature = 0;  // 0: the student's temperature
  std::string name;
};

struct Reference {
  double loss = 0, terms[kTerms] = {};
  std::vector<double> grad;
  double size = 1;  // size of the numbers whose difference is the gradient
};

// Add the soft term to `r`, and set the teacher's entropy. Called for any objective but the forward
// KL with one temperature.
void general_row(const Case& c, const std::vector<double>& z, const std::vector<double>& w,
                 int64_t label, double t, double soft_weight, Reference& r) {
  const double teacher_t = c.teacher_temperature > 0 ? c.teacher_temperature : t;
  const auto exact = truth::divergence(c.divergence, c.mix, z, w, t, teacher_t, label);
  r.terms[kSoft] = static_cast<double>(exact.value);
  r.loss += soft_weight == 0 ? 0 : soft_weight * t * t * r.terms[kSoft];
  double top = -kInfinity, sum = 0, entropy = 0;
  for (const double x : w) top = std::fmax(top, x);
  for (const double x : w) sum += std::exp((x - top) / teacher_t);
  for (const double x : w) {
    const double log_p = (x - top) / teacher_t - std::log(sum);
    if (log_p > -kInfinity) entropy -= std::exp(log_p) * log_p;
  }
  r.terms[kTeacherEntropy] = entropy;
  for (size_t i = 0; i < z.size(); i++)
    r.grad[i] += soft_weight * t * static_cast<double>(exact.grad[i]);
  r.size = std::fmax(1.0, soft_weight * t * t * static_cast<double>(exact.inverse));
}

Reference reference_row(const Case& c, const std::vector<double>& z, const std::vector<double>& w,
                        int64_t label, double t, double hard_weight, double soft_weight) {
  const bool general = c.divergence != Divergence::kForwardKL || c.teacher_temperature > 0;
  const double kl_weight = general ? 0 : soft_weight;
  const int64_t n = c.classes;
  Reference r;
  r.grad.assign(static_cast<size_t>(n), 0.0);
  double ms = -kInfinity, mt = -kInfinity, zs = 0, z1 = 0, zt = 0, mean = 0;
  bool poisoned = false;
  for (int64_t i = 0; i < n; i++) {
    ms = std::fmax(ms, z[i]), mt = std::fmax(mt, w[i]);
    poisoned |= std::isnan(z[i]) || std::isnan(w[i]) || z[i] == kInfinity || w[i] == kInfinity;
  }
  poisoned |= c.divergence == Divergence::kDecoupled && label < 0;
  if (poisoned || ms == -kInfinity || mt == -kInfinity) {
    r.loss = NAN;
    for (double& g : r.grad) g = NAN;
    return r;
  }
  for (int64_t i = 0; i < n; i++) {
    zs += std::exp((z[i] - ms) / t), z1 += std::exp(z[i] - ms), zt += std::exp((w[i] - mt) / t);
    mean += (z[i] - ms) / n;
  }
  double kl = 0, hs = 0, ht = 0;
  for (int64_t i = 0; i < n; i++) {
    const double lq = (z[i] - ms) / t - std::log(zs), lp = (w[i] - mt) / t - std::log(zt);
    const double q = std::exp(lq), p = std::exp(lp), d = lp - lq;
    const double f =
        std::fabs(d) < 1e-2
            ? d * d * (0.5 - d / 6 + d * d / 24 - d * d * d / 120 + d * d * d * d / 720)
            : d + std::expm1(-d);
    kl += z[i] == -kInfinity && w[i] > -kInfinity ? kInfinity : p == 0 ? q : p * f;
    if (q > 0) hs -= q * lq;
    if (p > 0) ht -= p * lp;
    if (z[i] == ms && w[i] == mt) r.terms[kAgreement] = 1;
    double g = kl_weight * t * (q - p);
    if (label >= 0)
      g += hard_weight *
           (std::exp(z[i] - ms) / z1 - c.smoothing / n - (i == label ? 1 - c.smoothing : 0));
    r.grad[static_cast<size_t>(i)] = g;
  }
  double hard = 0;
  if (label >= 0) {  // relative to the maximum, which may be 1e38
    hard = (1 - c.smoothing) * (std::log(z1) + (ms - z[label]));
    if (c.smoothing > 0) hard += c.smoothing * (std::log(z1) - mean);
  }
  r.terms[kHard] = hard, r.terms[kSoft] = kl;
  r.terms[kStudentEntropy] = hs, r.terms[kTeacherEntropy] = ht;
  r.loss =
      (hard_weight == 0 ? 0 : hard_weight * hard) + (kl_weight == 0 ? 0 : kl_weight * t * t * kl);
  if (general) general_row(c, z, w, label, t, soft_weight, r);
  return r;
}

// Test one case: forward, a second forward with the same bits, and three forms of backward: a
// filled gradient, a recomputed gradient, and one grad_output for each row. In place, test only
// one forward and the filled gradient.
struct Runner {
  const Case& c;
  int64_t group;
  RowStrides student_stride, teacher_stride, grad_stride;
  bool wide;
  int acc;
  int failures = 0;

  explicit Runner(const Case& which) : c(which) {
    group = c.group_rows > 0 ? c.group_rows : c.rows;
    student_stride = stride_of(c.student_pixels, c.student_pad, 5);
    teacher_stride = stride_of(c.teacher_pixels, c.teacher_pad, 3);
    grad_stride = stride_of(c.student_pixels, c.grad_pad, 0);
    wide = computes_in_double(c.student, c.teacher);
    acc = wide ? 8 : 4;
  }
  RowStrides stride_of(bool pixels, int64_t pad, int64_t pad_of_group) const {
    if (pixels) return {1, c.classes * (group + pad) + pad_of_group, group + pad};
    return {c.classes + pad, group * (c.classes + pad) + pad_of_group};
  }
  int64_t extent(RowStrides stride) const {
    return (c.rows + group - 1) / group * stride.group + stride.row;
  }
  int64_t at(int64_t row, int64_t i, RowStrides stride) const {
    return row_offset(row, group, stride) + i * stride.classes;
  }
  void fail(const char* what, int64_t row, int64_t i, double got, double want) {
    if (failures++ < 3)
      std::printf("FAIL %s [V=%lld]: %s row %lld class %lld: got %.9g, want %.9g\n", c.name.c_str(),
                  static_cast<long long>(c.classes), what, static_cast<long long>(row),
                  static_cast<long long>(i), got, want);
  }
  double acc_of(const Buffer& b, int64_t i) const {
    return load(b.host.data(), wide ? DType::kFloat64 : DType::kFloat32, i);
  }
  void run();
};

void Runner::run() {
  const int64_t es = size_of(c.student), et = size_of(c.teacher);
  Buffer student(extent(student_stride) * es, c.student_offset * es);
  Buffer teacher(extent(teacher_stride) * et, c.teacher_offset * et);
  Buffer grad(extent(grad_stride) * es, c.grad_offset * es);
  Buffer labels(c.rows * 8), settings(c.rows * acc * kRowSettings), loss(c.rows * acc);
  Buffer terms(c.rows * acc * kTerms), stats((c.rows * kStats + 1) * acc);
  Buffer total(acc * (1 + kTerms)), grad_output(acc * c.rows);
  const DType acc_dtype = wide ? DType::kFloat64 : DType::kFloat32;
  Random random{static_cast<uint64_t>(c.classes * 1000003 + c.rows)};
  std::vector<Reference> want;
  int64_t counted = 0;
  for (int64_t r = 0; r < c.rows; r++) {
    for (int64_t i = 0; i < c.classes; i++) {
      double w = 3 * random.normal(), z = w + c.noise * random.normal();
      z = z * c.factor + c.student_base, w = w * c.factor + c.teacher_base;
      if (i == c.classes / 2) z += c.outlier;
      if (c.zeros) z = r % 3 != 1 ? 0 : z, w = r % 3 != 0 ? 0 : w;
      if (c.both_mask && i % 5 == 2) z = w = -kInfinity;
      if (c.underflows && r % 2 == 0 && i == c.classes / 2) z = -kInfinity, w = -1e4;
      if (c.infinities && i % 7 == 3) z = -kInfinity, w = r % 2 ? -kInfinity : w;
      if (c.infinities && i % 11 == 5) w = -kInfinity;
      if (c.infinities && r == 3) z = -kInfinity;
      if (c.nan && r == 1 && i == c.classes / 2) z = NAN;
      if (c.nan && r == 2 && i == c.classes - 1) w = NAN;
      if (c.nan && r == 0 && i == 0) z = kInfinity;
      store(student.host.data(), c.student, at(r, i, student_stride), z);
      store(teacher.host.data(), c.teacher, at(r, i, teacher_stride), w);
    }
    int64_t label = r == 0   ? c.classes - 1
                    : r == 1 ? 0
                             : static_cast<int64_t>(random.uniform() * c.classes);
    if (c.infinities) label = label / 77 * 77;  // a class that is not masked
    if (c.both_mask) label = label / 5 * 5;
    if (c.ignored && r % 3 == 1 && c.rows > 1) label = -100;
    if (c.bad_label && r == 2) label = c.classes;
    reinterpret_cast<int64_t*>(labels.host.data())[r] = label;
    const bool labelled = c.above != 0 || c.teacher_above != 0 || c.alone;
    for (int64_t i = 0; i < c.classes && labelled; i++) {
      const int64_t z = at(r, i, student_stride), w = at(r, i, teacher_stride);
      const auto add = [&](Buffer& b, DType dtype, int64_t k, double above, bool masks) {
        const double x = load(b.host.data(), dtype, k) + (i == label ? above : 0);
        store(b.host.data(), dtype, k, masks && c.alone && i != label ? -kInfinity : x);
      };
      add(student, c.student, z, c.above, r % 3 != 1);
      add(teacher, c.teacher, w, c.teacher_above, r % 3 != 0);
    }
    const double t = c.row_settings ? 1 + 0.5 * static_cast<double>(r % 7) : c.temperature;
    const double teacher_t = c.teacher_temperature > 0 ? c.teacher_temperature : t;
    const double hard_weight = c.hard_weight * (c.row_settings ? 1 + r % 2 : 1);
    const double soft_weight = c.soft_weight * (c.row_settings ? 1 + r % 3 : 1);
    const double of_row[kRowSettings] = {t, teacher_t, hard_weight, soft_weight};
    for (int k = 0; k < kRowSettings; k++)
      store(settings.host.data(), acc_dtype, k * c.rows + r, of_row[k]);
    store(grad_output.host.data(), acc_dtype, r, 1.0);
    std::vector<double> z(static_cast<size_t>(c.classes)), w(z.size());
    for (int64_t i = 0; i < c.classes; i++) {
      z[i] = load(student.host.data(), c.student, at(r, i, student_stride));
      w[i] = load(teacher.host.data(), c.teacher, at(r, i, teacher_stride));
    }
    Reference ref;
    if (c.labels && label == -100) {
      ref.grad.assign(z.size(), 0.0);
    } else if (c.labels && label == c.classes) {
      counted++;
      ref.loss = NAN;
      ref.grad.assign(z.size(), NAN);
    } else {
      counted++;
      ref = reference_row(c, z, w, c.labels ? label : -1, t, hard_weight, soft_weight);
    }
    want.push_back(ref);
  }
  student.up(), teacher.up(), labels.up(), settings.up(), grad_output.up();
  check(cudaMemset(grad.at(), 0xff, grad.host.size()), "poison");
  check(cudaMemset(loss.at(), 0xff, loss.host.size()), "poison");
  check(cudaMemset(total.at(), 0xff, total.host.size()), "poison");

  ForwardArgs args;
  args.rows = c.rows, args.classes = c.classes, args.group_rows = group;
  args.student = student.at(), args.student_stride = student_stride;
  args.teacher = teacher.at(), args.teacher_stride = teacher_stride;
  args.student_dtype = c.student, args.teacher_dtype = c.teacher;
  args.labels = c.labels ? static_cast<const int64_t*>(labels.at()) : nullptr;
  args.row_settings = c.row_settings ? settings.at() : nullptr;
  args.temperature = args.teacher_temperature = c.temperature, args.hard_weight = c.hard_weight;
  if (c.teacher_temperature > 0) args.teacher_temperature = c.teacher_temperature;
  if (c.teacher_temperature > 0 && c.row_settings) args.teacher_temperature = c.temperature + 1;
  args.divergence = c.divergence, args.mix = c.mix;
  args.soft_weight = c.soft_weight, args.label_smoothing = c.smoothing;
  args.loss = loss.at(), args.stats = stats.at(), args.terms = c.terms ? terms.at() : nullptr;
  args.grad = c.no_grad ? nullptr : c.in_place ? student.at() : grad.at();
  args.grad_stride = c.in_place ? student_stride : grad_stride;
  args.reduction = c.reduction;
  // With a total, the losses and terms of the rows are scratch memory: a call without a total
  // returns them.
  ForwardArgs each_row = args;
  each_row.reduction = Reduction::kNone, each_row.grad = nullptr;
  check(cuda::forward(each_row, nullptr, nullptr, nullptr), c.name.c_str());
  check(cudaDeviceSynchronize(), c.name.c_str());
  loss.down(), terms.down();
  const auto forward = [&] {
    void* const to = c.reduction == Reduction::kNone ? nullptr : total.at();
    check(cuda::forward(args, to, nullptr, nullptr), c.name.c_str());
    check(cudaDeviceSynchronize(), c.name.c_str());
  };
  forward();
  Buffer& out = c.in_place ? student : grad;
  const RowStrides out_stride = args.grad_stride;
  out.down(), total.down(), stats.down();
  const std::vector<char> first = out.host;
  const double scale = c.reduction == Reduction::kMean ? 1.0 / (counted > 0 ? counted : 1) : 1.0;
  if (!close(acc_of(stats, kStats * c.rows), scale, 0, 1e-6))
    fail("scale", 0, 0, acc_of(stats, kStats * c.rows), scale);
  const double eps = c.student == DType::kBFloat16  ? 4.0e-3
                     : c.student == DType::kFloat16 ? 5.0e-4
                     : c.student == DType::kFloat64 ? 1e-10
                     : wide                         ? 2e-7
                                                    : 2e-6;
  const double tiny = c.student == DType::kFloat64   ? 1e-15
                      : c.student == DType::kFloat16 ? 3e-8 + 6e-7 * scale
                                                     : 6e-7 * scale;
  double sum = 0, term_sums[kTerms] = {};
  const auto check_grad = [&](const std::vector<char>& got, double factor, const char* what,
                              double slack = 1) {
    for (int64_t r = 0; r < c.rows; r++) {
      const double absolute = slack * tiny * std::fmax(1.0, std::fabs(factor)) * want[r].size;
      for (int64_t i = 0; i < c.classes; i++) {
        const double g = load(got.data(), c.student, at(r, i, out_stride));
        const double w = want[r].grad[i] * scale * factor;
        if (!close(g, w, absolute, slack * eps)) return fail(what, r, i, g, w);
      }
    }
  };
  if (!c.no_grad) check_grad(first, 1, "grad");
  const double loss_eps = wide ? 1e-12 : 3e-6;
  for (int64_t r = 0; r < c.rows; r++) {
    sum += want[r].loss;
    double absolute = wide ? 1e-13 : c.noise < 0.1 ? 1e-12 : 2e-6;
    // Unit vectors are rounded before they are compared.
    if (c.divergence == Divergence::kCosine && !wide)
      absolute += 2e-7 * std::sqrt(std::fabs(want[r].loss));
    if (!close(acc_of(loss, r), want[r].loss, absolute, loss_eps))
      fail("loss", r, 0, acc_of(loss, r), want[r].loss);
    for (int k = 0; k < kTerms; k++) {
      term_sums[k] += want[r].terms[k];
      if (c.terms && !std::isnan(want[r].loss) &&
          !close(acc_of(terms, k * c.rows + r), want[r].terms[k], 2e-6, 1e-5))
        fail("terms", r, k, acc_of(terms, k * c.rows + r), want[r].terms[k]);
    }
  }
  if (c.reduction != Reduction::kNone) {
    if (!close(acc_of(total, 0), sum * scale, 1e-6, 1e-5))
      fail("total", 0, 0, acc_of(total, 0), sum * scale);
    for (int k = 0; c.terms && k < kTerms && !std::isnan(sum); k++)
      if (!close(acc_of(total, 1 + k), term_sums[k] * scale, 1e-5, 1e-5))
        fail("total", 0, 1 + k, acc_of(total, 1 + k), term_sums[k] * scale);
  }
  if (c.in_place) {
    std::vector<char> keep = first;
  } else {
    forward();
    out.down();
    if (std::memcmp(first.data(), out.host.data(), first.size()) != 0) fail("repeat", 0, 0, 0, 0);
  }
  BackwardArgs back;
  static_cast<Inputs&>(back) = args;
  back.stats = stats.at(), back.grad = out.at(), back.grad_stride = out_stride;
  back.grad_output = grad_output.at();
  check(cuda::backward(back, true, nullptr), "backward 1");
  out.down();
  if (std::memcmp(first.data(), out.host.data(), first.size()) != 0)
    fail("backward filled, 1", 0, 0, 0, 0);
  if (!c.in_place) {
    check(cudaMemset(grad.at(), 0xff, grad.host.size()), "poison");
    check(cuda::backward(back, false, nullptr), "backward 2");
    out.down();
    int64_t differs = 0;
    for (int64_t r = 0; r < c.rows && c.smoothing == 0; r++)
      for (int64_t i = 0; i < c.classes; i++) {
        const int64_t index = at(r, i, out_stride), byte = index * es;
        const double w = load(first.data(), c.student, index);
        if (std::memcmp(&first[byte], &out.host[byte], es) != 0 && !std::isnan(w) && differs++ == 0)
          fail("backward recomputed, bitwise", r, i, load(out.host.data(), c.student, index), w);
      }
    check_grad(out.host, 1, "backward recomputed");
  }
  store(grad_output.host.data(), acc_dtype, 0, 3.0);
  grad_output.up();
  check(cuda::backward(back, true, nullptr), "backward 3");
  out.down();
  check_grad(out.host, 3, "backward filled, 3", c.in_place ? 2.1 : 1);  // rounded twice in place
  if (!c.in_place) {
    for (int64_t r = 0; r < c.rows; r++) store(grad_output.host.data(), acc_dtype, r, 0.5);
    grad_output.up();
    back.grad_output_per_row = true;
    check(cuda::backward(back, false, nullptr), "backward 4");
    out.down();
    check_grad(out.host, 0.5, "backward per row");
  }
  check(cudaDeviceSynchronize(), "end");
}

}  // namespace
