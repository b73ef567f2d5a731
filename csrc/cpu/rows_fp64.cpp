// The row engine in fp64, which is for correctness and not for speed: compiled once, for the least
// processor, and used by all instruction sets.
#include "rows.h"

namespace fastkd::cpu::baseline {

Kernels make_fp64_kernels();
Kernels make_fp64_kernels() { return row_kernels<double>("fp64"); }

}  // namespace fastkd::cpu::baseline
