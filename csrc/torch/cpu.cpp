// The ops on CPU tensors. This file counts rows, divides the work among torch's threads, and sums
// the losses of rows. The sum is in the order of rows, so that the result does not depend on the
// number of threads (docs/maths.md, sections 6, 8 and 9).
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <vector>

#include "backends.h"
#include "huge_pages.h"

namespace fastkd::glue {
namespace {

// Return the least number of rows that a thread should compute. The formula counts a row's costs
// besides its classes as up to 160 more classes.
int64_t grain_rows(int64_t classes) {
  constexpr int64_t kGrain = 16384;
  return std::max<int64_t>(1, kGrain / std::min(classes + 160, 5 * classes / 2 + 12));
}

// Return the value of a float32 or float64 tensor with one element.
double value_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(tensor.const_data_ptr())
             : static_cast<double>(*static_cast<const float*>(tensor.const_data_ptr()));
}

void multiply_(const Tensor& self, const Tensor& factor) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(self),
                                    torch::stable::detail::from(factor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the reference that the call returned
}

// Throw if a number of `of_rows`, acc [2, rows], is not a valid temperature.
void check_temperatures(const void* of_rows, int64_t rows, bool in_double) {
  if (of_rows == nullptr) return;
  for (int64_t at = 0; at < 2 * rows; ++at) {
    const double t = in_double ? static_cast<const double*>(of_rows)[at]
                               : static_cast<const float*>(of_rows)[at];
    STD_TORCH_CHECK(t > 0 && std::isfinite(t), at < rows ? "temperature" : "teacher_temperature",
                    " must be positive and finite; row ", at % rows, " has ", t);
  }
}

// Check labels and temperatures before anything is written. Return the number of rows that are not
// ignored.
int64_t count_rows(const Inputs& in) {
  static_assert(kTemperature == 0 && kTeacherTemperature == 1);
  check_temperatures(in.row_settings, in.rows, in_double(in));
  if (!in.labels) return in.rows;
  int64_t count = 0;
  for (int64_t row = 0; row < in.rows; ++row) {
    const int64_t label = in.labels[row];
    if (label == in.ignore_index) continue;
    STD_TORCH_CHECK(label >= 0 && label < in.classes, "labels must be in [0, ", in.classes,
                    ") or ignore_index=", in.ignore_index, "; row ", row, " has ", label);
    ++count;
  }
  return count;
}

// Return the factor of the sum over rows. `count`: the number of rows that are not ignored. If
// `count` is 0, the factor is 1, so that the mean is 0 for any divisor.
double scale_of(const Reducing& reducing, int64_t count) {
  if (reducing.reduction != Reduction::kMean) return 1.0;
  double divisor = static_cast<double>(count);
  if (reducing.denominator) divisor = value_of(*reducing.denominator);
  if (!reducing.denominator && reducing.normalizer > 0) divisor = reducing.normalizer;
  return count > 0 ? 1.0 / divisor : 1.0;
}

// Multiply `grad`, the gradient for grad_output = 1, by grad_output, and return true. Return false,
// with `grad` unchanged, if recomputing the gradient is more accurate. A gradient that has
// overwritten the student's logits cannot be recomputed.
bool scale_filled(const Inputs& inputs, const Tensor& grad_output, const Tensor& grad) {
  const double factor = value_of(grad_output);
  if (factor == 1.0) return true;
  // Scaling rounds a 16-bit gradient a second time, and a loss scale cannot restore what has
  // underflowed in fp16. In bf16 a product with a power of two is exact: the product changes the
  // exponent alone, whose range is that of float32.
  int exponent = 0;
  const bool exact = inputs.student_dtype == DType::kBFloat16 && std::isfinite(factor) &&
                     std::fabs(std::frexp(factor, &exponent)) == 0.5;
  if (size_of(inputs.student_dtype) == 2 && !exact && grad.const_data_ptr() != inputs.student)
    return false;
  multiply_(grad, grad_output);
  return true;
}

// Write, for each field of the outputs, the sum over rows times `scale`.
void add_up(const Inputs& inputs, const Outputs& outputs, double scale) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    const T* values = static_cast<const T*>(outputs.rows.const_data_ptr());
    T* const out = static_cast<T*>(outputs.out.mutable_data_ptr());
    for (int64_t field = 0; field < outputs.out.numel(); ++field) {
      double sum = 0;  // added in the order of the rows
      for (int64_t row = 0; row < inputs.rows; ++row) sum += static_cast<double>(*values++);
      out[field] = static_cast<T>(sum * scale);
    }
  };
  in_double(inputs) ? of_type(0.0) : of_type(0.0f);
}

// Greatest number of mixed logits in a thread's buffer, which should stay in L2. The buffer holds
// at least one row.
constexpr int64_t kMixedClasses = 65536;
constexpr int64_t kTile = 64;  // number of rows, a multiple of kTileRows (csrc/cpu/transpose.h)

// Call run(args, begin, end) for rows whose teacher is a mixture, on all threads. Each thread mixes
// a few rows at a time, and passes the mixed logits as the teacher's.
template <class Args, class Run>
void run_mixed(const Args& args, const MixtureArgs& mixture, const Run& run) {
  check_temperatures(mixture.row_temperatures, mixture.rows, mixture.in_double);
  const int64_t rows = args.rows, row_bytes = args.classes * acc_bytes(args);
  const int64_t grain = grain_rows(args.classes);
  const int64_t threads = std::max<int64_t>(
      1, std::min<int64_t>(torch::stable::get_num_threads(), (rows + grain - 1) / grain));
  int64_t step = std::max<int64_t>(1, kMixedClasses / args.classes);
  if (step > kTile) step -= step % kTile;
  step = std::min(step, (rows + threads - 1) / threads);
  const Tensor buffers =
      torch::stable::empty({threads, step, args.classes}, acc_type(in_double(args)));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    for (int64_t thread = first_thread; thread < last_thread; ++thread) {
      MixtureArgs mixed = mixture;
      Args with_teacher = args;
      mixed.mixed = static_cast<char*>(buffers.mutable_data_ptr()) + thread * step * row_bytes;
      const int64_t end = rows * (thread + 1) / threads;
      for (int64_t row = rows * thread / threads; row < end; row += step) {
        const int64_t last = std::min(row + step, end);
        mixed.first_row = row;
        cpu::kernels().mixture(mixed, row, last);
        // Pass the address that row 0 would have, because kernels add the offset of the row.
        const uintptr_t first =
            reinterpret_cast<uintptr_t>(mixed.mixed) - static_cast<size_t>(row * row_bytes);
        with_teacher.teacher = reinterpret_cast<const void*>(first);
        run(with_teacher, row, last);
      }
    }
  });
}

// Call run(args, begin, end) for rows [0, rows), on all threads.
template <class Args, class Run>
void run_rows(const Args& args, int64_t rows, const Run& run) {
  torch::stable::parallel_for(0, rows, grain_rows(args.classes),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

// Compute rows [begin, end). All threads share each row, segment by segment.
void forward_split(const cpu::Kernels& kernels, const ForwardArgs& args, int64_t begin,
                   int64_t end) {
  const int64_t segments = (args.classes + cpu::kSegment - 1) / cpu::kSegment;
  std::vector<cpu::Statistics> statistics(static_cast<size_t>(segments));
  std::vector<cpu::Sums> sums(static_cast<size_t>(segments));
  const auto for_segments = [&](auto&& work) {
    torch::stable::parallel_for(0, segments, 1, [&](int64_t first, int64_t last) {
      for (int64_t segment = first; segment < last; ++segment) {
        work(segment, static_cast<size_t>(segment));
      }
    });
  };
  for (int64_t row = begin; row < end; ++row) {
    sums.assign(sums.size(), {});
    for_segments(
        [&](int64_t segment, size_t at) { kernels.scan(args, row, segment, &statistics[at]); });
    cpu::Sums slope_sums = {};
    if (!is_one_sweep(args.divergence)) {
      for_segments([&](int64_t segment, size_t at) {
        kernels.sum_slopes(args, row, segment, statistics.data(), &sums[at]);
      });
      slope_sums = cpu::total(sums.data(), segments);
    }
    for_segments([&](int64_t segment, size_t at) {
      kernels.write(args, row, segment, statistics.data(), slope_sums, &sums[at]);
    });
    kernels.close(args, row, statistics.data(), sums.data());
  }
}

void run_forward(const ForwardArgs& args, const MixtureArgs* mixture) {
  const cpu::Kernels& kernels = cpu::kernels();
  if (mixture) return run_mixed(args, *mixture, kernels.forward);
  const int64_t threads = torch::stable::get_num_threads();
  // Every thread gets an equal number of rows. The remaining rows are shared segment by segment, if
  // sharing ends sooner than giving some threads one more row.
  const int64_t segments = (args.classes + cpu::kSegment - 1) / cpu::kSegment;
  const int64_t rest = cpu::has_apart_classes(args) ? 0 : args.rows % threads;
  const int64_t split = rest < std::min(threads, segments) ? rest : 0;
  run_rows(args, args.rows - split, kernels.forward);
  forward_split(kernels, args, args.rows - split, args.rows);
}

void run_topk(const TopkArgs& args) {
  const cpu::Kernels& kernels = cpu::kernels();
  std::atomic<int64_t> first_bad{args.rows};
  torch::stable::parallel_for(
      0, args.rows, grain_rows(args.classes), [&](int64_t begin, int64_t end) {
        std::vector<uint64_t> listed(static_cast<size_t>(cpu::bitmap_words(args.classes)));
        const int64_t bad = kernels.topk(args, begin, end, listed.data());
        int64_t before = first_bad.load();
        while (bad >= 0 && bad < before && !first_bad.compare_exchange_weak(before, bad)) continue;
      });
  STD_TORCH_CHECK(first_bad == args.rows,
                  "indices must be different classes of the student's, or negative, and log_probs "
                  "the logarithms of their probabilities; not so in row ",
                  first_bad.load());
}

struct CpuBackend final : Backend {
  void forward(const Call& call, ForwardArgs args, const Reducing& reducing,
               const Outputs& outputs) const override {
    args.scale = scale_of(reducing, count_rows(args));
    run_forward(args, call.mixture);
    if (!reducing.per_row()) add_up(args, outputs, args.scale);
  }

  void backward(const Call& call, const BackwardArgs& args, const Reducing& reducing,
                const Tensor& grad_output, const Tensor& grad, bool filled) const override {
    if (filled && scale_filled(args, grad_output, grad)) return;
    const int64_t count = count_rows(args);
    const auto kernel = cpu::kernels().backward;
    if (args.stats && call.mixture) return run_mixed(args, *call.mixture, kernel);
    if (args.stats) return run_rows(args, args.rows, kernel);
    // Run the forward pass: its gradient has the bits that the backward pass would write from
    // statistics.
    ForwardArgs forward;
    const Outputs outputs = set_outputs(call, reducing, 1, &grad, &forward);
    forward.grad_output = value_of(grad_output);
    forward.scale = scale_of(reducing, count);
    run_forward(forward, call.mixture);
  }

  void topk(const Call&, TopkArgs args, const Reducing& reducing,
            const Outputs& outputs) const override {
    args.scale = scale_of(reducing, count_rows(args));
    run_topk(args);
    if (!reducing.per_row()) add_up(args, outputs, args.scale);
  }

  void topk_backward(const Call&, TopkArgs args, const Reducing& reducing,
                     const Tensor& grad_output, const Tensor& grad, bool filled) const override {
    if (filled && scale_filled(args, grad_output, grad)) return;
    args.scale = scale_of(reducing, count_rows(args));
    run_topk(args);
  }

  void mix(const MixtureArgs& args, const Tensor& out) const override {
    check_temperatures(args.row_temperatures, args.rows, args.in_double);
    prefer_huge_pages(args.mixed, static_cast<size_t>(out.numel()) * out.element_size());
    run_rows(args, args.rows, cpu::kernels().mixture);
  }
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend kBackend;
  return kBackend;
}

}  // namespace fastkd::glue
