// Fuzz the interface of the CPU kernels (kernels.h). The input's bytes become sizes, strides,
// options, labels and the bits of the logits. For any input and instruction set, nothing outside
// the buffers is touched, and padding and inputs stay unchanged. Ignored rows give 0, and all paths
// give equal numbers. Buffers have no spare byte, so AddressSanitizer reports any access beyond
// their end.
//
// LLVMFuzzerTestOneInput is libFuzzer's entry. Without -DFASTKD_LIBFUZZER, main() passes random and
// mutated inputs from a seed: cpu_fuzz [CASES [SEED]].
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "fuzz_inputs.h"
#include "fuzz_topk.h"

namespace {

using namespace fastkd;

const Inputs* current_inputs = nullptr;  // the call that a failure reports

void require(bool ok, const char* what, const char* isa) {
  if (ok) return;
  const Inputs& in = *current_inputs;
  std::fprintf(
      stderr, "%s: %s; %lld x %lld, types %d and %d, t %g%s, weights %g and %g, smoothing %g, %s\n",
      isa, what, static_cast<long long>(in.rows), static_cast<long long>(in.classes),
      static_cast<int>(in.student_dtype), static_cast<int>(in.teacher_dtype), in.temperature,
      in.row_settings ? " (rows')" : "", in.hard_weight, in.soft_weight, in.label_smoothing,
      in.labels ? "labels" : "no labels");
  std::abort();
}

struct Call {
  DType student_dtype, teacher_dtype, acc;
  int64_t rows, classes, group_rows;
  bool in_place, with_terms, with_grad;
  std::unique_ptr<Matrix> student, teacher;
  std::vector<int64_t> labels;
  std::unique_ptr<uint8_t[]> row_settings;
  Inputs inputs;

  explicit Call(Bytes& in) {
    constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16,
                                DType::kBFloat16};
    constexpr double kTemperatures[] = {1, 2, 3, 4, 0.5, 7.3, 1e-3, 1e30, 0, -1, INFINITY, NAN};
    constexpr double kWeights[] = {0, 0.5, 1, 3, 1e30};
    constexpr int64_t kIgnore[] = {-100, 0, 1, -1, INT64_MIN, INT64_MAX};
    student_dtype = in.one_of(kTypes), teacher_dtype = in.one_of(kTypes);
    acc = computes_in_double(student_dtype, teacher_dtype) ? DType::kFloat64 : DType::kFloat32;
    rows = in.between(0, 5), classes = in.between(1, 70);
    const uint8_t size_class = in.take<uint8_t>();
    if (size_class < 24) rows = in.between(0, 70);
    if (size_class >= 232) classes = in.between(1000, 1100);
    if (size_class == 255) classes = in.between(cpu::kSegment - 2, 2 * cpu::kSegment + 2);
    group_rows = in.coin() ? std::max<int64_t>(rows, 1) : in.between(1, 3);
    in_place = in.coin(), with_terms = in.coin(), with_grad = in.coin();
    student.reset(new Matrix(in, rows, classes, group_rows, student_dtype));
    teacher.reset(new Matrix(in, rows, classes, group_rows, teacher_dtype));
    inputs.rows = rows, inputs.classes = classes, inputs.group_rows = group_rows;
    inputs.student = student->base(), inputs.student_stride = student->stride;
    inputs.teacher = teacher->base(), inputs.teacher_stride = teacher->stride;
    inputs.student_dtype = student_dtype, inputs.teacher_dtype = teacher_dtype;
    inputs.temperature = in.one_of(kTemperatures);
    inputs.teacher_temperature = in.coin() ? inputs.temperature : in.one_of(kTemperatures);
    inputs.mix = in.coin() ? 0.5 : 0.1;
    inputs.hard_weight = in.one_of(kWeights), inputs.soft_weight = in.one_of(kWeights);
    inputs.label_smoothing = in.coin() ? 0.0 : 0.1;
    inputs.ignore_index = in.one_of(kIgnore);
    inputs.divergence = static_cast<Divergence>(in.take<uint8_t>() % std::size(kDivergenceNames));
    if (in.coin()) take_labels(in);
    if (in.coin()) take_row_settings(in);
    student->fill(in, student_dtype, in.coin());
    teacher->fill(in, teacher_dtype, in.coin());
  }

  void take_labels(Bytes& in) {
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t kind = in.take<uint8_t>();
      labels.push_back(kind < 32   ? in.take<int64_t>()
                       : kind < 64 ? inputs.ignore_index
                                   : in.between(0, classes - 1));
    }
    labels.shrink_to_fit();
    inputs.labels = labels.data();
  }
  void take_row_settings(Bytes& in) {
    const size_t size = static_cast<size_t>(size_of(acc));
    const int64_t count = kRowSettings * rows;
    row_settings.reset(new uint8_t[static_cast<size_t>(count) * size]);
    for (int64_t i = 0; i < count; ++i) {
      const double setting = 0.5 + 0.1 * static_cast<double>(in.take<uint8_t>());
      const float narrow = static_cast<float>(setting);
      std::memcpy(&row_settings[static_cast<size_t>(i) * size],
                  acc == DType::kFloat64 ? static_cast<const void*>(&setting) : &narrow, size);
    }
    inputs.row_settings = row_settings.get();
  }
  int64_t acc_bytes(int64_t count) const { return count * size_of(acc); }
  bool ignored(int64_t row) const {
    return inputs.labels != nullptr && inputs.labels[row] == inputs.ignore_index;
  }
};

// Buffers of one forward call, with exactly the sizes that kernels.h requires.
struct Outputs {
  std::unique_ptr<uint8_t[]> loss, terms, stats;
  ForwardArgs args;

  explicit Outputs(const Call& call) {
    const auto allocate = [](int64_t bytes) {
      std::unique_ptr<uint8_t[]> memory(new uint8_t[static_cast<size_t>(bytes)]);
      std::memset(memory.get(), 0, static_cast<size_t>(bytes));
      return memory;
    };
    static_cast<Inputs&>(args) = call.inputs;
    loss = allocate(call.acc_bytes(call.rows));
    stats = allocate(call.acc_bytes(call.rows * kStats + 1));
    args.loss = loss.get(), args.stats = stats.get(), args.scale = 0.25;
    if (call.with_terms) {
      terms = allocate(call.acc_bytes(call.rows * kTerms));
      args.terms = terms.get();
    }
  }
  bool same(const Outputs& other, const Call& call) const {
    return same_numbers(loss.get(), other.loss.get(), call.rows, call.acc) &&
           (!terms || same_numbers(terms.get(), other.terms.get(), call.rows * kTerms, call.acc));
  }
};

bool is_zero(const uint8_t* at, int64_t bytes) {
  return std::all_of(at, at + bytes, [](uint8_t byte) { return byte == 0; });
}

void split(const cpu::Kernels& k, const ForwardArgs& args) {
  const int64_t segments = (args.classes + cpu::kSegment - 1) / cpu::kSegment;
  std::vector<cpu::Statistics> statistics(static_cast<size_t>(segments));
  std::vector<cpu::Sums> sums(static_cast<size_t>(segments));
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = 0; i < segments; ++i) k.scan(args, row, i, &statistics[i]);
    sums.assign(sums.size(), {});
    cpu::Sums slope_sums = {};
    if (!is_one_sweep(args.divergence)) {
      for (int64_t i = 0; i < segments; ++i)
        k.sum_slopes(args, row, i, statistics.data(), &sums[i]);
      slope_sums = cpu::total(sums.data(), segments);
    }
    for (int64_t i = 0; i < segments; ++i) {
      k.write(args, row, i, statistics.data(), slope_sums, &sums[i]);
    }
    k.close(args, row, statistics.data(), sums.data());
  }
}

void check_isa(const cpu::Kernels& k, const Call& call, const Matrix& blank) {
  const std::vector<uint8_t> student = call.student->copy(), teacher = call.teacher->copy();
  const auto grad_of = [&] {
    std::memset(blank.memory.get(), kGuard, static_cast<size_t>(blank.bytes));
    return blank.base();
  };
  Outputs by_rows(call), by_segments(call);
  if (call.with_grad) by_rows.args.grad = grad_of(), by_rows.args.grad_stride = blank.stride;
  k.forward(by_rows.args, 0, call.rows / 2);
  k.forward(by_rows.args, call.rows / 2, call.rows);
  require(padding_is_whole(blank), "padding of the gradient was written", k.name);
  for (int64_t row = 0; row < call.rows; ++row) {
    if (!call.ignored(row)) continue;
    require(is_zero(&by_rows.loss[static_cast<size_t>(call.acc_bytes(row))], call.acc_bytes(1)),
            "the loss of an ignored row", k.name);
    require(!call.with_grad || is_zero(blank.row(row), call.classes * blank.size),
            "the gradient of an ignored row", k.name);
  }
  const std::vector<uint8_t> grad = blank.copy();
  Matrix* const students = call.student.get();
  if (call.classes > cpu::kNarrow) {
    if (call.with_grad)
      by_segments.args.grad = grad_of(), by_segments.args.grad_stride = blank.stride;
    split(k, by_segments.args);
    require(by_segments.same(by_rows, call), "segments give other numbers than rows", k.name);
    require(padding_is_whole(blank), "padding was written segment by segment", k.name);
  }
  if (call.with_grad && call.rows > 0) {
    BackwardArgs args;
    static_cast<Inputs&>(args) = call.inputs;
    const double one = 1;
    const float narrow_one = 1;
    args.stats = by_rows.stats.get(), args.grad_stride = blank.stride, args.grad = grad_of();
    args.grad_output = call.acc == DType::kFloat64 ? static_cast<const void*>(&one) : &narrow_one;
    k.backward(args, 0, call.rows);
    require(same_numbers(blank.memory.get() + blank.offset, grad.data() + blank.offset,
                         (blank.bytes - blank.offset) / blank.size, call.student_dtype),
            "backward gives another gradient than forward", k.name);
  }
  require(call.student->copy() == student && call.teacher->copy() == teacher,
          "an input was written", k.name);
  if (!call.in_place) return;
  Outputs over(call);
  over.args.grad = students->base(), over.args.grad_stride = students->stride;
  k.forward(over.args, 0, call.rows);
  require(over.same(by_rows, call), "in place the loss is another", k.name);
  require(padding_is_whole(*students), "padding of the student was written", k.name);
  std::copy(student.begin(), student.end(), students->memory.get());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, data + size};
  if (in.take<uint8_t>() < 64) {
    check_topk(in);
    return 0;
  }
  Call call(in);
  current_inputs = &call.inputs;
  const Matrix blank(in, call.rows, call.classes, call.group_rows, call.student_dtype);
  for (const cpu::Kernels* const* k = cpu::available(); *k != nullptr; ++k) {
    check_isa(**k, call, blank);
  }
  return 0;
}

#ifndef FASTKD_LIBFUZZER
int main(int count, char** arguments) {
  const long cases = count > 1 ? std::atol(arguments[1]) : 3000;
  const long seed = count > 2 ? std::atol(arguments[2]) : 1;
  std::mt19937_64 random(static_cast<uint64_t>(seed));
  std::vector<uint8_t> input;
  for (long i = 0; i < cases; ++i) {
    if (i % 4 == 0) {  // start a new input, of which the next three cases change a few bytes
      input.resize(200 + random() % 200);
      for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    } else {
      for (int edit = 0; edit < 8; ++edit) {
        constexpr uint8_t kBytes[] = {0, 0xff, 0x7f, 0x80, 0x3c};
        input[random() % input.size()] =
            random() % 2 == 0 ? kBytes[random() % 5] : static_cast<uint8_t>(random());
      }
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("figures: {\"cases\": %ld, \"seed\": %ld, \"failures\": 0}\n", cases, seed);
  return 0;
}
#endif
