// The interface of the sparse loss. The teacher is known by the log-probabilities of k classes of
// each row, or of one sampled class (docs/maths.md, section 13). kernels.h explains the
// conventions.
#pragma once
#include "kernels.h"

namespace fastkd {

// The treatment of the classes that the teacher's list leaves out.
enum class Tail : int32_t { kGhost = 0, kRenormalize = 1, kIgnore = 2 };

// An estimate of KL(student || teacher) from one class that was sampled from the student (Schulman
// 2020). kNone: the list is compared by the divergence of Inputs instead.
enum class Estimator : int32_t { kNone = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

// Return true if the sparse loss supports the divergence: one that compares probabilities, except
// kDecoupled.
constexpr bool is_sparse_divergence(Divergence id) { return id <= Divergence::kTotalVariation; }

// The rows of the sparse loss's `terms`: those of Term, then the probabilities that student and
// teacher give to the listed classes together.
enum TopkTerm : int { kStudentMass = kTerms, kTeacherMass, kTopkTerms };

// A call of the sparse loss. `teacher` is acc [rows, k], contiguous: log-probabilities, which are
// used unchanged. `teacher_stride` is unused. The teacher's temperature changes no result, but must
// be valid.
struct TopkArgs : Inputs {
  int64_t k = 0;
  // [rows, k]: the class of each log-probability. An entry whose class is negative or whose
  // log-probability is -inf is padding, and is ignored.
  const int64_t* indices = nullptr;
  Tail tail = Tail::kGhost;                // with kIgnore the divergence must be the forward KL
  Estimator estimator = Estimator::kNone;  // unless kNone: k must be 1, and `tail` is not read

  void* loss = nullptr;   // acc [rows], weighted, not yet divided by any denominator; or null
  void* terms = nullptr;  // acc [kTopkTerms, rows], unweighted, or null
  void* stats = nullptr;  // CUDA only: acc [kStats, rows] as scratch memory, then the scale
  void* grad = nullptr;   // [rows, classes] in the student's dtype, or null; not the student itself
  RowStrides grad_stride;
  Reduction reduction = Reduction::kMean;  // `reduction` and `scale` are as in ForwardArgs
  double scale = 1.0;
  const void* grad_output =
      nullptr;  // acc, one number, or [rows] when `grad_output_per_row`; null: 1
  bool grad_output_per_row = false;
};

// Greatest valid sum of a row's listed probabilities. Rounding log-probabilities to 16 bits changes
// the sum by several percent.
constexpr double kMostMass = 1.1;

namespace cpu {

// Return the number of words of the bitmap `listed` (Kernels::topk), which has one bit for each
// class.
constexpr int64_t bitmap_words(int64_t classes) { return (classes + 63) / 64; }

}  // namespace cpu

namespace cuda {

// Compute the sparse loss. `total`, `denominator` and `stream` are as in forward() of kernels.h,
// with kTopkTerms instead of kTerms. A row with an invalid list (cpu::Kernels::topk) gets the loss
// and the gradient NaN. topk_backward() writes only the gradient, from the logits. `filled`:
// args.grad already holds the gradient for grad_output = 1, which stays if grad_output is 1.
int topk(const TopkArgs& args, void* total, const void* denominator, void* stream);
int topk_backward(const TopkArgs& args, bool filled, const void* denominator, void* stream);

}  // namespace cuda
}  // namespace fastkd
