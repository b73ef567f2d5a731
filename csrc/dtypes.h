// The number types of logits: how they are named, stored and computed with.
#pragma once
#include <cstdint>

namespace fastkd {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Everything is computed in fp32, or in fp64 as soon as one of the two inputs is fp64.
inline bool computes_in_double(DType student, DType teacher) {
  return student == DType::kFloat64 || teacher == DType::kFloat64;
}

}  // namespace fastkd
