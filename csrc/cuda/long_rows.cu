// Kernels for long rows: one CTA reads a row once for each of two to four sweeps (rows_kernel.cuh).
// The later sweeps hit L2 while all rows in flight fit in L2. Derivations: docs/maths.md, sections
// 2, 3 and 10.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

cudaError_t launch_long_rows(const ForwardCall& call, cudaStream_t stream) {
  const int64_t classes = call.args.classes;
  const int threads = classes >= 8192 ? 512 : classes >= 1024 ? 256 : 64;
  return with_row<false>(call.args, [&](auto view) {
    using Row = typename decltype(view)::Type;
    return launch_team<Row, BlockTeam, 512>(call, 0, threads, stream);
  });
}

}  // namespace fastkd::cuda
