// What the ops on CPU tensors share.
#pragma once
#include <algorithm>

#include "backends.h"

namespace fastkd::glue {

// Below this many classes of work in all, a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

inline int64_t grain_rows(int64_t classes) { return std::max<int64_t>(1, kGrain / classes); }

double number(const Tensor& tensor);

void prefer_huge_pages(void* data, size_t bytes);
size_t gradient_bytes(const Inputs& inputs);

// Checks what only the data can tell, before anything is written; returns the number of rows that
// count.
int64_t count_rows(const Call& call);

double divisor(const Reducing& reducing, int64_t count);

void multiply_(const Tensor& self, const Tensor& factor);

template <class T>
double ordered_sum(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

}  // namespace fastkd::glue
