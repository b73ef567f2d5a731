// Test the CPU kernels of every instruction set that this machine runs, against a reference in long
// double (cpu_truth.h). The reference is written from the definitions, and shares no code with the
// kernels.
//
//  cpu_kernels [ISA | memory]     the tests of one instruction set, or those that valgrind needs
#include "cpu_problem.h"

namespace {

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

// Test widths at and near the edges of a vector, of a block and of a segment.
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

// Test gradients that are written by non-temporal stores, in rows that begin at any address and
// have one or three segments.
void test_large_gradients(const cpu::Kernels& k) {
  Problem p;
  p.rows = 1537, p.classes = 2049, p.misalignment = 1, p.padding = 3;
  run(k, p);
  p.rows = 49, p.classes = 2 * cpu::kSegment + 5, p.padding = 0;
  run(k, p);
  if (memory_only) return;  // the next problem is slow under valgrind
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
        data.teacher.set(0, 5, -kInf);  // masked by the teacher, by the student, by both
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

// Test the layout (N, C, L): fewer rows than a tile (csrc/cpu/transpose.h), full tiles and more,
// and groups whose boundaries lie inside tiles. The classes fit in a tile's memory on the stack, in
// one block alone, or in neither.
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

// Test a class that the student masks and whose teacher probability underflows: the loss is
// infinite.
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

// Test students near the teacher, where fp32 log-probabilities would cancel.
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
      // The cosine has the rounding errors of two unit vectors.
      const double limit = p.divergence == Divergence::kCosine ? 1e-6 : 4e-7;
      check(std::fabs(got / want - 1) < limit, "loss", got, want);
      if (r == 0) std::printf("  KL %.2e: relative error %.1e\n", want / 16, got / want - 1);
      if (p.divergence == Divergence::kCosine)
        continue;  // the cosine's gradient is no difference of probabilities
      for (int64_t i = 0; i < p.classes; ++i) {
        const double exact = static_cast<double>(truth.grad[static_cast<size_t>(i)]);
        const double p = static_cast<double>(truth.teacher[static_cast<size_t>(i)]);
        check(std::fabs(data.grad.get(r, i) - exact) <= 2e-7 * data.args.scale * 4 * p, "grad",
              data.grad.get(r, i), exact);
      }
    }
  }
}

// Test that the error of a 16-bit gradient is at most 1 % above that of rounding the exact
// gradient.
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
  // Test every 61st float of [-126, 128).
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
  memory_only = argc > 1 && std::strcmp(argv[1], "memory") == 0;
  const char* const only = argc > 1 && !memory_only ? argv[1] : nullptr;
  test_selection();
  for (const cpu::Kernels* const* k = cpu::available(); *k != nullptr; ++k) {
    if (only != nullptr && std::strcmp((*k)->name, only) != 0) continue;
    std::printf("%s\n", (*k)->name);
    for (const bool by_registers : {false, true}) {
      if (!memory_only) test_exponential(**k, by_registers);
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
      if (memory_only) continue;
      test_cancellation(**k);
      test_rounding(**k);
    }
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
