// The dtypes of logits: their names and sizes, and the choice of the compute type, whose rounding
// docs/maths.md discusses in section 3.
#pragma once
#include <cstdint>

namespace fastkd {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Return true if either input is fp64. The loss is then computed in fp64, and otherwise in fp32.
inline bool computes_in_double(DType student, DType teacher) {
  return student == DType::kFloat64 || teacher == DType::kFloat64;
}

}  // namespace fastkd
