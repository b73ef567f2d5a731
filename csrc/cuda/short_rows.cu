// Kernels for short rows: 8 or 32 lanes of a warp share a row, which the sweeps after the first
// find in L1. Derivations: docs/maths.md, sections 2, 3 and 10.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

cudaError_t launch_short_rows(const ForwardCall& call, cudaStream_t stream) {
  // A row of few classes has few aligned vectors, so each of eight lanes loads up to four classes
  // one by one.
  using Few = ElementRow<AnyDtypes<float>>;
  const bool wide = computes_in_double(call.args.student_dtype, call.args.teacher_dtype);
  if (call.args.classes <= 8 * Few::kChunk && !wide)
    return launch_team<Few, LaneTeam<8>, 256>(call, 8, 256, stream);
  return with_row<false>(call.args, [&](auto view) {
    using Row = typename decltype(view)::Type;
    return launch_team<Row, LaneTeam<32>, 256>(call, 32, 256, stream);
  });
}

}  // namespace fastkd::cuda
