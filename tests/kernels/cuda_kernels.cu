// Checks every family of CUDA kernels against a double-precision reference on the host. No torch.
// Prints one line per failed case and a summary; the exit status is the number of failed cases.
// `cuda_kernels --short` runs a reduced set, for compute-sanitizer; `--at-most ROWS CLASSES` all
// but the large cases, for the emulation of a GPU; `--random CASES SEED` random cases alone.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
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
  int64_t student_pad = 0, teacher_pad = 0, grad_pad = 0;       // of a row, in elements
  int64_t group_rows = 0;
  bool student_pixels = false, teacher_pixels = false;  // rows adjacent instead of classes
  bool labels = true, ignored = true, bad_label = false, row_settings = false;
  bool terms = false, in_place = false, no_grad = false, infinities = false, nan = false;
  Reduction reduction = Reduction::kMean;
  double noise = 1;                           // of the student about the teacher
  double student_base = 0, teacher_base = 0;  // added to all logits
  bool underflows = false;              // a class that the student masks, of no teacher probability
  double above = 0, teacher_above = 0;  // added to the label's logits
  double factor = 1;                    // of all logits
  double outlier = 0;                   // added to the student's logit of a class in the middle
  bool zeros = false;                   // rows of zeros: the student's, the teacher's, both
  bool both_mask = false;               // every fifth class
  bool alone = false;  // all classes but the label are masked: by the student, the teacher, both
  Divergence divergence = Divergence::kForwardKL;
  double mix = 0.3;
  double teacher_temperature = 0;  // 0: the student's
  const cuda::Plan* plan = nullptr;
  std::string name;
};

struct Reference {
  double loss = 0, terms[kTerms] = {};
  std::vector<double> grad;
  double size = 1;  // of what the gradient is the difference of, if it is large
};

// The soft term of everything but the forward KL with one temperature.
void general_row(const Case& c, const std::vector<double>& z, const std::vector<double>& w,
                 int64_t label, double t, double soft_weight, Reference& r) {
  const double own = c.teacher_temperature > 0 ? c.teacher_temperature : t;
  const auto exact = truth::divergence(c.divergence, c.mix, z, w, t, own, label);
  r.terms[kSoft] = static_cast<double>(exact.value);
  r.loss += soft_weight == 0 ? 0 : soft_weight * t * t * r.terms[kSoft];
  double top = -kInfinity, sum = 0, entropy = 0;
  for (const double x : w) top = std::fmax(top, x);
  for (const double x : w) sum += std::exp((x - top) / own);
  for (const double x : w) {
    const double log_p = (x - top) / own - std::log(sum);
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

// One case: forward, a second forward (bitwise the same), then backward in its three forms.
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
      std::printf("FAIL %s [V=%lld %s]: %s row %lld class %lld: got %.9g, want %.9g\n",
                  c.name.c_str(), static_cast<long long>(c.classes), plan_name().c_str(), what,
                  static_cast<long long>(row), static_cast<long long>(i), got, want);
  }
  bool general() const {
    const bool same =
        c.teacher_temperature == 0 || (!c.row_settings && c.teacher_temperature == c.temperature);
    return !same || !is_one_sweep(c.divergence);
  }
  std::string plan_name() const {
    cuda::Device device;
    check(cuda::current_device(device), "device");
    const cuda::Plan p =
        c.plan ? *c.plan
               : cuda::make_plan(c.rows, c.classes, c.student, c.teacher, device.limits(),
                                 general(), c.student_pixels || c.teacher_pixels);
    return std::string(cuda::name_of(p.family)) + " " + std::to_string(p.cluster) + "x" +
           std::to_string(p.threads);
  }
  double acc_of(const Buffer& b, int64_t i) const {
    return load(b.host.data(), wide ? DType::kFloat64 : DType::kFloat32, i);
  }
  void run();
};

int forward_with(const Case& c, const ForwardArgs& args, void* total) {
  if (c.plan == nullptr) return cuda::forward(args, total, nullptr, nullptr);
  cuda::ForwardCall call;
  call.args = args;
  call.total = total;
  call.constants = make_constants(args.divergence, args.mix);
  call.scale_source = args.labels != nullptr && args.reduction == Reduction::kMean
                          ? cuda::ScaleSource::kCount
                          : cuda::ScaleSource::kArgument;
  if (args.labels == nullptr && args.reduction == Reduction::kMean)
    call.args.scale = 1.0 / static_cast<double>(args.rows);
  int status = cuda::launch_streaming(call, *c.plan, nullptr);
  if (status == 0 && total != nullptr) status = cuda::launch_finish(call, nullptr);
  return status;
}

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
    if (c.infinities) label = label / 77 * 77;  // of a class that is not masked
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
    const double own = c.teacher_temperature > 0 ? c.teacher_temperature : t;
    const double hard_weight = c.hard_weight * (c.row_settings ? 1 + r % 2 : 1);
    const double soft_weight = c.soft_weight * (c.row_settings ? 1 + r % 3 : 1);
    const double of_row[kRowSettings] = {t, own, hard_weight, soft_weight};
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
  const int status = forward_with(c, args, c.reduction == Reduction::kNone ? nullptr : total.at());
  check(status, c.name.c_str());
  check(cudaDeviceSynchronize(), c.name.c_str());
  Buffer& out = c.in_place ? student : grad;
  const RowStrides out_stride = args.grad_stride;
  out.down(), loss.down(), terms.down(), total.down(), stats.down();
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
  // Once more.
  if (c.in_place) {
    std::vector<char> keep = first;
  } else {
    check(forward_with(c, args, c.reduction == Reduction::kNone ? nullptr : total.at()), "again");
    out.down();
    if (std::memcmp(first.data(), out.host.data(), first.size()) != 0) fail("repeat", 0, 0, 0, 0);
  }
  // Backward.
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
        const int64_t of = at(r, i, out_stride), byte = of * es;
        const double w = load(first.data(), c.student, of);
        if (std::memcmp(&first[byte], &out.host[byte], es) != 0 && !std::isnan(w) && differs++ == 0)
          fail("backward anew, bitwise", r, i, load(out.host.data(), c.student, of), w);
      }
    check_grad(out.host, 1, "backward anew");
  }
  store(grad_output.host.data(), acc_dtype, 0, 3.0);
  grad_output.up();
  check(cuda::backward(back, true, nullptr), "backward 3");
  out.down();
  check_grad(out.host, 3, "backward filled, 3", c.in_place ? 2.1 : 1);  // in place rounds twice
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

int64_t most_rows = int64_t(1) << 40, most_classes = most_rows;
void test(Case c, const char* name) {
  if (c.classes > most_classes) return;
  if (!c.student_pixels && !c.teacher_pixels) c.rows = std::min(c.rows, most_rows);
  c.name = name;
  Runner runner(c);
  runner.run();
  total_failures += runner.failures != 0;
  total_cases++;
}

constexpr DType kHot[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

void sizes(bool brief) {
  const std::vector<int64_t> all = {1,     2,     7,     31,    32,     33,     127,   128,  129,
                                    255,   511,   512,   513,   1000,   1023,   1024,  1025, 2047,
                                    2049,  4095,  4096,  4097,  5003,   8191,   8192,  8193, 16385,
                                    27001, 32000, 50257, 65536, 128257, 151937, 262144};
  const std::vector<int64_t> few = {3, 33, 129, 1001, 2049, 4097, 20001, 50257};
  for (const int64_t classes : brief ? few : all)
    for (const DType dtype : kHot) {
      Case c;
      c.classes = classes, c.student = c.teacher = dtype;
      c.rows = classes > 20000 ? 5 : classes > 1024 ? 9 : 70;
      if (brief) c.rows = 4;
      test(c, "sizes");
    }
}
void layouts() {
  for (const int64_t classes : {100, 777, 3001, 9001, 40007})
    for (const DType dtype : kHot)
      for (int k = 0; k < 4; k++) {
        Case c;
        c.classes = classes, c.student = c.teacher = dtype, c.rows = 7;
        c.student_offset = k, c.teacher_offset = 2 * k % 5, c.grad_offset = 3 * k % 4;
        c.student_pad = k == 2 ? 3 : 0, c.teacher_pad = k == 3 ? 64 : k,
        c.grad_pad = k == 1 ? 1 : 0;
        c.group_rows = k == 3 ? 3 : 0;
        test(c, "layouts");
      }
}
void options() {
  for (const int64_t classes : {10, 100, 1000, 3000, 10000, 33333}) {
    for (const double t : {1.0, 1.5, 3.0, 4.0}) {
      Case c;
      c.classes = classes, c.temperature = t, c.rows = 40;
      test(c, "temperature");
      c.student = c.teacher = DType::kFloat32;
      test(c, "temperature fp32");
    }
    Case c;
    c.classes = classes, c.rows = 40;
    Case d = c;
    d.row_settings = true, test(d, "row temperature");
    d = c, d.bad_label = true, test(d, "bad label");
    d = c, d.terms = true, d.smoothing = 0.1, test(d, "terms and smoothing");
    d.student = d.teacher = DType::kFloat32, test(d, "terms and smoothing fp32");
    d = c, d.labels = false, test(d, "no labels");
    d = c, d.labels = false, d.temperature = 1.7, d.terms = true, test(d, "no labels, terms");
    d = c, d.in_place = true, test(d, "in place");
    d.student = d.teacher = DType::kFloat32, d.student_offset = 1, test(d, "in place fp32");
    d = c, d.infinities = true, d.rows = 9, test(d, "infinities");
    d.student = d.teacher = DType::kFloat32, test(d, "infinities fp32");
    d = c, d.nan = true, d.rows = 9, d.ignored = false, test(d, "nan");
    int turn = 0;  // every pair of a type and an offset, with one temperature after the other
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64})
      for (const double base : {30.0, -100.0, 1e4, -3e6, 1e38}) {
        const double temperatures[] = {1.0, 1.5, 2.0};
        d = c, d.student = d.teacher = dtype, d.temperature = temperatures[turn++ % 3], d.rows = 9;
        d.student_base = d.teacher_base = base, test(d, "far from zero");
        d.teacher_base = 0, test(d, "apart");
      }
    d = c, d.underflows = true, d.reduction = Reduction::kNone, d.rows = 9;
    test(d, "masked, and of no teacher probability");
    d.student = d.teacher = DType::kFloat32, test(d, "masked, and of none, fp32");
    d = c, d.reduction = Reduction::kSum, test(d, "sum");
    d = c, d.reduction = Reduction::kNone, test(d, "none");
    d = c, d.hard_weight = 0, d.soft_weight = 1, test(d, "soft only");
    d = c, d.hard_weight = 1, d.soft_weight = 0, test(d, "hard only");
    d = c, d.student = d.teacher = DType::kFloat32, d.hard_weight = 0, d.noise = 1e-3,
    test(d, "near");
  }
}
void mixes() {
  const DType all[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  for (const DType s : all)
    for (const DType t : all)
      for (const int64_t classes : {5, 100, 1000, 9999}) {
        Case c;
        c.classes = classes, c.student = s, c.teacher = t, c.rows = 20, c.terms = classes == 100;
        test(c, "mixed dtypes");
      }
}
void forced() {
  cuda::Plan streaming;
  streaming.threads = streaming.lanes = 512;
  for (const int64_t classes : {1000, 9001, 50257})
    for (const DType dtype : kHot) {
      Case c;
      c.plan = &streaming, c.classes = classes, c.student = c.teacher = dtype, c.teacher_offset = 1;
      test(c, "streaming");
    }
}
constexpr Divergence kFiniteIfMasked[] = {
    Divergence::kForwardKL,       Divergence::kDecoupled,       Divergence::kJensenShannon,
    Divergence::kSkewedForwardKL, Divergence::kSkewedReverseKL, Divergence::kTotalVariation};
void divergences(bool brief) {
  for (int id = 0; id < kDivergences; id++)
    for (const int64_t classes : {7, 100, 1003, 20001}) {
      Case c;
      c.divergence = static_cast<Divergence>(id), c.classes = classes, c.rows = 5;
      const std::string name = kDivergenceNames[id];
      test(c, name.c_str());
      Case d = c;
      d.student = d.teacher = DType::kFloat32, d.terms = true, d.smoothing = 0.1;
      d.student_offset = 1, test(d, (name + ", terms").c_str());
      d = c, d.teacher_temperature = 3, d.terms = true;
      test(d, (name + ", own temperature").c_str());
      d = c, d.row_settings = true, d.terms = true, test(d, (name + ", settings of rows").c_str());
      if (brief && classes > 2000) continue;
      d = c, d.in_place = true, test(d, (name + ", in place").c_str());
      d = c, d.student = DType::kFloat64, test(d, (name + ", fp64 and bf16").c_str());
      d = c, d.student = d.teacher = DType::kFloat16, test(d, (name + ", fp16").c_str());
      d = c, d.nan = true, d.ignored = false, test(d, (name + ", nan").c_str());
      d = c, d.student_base = 300, test(d, (name + ", apart").c_str());
    }
  // An outlying logit: squared errors of the other classes are lost if the maximum is subtracted.
  for (const Divergence id : {Divergence::kSquaredError, Divergence::kCenteredSquaredError})
    for (const int64_t classes : {7, 100, 1003, 20001})
      for (const double teacher_temperature : {0.0, 3.0}) {
        Case c;
        c.divergence = id, c.classes = classes, c.rows = 5, c.hard_weight = 0;
        c.student = c.teacher = DType::kFloat32, c.outlier = 1e6;
        c.teacher_temperature = teacher_temperature;
        test(c, (std::string(kDivergenceNames[static_cast<int>(id)]) + ", outlier").c_str());
        c.outlier = 0, c.student_base = 1000, c.noise = 1e-2;
        test(c, (std::string(kDivergenceNames[static_cast<int>(id)]) + ", offset").c_str());
      }
  // Of classes that one side masks some divergences are infinite: those that are not.
  for (const Divergence id : kFiniteIfMasked)
    for (const int64_t classes : {100, 1003}) {
      Case c;
      c.divergence = id, c.classes = classes, c.rows = 5;
      c.infinities = c.terms = true, c.teacher_temperature = 3;
      test(c, (std::string(kDivergenceNames[static_cast<int>(id)]) + ", masked").c_str());
    }
}
// What the label's part of a decoupled divergence may meet.
void decoupled(bool brief) {
  int turn = 0;
  for (const bool pixels : {false, true})
    for (const int64_t classes : {2, 3, 100, 1003, 5003}) {
      if (brief && classes > 1003) continue;
      turn++;
      Case c;
      c.divergence = Divergence::kDecoupled, c.classes = classes, c.rows = 9;
      c.mix = 8, c.soft_weight = 0.05;  // what gradients round at is the product's size
      c.student_pixels = c.teacher_pixels = pixels, c.student = c.teacher = DType::kFloat32;
      c.terms = true, c.ignored = c.bad_label = false;
      test(c, "dkd of fp32");
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
        c.student = c.teacher = dtype;
        const double pairs[][2] = {
            {-60, -60}, {-8, -8},        {8, 8},          {60, 60},
            {5, -5},    {-kInfinity, 0}, {0, -kInfinity}, {-kInfinity, -kInfinity},
            {NAN, 0},   {0, NAN},        {kInfinity, 0},  {0, kInfinity}};
        turn++;
        for (const auto& above : pairs) {  // each with one set of options after the other
          Case d = c;
          d.above = above[0], d.teacher_above = above[1];
          const int options = static_cast<int>(turn + &above - pairs) % 3;
          if (options > 0) d.teacher_temperature = 1.5, d.smoothing = 0.1;
          if (options > 1) d.row_settings = true;
          test(d, options == 0   ? "dkd, far label"
                  : options == 1 ? "dkd, far label, smoothing"
                                 : "dkd, far label, settings of rows");
        }
        Case d = c;
        d.alone = true, test(d, "dkd, label alone");
        d.teacher_temperature = 3, test(d, "dkd, label alone, own temperature");
        d.student_base = 200, test(d, "dkd, label alone, apart");
        d = c, d.labels = false, test(d, "dkd without labels");
        d = c, d.bad_label = true, d.ignored = true, test(d, "dkd, bad label");
        d = c, d.hard_weight = 0, d.noise = 1e-2, test(d, "dkd, near");
        d = c, d.hard_weight = 1, d.soft_weight = 0, test(d, "dkd, hard only");
      }
    }
}
// What the lengths of the cosine may meet.
void lengths(bool brief) {
  for (const bool pixels : {false, true})
    for (const int64_t classes : {1, 2, 100, 1003, 5003}) {
      if (brief && classes > 1003) continue;
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
        Case c;
        c.divergence = Divergence::kCosine, c.classes = classes, c.rows = 9;
        c.student_pixels = c.teacher_pixels = pixels, c.student = c.teacher = dtype;
        c.ignored = false;
        Case d = c;
        d.zeros = true, test(d, "cosine of zeros");
        d.row_settings = d.terms = true, test(d, "cosine of zeros, settings of rows");
        d = c, d.both_mask = classes > 2, d.terms = true, test(d, "cosine, both mask");
        d = c, d.infinities = classes > 100, test(d, "cosine, one masks");
        d = c, d.labels = false, d.noise = 1e-2, test(d, "cosine, near");
        d.noise = 0, test(d, "cosine of the same");
        for (const double factor : {1e30, 1e-8, 1e-30}) {
          d = c, d.factor = factor, d.hard_weight = 0, test(d, "cosine, far from 1");
        }
      }
    }
}
// Options as they meet by chance.
void random_cases(int64_t count, uint64_t seed) {
  Random random{seed};
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random.uniform() * n); };
  const auto one_in = [&](int64_t n) { return below(n) == 0; };
  const int64_t widths[] = {1, 5, 32, 100, 128, 129, 200, 777, 1000, 2049, 4097, 5003, 9001};
  for (int64_t i = 0; i < count; i++) {
    Case c;
    c.classes = widths[below(std::size(widths))] + below(3), c.rows = 1 + below(one_in(3) ? 70 : 9);
    c.student = c.teacher = kHot[below(3)];
    const double temperatures[] = {1, 1.5, 2, 3, 4, 20};
    c.temperature = temperatures[below(6)];
    c.student_offset = below(9), c.teacher_offset = below(9), c.grad_offset = below(9);
    c.student_pad = below(4), c.teacher_pad = below(4), c.grad_pad = below(4);
    if (one_in(4)) c.group_rows = 1 + below(c.rows);
    c.labels = !one_in(4), c.ignored = one_in(2), c.bad_label = c.labels && one_in(4);
    c.row_settings = one_in(4), c.terms = one_in(3), c.in_place = one_in(4);
    c.no_grad = !c.in_place && one_in(5);
    c.infinities = c.classes > 100 && one_in(6), c.nan = one_in(6);
    if (c.labels && one_in(4)) c.smoothing = c.infinities ? 0 : 0.1;
    c.reduction = static_cast<Reduction>(below(3));
    if (one_in(2)) {
      c.divergence = c.infinities ? kFiniteIfMasked[below(std::size(kFiniteIfMasked))]
                                  : static_cast<Divergence>(below(kDivergences));
      if (one_in(3)) c.teacher_temperature = temperatures[below(6)];
    }
    if (one_in(3))
      c.student_pixels = !one_in(4), c.teacher_pixels = !c.student_pixels || !one_in(4);
    if (one_in(4)) {
      const DType all[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
      c.student = all[below(4)], c.teacher = all[below(4)];
    }
    test(c, ("random " + std::to_string(i) + " of seed " + std::to_string(seed)).c_str());
  }
}
// Offsets that 32 bits do not count. Of two groups the first is ignored, so that only the second
// need be there.
void far_pixels() {
  constexpr int64_t kClasses = 19, kStep = 3, kFar = (int64_t(1) << 32) + 5;
  Buffer student(kClasses * kStep * 4), teacher(student.host.size()), grad(2 * kClasses * 4);
  Buffer labels(2 * 8), loss(2 * 4), stats((2 * kStats + 1) * 4);
  Random random{1};
  for (Buffer* logits : {&student, &teacher}) {
    for (int64_t i = 0; i < kClasses * kStep; i++)
      store(logits->host.data(), DType::kFloat32, i, random.normal());
    logits->up();
  }
  reinterpret_cast<int64_t*>(labels.host.data())[0] = -100;
  reinterpret_cast<int64_t*>(labels.host.data())[1] = 7;
  labels.up();
  std::vector<char> near;
  for (const int64_t group : {int64_t(0), kFar}) {
    const auto from = [&](Buffer& b) {
      return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(b.at()) -
                                     static_cast<uintptr_t>(group) * 4);
    };
    ForwardArgs args;
    args.rows = 2, args.classes = kClasses, args.group_rows = 1;
    args.student = from(student), args.teacher = from(teacher), args.grad = grad.at();
    args.student_stride = args.teacher_stride = {1, group, kStep};
    args.grad_stride = {1, kClasses, 1};
    args.labels = static_cast<const int64_t*>(labels.at());
    args.loss = loss.at(), args.stats = stats.at(), args.reduction = Reduction::kNone;
    check(cuda::forward(args, nullptr, nullptr, nullptr), "far pixels");
    loss.down(), grad.down();
    std::vector<char> all = loss.host;
    all.insert(all.end(), grad.host.begin(), grad.host.end());
    if (group == 0) near = all;
    total_failures += near != all || load(loss.host.data(), DType::kFloat32, 1) == 0;
  }
  total_cases++;
}
// Classes that are not adjacent: pixels.
void pixels(bool brief) {
  for (const int64_t classes : {3, 19}) {  // more tiles than the device holds at a time
    Case c;
    c.student_pixels = c.teacher_pixels = true, c.rows = 2500, c.group_rows = 700;
    c.classes = classes, test(c, "many pixels");
    c.divergence = Divergence::kJensenShannon, test(c, "many pixels, JSD");
  }
  far_pixels();
  if (brief) return;
  const DType all[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64};
  int turn = 0;
  for (const int64_t classes : {1, 2, 4, 19, 33, 150, 1003}) {
    turn++;
    for (const DType dtype : all) {
      Case c;
      c.student_pixels = c.teacher_pixels = true;
      c.classes = classes, c.student = c.teacher = dtype;
      c.rows = 90, c.group_rows = 37;
      test(c, "pixels");
      Case d = c;
      d.student_pad = 3, d.teacher_pad = 1, d.student_offset = 1, d.terms = true, d.smoothing = 0.1;
      test(d, "pixels, terms and smoothing");
      d = c, d.bad_label = true, test(d, "pixels, bad label");
      // Of one class the gradient is what the weights round at, and these are many times larger.
      d.row_settings = classes > 1, test(d, "pixels, settings of rows");
      d = c, d.in_place = true, d.student_pad = 5, test(d, "pixels, in place");
      d = c, d.labels = false, d.reduction = Reduction::kSum, test(d, "pixels, no labels");
      d = c, d.teacher_pixels = false, d.reduction = Reduction::kNone;
      test(d, "pixels, and a teacher of rows");
      d = c, d.student_pixels = false, test(d, "rows, and a teacher of pixels");
      d = c, d.no_grad = true, d.teacher = DType::kFloat32, test(d, "pixels, mixed, no gradient");
      d = c, d.nan = true, d.ignored = false, test(d, "pixels, nan");
      d = c, d.underflows = true, test(d, "pixels, masked, and of no teacher probability");
      d = c, d.temperature = 1.5, d.student_base = 1e4, test(d, "pixels, apart");
      d = c, d.infinities = true, d.smoothing = 0, test(d, "pixels, infinities");
      // One type after the other: each divergence meets all of them among the numbers of classes.
      for (int id = 1; id < kDivergences; id++) {
        if (dtype != all[(id + turn) % 4]) continue;
        // In more rows some p and q are nearer than fp32 can tell, where total variation has a
        // bend.
        d = c, d.divergence = static_cast<Divergence>(id), d.rows = 40, d.group_rows = 13;
        const std::string name = std::string("pixels, ") + kDivergenceNames[id];
        test(d, name.c_str());
        d.in_place = true, d.teacher_temperature = 3, d.terms = true;
        test(d, (name + ", own temperature, in place").c_str());
      }
    }
  }
}
void many_rows() {
  for (const int64_t classes : {10, 130, 1000, 2000, 5000}) {
    Case c;
    c.classes = classes, c.rows = classes < 1000 ? 40000 : 3000;
    test(c, "many rows");
  }
  Case c;
  c.rows = 0;
  c.classes = 1000;
  Buffer total(8), stats(8), loss(8);
  ForwardArgs args;
  args.classes = 1000, args.stats = stats.at(), args.loss = loss.at();
  check(cuda::forward(args, total.at(), nullptr, nullptr), "no rows");
  total.down();
  if (load(total.host.data(), DType::kFloat32, 0) != 0)
    total_failures++, std::printf("FAIL no rows\n");
}

// The kernels before and after the rows, of one CTA or of several.
void totals() {
  for (const DType acc : {DType::kFloat32, DType::kFloat64})
    for (const int64_t rows : {1, 2048, 16384, 16385, 70001}) {
      const int64_t size = size_of(acc);
      Buffer labels(rows * 8), loss(rows * size), terms(kTerms * rows * size);
      Buffer stats((kStats * rows + 1) * size), total((1 + kTerms) * size);
      Random random{static_cast<uint64_t>(rows)};
      int64_t count = 0;
      double want[1 + kTerms] = {};
      for (int64_t row = 0; row < rows; row++) {
        const bool ignored = random.uniform() < 0.3;
        reinterpret_cast<int64_t*>(labels.host.data())[row] = ignored ? -100 : row % 7;
        count += !ignored;
        for (int i = 0; i < 1 + kTerms; i++) {
          char* const to = i == 0 ? loss.host.data() : terms.host.data() + (i - 1) * rows * size;
          store(to, acc, row, random.normal() + i);
          want[i] += load(to, acc, row);
        }
      }
      labels.up(), loss.up(), terms.up();
      cuda::ForwardCall call;
      call.args.rows = rows, call.args.classes = 7, call.args.student_dtype = acc;
      call.args.labels = static_cast<const int64_t*>(labels.at());
      call.args.loss = loss.at(), call.args.terms = terms.at(), call.args.stats = stats.at();
      call.total = total.at();
      call.scale_source = cuda::ScaleSource::kCount;
      check(cuda::launch_count(call, nullptr), "count");
      check(cuda::launch_finish(call, nullptr), "finish");
      check(cudaDeviceSynchronize(), "totals");
      stats.down(), total.down();
      const double scale = 1.0 / static_cast<double>(count > 0 ? count : 1);
      bool good = close(load(stats.host.data(), acc, kStats * rows), scale, 0, 1e-6);
      for (int i = 0; i < 1 + kTerms; i++)
        good &= close(load(total.host.data(), acc, i), want[i] * scale, 1e-7, 1e-6);
      total_cases++, total_failures += !good;
      if (!good) std::printf("FAIL totals of %lld rows\n", static_cast<long long>(rows));
    }
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 0;
  const std::string mode = argc > 1 ? argv[1] : "";
  const auto number = [&](int i) { return argc > i ? std::atoll(argv[i]) : 0; };
  const bool brief = mode == "--short";
  if (mode == "--at-most") most_rows = number(2), most_classes = number(3);
  if (mode == "--random") {
    random_cases(number(2), static_cast<uint64_t>(number(3)));
  } else {
    sizes(brief);
    if (!brief) layouts(), options(), mixes(), many_rows(), random_cases(100, 1);
    forced(), divergences(brief), decoupled(brief), lengths(brief), pixels(brief);
    totals();
  }
  return outcome();
}
