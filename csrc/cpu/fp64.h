// Sparse losses and mixtures in fp64, which is for correctness and not for speed. The code is
// compiled once, for the baseline instruction set, and all instruction sets use this code.
// Arguments are those of Kernels (kernels.h). Formulas: docs/maths.md, sections 12 and 13.
#pragma once
#include "../kernels.h"

namespace fastkd::cpu::baseline::fp64 {

int64_t topk(const TopkArgs& args, int64_t begin, int64_t end, uint64_t* listed);
void mixture(const MixtureArgs& args, int64_t begin, int64_t end);

}  // namespace fastkd::cpu::baseline::fp64
