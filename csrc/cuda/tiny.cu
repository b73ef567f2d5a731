// Kernels for rows of at most 128 classes: 8 or 32 lanes share a row, four classes each, which the
// second sweep finds in L1. Any dtypes and alignments; bound by the launch rather than by memory.
// Derivations: docs/maths.md, sections 2, 3 and 10.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

cudaError_t launch_tiny(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  using Row = ElementRow<AnyDtypes<float>>;
  static_assert(Row::kChunk == kTinyPerLane);
  const auto with = [&](auto writer) {
    using W = typename decltype(writer)::Type;
    return plan.lanes == 8
               ? launch_rows<Row, LaneTeam<8>, W, true, kTinyThreads, 1>(call, plan, stream)
               : launch_rows<Row, LaneTeam<32>, W, true, kTinyThreads, 1>(call, plan, stream);
  };
  return is_hot(call.args) ? with(TypeOf<Writer<float>>()) : with(TypeOf<GeneralWriter<float>>());
}

}  // namespace fastkd::cuda
