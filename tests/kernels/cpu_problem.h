// One problem for the tests of the CPU kernels: its data, a run, and the checks of the results.
#pragma once
#include <cstdio>
#include <random>
#include <string>

#include "cpu_truth.h"

namespace {

int failures = 0;
std::string context;

void check(bool ok, const char* what, double got = 0, double want = 0) {
  if (ok) return;
  if (++failures <= 40) {
    std::printf("FAIL %s: %s, got %.9g, want %.9g\n", context.c_str(), what, got, want);
  }
}

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
  double noise = 1;  // standard deviation of teacher - student
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

  // Set `args`, whose pointers point into this object.
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

// True in the mode `cpu_kernels memory`, which does not compare results with the reference: under
// valgrind, long double is slow and has the precision of double.
bool memory_only = false;

// Return true if the reference is precise enough to check the results. A reference in double is too
// imprecise for fp64 results, and its range is too narrow for low temperatures.
bool has_truth(const Problem& p, DType acc) {
  if (memory_only) return false;
  volatile Real one = 1, less = static_cast<Real>(std::numeric_limits<double>::epsilon()) / 4;
  return one + less != one || (acc != DType::kFloat64 && p.temperature >= 0.01);
}

void check_row(Data& data, const std::vector<Truth>& truths, int64_t r, bool terms) {
  const Problem& p = data.problem;
  if (!has_truth(p, data.acc_type())) return;
  const bool fp64 = data.acc_type() == DType::kFloat64;
  const Truth& truth = truths[static_cast<size_t>(r)];
  // The bounds allow for large exponents, which lose digits in any formula.
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
    // The error is at most the compute type's error at the size of the probabilities. Rounding to a
    // stored type other than fp64 adds half a unit in the last place.
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
    if (data.problem.divergence == Divergence::kCosine)
      continue;  // the statistics of the cosine are not those of a softmax
    Real max = -kInf, sum = 0;
    const auto counts = [&](int64_t i) {
      return data.problem.divergence != Divergence::kDecoupled ||
             i != data.labels[static_cast<size_t>(r)];
    };
    for (int64_t i = 0; i < data.problem.classes; ++i) {
      if (counts(i)) max = std::max(max, static_cast<Real>(data.teacher.get(r, i)));
    }
    if (max == -kInf) max = 0;  // all classes but the label are masked
    for (int64_t i = 0; i < data.problem.classes; ++i) {
      if (counts(i)) sum += std::exp((data.teacher.get(r, i) - max) / data.temperature_of(r));
    }
    const Real scale = sum == 0 ? 0 : 1 / sum;
    const double got_max = data.acc(data.stats, kTeacherMax * data.problem.rows + r);
    const double got = data.acc(data.stats, kTeacherScale * data.problem.rows + r);
    check(got_max == static_cast<double>(max), "teacher max", got_max, static_cast<double>(max));
    // The bound allows a rounding of max / t, which would shift all classes of the row alike.
    const double shift = static_cast<double>(std::fabs(max)) / data.temperature_of(r);
    check(agrees(got, scale, 1e-6 + 1e-7 * shift, 0), "teacher scale", got,
          static_cast<double>(scale));
  }
}

// Check that backward with grad_output 1 gives forward's bits, and that 0.5 gives half the
// gradient.
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

// Check that rows divided into segments give the bits of undivided rows.
void check_split(const cpu::Kernels& k, const Problem& p, const Data& expected, unsigned seed,
                 bool terms) {
  Data data(p, seed);
  data.labels = expected.labels;
  if (!p.in_place) {
    data.student.bytes = expected.student.bytes;
    data.teacher.bytes = expected.teacher.bytes;
  }
  data.refresh();
  if (terms) data.args.terms = data.terms.data();
  const int64_t segments = (p.classes + cpu::kSegment - 1) / cpu::kSegment;
  for (int64_t r = p.rows; r-- > 0;) {
    std::vector<cpu::Statistics> statistics(static_cast<size_t>(segments));
    std::vector<cpu::Sums> sums(static_cast<size_t>(segments));
    for (int64_t s = segments; s-- > 0;) k.scan(data.args, r, s, &statistics[s]);
    cpu::Sums slope_sums = {};
    if (!is_one_sweep(p.divergence)) {
      for (int64_t s = 0; s < segments; ++s) {
        k.sum_slopes(data.args, r, s, statistics.data(), &sums[static_cast<size_t>(s)]);
      }
      slope_sums = cpu::total(sums.data(), segments);
    }
    for (int64_t s = 0; s < segments; ++s) {
      k.write(data.args, r, s, statistics.data(), slope_sums, &sums[static_cast<size_t>(s)]);
    }
    k.close(data.args, r, statistics.data(), sums.data());
  }
  check(data.grad.bytes == expected.grad.bytes, "split gradient");
  check(data.student.bytes == expected.student.bytes, "split student");
  check(data.loss == expected.loss, "split loss");
  check(data.stats == expected.stats, "split stats");
  if (terms) check(data.terms == expected.terms, "split terms");
}

template <class Edit>
void run(const cpu::Kernels& k, const Problem& p, bool terms, Edit&& edit, unsigned seed = 1) {
  context = describe(p, k.name);
  Data data(p, seed);
  edit(data);
  data.refresh();
  if (terms) data.args.terms = data.terms.data();
  std::vector<Truth> truths;
  for (int64_t r = 0; r < p.rows && !memory_only; ++r) truths.push_back(data.truth(r));
  const std::vector<unsigned char> student = data.student.bytes;
  k.forward(data.args, 0, p.rows / 2);
  k.forward(data.args, p.rows / 2, p.rows);
  if (!p.in_place) check(data.student.bytes == student, "student untouched");
  for (int64_t r = 0; r < p.rows; ++r) check_row(data, truths, r, terms);
  if (!memory_only) check_stats(data, truths);
  check_backward(k, data);
  // The transposed layout has no segments, and callers do not divide rows whose classes are not
  // adjacent.
  const bool is_unsplit = cpu::is_transposed(data.args) || cpu::has_apart_classes(data.args);
  if (!is_unsplit) check_split(k, p, data, seed, terms);

  // Check that the loss has equal bits without a gradient.
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

}  // namespace
