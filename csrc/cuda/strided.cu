// Kernels for rows whose classes are not adjacent while the rows themselves are, as in (N, C, H,
// W): a thread for each row, or a few threads that share its classes. The threads of a warp have
// neighboring rows, so that their loads of a class are coalesced. The logits are read twice, the
// second time from L1 or L2 while the rows in flight fit there. Any dtypes and strides.
// Derivations: docs/maths.md, sections 2, 3 and 10.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

cudaError_t launch_strided(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  return with_elements(call.args, [&](auto elements) {
    using Row = ElementRow<typename decltype(elements)::Type>;
    using A = typename Row::A;
    return with_writer<Row>(call.args, [&](auto writer, auto extra) {
      constexpr bool kExtra = decltype(extra)::value;
      // CTAs for which a processor has registers. With chunks of eight a third CTA would make the
      // loops spill (232 bytes, sm_100).
      constexpr int kResident = sizeof(A) == 8 ? 1 : kExtra || Row::kChunk > 4 ? 2 : 3;
      return launch_rows<Row, TileTeam<A>, typename decltype(writer)::Type, kExtra, kStridedThreads,
                         kResident>(call, plan, stream);
    });
  });
}

}  // namespace fastkd::cuda
