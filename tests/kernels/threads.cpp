// Test the CPU kernels from several threads at once, as csrc/torch/cpu.cpp calls them. Cases: rows
// divided among threads (forward and backward); rows shared segment by segment; concurrent calls on
// the same inputs; calls on a small stack; calls without memory for the cache of exponentials; a
// concurrent choice of the instruction set. Every loss and gradient has the bits of a run on one
// thread. ThreadSanitizer (make sanitize) checks that threads do not race.
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/kernels.h"

namespace {
bool memory_is_short = false;
}

// Replace the allocation functions that the kernels call, so that allocations can fail.
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return memory_is_short ? nullptr : ::operator new[](size);
}
void* operator new[](std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return memory_is_short ? nullptr : ::operator new[](size, alignment);
}

namespace {

using namespace fastkd;

constexpr int kThreads = 4;

// Run work(item) for all items on kThreads threads, which take items off a counter.
void in_parallel(int64_t items, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> team;
  for (int i = 0; i < kThreads; ++i) {
    team.emplace_back([&] {
      for (int64_t item; (item = next.fetch_add(1)) < items;) work(item);
    });
  }
  for (std::thread& member : team) member.join();
}

struct Problem {
  int64_t rows, classes;
  Divergence divergence = Divergence::kForwardKL;
  std::vector<float> student, teacher;  // [rows, classes]
  std::vector<int64_t> labels;          // [rows]

  Problem(int64_t rows, int64_t classes) : rows(rows), classes(classes) {
    std::mt19937 random(static_cast<unsigned>(classes));
    std::normal_distribution<float> normal(0, 3);
    student.resize(static_cast<size_t>(rows * classes));
    teacher.resize(student.size());
    for (float& x : student) x = normal(random);
    for (float& x : teacher) x = normal(random);
    for (int64_t row = 0; row < rows; ++row) labels.push_back(row % 3 == 2 ? -100 : row % classes);
  }
};

struct Call {
  std::vector<float> loss, terms, stats, grad;
  ForwardArgs args;

  explicit Call(const Problem& p) {
    const size_t rows = static_cast<size_t>(p.rows);
    loss.resize(rows), terms.resize(rows * kTerms), stats.resize(rows * kStats + 1);
    grad.resize(p.student.size());
    args.rows = args.group_rows = p.rows, args.classes = p.classes;
    args.student = p.student.data(), args.teacher = p.teacher.data();
    args.student_stride = args.teacher_stride = args.grad_stride = {p.classes, 0};
    args.labels = p.labels.data();
    args.temperature = args.teacher_temperature = 2, args.label_smoothing = 0.1;
    args.divergence = p.divergence;
    args.loss = loss.data(), args.terms = terms.data(), args.stats = stats.data();
    args.grad = grad.data(), args.scale = 0.5;
  }
  Call(const Call&) = delete;

  bool operator==(const Call& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(loss, other.loss) && same(terms, other.terms) && same(stats, other.stats) &&
           same(grad, other.grad);
  }
};

void rows_apart(const cpu::Kernels& k, const ForwardArgs& args) {
  in_parallel(args.rows, [&](int64_t row) { k.forward(args, row, row + 1); });
}

void rows_shared(const cpu::Kernels& k, const ForwardArgs& args) {
  const int64_t segments = (args.classes + cpu::kSegment - 1) / cpu::kSegment;
  std::vector<cpu::Statistics> statistics(static_cast<size_t>(segments));
  std::vector<cpu::Sums> sums(static_cast<size_t>(segments));
  for (int64_t row = 0; row < args.rows; ++row) {
    in_parallel(segments,
                [&](int64_t i) { k.scan(args, row, i, &statistics[static_cast<size_t>(i)]); });
    sums.assign(sums.size(), {});
    cpu::Sums slope_sums = {};
    if (!is_one_sweep(args.divergence)) {
      in_parallel(segments, [&](int64_t i) {
        k.sum_slopes(args, row, i, statistics.data(), &sums[static_cast<size_t>(i)]);
      });
      slope_sums = cpu::total(sums.data(), segments);
    }
    in_parallel(segments, [&](int64_t i) {
      k.write(args, row, i, statistics.data(), slope_sums, &sums[static_cast<size_t>(i)]);
    });
    k.close(args, row, statistics.data(), sums.data());
  }
}

// Run `work` on a thread with a stack of 128 KB, as musl gives. Return false if the thread cannot
// start; a stack overflow ends the program.
bool fits_small_stack(const std::function<void()>& work) {
  constexpr size_t kStack = 128 << 10;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStack);
  pthread_t thread;
  const auto run = [](void* argument) -> void* {
    (*static_cast<const std::function<void()>*>(argument))();
    return nullptr;
  };
  const int status =
      pthread_create(&thread, &attributes, run, const_cast<std::function<void()>*>(&work));
  pthread_attr_destroy(&attributes);
  return status == 0 && pthread_join(thread, nullptr) == 0;
}

bool backward_is_the_same(const cpu::Kernels& k, const Call& alone) {
  const float one = 1;
  std::vector<float> grad(alone.grad.size());
  BackwardArgs args;
  static_cast<Inputs&>(args) = alone.args;
  args.stats = alone.stats.data(), args.grad_output = &one;
  args.grad = grad.data(), args.grad_stride = alone.args.grad_stride;
  in_parallel(args.rows, [&](int64_t row) { k.backward(args, row, row + 1); });
  return std::memcmp(grad.data(), alone.grad.data(), grad.size() * sizeof(float)) == 0;
}

int failures = 0;

void check(bool ok, const char* what, const cpu::Kernels& k, const Problem& p) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s: %s, %s, %lld x %lld\n", k.name, what,
              kDivergenceNames[static_cast<int>(p.divergence)], static_cast<long long>(p.rows),
              static_cast<long long>(p.classes));
}

void test(const cpu::Kernels& k, const Problem& p) {
  Call alone(p), apart(p);
  k.forward(alone.args, 0, p.rows);
  rows_apart(k, apart.args);
  check(apart == alone, "rows apart", k, p);
  check(backward_is_the_same(k, alone), "backward", k, p);
  Call frugal(p);
  memory_is_short = true;
  k.forward(frugal.args, 0, p.rows);
  memory_is_short = false;
  check(frugal == alone, "without memory", k, p);
  if (p.classes > cpu::kNarrow) {
    Call shared(p);
    rows_shared(k, shared.args);
    check(shared == alone, "rows shared", k, p);
    Call stacked(p);
    const bool ran = fits_small_stack([&] { k.forward(stacked.args, 0, p.rows); });
    check(ran && stacked == alone, "on a small stack", k, p);
  }
  std::atomic<int> different{0};
  in_parallel(8, [&](int64_t) {
    Call again(p);
    k.forward(again.args, 0, p.rows);
    if (!(again == alone)) ++different;
  });
  check(different == 0, "calls side by side", k, p);
}

// Test that kernels() returns an available set while other threads select sets.
void test_selection(const Problem& p) {
  int count = 0;
  while (cpu::available()[count] != nullptr) ++count;
  std::atomic<int> unknown{0};
  in_parallel(400, [&](int64_t item) {
    cpu::select(cpu::available()[item % count]->name);
    const cpu::Kernels* chosen = &cpu::kernels();
    bool known = false;
    for (int i = 0; i < count; ++i) known |= cpu::available()[i] == chosen;
    if (!known) ++unknown;
  });
  check(unknown == 0, "selection", cpu::kernels(), p);
}

}  // namespace

int main() {
  int calls = 0;
  for (const auto& [rows, classes] : {std::pair<int64_t, int64_t>{70, 10},
                                      {9, 1000},
                                      {5, cpu::kSegment + 1},
                                      {2, 5 * cpu::kSegment + 100}}) {
    Problem problem(rows, classes);
    for (int divergence = 0; divergence < kDivergences; ++divergence) {
      problem.divergence = static_cast<Divergence>(divergence);
      for (const cpu::Kernels* const* k = cpu::available(); *k != nullptr; ++k, ++calls) {
        test(**k, problem);
      }
    }
    test_selection(problem);
  }
  std::printf("%d problems on %d threads, %d failures\n", calls, kThreads, failures);
  return failures == 0 ? 0 : 1;
}
