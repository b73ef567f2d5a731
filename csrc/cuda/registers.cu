// Kernels for rows of 129 to 4096 classes (32 bits) or 8192 (16 bits), with the hot objective: a
// warp or a CTA for each row holds the row in registers between the sweeps, so that the second
// sweep reads nothing. Derivations: docs/maths.md, sections 2 and 3.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

cudaError_t launch_registers(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  return with_elements(call.args, [&](auto elements) -> cudaError_t {
    using E = typename decltype(elements)::Type;
    if constexpr (!E::kHot) {
      return cudaErrorInvalidValue;
    } else {
      using Row = VectorRow<typename E::T, kRegisterBytes / kVectorBytes>;
      using W = Writer<float>;
      const auto with = [&](auto extra) {
        constexpr bool kExtra = decltype(extra)::value;
        return plan.lanes == 32
                   ? launch_rows<Row, LaneTeam<32>, W, kExtra, 512, 1>(call, plan, stream)
                   : launch_rows<Row, BlockTeam, W, kExtra, 256, kExtra ? 1 : 2>(call, plan,
                                                                                 stream);
      };
      return wants_extra(call.args) ? with(std::true_type()) : with(std::false_type());
    }
  });
}

}  // namespace fastkd::cuda
