// The CPU kernels of every instruction set that this machine runs, against a reference that is
// written from the definitions in long double and shares no line with them.
//
//   cpu_kernels [ISA | memory]     the tests of one instruction set, or those that valgrind needs
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"

namespace {

using namespace fastkd;
#if !defined(FASTKD_TRUTH)  // another type where long double is slow
#define FASTKD_TRUTH long double
#endif
using Real = FASTKD_TRUTH;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

int failures = 0;
std::string context;

void check(bool ok, const char* what, double got = 0, double want = 0) {
  if (ok) return;
  if (++failures <= 40) {
    std::printf("FAIL %s: %s, got %.9g, want %.9g\n", context.c_str(), what, got, want);
  }
}

// ---- Number types, by arithmetic rather than by bits.

struct Shape {
  int precision, min_exponent;  // significant bits; exponent of the least normal number
};
Shape shape_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {11, -14};
    case DType::kBFloat16:
      return {8, -126};
    case DType::kFloat64:
      return {53, -1022};
    default:
      return {24, -126};
  }
}

// The distance of the numbers around x.
double spacing(double x, DType dtype) {
  const Shape shape = shape_of(dtype);
  const int exponent = x == 0 ? shape.min_exponent : std::max(std::ilogb(x), shape.min_exponent);
  return std::ldexp(1.0, exponent - shape.precision + 1);
}

double rounded(double x, DType dtype) {
  if (!std::isfinite(x)) return x;
  const double step = spacing(x, dtype);
  return std::nearbyint(x / step) * step;
}

double decode(const unsigned char* from, DType dtype) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, from, 4);
    return x;
  }
  if (dtype == DType::kFloat64) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  const int mantissa_bits = dtype == DType::kFloat16 ? 10 : 7;
  const int bias = dtype == DType::kFloat16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * bias + 1) return mantissa != 0 ? kNan : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

void encode(double x, DType dtype, unsigned char* to) {
  if (dtype == DType::kFloat32) {
    const float y = static_cast<float>(x);
    std::memcpy(to, &y, 4);
    return;
  }
  if (dtype == DType::kFloat64) {
    std::memcpy(to, &x, 8);
    return;
  }
  const int mantissa_bits = dtype == DType::kFloat16 ? 10 : 7;
  const int bias = dtype == DType::kFloat16 ? 15 : 127;
  int bits = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    bits |= 0x7fff;
  } else if (std::isinf(x)) {
    bits |= (2 * bias + 1) << mantissa_bits;
  } else if (x != 0) {
    const double y = std::fabs(rounded(x, dtype));
    const int exponent = std::ilogb(y);
    bits |= exponent < 1 - bias ? static_cast<int>(std::ldexp(y, bias - 1 + mantissa_bits))
                                : ((exponent + bias) << mantissa_bits) +
                                      static_cast<int>(std::ldexp(y, mantissa_bits - exponent)) -
                                      (1 << mantissa_bits);
  }
  const uint16_t stored = static_cast<uint16_t>(bits);
  std::memcpy(to, &stored, 2);
}

// ---- Rows in memory: [rows, classes], with a stride, at any alignment, between guard bytes. Or,
// of `pixels`, [groups, classes, rows of a group]: (N, C, L).

struct Matrix {
  int64_t rows, classes, group_rows, stride, class_stride, group;
  DType dtype;
  std::vector<unsigned char> bytes;
  int64_t start;

  Matrix(int64_t rows, int64_t classes, DType dtype, int64_t padding, int64_t misalignment,
         int64_t group_rows = 0, bool pixels = false)
      : rows(rows),
        classes(classes),
        group_rows(group_rows > 0 ? group_rows : std::max<int64_t>(rows, 1)),
        stride(pixels ? 1 : classes + padding),
        class_stride(pixels ? this->group_rows + padding : 1),
        group((pixels ? classes * class_stride : this->group_rows * stride) +
              (group_rows > 0 ? 5 : 0)),
        dtype(dtype),
        start(64 + misalignment * size_of(dtype)) {
    const int64_t groups = (rows + this->group_rows - 1) / this->group_rows;
    bytes.assign(static_cast<size_t>(start + (groups * group + 16) * size_of(dtype)), 0xa5);
  }
  unsigned char* at(int64_t row, int64_t i) {
    const int64_t offset = row / group_rows * group + row % group_rows * stride + i * class_stride;
    return bytes.data() + start + offset * size_of(dtype);
  }
  double get(int64_t row, int64_t i) { return decode(at(row, i), dtype); }
  void set(int64_t row, int64_t i, double x) { encode(x, dtype, at(row, i)); }
  void* base() { return bytes.data() + start; }
  RowStrides strides() const { return {stride, group, class_stride}; }
};

// ---- The definitions.

struct Truth {
  Real loss, hard, soft, student_entropy, teacher_entropy;
  bool agreement, nan, ignored;
  std::vector<Real> grad, teacher;  // teacher: its probabilities
  Real soft_size;                   // what numbers of size 1 are multiplied by in the soft gradient
};

std::vector<Real> log_softmax(const std::vector<Real>& x, Real t) {
  Real max = -kInf, sum = 0;
  for (Real v : x) max = std::max(max, v);
  for (Real v : x) sum += std::exp((v - max) / t);
  std::vector<Real> result;
  for (Real v : x) result.push_back((v - max) / t - std::log(sum));
  return result;
}

struct Soft {
  Real value = 0;
  std::vector<Real> grad;  // by z / t
  Real size = 1;           // of its slopes
};

Soft forward_kl(const std::vector<Real>& log_p, const std::vector<Real>& log_q) {
  Soft soft;
  for (size_t i = 0; i < log_p.size(); ++i) {
    const Real p = std::exp(log_p[i]), q = std::exp(log_q[i]);
    if (p > 0) soft.value += p * (log_p[i] - log_q[i]);
    soft.grad.push_back(q - p);
  }
  return soft;
}

std::vector<Real> over(std::vector<Real> logits, Real t) {
  for (Real& x : logits) x /= t;
  return logits;
}

// Its two divergences are forward KLs: of (label, the rest), and of the other classes.
Soft decoupled(const std::vector<Real>& log_p, const std::vector<Real>& log_q, size_t label,
               Real mix) {
  const auto parts = [=](std::vector<Real> logs, Real* of_label, Real* of_rest) {
    *of_label = logs[label];
    logs[label] = -kInf;
    Real sum = 0;
    for (Real v : logs) sum += std::exp(v);
    *of_rest = std::log(sum);
    for (Real& v : logs) v = sum > 0 ? v - *of_rest : -kInf;
    return logs;
  };
  std::vector<Real> p(2), q(2);
  const std::vector<Real> others_p = parts(log_p, &p[0], &p[1]),
                          others_q = parts(log_q, &q[0], &q[1]);
  const Soft binary = forward_kl(p, q), others = forward_kl(others_p, others_q);
  const Real weight = p[1] > -kInf ? mix : 0;
  Soft soft;
  soft.value = binary.value + (weight > 0 ? weight * others.value : 0);
  for (size_t i = 0; i < others_q.size(); ++i) {
    soft.grad.push_back(weight * others.grad[i] - binary.grad[0] * std::exp(others_q[i]));
  }
  soft.grad[label] = binary.grad[0];
  return soft;
}

// Of logits over their temperatures; classes that both mask are left out.
Soft cosine(std::vector<Real> w, std::vector<Real> z) {
  Real dot = 0, student = 0, teacher = 0;
  for (size_t i = 0; i < z.size(); ++i) {
    if (z[i] == -kInf && w[i] == -kInf) z[i] = w[i] = 0;
    dot += z[i] * w[i], student += z[i] * z[i], teacher += w[i] * w[i];
  }
  const Real length = student > 0 ? std::sqrt(student) : 1;
  const Real teacher_length = teacher > 0 ? std::sqrt(teacher) : 1;
  const Real c = dot / (length * teacher_length);
  Soft soft;
  soft.value = 1 - c, soft.size = 1 / length;
  for (size_t i = 0; i < z.size(); ++i) {
    soft.grad.push_back((c * z[i] / length - w[i] / teacher_length) / length);
  }
  return soft;
}

Truth reference(const ForwardArgs& args, const std::vector<Real>& z, const std::vector<Real>& w,
                Real t, int64_t label, bool labelled) {
  Truth truth = {};
  const size_t n = z.size();
  truth.grad.assign(n, 0);
  truth.ignored = labelled && label == args.ignore_index;
  if (truth.ignored) return truth;
  bool any_z = false, any_w = false;
  for (size_t i = 0; i < n; ++i) {
    // As doubles, which they are: compilers compare long doubles with the greatest of them, and
    // that is an infinity under valgrind.
    const double student = static_cast<double>(z[i]), teacher = static_cast<double>(w[i]);
    truth.nan |= std::isnan(student) || std::isnan(teacher) || student == kInf || teacher == kInf;
    truth.nan |=
        args.divergence == Divergence::kCosine && std::isinf(student) != std::isinf(teacher);
    any_z |= student > -kInf;
    any_w |= teacher > -kInf;
  }
  truth.nan |= !any_z || !any_w || !(t > 0) || std::isinf(static_cast<double>(t));
  truth.nan |= labelled && (label < 0 || label >= static_cast<int64_t>(n));
  truth.nan |= !labelled && args.divergence == Divergence::kDecoupled;
  if (truth.nan) return truth;
  const auto log_q = log_softmax(z, t), log_p = log_softmax(w, t), log_1 = log_softmax(z, 1);
  const Real max_z = *std::max_element(z.begin(), z.end());
  const Real max_w = *std::max_element(w.begin(), w.end());
  const Real eps = args.label_smoothing;
  const Soft soft = args.divergence == Divergence::kDecoupled
                        ? decoupled(log_p, log_q, static_cast<size_t>(label), args.mix)
                    : args.divergence == Divergence::kCosine ? cosine(over(w, t), over(z, t))
                                                             : forward_kl(log_p, log_q);
  truth.soft = soft.value, truth.soft_size = t * soft.size;
  for (size_t i = 0; i < n; ++i) {
    const Real p = std::exp(log_p[i]), q = std::exp(log_q[i]);
    if (q > 0) truth.student_entropy -= q * log_q[i];
    if (p > 0) truth.teacher_entropy -= p * log_p[i];
    truth.teacher.push_back(p);
    truth.agreement |= z[i] == max_z && w[i] == max_w;
    truth.grad[i] = args.soft_weight * t * soft.grad[i];
    if (!labelled) continue;
    const bool hit = static_cast<int64_t>(i) == label;
    const Real target = (hit ? 1 - eps : Real(0)) + eps / static_cast<Real>(n);
    if (target > 0) truth.hard -= target * log_1[i];
    truth.grad[i] += args.hard_weight * (std::exp(log_1[i]) - target);
  }
  truth.loss = 0;
  if (args.soft_weight != 0) truth.loss += args.soft_weight * t * t * truth.soft;
  if (args.hard_weight != 0) truth.loss += args.hard_weight * truth.hard;
  for (Real& g : truth.grad) g *= args.scale;
  return truth;
}

// ---- One problem.

Divergence tested = Divergence::kForwardKL;

struct Problem {
  int64_t rows = 3, classes = 10;
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  double temperature = 4;
  Divergence divergence = tested;
  bool row_settings = false;
  double hard_weight = 0.5, soft_weight = 0.5, smoothing = 0;
  bool labels = true, in_place = false;
  int64_t padding = 0, misalignment = 0, group_rows = 0;
  bool student_pixels = false, teacher_pixels = false;
  double noise = 1;  // teacher = student + noise, sigma 3
  double shift = 0;  // added to every teacher logit
};

std::string describe(const Problem& p, const char* isa) {
  char text[256];
  std::snprintf(
      text, sizeof(text),
      "%s %s %lldx%lld types %d/%d t %g rows-t %d weights %g/%g eps %g labels %d in-place %d "
      "pad %lld off %lld groups %lld pixels %d/%d",
      isa, kDivergenceNames[static_cast<int>(p.divergence)], static_cast<long long>(p.rows),
      static_cast<long long>(p.classes), static_cast<int>(p.student), static_cast<int>(p.teacher),
      p.temperature, p.row_settings, p.hard_weight, p.soft_weight, p.smoothing, p.labels,
      p.in_place, static_cast<long long>(p.padding), static_cast<long long>(p.misalignment),
      static_cast<long long>(p.group_rows), p.student_pixels, p.teacher_pixels);
  return text;
}

struct Data {
  Problem problem;
  Matrix student, teacher, grad;
  std::vector<int64_t> labels;
  std::vector<unsigned char> loss, terms, stats, settings;
  ForwardArgs args;

  explicit Data(const Problem& p, unsigned seed = 1)
      : problem(p),
        student(p.rows, p.classes, p.student, p.padding, p.misalignment, p.group_rows,
                p.student_pixels),
        teacher(p.rows, p.classes, p.teacher, 2 * p.padding, p.misalignment, p.group_rows,
                p.teacher_pixels),
        grad(p.rows, p.classes, p.student, p.in_place ? p.padding : 0, p.misalignment, p.group_rows,
             p.student_pixels) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t i = 0; i < p.classes; ++i) {
        student.set(r, i, 3 * normal(random));
        teacher.set(r, i, student.get(r, i) + p.noise * normal(random) + p.shift);
      }
      labels.push_back(static_cast<int64_t>(random() % static_cast<unsigned>(p.classes)));
    }
    const bool fp64 = computes_in_double(p.student, p.teacher);
    const size_t acc = fp64 ? 8 : 4, rows = static_cast<size_t>(p.rows);
    loss.assign(acc * rows, 0xa5);
    terms.assign(acc * rows * kTerms, 0xa5);
    stats.assign(acc * (rows * kStats + 1), 0xa5);
    settings.assign(acc * rows * kRowSettings, 0);
    for (size_t r = 0; r < rows; ++r) {
      const double t = 0.5 + static_cast<double>(r);
      const double of_row[kRowSettings] = {t, t, p.hard_weight, p.soft_weight};
      for (size_t k = 0; k < kRowSettings; ++k) {
        encode(of_row[k], acc_type(), &settings[acc * (k * rows + r)]);
      }
    }
    refresh();
  }

  DType acc_type() const {
    return computes_in_double(problem.student, problem.teacher) ? DType::kFloat64 : DType::kFloat32;
  }
  double acc(const std::vector<unsigned char>& v, int64_t i) const {
    return decode(v.data() + i * size_of(acc_type()), acc_type());
  }

  // Pointers into this object: call again after a copy.
  void refresh() {
    const Problem& p = problem;
    args.rows = p.rows, args.classes = p.classes, args.group_rows = student.group_rows;
    args.student = student.base(), args.student_stride = student.strides();
    args.teacher = teacher.base(), args.teacher_stride = teacher.strides();
    args.student_dtype = p.student, args.teacher_dtype = p.teacher;
    args.labels = p.labels ? labels.data() : nullptr;
    args.row_settings = p.row_settings ? settings.data() : nullptr;
    args.temperature = args.teacher_temperature = p.temperature;
    args.divergence = p.divergence;
    args.hard_weight = p.hard_weight, args.soft_weight = p.soft_weight;
    args.label_smoothing = p.smoothing;
    args.loss = loss.data(), args.stats = stats.data(), args.terms = nullptr;
    args.grad = p.in_place ? student.base() : grad.base();
    args.grad_stride = p.in_place ? student.strides() : grad.strides();
    args.scale = 0.25;
  }
  Data(const Data& other) = delete;

  double temperature_of(int64_t row) const {
    return problem.row_settings ? acc(settings, row) : problem.temperature;
  }
  Truth truth(int64_t row) {
    std::vector<Real> z, w;
    for (int64_t i = 0; i < problem.classes; ++i) {
      z.push_back(student.get(row, i));
      w.push_back(teacher.get(row, i));
    }
    return reference(args, z, w, temperature_of(row), problem.labels ? labels[row] : 0,
                     problem.labels);
  }
};

bool agrees(double got, Real want, double relative, double absolute) {
  const double expected = static_cast<double>(want);
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= relative * std::fabs(expected) + absolute;
}

// `cpu_kernels memory` tries nothing but the use of memory, and that all ways give the same bits:
// what valgrind can tell, where long double is slow, and no longer than double.
bool memory_alone = false;

// Whether the truth has more digits, and a wider range, than what is held to it. Where long double
// has no more than double, it has not for fp64, and for exponents beyond double's range.
bool has_truth(const Problem& p, DType acc) {
  if (memory_alone) return false;
  volatile Real one = 1, less = static_cast<Real>(std::numeric_limits<double>::epsilon()) / 4;
  return one + less != one || (acc != DType::kFloat64 && p.temperature >= 0.01);
}

void check_row(Data& data, const std::vector<Truth>& truths, int64_t r, bool terms) {
  const Problem& p = data.problem;
  if (!has_truth(p, data.acc_type())) return;
  const bool fp64 = data.acc_type() == DType::kFloat64;
  const Truth& truth = truths[static_cast<size_t>(r)];
  // Tempered exponents of 10^4 times the spacing of logits (shift) cost digits that no form keeps.
  const double eps = fp64 ? 2e-14 : 2e-6;
  const double loss = data.acc(data.loss, r);
  const Real want = truth.nan ? static_cast<Real>(kNan) : truth.loss;
  check(agrees(loss, want, eps, eps * 0.1), "loss", loss, static_cast<double>(want));
  if (terms) {
    const Real values[] = {p.labels ? truth.hard : Real(0), truth.soft, truth.student_entropy,
                           truth.teacher_entropy, truth.agreement ? Real(1) : Real(0)};
    const char* names[] = {"hard", "soft", "student entropy", "teacher entropy", "agreement"};
    for (int i = 0; i < kTerms; ++i) {
      const double got = data.acc(data.terms, i * p.rows + r);
      const Real value = truth.nan ? static_cast<Real>(kNan) : values[i];
      check(agrees(got, value, eps, eps), names[i], got, static_cast<double>(value));
    }
  }
  Matrix& grad = p.in_place ? data.student : data.grad;
  const double soft_size = static_cast<double>(truth.soft_size);
  const double size = data.args.scale * (p.hard_weight + p.soft_weight * soft_size);
  for (int64_t i = 0; i < p.classes; ++i) {
    const double got = grad.get(r, i);
    if (truth.nan) {
      check(std::isnan(got), "grad is NaN", got, kNan);
      continue;
    }
    const Real exact = truth.grad[static_cast<size_t>(i)];
    // Half a step of the stored type, and the error of fp32 on the probabilities' scale.
    const double slack = (fp64 ? 1e-14 : 1.5e-6) * size;
    const double half = fp64 && p.student == DType::kFloat64
                            ? 0
                            : 0.5 * spacing(static_cast<double>(exact), p.student);
    check(std::fabs(got - static_cast<double>(exact)) <= half + slack, "grad", got,
          static_cast<double>(exact));
    if (truth.ignored) check(got == 0, "ignored grad", got, 0);
  }
}

void check_stats(Data& data, const std::vector<Truth>& truths) {
  for (int64_t r = 0; r < data.problem.rows; ++r) {
    const Truth& truth = truths[static_cast<size_t>(r)];
    if (truth.nan || truth.ignored || data.problem.in_place) continue;
    if (data.problem.divergence == Divergence::kCosine) continue;  // it leaves others
    Real max = -kInf, sum = 0;
    const auto counts = [&](int64_t i) {
      return data.problem.divergence != Divergence::kDecoupled ||
             i != data.labels[static_cast<size_t>(r)];
    };
    for (int64_t i = 0; i < data.problem.classes; ++i) {
      if (counts(i)) max = std::max(max, static_cast<Real>(data.teacher.get(r, i)));
    }
    if (max == -kInf) max = 0;  // no class but the label
    for (int64_t i = 0; i < data.problem.classes; ++i) {
      if (counts(i)) sum += std::exp((data.teacher.get(r, i) - max) / data.temperature_of(r));
    }
    const Real scale = sum == 0 ? 0 : 1 / sum;
    const double got_max = data.acc(data.stats, kTeacherMax * data.problem.rows + r);
    const double got = data.acc(data.stats, kTeacherScale * data.problem.rows + r);
    check(got_max == static_cast<double>(max), "teacher max", got_max, static_cast<double>(max));
    // The maximum over t is rounded before it is subtracted; all of the row is shifted alike.
    const double shift = static_cast<double>(std::fabs(max)) / data.temperature_of(r);
    check(agrees(got, scale, 1e-6 + 1e-7 * shift, 0), "teacher scale", got,
          static_cast<double>(scale));
  }
}

// Backward with grad_output 1 is forward's gradient to the bit; with 0.5 half of it.
void check_backward(const cpu::Kernels& k, Data& data) {
  if (data.problem.in_place) return;
  BackwardArgs args;
  static_cast<Inputs&>(args) = data.args;
  args.stats = data.stats.data();
  args.grad_stride = data.args.grad_stride;
  for (double gain : {1.0, 0.5}) {
    Matrix grad(data.problem.rows, data.problem.classes, data.problem.student, 0,
                data.problem.misalignment, data.problem.group_rows, data.problem.student_pixels);
    unsigned char grad_output[8];
    encode(gain, data.acc_type(), grad_output);
    args.grad_output = grad_output;
    args.grad = grad.base();
    k.backward(args, 0, args.rows);
    if (gain == 1) {
      check(grad.bytes == data.grad.bytes, "backward is forward's gradient");
      continue;
    }
    for (int64_t r = 0; r < data.problem.rows; ++r) {
      for (int64_t i = 0; i < data.problem.classes; ++i) {
        const double full = data.grad.get(r, i), half = grad.get(r, i);
        if (std::isnan(full)) {
          check(std::isnan(half), "backward keeps NaN", half, full);
        } else {
          check(agrees(half, full / 2, 1e-6, spacing(full, data.problem.student)),
                "backward scales", half, full / 2);
        }
      }
    }
  }
}

// Rows cut into segments give the bits of whole rows.
void check_split(const cpu::Kernels& k, const Problem& p, const Data& whole, unsigned seed,
                 bool terms) {
  Data data(p, seed);
  data.labels = whole.labels;
  if (!p.in_place) {
    data.student.bytes = whole.student.bytes;
    data.teacher.bytes = whole.teacher.bytes;
  }
  data.refresh();
  if (terms) data.args.terms = data.terms.data();
  const int64_t segments = (p.classes + cpu::kSegment - 1) / cpu::kSegment;
  for (int64_t r = p.rows; r-- > 0;) {
    std::vector<cpu::Statistics> statistics(static_cast<size_t>(segments));
    std::vector<cpu::Sums> sums(static_cast<size_t>(segments));
    for (int64_t s = segments; s-- > 0;) k.scan(data.args, r, s, &statistics[s]);
    cpu::Sums balanced = {};
    if (!is_one_sweep(p.divergence)) {
      for (int64_t s = 0; s < segments; ++s) {
        k.balance(data.args, r, s, statistics.data(), &sums[static_cast<size_t>(s)]);
      }
      balanced = cpu::total(sums.data(), segments);
    }
    for (int64_t s = 0; s < segments; ++s) {
      k.write(data.args, r, s, statistics.data(), balanced, &sums[static_cast<size_t>(s)]);
    }
    k.close(data.args, r, statistics.data(), sums.data());
  }
  check(data.grad.bytes == whole.grad.bytes, "split gradient");
  check(data.student.bytes == whole.student.bytes, "split student");
  check(data.loss == whole.loss, "split loss");
  check(data.stats == whole.stats, "split stats");
  if (terms) check(data.terms == whole.terms, "split terms");
}

template <class Edit>
void run(const cpu::Kernels& k, const Problem& p, bool terms, Edit&& edit, unsigned seed = 1) {
  context = describe(p, k.name);
  Data data(p, seed);
  edit(data);
  data.refresh();
  if (terms) data.args.terms = data.terms.data();
  std::vector<Truth> truths;
  for (int64_t r = 0; r < p.rows && !memory_alone; ++r) truths.push_back(data.truth(r));
  const std::vector<unsigned char> student = data.student.bytes;
  k.forward(data.args, 0, p.rows / 2);
  k.forward(data.args, p.rows / 2, p.rows);
  if (!p.in_place) check(data.student.bytes == student, "student untouched");
  for (int64_t r = 0; r < p.rows; ++r) check_row(data, truths, r, terms);
  if (!memory_alone) check_stats(data, truths);
  check_backward(k, data);
  // Nobody cuts rows of the transposed engine into segments, nor rows whose classes are not
  // adjacent.
  const bool whole = cpu::is_transposed(data.args) || cpu::has_apart_classes(data.args);
  if (!whole) check_split(k, p, data, seed, terms);

  // The loss alone: the same bits without a gradient.
  const std::vector<unsigned char> loss = data.loss;
  if (p.in_place) return;
  data.args.grad = nullptr;
  const std::vector<unsigned char> grad = data.grad.bytes;
  k.forward(data.args, 0, p.rows);
  check(data.loss == loss && data.grad.bytes == grad, "loss alone");
}

void run(const cpu::Kernels& k, const Problem& p, bool terms = false) {
  run(k, p, terms, [](Data&) {});
}

void test_types(const cpu::Kernels& k) {
  for (DType student : kTypes) {
    for (DType teacher : kTypes) {
      for (double t : {1.0, 2.0, 3.0, 4.0, 0.7}) {
        Problem p;
        p.student = student, p.teacher = teacher, p.temperature = t, p.classes = cpu::kNarrow + 29;
        run(k, p, t == 2);
        p.classes = 1056, p.misalignment = 1, p.smoothing = 0.1;
        run(k, p, t == 0.7);
      }
    }
  }
}

// Every edge of a vector, of a block and of a segment, and one either side of it.
void test_widths(const cpu::Kernels& k) {
  constexpr int64_t kNarrow = cpu::kNarrow, kSegment = cpu::kSegment;
  constexpr int64_t kWidths[] = {
      1,        2,           3,    7,    10,          15,      16,          17,    31,
      32,       33,          63,   65,   100,         127,     129,         511,   1000,
      1023,     1024,        1025, 2049, kNarrow - 1, kNarrow, kNarrow + 1, 16384, kSegment - 1,
      kSegment, kSegment + 1};
  for (DType type : kTypes) {
    for (int64_t n : kWidths) {
      Problem p;
      p.student = p.teacher = type, p.classes = n, p.rows = n > 3000 ? 1 : 3;
      run(k, p);
      p.in_place = true, p.padding = 3;
      run(k, p);
    }
  }
}

// Gradients that are written past the caches, in rows that begin anywhere; of one segment, and of
// three, whose exponentials are kept where the last rows' gradients will be.
void test_large_gradients(const cpu::Kernels& k) {
  Problem p;
  p.rows = 1537, p.classes = 2049, p.misalignment = 1, p.padding = 3;
  run(k, p);
  p.rows = 49, p.classes = 2 * cpu::kSegment + 5, p.padding = 0;
  run(k, p);
  if (memory_alone) return;  // the same, and long
  p.rows = 3080, p.classes = 2049, p.student = p.teacher = DType::kBFloat16;
  run(k, p);
}

void test_options(const cpu::Kernels& k) {
  for (DType type : kTypes) {
    Problem base;
    base.student = base.teacher = type, base.classes = 1234, base.rows = 4;
    for (double hard : {0.0, 0.3, 1.0}) {
      for (double smoothing : {0.0, 0.1, 1.0}) {
        Problem p = base;
        p.hard_weight = hard, p.soft_weight = 1 - hard, p.smoothing = smoothing;
        run(k, p);
        run(k, p, true);
        p.row_settings = true;
        run(k, p);
      }
    }
    Problem p = base;
    p.labels = false;
    run(k, p);
    run(k, p, true);
    for (int64_t offset : {1, 3, 5, 8}) {
      p = base;
      p.misalignment = offset, p.padding = offset;
      run(k, p);
      p.group_rows = 2;
      run(k, p);
    }
    p = base;
    p.shift = 64;
    run(k, p);
  }
}

void test_labels(const cpu::Kernels& k) {
  for (DType type : kTypes) {
    for (bool in_place : {false, true}) {
      Problem p;
      p.student = p.teacher = type, p.rows = 5, p.classes = 1025, p.in_place = in_place;
      run(k, p, true, [](Data& data) {
        data.labels = {-100, 1024, -1, 1025, 0};
        data.student.set(0, 3, kNan);  // an ignored row is not read
      });
    }
  }
}

void test_infinities(const cpu::Kernels& k) {
  for (DType type : kTypes) {
    for (double hard : {0.0, 0.5}) {
      Problem p;
      p.student = p.teacher = type, p.rows = 10, p.classes = 3001;
      p.hard_weight = hard, p.soft_weight = 1 - hard;
      run(k, p, true, [](Data& data) {
        for (int64_t r = 0; r < 10; ++r) data.labels[static_cast<size_t>(r)] = 17;
        data.teacher.set(0, 5, -kInf);  // masked in the teacher, in the student, in both
        data.student.set(1, 5, -kInf);
        for (int64_t i = 1024; i < 3001; ++i) {
          data.student.set(2, i, -kInf);
          data.teacher.set(2, i, -kInf);
        }
        for (int64_t i = 0; i < 3001; ++i) {  // masked blocks come first
          if (i < 2000 && i != 17) data.student.set(3, i, -kInf), data.teacher.set(3, i, -kInf);
          data.student.set(4, i, -kInf);
          data.teacher.set(5, i, -kInf);
        }
        data.student.set(6, 2000, kNan);
        data.teacher.set(7, 3000, kNan);
        data.student.set(8, 0, kInf);
        data.teacher.set(9, 1024, kInf);
      });
    }
  }
}

// Pixels beside each other: fewer than a tile, whole tiles and more, in groups that tiles straddle;
// classes of one block, of several, and of more than a tile keeps.
void test_pixels(const cpu::Kernels& k) {
  for (DType type : kTypes) {
    for (int64_t classes : {int64_t{1}, int64_t{2}, int64_t{19}, cpu::kNarrow - 1, cpu::kNarrow,
                            cpu::kNarrow + 1, int64_t{150}, int64_t{513}, int64_t{1025}}) {
      Problem p;
      p.student = p.teacher = type, p.classes = classes, p.rows = 70;
      p.student_pixels = p.teacher_pixels = true;
      p.temperature = classes % 2 ? 2 : 0.7;
      run(k, p, classes % 2 == 0);
      p.group_rows = 10, p.padding = 3, p.misalignment = 1, p.smoothing = 0.1;
      run(k, p, true);
      p.in_place = true;
      run(k, p);
      p.in_place = false, p.row_settings = true, p.group_rows = 35;
      run(k, p);
      p.student_pixels = false;
      run(k, p);
      p.student_pixels = true, p.teacher_pixels = false, p.row_settings = false;
      p.student = DType::kFloat32, p.rows = 40;
      run(k, p);
      p.labels = false;
      run(k, p, true);
      if (classes < 19) continue;
      p = Problem{};
      p.student = p.teacher = type, p.classes = classes, p.rows = 10;
      p.student_pixels = p.teacher_pixels = true;
      run(k, p, true, [](Data& data) {
        data.labels = {-100, 1, -1, data.problem.classes, 0, 1, 1, 1, 1, 1};
        data.student.set(0, 3, kNan);
        data.teacher.set(4, 5, -kInf);
        data.student.set(5, 5, -kInf);
        for (int64_t i = 0; i < data.problem.classes; ++i) data.student.set(6, i, -kInf);
        data.student.set(7, 18, kNan);
        data.teacher.set(8, 2, kInf);
      });
    }
  }
}

void test_temperatures(const cpu::Kernels& k) {
  for (double t : {0.0, -1.0, kInf, kNan, 1e-3, 50.0}) {
    Problem p;
    p.temperature = t;
    run(k, p, true);
  }
}

// The student masks a class, and the teacher's probability of it underflows: still infinite.
void test_underflow(const cpu::Kernels& k) {
  Problem p;
  p.temperature = 1, p.soft_weight = 1, p.hard_weight = 0, p.rows = 1;
  Data data(p);
  data.teacher.set(0, 4, -500);
  data.student.set(0, 4, -kInf);
  data.refresh();
  k.forward(data.args, 0, 1);
  context = std::string(k.name) + " underflow";
  check(data.acc(data.loss, 0) == kInf, "loss", data.acc(data.loss, 0), kInf);
  check(data.grad.get(0, 4) == 0, "grad", data.grad.get(0, 4), 0);
}

// KL = 5e-7: differences of log-probabilities lose a third of it in fp32.
void test_cancellation(const cpu::Kernels& k) {
  for (double noise : {4e-3, 1e-1}) {
    Problem p;
    p.classes = 32000, p.rows = 4, p.noise = noise, p.hard_weight = 0, p.soft_weight = 1;
    Data data(p);
    context = describe(p, k.name) + " small KL";
    k.forward(data.args, 0, p.rows);
    for (int64_t r = 0; r < p.rows; ++r) {
      const Truth truth = data.truth(r);
      const double got = data.acc(data.loss, r), want = static_cast<double>(truth.loss);
      // Of the cosine two vectors are rounded whose difference it is.
      const double limit = p.divergence == Divergence::kCosine ? 1e-6 : 4e-7;
      check(std::fabs(got / want - 1) < limit, "loss", got, want);
      if (r == 0) std::printf("  KL %.2e: relative error %.1e\n", want / 16, got / want - 1);
      if (p.divergence == Divergence::kCosine) continue;  // its gradient is no probability's
      for (int64_t i = 0; i < p.classes; ++i) {
        const double exact = static_cast<double>(truth.grad[static_cast<size_t>(i)]);
        const double p = static_cast<double>(truth.teacher[static_cast<size_t>(i)]);
        check(std::fabs(data.grad.get(r, i) - exact) <= 2e-7 * data.args.scale * 4 * p, "grad",
              data.grad.get(r, i), exact);
      }
    }
  }
}

// A 16-bit gradient is the exact one rounded once: its error is hardly above that of rounding.
void test_rounding(const cpu::Kernels& k) {
  for (DType type : {DType::kFloat16, DType::kBFloat16}) {
    Problem p;
    p.student = p.teacher = type, p.classes = 5000, p.temperature = 2;
    Data data(p);
    context = describe(p, k.name) + " rounding";
    k.forward(data.args, 0, p.rows);
    double ours = 0, best = 0;
    for (int64_t r = 0; r < p.rows; ++r) {
      const Truth truth = data.truth(r);
      for (int64_t i = 0; i < p.classes; ++i) {
        const double exact = static_cast<double>(truth.grad[static_cast<size_t>(i)]);
        ours += std::fabs(data.grad.get(r, i) - exact);
        best += std::fabs(rounded(exact, type) - exact);
      }
    }
    check(ours <= 1.01 * best, "error over that of correct rounding", ours / best, 1);
  }
}

void test_exponential(const cpu::Kernels& k, bool by_registers) {
  context = std::string(k.name) + (by_registers ? " exp2, registers" : " exp2");
  constexpr int64_t kBatch = 1 << 16;
  std::vector<float> in(kBatch), out(kBatch);
  double worst = 0;
  // Every 61st float of [-126, 128), both signs.
  for (int sign = 0; sign < 2; ++sign) {
    float limit = sign != 0 ? 126.0f : 127.99999f;
    uint32_t last, bits = 0;
    std::memcpy(&last, &limit, 4);
    while (bits <= last) {
      for (int64_t i = 0; i < kBatch; ++i, bits += 61) {
        const uint32_t used = std::min(bits, last);
        std::memcpy(&in[static_cast<size_t>(i)], &used, 4);
        if (sign != 0) in[static_cast<size_t>(i)] = -in[static_cast<size_t>(i)];
      }
      k.exp2(in.data(), out.data(), kBatch, by_registers);
      for (size_t i = 0; i < static_cast<size_t>(kBatch); ++i) {
        const double want = std::exp2(static_cast<double>(in[i]));
        worst = std::max(worst, std::fabs(out[i] - want) / spacing(want, DType::kFloat32));
      }
    }
  }
  std::printf("  exp2%s: worst error %.3f ulp\n", by_registers ? ", registers" : "", worst);
  const std::string name = k.name;  // the x86 baseline has no FMA
  const double bound = name == "default" ? 1.3 : name == "avx2" && by_registers ? 1.2 : 1.0;
  check(worst <= bound, "ulp", worst, bound);
  const float edges[] = {
      0, -0.0f, -126.0001f, -1e30f, -static_cast<float>(kInf), static_cast<float>(kNan)};
  float results[6];
  k.exp2(edges, results, 6, by_registers);
  check(results[0] == 1 && results[1] == 1, "2^0", results[0], 1);
  check(results[2] == 0 && results[3] == 0 && results[4] == 0, "flush to zero", results[2], 0);
  check(std::isnan(results[5]), "2^NaN", results[5], kNan);
}

void test_selection() {
  context = "selection";
  int count = 0;
  for (const cpu::Kernels* const* k = cpu::available(); *k != nullptr; ++k, ++count) {
    check(cpu::select((*k)->name) && &cpu::kernels() == *k, (*k)->name);
  }
  check(count > 0, "some kernels");
  const cpu::Kernels* before = &cpu::kernels();
  check(!cpu::select("no such thing") && &cpu::kernels() == before, "unknown name");
}

}  // namespace

int main(int argc, char** argv) {
  memory_alone = argc > 1 && std::strcmp(argv[1], "memory") == 0;
  const char* const only = argc > 1 && !memory_alone ? argv[1] : nullptr;
  test_selection();
  for (const cpu::Kernels* const* k = cpu::available(); *k != nullptr; ++k) {
    if (only != nullptr && std::strcmp((*k)->name, only) != 0) continue;
    std::printf("%s\n", (*k)->name);
    for (const bool by_registers : {false, true}) {
      if (!memory_alone) test_exponential(**k, by_registers);
    }
    tested = Divergence::kForwardKL;
    test_large_gradients(**k);
    for (const Divergence divergence :
         {Divergence::kForwardKL, Divergence::kDecoupled, Divergence::kCosine}) {
      tested = divergence;
      test_types(**k);
      test_widths(**k);
      test_options(**k);
      test_labels(**k);
      test_infinities(**k);
      test_pixels(**k);
      test_temperatures(**k);
      if (divergence != Divergence::kCosine) test_underflow(**k);
      if (memory_alone) continue;
      test_cancellation(**k);
      test_rounding(**k);
    }
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
