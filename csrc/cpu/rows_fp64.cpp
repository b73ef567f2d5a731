// The row engine (rows.h) in fp64, which is for correctness and not for speed. The code is compiled
// once, for the baseline instruction set, and all instruction sets use this code. Derivations:
// docs/maths.md, sections 1 to 3.
#include "rows.h"

namespace fastkd::cpu::baseline {

Kernels make_fp64_kernels();
Kernels make_fp64_kernels() { return row_kernels<double>("fp64"); }

}  // namespace fastkd::cpu::baseline
