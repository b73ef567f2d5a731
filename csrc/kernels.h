// The interface between the kernels and their callers: structs and functions without torch. topk.h
// and mixture.h extend this interface.
//
// One call computes, for each row of logits, with the student's temperature t,
//   loss = hard_weight * CE(student, label)
//         + soft_weight * t^2 * D(softmax(teacher / teacher_temperature), softmax(student / t))
// (docs/maths.md, section 1). The gradient with respect to the student's logits is computed in the
// same pass through memory.
//
// "acc" is the compute type: float, or double if either input is fp64 (dtypes.h). Pointers marked
// acc point to numbers of this type. Two layouts are read in place. In (..., C), the classes of a
// row are adjacent, and rows have any strides. In (N, C, H, W), the rows of a group are adjacent,
// and classes have any stride. Tensors may have any alignment.
#pragma once
#include <cstdint>

#include "divergences.h"
#include "dtypes.h"

namespace fastkd {

enum class Reduction : int32_t { kNone = 0, kSum = 1, kMean = 2 };

// The rows of `terms` (ForwardArgs), which the ops return after the loss.
enum Term : int { kHard, kSoft, kStudentEntropy, kTeacherEntropy, kAgreement, kTerms };

// The rows of `row_settings` (Inputs).
enum RowSetting : int { kTemperature, kTeacherTemperature, kHardWeight, kSoftWeight, kRowSettings };

// The rows of `stats`: the numbers of a row from which backward recomputes the gradient, bit for
// bit. z and w are the student's and the teacher's logits. t is the student's temperature for z,
// and the teacher's temperature for w.
enum Stat : int {
  kStudentMax,    // max z
  kStudentScale,  // 1 / sum exp((z - max z) / t)
  kHardScale,     // 1 / sum exp(z - max z)
  kTeacherMax,    // max w
  kTeacherScale,  // 1 / sum exp((w - max w) / t)
  kSlopeSum,      // S of divergences.h; the divergence itself for kCosine
  kClassCount,    // n of SlopeCentering (divergences.h), or 0
  kStats,

  // Aliases of the rows above, for divergences that replace the numbers of those rows. kCosine: the
  // inverse norms 1 / |z| and 1 / |w|.
  kStudentInverseNorm = kStudentScale,
  kTeacherInverseNorm = kTeacherScale,
  // kCenteredSquaredError: the means of z and of w.
  kStudentMean = kStudentScale,
  kTeacherMean = kTeacherScale,
  // kForwardKL, kSoftCrossEntropy and kJensenShannon in the CPU's row engine (cpu/rows.h): the
  // teacher's mean of log(p / q) if the row is well separated, else 0 (mean_of(), cpu/row.h).
  kMeanLogRatio = kClassCount,
};
// With kDecoupled the sums leave the label out. A maximum and its scales are 0 if all classes but
// the label are masked.

// Strides, in elements. Rows come in groups of `group_rows`: rows of a group are `row` apart,
// groups are `group` apart, and classes of a row are `classes` apart. Most tensors have one group.
// logits[:, :-1] of a batch of sequences has one group per sequence, and (N, C, H, W) one per
// image. Either `row` or `classes` is 1, unless there is a single row.
struct RowStrides {
  int64_t row = 0;
  int64_t group = 0;
  int64_t classes = 1;
};

FASTKD_HOST_DEVICE int64_t row_offset(int64_t row, int64_t group_rows, RowStrides stride) {
  if (row < group_rows) return row * stride.row;
  const int64_t group = row / group_rows;
  return group * stride.group + (row - group * group_rows) * stride.row;
}

struct Inputs {
  int64_t rows = 0;
  int64_t classes = 0;
  int64_t group_rows =
      0;  // rows in a group of student, teacher and grad; `rows` if there is one group

  const void* student = nullptr;  // [rows, classes]
  RowStrides student_stride;
  DType student_dtype = DType::kFloat32;

  const void* teacher = nullptr;  // [rows, classes]
  RowStrides teacher_stride;
  DType teacher_dtype = DType::kFloat32;

  const int64_t* labels = nullptr;  // [rows], or null: no hard term and no ignored rows

  // Settings of each row, acc [kRowSettings, rows], which replace the next four numbers; or null.
  // If the two temperatures below are equal, the two temperatures of each row must be equal as
  // well.
  const void* row_settings = nullptr;
  double temperature = 1.0;  // temperature of the student, whose square multiplies the divergence
  double teacher_temperature = 1.0;
  double hard_weight = 0.5;
  double soft_weight = 0.5;
  double label_smoothing = 0.0;
  int64_t ignore_index =
      -100;  // rows with this label have loss, terms and gradient 0 for any logits
  Divergence divergence = Divergence::kForwardKL;
  double mix = 0.5;  // parameter of some divergences
};
// Without labels, kDecoupled gives NaN, as for labels out of range.

// A forward call with its outputs. A label out of range makes the row's loss and gradient NaN.
struct ForwardArgs : Inputs {
  void* loss = nullptr;   // acc [rows], weighted, not yet divided by any denominator
  void* terms = nullptr;  // acc [kTerms, rows], or null. Entropies in nats, at the temperatures of
                          // student and teacher; agreement is 1 if some class is the greatest for
                          // both teacher and student
  void* stats = nullptr;  // acc [kStats, rows], then the scale; or null
  void* grad =
      nullptr;  // [rows, classes] in the student's dtype, or null; may be the student itself
  RowStrides grad_stride;
  // Factor of the gradient and, on CUDA, of the totals. kNone and kSum use `scale` unchanged. kMean
  // on the CPU uses `scale` unchanged as well, because the caller has counted the rows. kMean on
  // CUDA takes the factor from `denominator`, or counts the rows that are not ignored.
  Reduction reduction = Reduction::kMean;
  double scale = 1.0;
  // CPU only: the grad_output of backward, as a factor of the gradient besides `scale`.
  double grad_output = 1.0;
};

// The arguments of backward, which writes grad = d(sum_i grad_output_i * scale * loss_i)/d student
// from the stats of forward.
struct BackwardArgs : Inputs {
  const void* stats = nullptr;        // acc [kStats, rows], then the scale
  const void* grad_output = nullptr;  // acc, one number, or [rows] when `grad_output_per_row`
  bool grad_output_per_row = false;
  void* grad = nullptr;  // [rows, classes] in the student's dtype
  RowStrides grad_stride;
};

struct TopkArgs;     // topk.h
struct MixtureArgs;  // mixture.h

namespace cpu {

// Greatest number of classes of a segment. Longer rows are divided into segments, whose sums are
// merged in order. Several threads can then share one row, and the result does not depend on the
// number of threads (docs/maths.md, section 9).
constexpr int64_t kSegment = 32768;

// Greatest number of adjacent classes with which rows use the transposed layout, one row per SIMD
// lane. Rows whose classes are not adjacent always use that layout, and rows computed in fp64
// never. The layout saves each row's padded last step and separate logarithms, but many classes of
// several rows do not fit in L1. The layout saves 11 % of the time at 128 classes, and costs 6 % at
// 160 (Zen 4, 2026-11-28).
constexpr int64_t kNarrow = 144;

FASTKD_HOST_DEVICE bool has_apart_classes(const Inputs& in) {
  return in.student_stride.classes != 1 || in.teacher_stride.classes != 1;
}
FASTKD_HOST_DEVICE bool is_transposed(const Inputs& in) {
  return (in.classes <= kNarrow || has_apart_classes(in)) &&
         !computes_in_double(in.student_dtype, in.teacher_dtype);
}

// Results of the first sweep over one segment of one row.
struct Statistics {
  double student_max, student_sum, hard_sum, teacher_max, teacher_sum;
  // The label's logits if this segment has the label and the sums leave the label out (kDecoupled);
  // else 0.
  double student_label = 0, teacher_label = 0;
  // kCosine: the sums of z^2 and w^2. kCenteredSquaredError: the sums of z and w over the classes
  // that are not masked, and the numbers of these classes. Other divergences: 0.
  double student_moment = 0, teacher_moment = 0;
  double student_count = 0, teacher_count = 0;
  // The sum over classes of exp((w - max w) / t) times the difference (w - max w) - (z - max z),
  // which is bounded for the JSD (cpu/scan.h). The sum is NaN if it was abandoned after the first
  // block (cpu/first_sweep.h), and 0 if unused.
  double log_ratio_sum = 0;
};
// Sums of the sweeps after the first over one segment of one row.
struct Sums {
  double value;           // sum of the values of the divergence
  double slope;           // sum of slopes; for kDecoupled the sum of q - p, for kCosine `value`
  double classes;         // number of classes in a mean: n of SlopeCentering (divergences.h), or 0
  double student_logits;  // sum of z - max z, weighted by the target (docs/maths.md, section 7)
  double student_entropy, teacher_entropy;
  double agreement;  // > 0 if a class is the greatest for both student and teacher
};

// The kernels of one instruction set. Kernels start no threads: the caller divides rows or segments
// among threads.
struct Kernels {
  const char* name;
  // Compute rows [begin, end).
  void (*forward)(const ForwardArgs&, int64_t begin, int64_t end);
  void (*backward)(const BackwardArgs&, int64_t begin, int64_t end);
  // The steps of forward(), for a few rows that are longer than a segment. First, scan every
  // segment of a row. Unless the divergence is_one_sweep(), sum the slopes of every segment next,
  // given all statistics. Then write every segment, given the total of the sums. Last, close the
  // row: write its loss, terms and `stats`. The arrays of statistics and sums have ceil(classes /
  // kSegment) entries. sum_slopes and write add to the segment's entry of the sums.
  void (*scan)(const ForwardArgs&, int64_t row, int64_t segment, Statistics*);
  void (*sum_slopes)(const ForwardArgs&, int64_t row, int64_t segment, const Statistics* of_row,
                     Sums* of_segment);
  void (*write)(const ForwardArgs&, int64_t row, int64_t segment, const Statistics* of_row,
                const Sums& slope_sums, Sums* of_segment);
  void (*close)(const ForwardArgs&, int64_t row, const Statistics* of_row, const Sums* of_row_sums);
  // Compute out[i] = 2^in[i], for tests. The kernels have two exponentials: one with explicit
  // registers, and one that compilers vectorize.
  void (*exp2)(const float* in, float* out, int64_t count, bool by_registers);
  // Compute rows [begin, end) of the sparse loss. `listed`: bitmap_words(classes) words, all 0
  // before and after the call. Return the first row with an invalid list, or -1. A list is invalid
  // if a class is out of range or listed twice, or if its probabilities do not add up to at most
  // kMostMass (topk.h). The row's loss and gradient are then NaN.
  int64_t (*topk)(const TopkArgs&, int64_t begin, int64_t end, uint64_t* listed);
  void (*mixture)(const MixtureArgs&, int64_t begin, int64_t end);
};

// Return the sums of slopes and classes over all segments, with 0 for the remaining sums. The order
// is that of forward(), so that the bits are equal.
Sums total(const Sums* of_segments, int64_t segments);

// Return the kernels that select() or FASTKD_CPU_CAPABILITY named, or else the best kernels that
// this processor can run.
const Kernels& kernels();
// Return the kernels that this processor can run, best first, null-terminated.
const Kernels* const* available();
// Make kernels() return the named kernels. Return false, and change nothing, if the named kernels
// are not available.
bool select(const char* name);

}  // namespace cpu

namespace cuda {

// Every call but describe() returns a cudaError_t (0 is success), and queues work on `stream` of
// the current device. No call waits for the device, so that calls can be captured in a CUDA graph.
// All pointers to tensors are device pointers.

// Compute forward, and reduce the losses and terms of the rows. `args.stats` is required, and its
// last number receives the scale that was folded into the gradient and the total. If `total` is not
// null, `args.loss` and `args.terms` are scratch memory.
//   total        acc [1], or [1 + kTerms] with `args.terms`; null for Reduction::kNone
//   denominator  acc, one number: replaces the count of rows that are not ignored in
//                Reduction::kMean; or null
int forward(const ForwardArgs& args, void* total, const void* denominator, void* stream);

// Compute backward. `filled`: args.grad already holds the gradient for grad_output = 1, as forward
// wrote it. The kernel reads grad_output and returns at once if grad_output is 1. Otherwise 16-bit
// gradients are recomputed from the logits, so that they are rounded once, and do not underflow in
// fp16 before a loss scale is applied. fp32 and fp64 gradients are scaled in place, and so are
// gradients that overwrote the student (args.grad == args.student).
int backward(const BackwardArgs& args, bool filled, void* stream);

const char* describe(int status);

}  // namespace cuda
}  // namespace fastkd
