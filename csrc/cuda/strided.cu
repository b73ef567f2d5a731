// Kernels for rows whose classes are not adjacent, as in (N, C, H, W), of any dtypes and strides.
// One thread computes a row, or eight threads share the row. The threads of a warp have neighboring
// rows, so that loads of a class are coalesced. The later sweeps read the logits from L1 or L2
// while the rows in flight fit in the cache. Derivations: docs/maths.md, sections 2, 3 and 10.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

cudaError_t launch_strided(const ForwardCall& call, cudaStream_t stream) {
  // Eight threads share a row of more than 24 classes: a thread's sum of many classes in float32
  // loses digits, and few threads leave multiprocessors idle. L1 keeps about 24 classes of each
  // thread until the second sweep.
  const int parts = call.args.classes <= 24 ? 1 : 8;
  return with_row<true>(call.args, [&](auto view) {
    using Row = typename decltype(view)::Type;
    using Team = TileTeam<typename Row::A>;
    return launch_team<Row, Team, kStridedThreads>(call, parts, kStridedThreads, stream);
  });
}

}  // namespace fastkd::cuda
