// What _C has for _eager: the ops on CPU tensors as functions of plain structs (cpu.cpp, topk.cpp),
// which it hands out in a capsule. A plain call that goes this way, and not through torch's
// dispatcher and the boxes of its stable ABI, touches half the code, most of which has left the
// caches since the last call.
#pragma once
#include <optional>

#include "../topk.h"

namespace fastkd {

// `args` is without loss, terms and scale. `divisor`: what kMean divides by; nothing: the rows that
// count. `out`: acc, one number, or 1 + kTerms with `terms`; with kNone of each row. What only the
// data can tell is checked before anything is written; std::runtime_error says what is wrong.
struct CpuCalls {
  void (*forward)(ForwardArgs args, std::optional<double> divisor, bool terms, void* out);
  void (*topk)(TopkArgs args, Reduction reduction, std::optional<double> divisor, void* out);
};

constexpr const char* kCpuCallsCapsule = "fastkd.cpu_calls";
const CpuCalls& cpu_calls();

}  // namespace fastkd
