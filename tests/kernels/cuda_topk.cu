// Check the CUDA kernels of the sparse loss against its definition in double on the host, without
// torch. The program prints at most three lines per failed case and a summary; the exit status is
// the number of failed cases, at most 90, or 99 after a CUDA error. `cuda_topk --short` runs a
// reduced set, for compute-sanitizer and for the emulation.
#include <algorithm>
#include <cstring>
#include <string>

#include "topk_reference.h"

namespace {

// Test one case: loss, terms and gradient, a second run with the same bits, and three forms of
// backward: a filled gradient, a recomputed gradient, and one grad_output for each row.
struct Runner {
  const Case& c;
  bool wide;
  DType acc;
  int64_t group;
  RowStrides student_stride, grad_stride;
  int64_t k;
  int failures = 0;

  explicit Runner(const Case& which) : c(which) {
    wide = c.student == DType::kFloat64 || c.wide_lists;
    acc = wide ? DType::kFloat64 : DType::kFloat32;
    group = c.group_rows > 0 ? c.group_rows : c.rows;
    student_stride.row = c.classes + c.student_pad;
    student_stride.group = group * student_stride.row + 5;
    grad_stride.row = c.classes + c.grad_pad;
    grad_stride.group = group * grad_stride.row;
    k = c.k;
  }
  int64_t extent(RowStrides stride) const {
    return (c.rows + group - 1) / group * stride.group + stride.row;
  }
  void fail(const char* what, int64_t row, int64_t i, double got, double want) {
    if (failures++ < 3)
      std::printf(
          "FAIL %s [V=%lld k=%lld dtype %d tail %d divergence %d estimator %d]: %s row %lld class "
          "%lld: got %.9g, want %.9g\n",
          c.name.c_str(), static_cast<long long>(c.classes), static_cast<long long>(k),
          static_cast<int>(c.student), static_cast<int>(c.tail), static_cast<int>(c.divergence),
          static_cast<int>(c.estimator), what, static_cast<long long>(row),
          static_cast<long long>(i), got, want);
  }
  // Make a row: a teacher, whose greatest classes are listed in permuted order, and a student with
  // the teacher's logits and noise. Then make the changes that the case asks for.
  Row make_row(Random& random, int64_t index) const {
    Row row;
    const size_t n = static_cast<size_t>(c.classes);
    std::vector<double> w(n);
    row.z.resize(n);
    for (size_t i = 0; i < n; i++) {
      w[i] = 3 * random.normal() / c.temperature;
      row.z[i] = w[i] * c.temperature + c.noise * random.normal();
    }
    const double all = log_sum(w);
    std::vector<std::pair<double, int64_t>> order(n);
    for (size_t i = 0; i < n; i++) order[i] = {-w[i], static_cast<int64_t>(i)};
    std::partial_sort(order.begin(), order.begin() + k, order.end());
    row.ids.resize(static_cast<size_t>(k)), row.log_p.resize(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; i++) {
      const int64_t to = (i * 7 + index) % k;  // a permutation, since k is no multiple of 7
      row.ids[to] = order[i].second, row.log_p[to] = -order[i].first - all;
    }
    double mass = 0;
    for (int64_t i = 0; i < k; i++) {
      if (c.padding == 1 || random.uniform() < c.padding) row.ids[i] = i % 2 ? -1 : -(1ll << 60);
      if (row.ids[i] >= 0) mass += std::exp(row.log_p[i]), row.z[row.ids[i]] += c.gap;
    }
    for (int64_t i = 0; i < k; i++) {
      if (c.mass > 0) row.log_p[i] += std::log(c.mass / mass);
      if (c.impossible) row.log_p[i] = -kInfinity;
      if (row.ids[i] < 0) row.log_p[i] = NAN;
    }
    row.label = index % 2 ? std::max<int64_t>(0, row.ids[0])
                          : static_cast<int64_t>(random.uniform() * c.classes);
    if (index == 0) row.label = c.classes - 1;
    if (c.masked_rest || c.masked_list)
      for (int64_t i = 0; i < c.classes; i++) {
        const bool listed = std::find(row.ids.begin(), row.ids.end(), i) != row.ids.end();
        if (i != row.label && (listed ? c.masked_list && i % 3 == 0 : c.masked_rest))
          row.z[i] = -kInfinity;
      }
    for (double& z : row.z) z += c.base;
    if (c.nan && index == 1) row.z[c.classes / 2] = NAN;
    if (c.nan && index == 2) row.z[row.ids[0] < 0 ? 0 : row.ids[0]] = kInfinity;
    if (index % 2 == 0) spoil(row);
    return row;
  }
  // Return the case with the options of one row.
  Case of_row(int64_t row) const {
    Case result = c;
    if (!c.row_settings) return result;
    result.temperature *= 1 + row % 3, result.hard_weight *= row % 2, result.soft_weight *= row % 4;
    return result;
  }
  void spoil(Row& row) const {
    switch (c.mistake) {
      case Mistake::kNone:
        break;
      case Mistake::kTwice:
        row.ids[0] = row.ids[k - 1] = c.classes - 1, row.log_p[0] = row.log_p[k - 1] = -9;
        break;
      case Mistake::kOutOfRange:
        row.ids[k / 2] = c.classes, row.log_p[k / 2] = -9;
        break;
      case Mistake::kTooMuch:
        row.ids[0] = 0, row.log_p[0] = 0.2;
        break;
      case Mistake::kNaN:
        row.ids[0] = 0, row.log_p[0] = NAN;
        break;
    }
  }
  void run();
};

void Runner::run() {
  const int64_t es = size_of(c.student), ea = size_of(acc);
  Buffer student(extent(student_stride) * es, c.student_offset * es);
  Buffer grad(extent(grad_stride) * es, c.grad_offset * es);
  Buffer ids(c.rows * k * 8), log_probs(c.rows * k * ea), labels(c.rows * 8), loss(c.rows * ea);
  Buffer stats((c.rows * kStats + 1) * ea), grad_output(c.rows * ea);
  Buffer terms(kTopkTerms * c.rows * ea), total((1 + kTopkTerms) * ea);
  Random random{static_cast<uint64_t>(c.classes * 1000003 + c.rows)};
  std::vector<Reference> want;
  int64_t counted = 0;
  for (int64_t r = 0; r < c.rows; r++) {
    Row row = make_row(random, r);
    const int64_t at = row_offset(r, group, student_stride);
    for (int64_t i = 0; i < c.classes; i++) {
      store(student.host.data(), c.student, at + i, row.z[i]);
      row.z[i] = load(student.host.data(), c.student, at + i);
    }
    for (int64_t i = 0; i < k; i++) {
      reinterpret_cast<int64_t*>(ids.host.data())[r * k + i] = row.ids[i];
      store(log_probs.host.data(), acc, r * k + i, row.log_p[i]);
      row.log_p[i] = load(log_probs.host.data(), acc, r * k + i);
    }
    row.ignored = c.labels && c.ignored && r % 3 == 1 && c.rows > 1;
    if (row.ignored) row.label = -100;
    if (c.bad_label && r == 2) row.label = c.classes;
    reinterpret_cast<int64_t*>(labels.host.data())[r] = row.label;
    store(grad_output.host.data(), acc, r, 1.0);
    counted += !row.ignored;
    want.push_back(reference_row(of_row(r), row));
  }
  Buffer settings(c.rows * kRowSettings * ea);
  for (int64_t r = 0; r < c.rows; r++) {
    const Case row_case = of_row(r);
    const double numbers[] = {row_case.temperature, row_case.temperature, row_case.hard_weight,
                              row_case.soft_weight};
    for (int i = 0; i < kRowSettings; i++)
      store(settings.host.data(), acc, i * c.rows + r, numbers[i]);
  }
  settings.up();
  student.up(), ids.up(), log_probs.up(), labels.up(), grad_output.up();
  check(cudaMemset(grad.at(), 0xff, grad.host.size()), "poison");

  TopkArgs args;
  args.rows = c.rows, args.classes = c.classes, args.group_rows = group, args.k = k;
  args.student = student.at(), args.student_stride = student_stride;
  args.student_dtype = c.student, args.teacher_dtype = acc;
  args.teacher = log_probs.at(), args.indices = static_cast<const int64_t*>(ids.at());
  args.labels = c.labels ? static_cast<const int64_t*>(labels.at()) : nullptr;
  args.temperature = args.teacher_temperature = c.temperature;
  args.hard_weight = c.labels ? c.hard_weight : 0, args.soft_weight = c.soft_weight;
  args.label_smoothing = c.smoothing, args.tail = c.tail, args.reduction = c.reduction;
  args.divergence = c.divergence, args.mix = c.mix, args.estimator = c.estimator;
  args.row_settings = c.row_settings ? settings.at() : nullptr;
  args.loss = loss.at(), args.stats = stats.at();
  args.grad = c.gradient ? grad.at() : nullptr, args.grad_stride = grad_stride;
  // A call with a total uses the rows' losses and terms as scratch memory. A call without a total
  // returns the losses and terms to compare.
  TopkArgs each_row = args;
  each_row.reduction = Reduction::kNone, each_row.grad = nullptr, each_row.terms = terms.at();
  check(cuda::topk(each_row, nullptr, nullptr, nullptr), c.name.c_str());
  check(cudaDeviceSynchronize(), c.name.c_str());
  loss.down(), terms.down();
  void* sum_at = c.reduction == Reduction::kNone ? nullptr : total.at();
  check(cuda::topk(args, sum_at, nullptr, nullptr), c.name.c_str());
  check(cudaDeviceSynchronize(), c.name.c_str());
  grad.down(), total.down();
  const std::vector<char> first = grad.host;
  const double scale = c.reduction == Reduction::kMean ? 1.0 / (counted > 0 ? counted : 1) : 1.0;
  const double eps = c.student == DType::kBFloat16  ? 4.0e-3
                     : c.student == DType::kFloat16 ? 5.0e-4
                     : c.student == DType::kFloat32 ? (wide ? 2e-7 : 3e-6)
                                                    : 1e-10;
  const double tiny = c.student == DType::kFloat16 ? 6e-8 : (wide ? 1e-16 : 6e-8 * scale);
  const auto check_grad = [&](const std::vector<char>& got, double factor, const char* what) {
    for (int64_t r = 0; r < c.rows; r++)
      for (int64_t i = 0; i < c.classes; i++) {
        const double g = load(got.data(), c.student, row_offset(r, group, grad_stride) + i);
        const double w = want[r].grad[i] * scale * factor;
        if (!close(g, w, tiny * std::fmax(1.0, std::fabs(factor)), eps))
          return fail(what, r, i, g, w);
      }
  };
  double sum = 0, term_sums[kTopkTerms] = {};
  for (int64_t r = 0; r < c.rows; r++) {
    sum += want[r].loss;
    for (int i = 0; i < kTopkTerms; i++) {
      term_sums[i] += want[r].terms[i];
      // The check of the loss, below, tests the soft term with a smaller tolerance.
      const double got = load(terms.host.data(), acc, i * c.rows + r), truth = want[r].terms[i];
      if (!close(got, truth, wide ? 1e-12 : 2e-6, wide ? 1e-11 : 5e-6))
        fail("term", r, i, got, truth);
    }
    const double got = load(loss.host.data(), acc, r);
    // Rounding errors of the student's probabilities change a divergence D in proportion to
    // sqrt(D), the size of its gradient. For a student near the teacher, the loss is small and must
    // still be accurate. With Tail::kIgnore, D is less accurate, because the kernel's terms contain
    // q - p, whose sum the kernel subtracts again.
    const bool near = c.noise < 0.1 && c.tail != Tail::kIgnore;
    const double absolute = wide ? 1e-13 : near ? 1e-7 * std::sqrt(want[r].loss) : 1e-6;
    if (!close(got, want[r].loss, absolute, wide ? 1e-12 : near ? 1e-6 : 3e-6))
      fail("loss", r, 0, got, want[r].loss);
  }
  if (sum_at != nullptr && !close(load(total.host.data(), acc, 0), sum * scale, 1e-6, 1e-5))
    fail("total", 0, 0, load(total.host.data(), acc, 0), sum * scale);
  if (sum_at != nullptr) {
    TopkArgs with_terms = args;
    with_terms.terms = terms.at();
    check(cuda::topk(with_terms, sum_at, nullptr, nullptr), "terms");
    total.down();
    for (int i = 0; i < kTopkTerms; i++) {
      const double got = load(total.host.data(), acc, 1 + i);
      if (!close(got, term_sums[i] * scale, 2e-6, 1e-5))
        fail("total of a term", 0, i, got, term_sums[i] * scale);
    }
  }
  if (!c.gradient) return;
  check_grad(first, 1, "grad");
  check(cuda::topk(args, sum_at, nullptr, nullptr), "again");
  grad.down();
  if (std::memcmp(first.data(), grad.host.data(), first.size()) != 0) fail("repeat", 0, 0, 0, 0);

  args.loss = nullptr, args.grad_output = grad_output.at();
  const auto backward = [&](bool filled, const char* what) {
    check(cuda::topk_backward(args, filled, nullptr, nullptr), what);
    check(cudaDeviceSynchronize(), what);
    grad.down();
  };
  backward(true, "backward filled, 1");
  if (std::memcmp(first.data(), grad.host.data(), first.size()) != 0)
    fail("backward filled, 1", 0, 0, 0, 0);
  check(cudaMemset(grad.at(), 0xff, grad.host.size()), "poison");
  backward(false, "backward recomputed");
  if (std::memcmp(first.data(), grad.host.data(), first.size()) != 0)
    fail("backward recomputed, bitwise", 0, 0, 0, 0);
  store(grad_output.host.data(), acc, 0, 3.0);
  grad_output.up();
  backward(true, "backward filled, 3");
  check_grad(grad.host, 3, "backward filled, 3");
  for (int64_t r = 0; r < c.rows; r++) store(grad_output.host.data(), acc, r, 0.5);
  grad_output.up();
  args.grad_output_per_row = true;
  backward(false, "backward per row");
  check_grad(grad.host, 0.5, "backward per row");
}

void test(Case c, const char* name) {
  c.name = name;
  c.k = std::min(c.k, c.classes);
  if (c.k % 7 == 0) c.k--;
  if (c.k == 0) c.k = 1;
  Runner runner(c);
  runner.run();
  total_failures += runner.failures != 0;
  total_cases++;
}

constexpr DType kHot[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};
constexpr DType kAll[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64};
constexpr Tail kTails[] = {Tail::kGhost, Tail::kRenormalize, Tail::kIgnore};

// Test rows of one class; of fewer classes than a vector; of one and of many vectors per thread;
// and rows whose map of listed classes has several pieces.
void sizes(bool brief) {
  const std::vector<int64_t> all = {1,     2,     7,      33,     63,    64,   65,
                                    127,   255,   513,    1000,   1025,  4097, 8192,
                                    20001, 50257, 128257, 270011, 600005};
  const std::vector<int64_t> few = {2, 63, 65, 1000, 4099, 130001, 270011};
  for (const int64_t classes : brief ? few : all)
    for (const DType dtype : kAll)
      for (const int64_t k : {1, 64, 300}) {
        if (k > 1 && k / 2 > classes) continue;
        if (brief && classes > 100000 && (k != 64 || dtype == DType::kFloat16)) continue;
        Case c;
        c.classes = classes, c.student = dtype, c.k = k, c.tail = kTails[(classes + k) % 3];
        c.rows = classes > 20000 ? 2 : 9;
        c.ignored = c.rows > 2;
        test(c, "sizes");
      }
}
void layouts(bool brief) {
  for (const int64_t classes : {70, 777, 9001})
    for (const DType dtype : kHot)
      for (int i = 0; i < 8; i++) {
        if (brief && classes == 9001) continue;
        Case c;
        c.classes = classes, c.student = dtype, c.rows = 7, c.tail = kTails[i % 3];
        c.k = i < 6 ? 12 : classes;
        c.student_offset = i, c.grad_offset = 3 * i % 8;
        c.student_pad = i % 4 == 2 ? 3 : 0, c.grad_pad = i % 4 == 1 ? 1 : 0;
        c.group_rows = i % 4 == 3 ? 3 : 0;
        test(c, "layouts");
      }
}
void options(bool brief) {
  for (const int64_t classes : {10, 100, 1000, 10000})
    for (const Tail tail : kTails)
      for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
        if (brief && (classes == 10000 || classes == 100)) continue;
        Case c;
        c.classes = classes, c.student = dtype, c.tail = tail, c.rows = 6;
        for (const double t : {0.7, 1.0, 1.5, 3.0, 4.0}) {
          Case d = c;
          d.temperature = t, d.smoothing = t == 3 ? 0.3 : 0, test(d, "temperature");
        }
        Case d = c;
        d.bad_label = true, d.ignored = false, test(d, "bad label");
        d = c, d.labels = false, test(d, "no labels");
        d = c, d.smoothing = 1, test(d, "smoothing 1");
        d = c, d.reduction = Reduction::kSum, test(d, "sum");
        d = c, d.reduction = Reduction::kNone, test(d, "none");
        d = c, d.gradient = false, test(d, "loss alone");
        d = c, d.hard_weight = 0, d.soft_weight = 1, test(d, "soft only");
        d = c, d.hard_weight = 1, d.soft_weight = 0, test(d, "hard only");
        d = c, d.padding = 1, test(d, "nothing listed");
        d = c, d.padding = 0, d.k = classes, test(d, "everything listed");
        d = c, d.mass = 1.05, test(d, "a mass above 1");
        d = c, d.gap = 25, test(d, "little is left outside the list");
        d = c, d.impossible = true, test(d, "padding of -inf");
        d = c, d.masked_rest = true, test(d, "masked rest");
        d = c, d.masked_list = true, test(d, "masked list");
        d = c, d.masked_list = d.impossible = true, test(d, "masked padding of -inf");
        d = c, d.nan = true, d.ignored = false, test(d, "nan");
        for (const Mistake m :
             {Mistake::kTwice, Mistake::kOutOfRange, Mistake::kTooMuch, Mistake::kNaN}) {
          d = c, d.mistake = m, d.padding = 0, test(d, "mistake");
        }
        d = c, d.noise = 1e-3, d.hard_weight = 0, test(d, "near");
        for (const double base : {30.0, -100.0, 1e4, -3e6, 1e38}) {
          d = c, d.base = base, d.noise = 2, d.smoothing = base == -100 ? 0.1 : 0;
          test(d, "far from zero");
        }
      }
}
constexpr Divergence kDivergencesHere[] = {
    Divergence::kSoftCrossEntropy, Divergence::kReverseKL,       Divergence::kSymmetricKL,
    Divergence::kJensenShannon,    Divergence::kSkewedForwardKL, Divergence::kSkewedReverseKL,
    Divergence::kTotalVariation};
void divergences() {
  for (const DType dtype : kAll)
    for (const int64_t classes : {40, 1000})
      for (const Tail tail : {Tail::kGhost, Tail::kRenormalize})
        for (const Divergence divergence : kDivergencesHere) {
          Case c;
          c.classes = classes, c.student = dtype, c.tail = tail, c.divergence = divergence;
          test(c, "divergence");
          Case d = c;
          d.masked_rest = true, test(d, "divergence, masked rest");
          d = c, d.padding = 0, d.mass = 1.05, d.smoothing = 0.1, test(d, "divergence, mass");
          d = c, d.row_settings = true, test(d, "divergence, settings of rows");
        }
}
void estimators() {
  for (const DType dtype : kAll)
    for (const Estimator estimator : {Estimator::kK1, Estimator::kK2, Estimator::kK3})
      for (const int64_t classes : {40, 1000}) {
        Case c;
        c.classes = classes, c.student = dtype, c.estimator = estimator, c.k = 1;
        c.row_settings = classes == 40;
        test(c, "estimator");
      }
}
void mixes() {
  for (const DType dtype : kAll)
    for (const int64_t classes : {5, 100, 1000}) {
      Case c;
      c.classes = classes, c.student = dtype, c.wide_lists = true, c.rows = 8;
      test(c, "lists in fp64");
    }
}
void many_rows() {
  for (const int64_t classes : {10, 130, 2000}) {
    Case c;
    c.classes = classes, c.rows = 3000;
    test(c, "many rows");
  }
  Buffer total(8), stats(8);
  TopkArgs args;
  args.classes = 1000, args.k = 3, args.stats = stats.at();
  check(cuda::topk(args, total.at(), nullptr, nullptr), "no rows");
  total.down();
  if (load(total.host.data(), DType::kFloat32, 0) != 0)
    total_failures++, std::printf("FAIL no rows\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 0;
  const bool brief = argc > 1 && std::strcmp(argv[1], "--short") == 0;
  sizes(brief), layouts(brief), options(brief), mixes();
  divergences(), estimators();
  if (!brief) many_rows();
  return outcome();
}
