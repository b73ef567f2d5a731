// Fuzz calls of the sparse loss: classes anywhere in int64, log-probabilities of any bits.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/topk.h"
#include "fuzz_inputs.h"

namespace fastkd {

struct TopkCall {
  DType student_dtype, acc;
  std::unique_ptr<Matrix> student, lists;
  std::vector<int64_t> labels, indices;
  TopkArgs args;

  explicit TopkCall(Bytes& in) {
    constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16,
                                DType::kBFloat16};
    constexpr double kTemperatures[] = {1, 2, 3, 4, 0.5, 7.3, 1e-3, 1e30, 0, -1, INFINITY, NAN};
    constexpr double kWeights[] = {0, 0.5, 1, 3, 1e30};
    student_dtype = in.one_of(kTypes);
    acc = student_dtype == DType::kFloat64 || in.coin() ? DType::kFloat64 : DType::kFloat32;
    args.rows = in.between(0, 5), args.classes = in.between(1, 200);
    if (in.take<uint8_t>() == 255) args.classes = in.between(cpu::kSegment, cpu::kSegment + 99);
    args.k = in.between(1, in.coin() ? 9 : 130);
    args.group_rows = in.coin() ? std::max<int64_t>(args.rows, 1) : in.between(1, 3);
    student.reset(new Matrix(in, args.rows, args.classes, args.group_rows, student_dtype));
    args.student = student->base(), args.student_stride = student->stride;
    args.student_dtype = student_dtype, args.teacher_dtype = acc;
    args.temperature = in.one_of(kTemperatures);
    args.hard_weight = in.one_of(kWeights), args.soft_weight = in.one_of(kWeights);
    args.label_smoothing = in.coin() ? 0.0 : 0.1;
    args.tail = static_cast<Tail>(in.between(0, 2));
    args.scale = 0.25;
    Bytes none{in.end, in.end};
    lists.reset(new Matrix(none, args.rows, args.k, std::max<int64_t>(args.rows, 1), acc));
    args.teacher = lists->base();
    for (int64_t i = 0; i < args.rows * args.k; ++i) {
      const uint8_t kind = in.take<uint8_t>();
      indices.push_back(kind < 2   ? in.take<int64_t>()
                        : kind < 4 ? args.classes
                                   : (kind + 7 * i) % args.classes);
    }
    indices.shrink_to_fit();
    args.indices = indices.data();
    for (int64_t row = 0; in.coin() && row < args.rows; ++row) {
      const uint8_t kind = in.take<uint8_t>();
      labels.resize(static_cast<size_t>(args.rows), -100);
      labels[static_cast<size_t>(row)] =
          kind < 16 ? in.take<int64_t>() : in.between(0, args.classes - 1);
    }
    args.labels = labels.empty() ? nullptr : labels.data();
    student->fill(in, student_dtype, in.coin());
    lists->fill(in, acc, in.coin());
    if (in.coin()) spread();
  }
  // Write logarithms of probabilities that add up to at most 1, so that no list is invalid by its
  // sum.
  void spread() {
    for (int64_t i = 0; i < args.rows * args.k; ++i) {
      const double value = -std::log(static_cast<double>(args.k)) - static_cast<double>(i % 3);
      const float narrow = static_cast<float>(value);
      std::memcpy(lists->base() + i * lists->size,
                  acc == DType::kFloat64 ? static_cast<const void*>(&value) : &narrow,
                  static_cast<size_t>(lists->size));
    }
  }
};

inline void require_topk(bool ok, const char* what, const char* isa, const TopkCall& call) {
  if (ok) return;
  std::fprintf(stderr, "%s: sparse loss: %s; %lld x %lld, k %lld, types %d and %d, t %g, tail %d\n",
               isa, what, static_cast<long long>(call.args.rows),
               static_cast<long long>(call.args.classes), static_cast<long long>(call.args.k),
               static_cast<int>(call.student_dtype), static_cast<int>(call.acc),
               call.args.temperature, static_cast<int>(call.args.tail));
  std::abort();
}

inline double number_at(const uint8_t* numbers, int64_t index, DType dtype) {
  double value = 0;
  float narrow = 0;
  if (dtype == DType::kFloat64) {
    std::memcpy(&value, numbers + index * 8, sizeof value);
    return value;
  }
  std::memcpy(&narrow, numbers + index * 4, sizeof narrow);
  return static_cast<double>(narrow);
}

inline void check_topk(Bytes& in) {
  TopkCall call(in);
  const Matrix grad(in, call.args.rows, call.args.classes, call.args.group_rows,
                    call.student_dtype);
  const std::vector<uint8_t> student = call.student->copy(), lists = call.lists->copy();
  const int64_t rows = call.args.rows, acc_size = size_of(call.acc);
  const size_t bytes = static_cast<size_t>(rows * acc_size);
  for (const cpu::Kernels* const* each = cpu::available(); *each != nullptr; ++each) {
    const cpu::Kernels& k = **each;
    const auto require = [&](bool ok, const char* what) { require_topk(ok, what, k.name, call); };
    const size_t words = static_cast<size_t>(cpu::bitmap_words(call.args.classes));
    std::unique_ptr<uint64_t[]> listed(new uint64_t[words]());
    std::unique_ptr<uint8_t[]> loss(new uint8_t[bytes]()), again(new uint8_t[bytes]());
    std::unique_ptr<uint8_t[]> terms(new uint8_t[bytes * kTopkTerms]());
    std::memset(grad.memory.get(), kGuard, static_cast<size_t>(grad.bytes));
    TopkArgs args = call.args;
    args.loss = loss.get(), args.terms = terms.get();
    args.grad = grad.base(), args.grad_stride = grad.stride;
    const int64_t wrong = k.topk(args, 0, rows, listed.get());
    require(wrong >= -1 && wrong < rows, "the reported row does not exist");
    require(std::all_of(listed.get(), listed.get() + words, [](uint64_t w) { return w == 0; }),
            "the bitmap is not zeros");
    require(padding_is_whole(grad), "padding of the gradient was written");
    require(call.student->copy() == student && call.lists->copy() == lists, "an input was written");
    args.grad = args.terms = nullptr, args.loss = again.get();
    k.topk(args, 0, rows / 2, listed.get());
    k.topk(args, rows / 2, rows, listed.get());
    require(same_numbers(loss.get(), again.get(), rows, call.acc),
            "without gradient and terms the loss is another");
    for (int64_t row = 0; row < rows; ++row) {
      const double value = number_at(loss.get(), row, call.acc);
      const bool ignored = call.args.labels != nullptr && call.args.labels[row] == -100;
      require(!ignored || value == 0, "the loss of an ignored row");
      require(row != wrong || std::isnan(value), "a list that is none has a loss");
      for (int64_t term = 0; term < kTopkTerms; ++term) {
        const double of_term = number_at(terms.get(), term * rows + row, call.acc);
        require(!ignored || of_term == 0, "a term of an ignored row");
        require(row != wrong || std::isnan(of_term), "a list that is none has a term");
      }
    }
  }
}

}  // namespace fastkd
