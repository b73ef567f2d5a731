// Kernels for long rows, fp64, and students and teachers of different dtypes: a CTA for each row
// reads the row twice, or three times if slopes are summed. L2 serves all reads but the first while
// the rows in flight fit there. Derivations: docs/maths.md, sections 2, 3 and 10.
#include "rows_kernel.cuh"

namespace fastkd::cuda {

template <class Row>
static cudaError_t launch_as(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  return with_writer<Row>(call.args, [&](auto writer, auto extra) {
    using W = typename decltype(writer)::Type;
    // fp64 needs twice the registers, and so does the sweep that sums slopes.
    constexpr int kThreads = sizeof(typename Row::A) == 8 || W::kGeneral ? 256 : 512;
    return launch_rows<Row, BlockTeam, W, decltype(extra)::value, kThreads, 1>(call, plan, stream);
  });
}

cudaError_t launch_streaming(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  return with_elements(call.args, [&](auto elements) {
    using E = typename decltype(elements)::Type;
    if constexpr (E::kHot) {
      return launch_as<VectorRow<typename E::T>>(call, plan, stream);
    } else {
      return launch_as<ElementRow<E>>(call, plan, stream);
    }
  });
}

}  // namespace fastkd::cuda
