// The arguments of the forward kernels, and the functions that kernels of all layouts share besides
// the sweeps. These functions classify rows, compute the scale, write a row's loss, terms and
// statistics, and sum the total. Derivations: docs/maths.md, sections 1, 5 and 6. numerics.h
// defines the letters.
#pragma once
#include "general.cuh"

namespace fastkd::cuda {

// The source of the scale that is folded into the gradient and the total.
enum class ScaleSource : int32_t { kArgument, kDenominator, kCount, kStats };

struct ForwardCall {
  ForwardArgs args;
  const void* denominator = nullptr;  // acc, one number, or null
  void* total = nullptr;              // acc [quantities()], or null
  ScaleSource scale_source = ScaleSource::kArgument;
  Constants constants;
  int terms = kTerms;  // number of rows of args.terms

  // Return the number of results of each row: the loss, and the terms if the call has terms.
  FASTKD_HOST_DEVICE int quantities() const { return args.terms == nullptr ? 1 : 1 + terms; }
};

// Return true if a call needs the sums of Writer::add_extra(), for `terms`, label smoothing or the
// soft cross entropy.
FASTKD_HOST_DEVICE bool wants_extra(const ForwardArgs& args) {
  return args.terms != nullptr || args.label_smoothing != 0 ||
         args.divergence == Divergence::kSoftCrossEntropy;
}

enum class RowKind : int32_t { kReal, kIgnored, kBad };

__device__ __forceinline__ RowKind kind_of(const Inputs& in, int64_t label) {
  if (in.labels == nullptr) return RowKind::kReal;
  if (label == in.ignore_index) return RowKind::kIgnored;
  return label < 0 || label >= in.classes ? RowKind::kBad : RowKind::kReal;
}
// Return the value of loss and gradient in a row without valid results: 0 if the row is ignored,
// else NaN.
__device__ __forceinline__ float fill_value(RowKind kind) {
  return kind == RowKind::kIgnored ? 0.0f : NAN;
}
// Write `value` as loss, terms and statistics of a row.
template <class A>
__device__ __forceinline__ void close_row_as(const ForwardArgs& args, int64_t row, A value) {
  static_cast<A*>(args.loss)[row] = value;
  if (args.terms != nullptr)
    for (int i = 0; i < kTerms; i++) static_cast<A*>(args.terms)[i * args.rows + row] = value;
  for (int i = 0; i < kStats; i++) static_cast<A*>(args.stats)[i * args.rows + row] = value;
}

// Write a row's loss, terms and statistics. Only one thread of a row calls this function.
template <class W, class A>
__device__ __forceinline__ void close_row(const ForwardArgs& args, int64_t row, const W& writer,
                                          const typename W::Stats& stats, Sums<A> sums,
                                          A label_logit) {
  const Temperature<A>& t = writer.t;
  A hard = 0;
  if (args.labels != nullptr) {
    A log_sum = log_sum_of(stats);
    hard = log_sum + (stats.student_max - label_logit);
    if constexpr (W::kGeneral) writer.include_label(args, row, label_logit, log_sum, hard, sums);
    if (args.label_smoothing != 0) {
      const A eps = static_cast<A>(args.label_smoothing);
      hard = weighted(A(1) - eps, hard) + weighted(eps, log_sum - sums.logits);
    }
  }
  // In a valid row, NaN comes only from infinite terms: from 0 * inf, if the student masks a class
  // whose teacher probability underflows, or from inf - inf (kCenteredSquaredError). The divergence
  // is then infinite.
  A soft =
      divergence_of(args.divergence, sums.value, sums.slope, sums.classes, sums.teacher_entropy);
  if (soft != soft) soft = A(INFINITY);
  // nan_or_0 makes the loss and the terms of an invalid row NaN.
  const A nan_or_0 = stats.valid() ? A(0) : static_cast<A>(fill_value(RowKind::kBad));
  soft += nan_or_0;
  static_cast<A*>(args.loss)[row] =
      weighted(setting_of<A>(args, kHardWeight, row, args.hard_weight), hard) +
      weighted(setting_of<A>(args, kSoftWeight, row, args.soft_weight) * t.t * t.t, soft);
  if (args.terms != nullptr) {
    A* terms = static_cast<A*>(args.terms);
    terms[kHard * args.rows + row] = hard + nan_or_0;
    terms[kSoft * args.rows + row] = soft;
    terms[kStudentEntropy * args.rows + row] = sums.student_entropy + nan_or_0;
    terms[kTeacherEntropy * args.rows + row] = sums.teacher_entropy + nan_or_0;
    terms[kAgreement * args.rows + row] = sums.agreement + nan_or_0;
  }
  stats.store(static_cast<A*>(args.stats), args.rows, row, sums.slope, sums.classes);
}

// Return the number of labels that are not ignored, among those of rows first, first + step, ...
__device__ __forceinline__ int count_labels(const Inputs& in, int64_t first, int64_t step) {
  int count = 0;
#pragma unroll 8
  for (int64_t i = first; i < in.rows; i += step) count += in.labels[i] != in.ignore_index;
  return count;
}
template <class A>
__device__ __forceinline__ A scale_of_count(int64_t count) {
  return quotient_of(A(1), static_cast<A>(count > 0 ? count : 1));
}
// Return the scale of a call whose scale_source is not kCount.
template <class A>
__device__ __forceinline__ A known_scale(const ForwardCall& call) {
  if (call.scale_source == ScaleSource::kDenominator)
    return A(1) / *static_cast<const A*>(call.denominator);
  if (call.scale_source == ScaleSource::kStats)
    return static_cast<const A*>(call.args.stats)[kStats * call.args.rows];
  return static_cast<A>(call.args.scale);
}
// Return the scale. Unless `stats` has the scale already, one thread of the grid stores it there.
// All threads of a CTA must call this function.
template <class A>
__device__ __forceinline__ A block_scale(const ForwardCall& call, WarpExchange& exchange) {
  A scale;
  if (call.scale_source == ScaleSource::kCount) {
    const int count = count_labels(call.args, threadIdx.x, static_cast<int64_t>(blockDim.x));
    scale = scale_of_count<A>(static_cast<int64_t>(exchange.sum(count)));
  } else {
    scale = known_scale<A>(call);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && call.scale_source != ScaleSource::kStats)
    static_cast<A*>(call.args.stats)[kStats * call.args.rows] = scale;
  return scale;
}

// Return the losses of all rows (quantity 0), or one of the terms of all rows.
template <class A>
__device__ __forceinline__ A* values_of(const ForwardArgs& args, int quantity) {
  return quantity == 0 ? static_cast<A*>(args.loss)
                       : static_cast<A*>(args.terms) + (quantity - 1) * args.rows;
}
// If a total is wanted, replace each value of this CTA's first row by the sum over the CTA's rows.
// launch_finish() then adds the CTAs' sums. The CTA computed `rows_at_once` rows at a time. All
// threads of the CTA must call this function.
template <class A>
__device__ __forceinline__ void add_up_rows(const ForwardCall& call, int rows_at_once,
                                            WarpExchange& exchange) {
  if (call.total == nullptr) return;
  __syncthreads();  // wait until the results of all rows are written
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows_at_once;
  for (int quantity = 0; quantity < call.quantities(); quantity++) {
    A* const values = values_of<A>(call.args, quantity);
    double sum = 0;
    for (unsigned k = threadIdx.x;; k += blockDim.x) {
      const int64_t row = first + k / rows_at_once * step + k % rows_at_once;
      if (row >= call.args.rows) break;
      sum += static_cast<double>(values[row]);
    }
    sum = exchange.sum(sum);
    if (threadIdx.x == 0) values[first] = static_cast<A>(sum);
  }
}

}  // namespace fastkd::cuda
