// The kernels in fp64, which are for correctness and not for speed: compiled once, for the least
// processor. Each instruction set's kernels pass fp64 calls on to it. Arguments as in Kernels
// (kernels.h).
#pragma once
#include "../kernels.h"

namespace fastkd::cpu::baseline::fp64 {

void forward(const ForwardArgs& args, int64_t begin, int64_t end);
void backward(const BackwardArgs& args, int64_t begin, int64_t end);
void scan(const ForwardArgs& args, int64_t row, int64_t segment, Statistics* result);
void balance(const ForwardArgs& args, int64_t row, int64_t segment, const Statistics* of_row,
             Sums* of_segment);
void write(const ForwardArgs& args, int64_t row, int64_t segment, const Statistics* of_row,
           const Sums& of_balance, Sums* of_segment);
void close(const ForwardArgs& args, int64_t row, const Statistics* of_row, const Sums* of_segments);
int64_t topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed);
void mixture(const MixtureArgs& args, int64_t begin, int64_t end);

}  // namespace fastkd::cpu::baseline::fp64
