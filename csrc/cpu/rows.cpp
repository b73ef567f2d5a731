// The kernels of one instruction set (FASTKD_ISA names it and the namespace): the row engine in
// fp32, and the table of all.
#include "rows.h"

#include "fp64.h"

namespace fastkd::cpu::FASTKD_ISA {

// transposed.cpp
void forward_transposed(const ForwardArgs& args, int64_t begin, int64_t end);
void backward_transposed(const BackwardArgs& args, int64_t begin, int64_t end);

namespace {

namespace fp64 = baseline::fp64;

void exp2_all(const float* in, float* out, int64_t count, bool by_registers) {
  const Exponential<float> power(1.0f, 0.0f, 1.0);
  if (!by_registers) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = power(in[i]);
    return;
  }
  const Exponentials<float> powers(power);
  for (int64_t i = 0; i < count; ++i) {
    Register<float> result = powers(splat(in[i]));
    std::memcpy(&out[i], &result, sizeof(float));
  }
}

template <class Args>
bool in_double(const Args& args) {
  return computes_in_double(args.student_dtype, args.teacher_dtype);
}

void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  in_double(args)       ? fp64::forward(args, begin, end)
  : is_transposed(args) ? forward_transposed(args, begin, end)
                        : forward_rows<float>(args, begin, end);
}
void backward(const BackwardArgs& args, int64_t begin, int64_t end) {
  in_double(args)       ? fp64::backward(args, begin, end)
  : is_transposed(args) ? backward_transposed(args, begin, end)
                        : backward_rows<float>(args, begin, end);
}
void scan(const ForwardArgs& args, int64_t row, int64_t segment, Statistics* result) {
  in_double(args) ? fp64::scan(args, row, segment, result)
                  : scan_segment<float>(args, row, segment, result);
}
void balance(const ForwardArgs& args, int64_t row, int64_t segment, const Statistics* of_row,
             Sums* result) {
  in_double(args) ? fp64::balance(args, row, segment, of_row, result)
                  : balance_segment<float>(args, row, segment, of_row, result);
}
void write(const ForwardArgs& args, int64_t row, int64_t segment, const Statistics* of_row,
           const Sums& of_balance, Sums* result) {
  in_double(args) ? fp64::write(args, row, segment, of_row, of_balance, result)
                  : write_segment<float>(args, row, segment, of_row, of_balance, result);
}
void close(const ForwardArgs& args, int64_t row, const Statistics* of_row,
           const Sums* of_segments) {
  in_double(args) ? fp64::close(args, row, of_row, of_segments)
                  : close_row<float>(args, row, of_row, of_segments);
}

}  // namespace

int64_t run_topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed);  // topk.cpp
void run_mixture(const MixtureArgs& args, int64_t begin, int64_t end);  // mixture.cpp

Kernels make_kernels(const char* name);
Kernels make_kernels(const char* name) {
  return {name, forward, backward, scan, balance, write, close, exp2_all, run_topk, run_mixture};
}

}  // namespace fastkd::cpu::FASTKD_ISA
