// Contiguous copies of rows whose classes are not adjacent, for the row engine in fp64. In fp32,
// the transposed engine computes rows whose classes are not adjacent.
#pragma once
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "storage.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Copy numbers of `size` bytes; strides are in numbers.
inline void copy_apart(const void* from, int64_t from_stride, void* to, int64_t to_stride,
                       int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(static_cast<char*>(to) + i * to_stride * size,
                static_cast<const char*>(from) + i * from_stride * size, static_cast<size_t>(size));
  }
}

// Call fn(args, row, row + 1) for each row, with contiguous copies of its logits. Copy to args.grad
// the contiguous gradient that fn writes.
template <class Args, class Fn>
void for_gathered_rows(const Args& args, int64_t begin, int64_t end, Fn&& fn) {
  const int64_t student_size = size_of(args.student_dtype),
                teacher_size = size_of(args.teacher_dtype);
  const size_t classes = static_cast<size_t>(args.classes);
  std::vector<double> student(classes), teacher(classes), grad(classes);
  Args gathered = args;
  gathered.student = student.data(), gathered.teacher = teacher.data();
  gathered.student_stride = gathered.teacher_stride = gathered.grad_stride = {};
  if (args.grad != nullptr) gathered.grad = grad.data();
  for (int64_t row = begin; row < end; ++row) {
    const auto offset = [&](const RowStrides& s) { return row_offset(row, args.group_rows, s); };
    copy_apart(at(args.student, args.student_dtype, offset(args.student_stride)),
               args.student_stride.classes, student.data(), 1, args.classes, student_size);
    copy_apart(at(args.teacher, args.teacher_dtype, offset(args.teacher_stride)),
               args.teacher_stride.classes, teacher.data(), 1, args.classes, teacher_size);
    fn(gathered, row, row + 1);
    if (args.grad == nullptr) continue;
    void* const to = const_cast<void*>(at(args.grad, args.student_dtype, offset(args.grad_stride)));
    copy_apart(grad.data(), 1, to, args.grad_stride.classes, args.classes, student_size);
  }
}

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
