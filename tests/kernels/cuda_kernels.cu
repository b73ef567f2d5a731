// Check the CUDA kernels of the dense loss against a reference on the host (dense_case.h), without
// torch. The program prints at most three lines per failed case and a summary; the exit status is
// the number of failed cases, at most 90, or 99 after a CUDA error.
//
//  cuda_kernels --short                     a reduced set, for compute-sanitizer
//
//  cuda_kernels --at-most ROWS CLASSES      cases of at most CLASSES classes, most of them cut to
//                                           ROWS rows, for the emulation of a GPU
//
//  cuda_kernels --random CASES SEED         random cases alone
#include "dense_case.h"

namespace {

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
constexpr DType kEach[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat64};

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
  for (const int64_t classes : {100, 1000, 3000, 10000, 33333}) {
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
    int turn = 0;  // selects the temperatures in turn
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
constexpr Divergence kFiniteIfMasked[] = {
    Divergence::kForwardKL,       Divergence::kDecoupled,       Divergence::kJensenShannon,
    Divergence::kSkewedForwardKL, Divergence::kSkewedReverseKL, Divergence::kTotalVariation};
void divergences(bool brief) {
  for (int id = 0; id < kDivergences; id++)
    for (const int64_t classes : {id % 2 ? 7 : 100, 1003, 20001}) {
      Case c;
      c.divergence = static_cast<Divergence>(id), c.classes = classes, c.rows = 5;
      const std::string name = kDivergenceNames[id];
      test(c, name.c_str());
      Case d = c;
      d.student = d.teacher = DType::kFloat32, d.terms = true, d.smoothing = 0.1;
      d.student_offset = 1, test(d, (name + ", terms").c_str());
      d = c, d.teacher_temperature = 3, d.terms = true;
      test(d, (name + ", teacher temperature").c_str());
      d = c, d.row_settings = true, d.terms = true, test(d, (name + ", settings of rows").c_str());
      if (brief && classes > 2000) continue;
      d = c, d.in_place = true, test(d, (name + ", in place").c_str());
      d = c, d.student = DType::kFloat64, test(d, (name + ", fp64 and bf16").c_str());
      d = c, d.student = d.teacher = DType::kFloat16, test(d, (name + ", fp16").c_str());
      d = c, d.nan = true, d.ignored = false, test(d, (name + ", nan").c_str());
      d = c, d.student_base = 300, test(d, (name + ", apart").c_str());
    }
  // Test an outlying logit, and student logits far from the teacher's. If the maximum were
  // subtracted, the squared errors of all classes but the outlier would be lost.
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
  // Some divergences have no finite gradient if only student or teacher masks a class. This loop
  // tests divergences with a finite gradient.
  for (const Divergence id : kFiniteIfMasked)
    for (const int64_t classes : {100, 1003}) {
      Case c;
      c.divergence = id, c.classes = classes, c.rows = 5;
      c.infinities = c.terms = true, c.teacher_temperature = 3;
      test(c, (std::string(kDivergenceNames[static_cast<int>(id)]) + ", masked").c_str());
    }
}
// Test the special cases of the label's part in decoupled distillation.
void decoupled(bool brief) {
  const double pairs[][2] = {{-60, -60}, {-8, -8},        {8, 8},          {60, 60},
                             {5, -5},    {-kInfinity, 0}, {0, -kInfinity}, {-kInfinity, -kInfinity},
                             {NAN, 0},   {0, NAN},        {kInfinity, 0},  {0, kInfinity}};
  int turn = 0;
  for (const bool pixels : {false, true})
    for (const int64_t classes : {2, 3, 100, 1003, 5003}) {
      if (brief && classes > 1003) continue;
      const auto with = [&](const char* name, auto&& change) {
        Case c;
        c.divergence = Divergence::kDecoupled, c.classes = classes, c.rows = 9;
        // soft_weight is small, because the rounding errors of the gradient grow with mix *
        // soft_weight.
        c.mix = 8, c.soft_weight = 0.05;
        c.student_pixels = c.teacher_pixels = pixels;
        c.terms = true, c.ignored = c.bad_label = false;
        c.student = c.teacher = kEach[turn++ % 3];
        change(c);
        test(c, name);
      };
      // `turn` alternates data types and options.
      for (const auto& above : pairs)
        with("dkd, far label", [&](Case& c) {
          c.above = above[0], c.teacher_above = above[1];
          if (turn % 4 > 0) c.teacher_temperature = 1.5, c.smoothing = 0.1;
          if (turn % 4 > 1) c.row_settings = true;
        });
      turn++;
      with("dkd of fp32", [](Case& c) { c.student = c.teacher = DType::kFloat32; });
      with("dkd, label alone", [](Case& c) { c.alone = true; });
      with("dkd, label alone, teacher temperature, apart",
           [](Case& c) { c.alone = true, c.teacher_temperature = 3, c.student_base = 200; });
      with("dkd without labels", [](Case& c) { c.labels = false; });
      with("dkd, bad label", [](Case& c) { c.bad_label = c.ignored = true; });
      with("dkd, near", [](Case& c) { c.hard_weight = 0, c.noise = 1e-2; });
      with("dkd, hard only", [](Case& c) { c.hard_weight = 1, c.soft_weight = 0; });
    }
}
// Test the special cases of the cosine's norms.
void lengths(bool brief) {
  int turn = 0;
  for (const bool pixels : {false, true})
    for (const int64_t classes : {1, 2, 100, 1003, 5003}) {
      if (brief && classes > 1003) continue;
      const auto with = [&](const char* name, auto&& change) {
        Case c;
        c.divergence = Divergence::kCosine, c.classes = classes, c.rows = 9;
        c.student_pixels = c.teacher_pixels = pixels, c.student = c.teacher = kEach[turn++ % 3];
        c.ignored = false;
        change(c);
        test(c, name);
      };
      with("cosine of zeros", [](Case& c) { c.zeros = true; });
      with("cosine of zeros, settings of rows",
           [](Case& c) { c.zeros = c.row_settings = c.terms = true; });
      with("cosine, both mask", [](Case& c) { c.both_mask = c.classes > 2, c.terms = true; });
      with("cosine, one masks", [](Case& c) { c.infinities = c.classes > 100; });
      with("cosine, near", [](Case& c) { c.labels = false, c.noise = 1e-2; });
      with("cosine of the same", [](Case& c) { c.labels = false, c.noise = 0; });
      for (const double factor : {1e30, 1e-8, 1e-30})
        with("cosine, far from 1", [&](Case& c) { c.factor = factor, c.hard_weight = 0; });
      turn++;
    }
}
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
// Test offsets above 2^32. The first of two groups is ignored, so that only the second group needs
// memory.
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
// Test the layout (N, C, H, W), in which the classes of a pixel are not adjacent.
void pixels(bool brief) {
  for (const int64_t classes : {3, 19}) {  // more rows than the emulated device computes at a time
    Case c;
    c.student_pixels = c.teacher_pixels = true, c.rows = 2500, c.group_rows = 700;
    c.classes = classes, test(c, "many pixels");
    c.divergence = Divergence::kJensenShannon, test(c, "many pixels, JSD");
  }
  far_pixels();
  if (brief) return;
  const DType all[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64};
  int turn = 0;  // alternates the types, so that each option is tested with each type
  for (const int64_t classes : {1, 2, 4, 19, 33, 150, 1003}) {
    const auto with = [&](const std::string& name, auto&& change) {
      Case c;
      c.student_pixels = c.teacher_pixels = true, c.student = c.teacher = all[turn++ % 4];
      c.classes = classes, c.rows = 90, c.group_rows = 37;
      change(c);
      test(c, ("pixels" + name).c_str());
    };
    with("", [](Case&) {});
    with(", terms and smoothing", [](Case& c) {
      c.student_pad = 3, c.teacher_pad = 1, c.student_offset = 1, c.terms = true, c.smoothing = 0.1;
    });
    // With one class the gradient is the rounding error of the weights, which row_settings would
    // make many times larger.
    with(", bad label, settings of rows",
         [](Case& c) { c.bad_label = true, c.row_settings = c.classes > 1; });
    with(", in place", [](Case& c) { c.in_place = true, c.student_pad = 5; });
    with(", no labels", [](Case& c) { c.labels = false, c.reduction = Reduction::kSum; });
    with(", and a teacher of rows",
         [](Case& c) { c.teacher_pixels = false, c.reduction = Reduction::kNone; });
    with(" of the teacher alone", [](Case& c) { c.student_pixels = false; });
    with(", mixed, no gradient", [](Case& c) { c.no_grad = true, c.teacher = DType::kFloat32; });
    with(", nan", [](Case& c) { c.nan = true, c.ignored = false; });
    with(", masked, and of no teacher probability", [](Case& c) { c.underflows = true; });
    with(", apart", [](Case& c) { c.temperature = 1.5, c.student_base = 1e4; });
    with(", infinities", [](Case& c) { c.infinities = true; });
    for (int id = 1; id < kDivergences; id++) {
      const std::string name = std::string(", ") + kDivergenceNames[id];
      // In more rows, some probabilities of student and teacher would be closer than fp32 can
      // resolve, where total variation is not smooth.
      const auto few = [&](Case& c) {
        c.divergence = static_cast<Divergence>(id), c.rows = 40, c.group_rows = 13;
      };
      with(name, few);
      with(name + ", teacher temperature, in place", [&](Case& c) {
        few(c);
        c.in_place = true, c.teacher_temperature = 3, c.terms = true;
      });
    }
    turn++;
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

// Test the kernels that run before and after the rows' kernel.
void totals() {
  for (const DType acc : {DType::kFloat32, DType::kFloat64})
    for (const int64_t rows : {2049, 70001}) {
      constexpr int kRowsAtOnce = 32;
      const int64_t ctas = std::min<int64_t>((rows + kRowsAtOnce - 1) / kRowsAtOnce, 1056);
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
          if (row % kRowsAtOnce == 0 && row / kRowsAtOnce < ctas) want[i] += load(to, acc, row);
        }
      }
      labels.up(), loss.up(), terms.up();
      cuda::ForwardCall call;
      call.args.rows = rows, call.args.classes = 7, call.args.student_dtype = acc;
      call.args.labels = static_cast<const int64_t*>(labels.at());
      call.args.loss = loss.at(), call.args.terms = terms.at(), call.args.stats = stats.at();
      call.total = total.at();
      check(cuda::launch_scale(call, nullptr, nullptr), "count");
      check(cuda::launch_finish(call, ctas, kRowsAtOnce, nullptr), "finish");
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
    divergences(brief), decoupled(brief), lengths(brief), pixels(brief);
    totals();
  }
  return outcome();
}
