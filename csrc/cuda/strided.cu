// Kernels for rows whose classes are not adjacent while the rows themselves are, as in (N, C, H,
// W): a thread for each row, or eight threads that share its classes. The threads of a warp have
// neighboring rows, so that their loads of a class are coalesced. The logits are read twice, the
// second time from L1 or L2 while the rows in flight fit there. Any dtypes and strides.
// Derivations: docs/maths.md, sections 2, 3 and 10.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

cudaError_t launch_strided(const ForwardCall& call, cudaStream_t stream) {
  // A thread that adds up many classes in float32 loses digits, and few rows leave processors idle.
  // 24 classes of each thread are what L1 keeps until the second sweep.
  const int parts = call.args.classes <= 24 ? 1 : 8;
  return with_row<true>(call.args, [&](auto view) {
    using Row = typename decltype(view)::Type;
    using Team = TileTeam<typename Row::A>;
    return launch_team<Row, Team, kStridedThreads>(call, parts, kStridedThreads, stream);
  });
}

}  // namespace fastkd::cuda
