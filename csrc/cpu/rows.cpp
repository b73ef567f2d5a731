// The table of kernels of one instruction set, and its fp32 row engine (rows.h). FASTKD_ISA names
// the instruction set and its namespace. Derivations: docs/maths.md, sections 1 to 3.
#include "rows.h"

namespace fastkd::cpu::baseline {
Kernels make_fp64_kernels();  // rows_fp64.cpp
}

namespace fastkd::cpu::FASTKD_ISA {

void forward_transposed(const ForwardArgs& args, int64_t begin, int64_t end);  // transposed.cpp
void backward_transposed(const BackwardArgs& args, int64_t begin, int64_t end);
int64_t run_topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed);  // topk.cpp
void run_mixture(const MixtureArgs& args, int64_t begin, int64_t end);  // mixture.cpp

namespace {

const Kernels& row_engine(const Inputs& in) {
  static const Kernels fp32 = row_kernels<float>("fp32"), fp64 = baseline::make_fp64_kernels();
  return computes_in_double(in.student_dtype, in.teacher_dtype) ? fp64 : fp32;
}

void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  (is_transposed(args) ? forward_transposed : row_engine(args).forward)(args, begin, end);
}
void backward(const BackwardArgs& args, int64_t begin, int64_t end) {
  (is_transposed(args) ? backward_transposed : row_engine(args).backward)(args, begin, end);
}

template <auto kStep, class... Rest>
void step(const ForwardArgs& args, Rest... rest) {
  (row_engine(args).*kStep)(args, rest...);
}

void exp2_all(const float* in, float* out, int64_t count, bool by_registers) {
  const Exponential<float> power(1.0f, 0.0f, 1.0);
  if (!by_registers) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = power(in[i]);
    return;
  }
  const Exponentials<float> powers(power);
  for (int64_t i = 0; i < count; ++i) out[i] = lane_of(powers(splat(in[i])), 0);
}

}  // namespace

Kernels make_kernels(const char* name);
Kernels make_kernels(const char* name) {
  return {name,
          forward,
          backward,
          step<&Kernels::scan>,
          step<&Kernels::sum_slopes>,
          step<&Kernels::write>,
          step<&Kernels::close>,
          exp2_all,
          run_topk,
          run_mixture};
}

}  // namespace fastkd::cpu::FASTKD_ISA
