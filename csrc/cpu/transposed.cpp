// Entry points of the transposed engine (transposed_engine.h), compiled once for each instruction
// set.
#include "transposed_engine.h"

namespace fastkd::cpu::FASTKD_ISA {

void forward_transposed(const ForwardArgs& args, int64_t begin, int64_t end);
void forward_transposed(const ForwardArgs& args, int64_t begin, int64_t end) {
  TransposedEngine engine(args, args.terms != nullptr);
  const float gain = static_cast<float>(args.scale) * static_cast<float>(args.grad_output);
  engine.for_groups(begin, end, [&] {
    engine.scan();
    engine.gain = splat<V>(gain);
    engine.differentiate(false);
    engine.put_results(args);
    engine.put_stats(args);
  });
}

void backward_transposed(const BackwardArgs& args, int64_t begin, int64_t end);
void backward_transposed(const BackwardArgs& args, int64_t begin, int64_t end) {
  TransposedEngine engine(args, false);
  const float scale = static_cast<const float*>(args.stats)[kStats * args.rows];
  const float* const grad_output = static_cast<const float*>(args.grad_output);
  engine.for_groups(begin, end, [&] {
    engine.get_stats(args);
    engine.gain = splat<V>(scale * grad_output[0]);
    for (int64_t i = 0; i < engine.count && args.grad_output_per_row; ++i) {
      engine.gain[i] = scale * grad_output[engine.first + i];
    }
    engine.exponentiate<false>({0, args.classes});
    engine.differentiate(true);
  });
}

}  // namespace fastkd::cpu::FASTKD_ISA
