// The interface of mixtures: several teachers, or one teacher's probabilities, become the logits of
// one teacher (docs/maths.md, section 12). kernels.h explains the conventions.
#pragma once
#include "kernels.h"

namespace fastkd {

// The quantity that is averaged over the teachers: probabilities, or logits.
enum class Ensemble : int32_t { kProbs = 0, kLogits = 1 };

struct MixedTeacher {
  const void* logits = nullptr;  // [rows, classes], or probabilities; classes are adjacent
  DType dtype = DType::kFloat32;
  int64_t group_rows = 0;
  RowStrides stride;
  double share = 1.0;  // the shares of all teachers add up to 1
};

// A mixture of teachers, as logits w. With kProbs, softmax(w / temperature) is the mixture of
// softmax(logits / teacher_temperature). With kProbs and several teachers, a row of w is NaN if the
// row of a teacher has NaN, +inf or no unmasked class. With kLogits, w / temperature is the
// weighted mean of logits / teacher_temperature. Probabilities are converted to logits by the
// logarithm.
struct MixtureArgs {
  int64_t rows = 0;
  int64_t classes = 0;
  const MixedTeacher* teachers = nullptr;  // [count]
  int64_t count = 0;
  bool probabilities = false;
  Ensemble ensemble = Ensemble::kProbs;
  double temperature = 1.0;
  double teacher_temperature = 1.0;
  const void* row_temperatures = nullptr;  // acc [2, rows]: replaces the two temperatures; or null
  bool in_double = false;                  // acc is double
  void* mixed = nullptr;                   // acc [rows, classes], contiguous, from `first_row` on
  int64_t first_row = 0;                   // CPU only
};

namespace cuda {

constexpr int kMostTeachers = 32;  // equals MOST_TEACHERS_ON_CUDA of python/fastkd/_core/dense.py

// Queue a mixture of at most kMostTeachers teachers. `stream` and the returned status are as in
// kernels.h.
int mixture(const MixtureArgs& args, void* stream);

}  // namespace cuda

}  // namespace fastkd
