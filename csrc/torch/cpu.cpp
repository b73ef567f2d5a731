// The ops on CPU tensors: counts rows, splits the work among torch's threads, sums the row losses
// in order.
#include "cpu.h"

#include <array>
#include <cmath>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd::glue {

double number(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(tensor.const_data_ptr())
             : static_cast<double>(*static_cast<const float*>(tensor.const_data_ptr()));
}

// Asks for huge pages under a gradient that is about to be written: allocators hand large tensors
// out as pages that the kernel clears at the first touch, 4 KB at a time, which costs more than the
// gradient itself. Only whole huge pages inside, so that no neighbour is affected. Where the advice
// is not taken nothing changes.
void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (start + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

size_t gradient_bytes(const Inputs& inputs) {
  return static_cast<size_t>(inputs.rows * inputs.classes * size_of(inputs.student_dtype));
}

int64_t count_rows(const Call& call) {
  const Inputs& in = call.inputs;
  for (const RowSetting which : {kTemperature, kTeacherTemperature}) {
    for (int64_t row = 0; in.row_settings && row < in.rows; ++row) {
      const int64_t at = which * in.rows + row;
      const double t = call.acc == ScalarType::Double
                           ? static_cast<const double*>(in.row_settings)[at]
                           : static_cast<const float*>(in.row_settings)[at];
      STD_TORCH_CHECK(t > 0 && std::isfinite(t), "temperature must be positive and finite; row ",
                      row, " has ", t);
    }
  }
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

void multiply_(const Tensor& self, const Tensor& factor) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(self),
                                    torch::stable::detail::from(factor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
}

double divisor(const Reducing& reducing, int64_t count) {
  if (reducing.reduction != Reduction::kMean) return 1.0;
  if (reducing.denominator) return number(*reducing.denominator);
  if (reducing.normalizer > 0) return reducing.normalizer;
  return static_cast<double>(count > 0 ? count : 1);
}

namespace {

// Few long rows: all threads share each of the last rows, segment by segment.
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
    cpu::Sums balanced = {};
    if (!is_one_sweep(args.divergence)) {
      for_segments([&](int64_t segment, size_t at) {
        kernels.balance(args, row, segment, statistics.data(), &sums[at]);
      });
      balanced = cpu::total(sums.data(), segments);
    }
    for_segments([&](int64_t segment, size_t at) {
      kernels.write(args, row, segment, statistics.data(), balanced, &sums[at]);
    });
    kernels.close(args, row, statistics.data(), sums.data());
  }
}

void run_forward(const ForwardArgs& args) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t threads = torch::stable::get_num_threads();
  // Every thread gets the same number of whole rows. What is left over is shared segment by segment
  // where that ends sooner than giving one more row to some of the threads.
  const int64_t segments = (args.classes + cpu::kSegment - 1) / cpu::kSegment;
  const int64_t rest = cpu::in_lanes(args) ? 0 : args.rows % threads;
  const int64_t whole = rest < std::min(threads, segments) ? args.rows - rest : args.rows;
  torch::stable::parallel_for(0, whole, grain_rows(args.classes), [&](int64_t begin, int64_t end) {
    kernels.forward(args, begin, end);
  });
  forward_split(kernels, args, whole, args.rows);
}

}  // namespace

ForwardResult Cpu::forward(const Call& call, const Reducing& reducing, bool terms, bool with_stats,
                           const Tensor* grad, double grad_output) {
  ForwardArgs args;
  static_cast<Inputs&>(args) = call.inputs;
  const int64_t rows = args.rows;
  args.scale = 1.0 / divisor(reducing, count_rows(call));
  args.grad_output = grad_output;
  args.reduction = reducing.reduction;
  const bool per_row = reducing.reduction == Reduction::kNone;
  ForwardResult result{empty_out(call, terms, per_row),
                       with_stats ? empty_stats(call) : nothing(call)};
  const Tensor values = per_row ? result.out : empty_out(call, terms, true);
  args.loss = values.mutable_data_ptr();
  if (terms) args.terms = static_cast<char*>(args.loss) + rows * acc_size(call);
  if (with_stats) args.stats = result.stats.mutable_data_ptr();
  if (grad) {
    args.grad = grad->mutable_data_ptr();
    args.grad_stride = call.grad_stride;
    const bool fresh = args.grad != args.student;
    if (fresh) prefer_huge_pages(args.grad, gradient_bytes(args));
  }
  run_forward(args);
  const auto finish = [&](auto zero) {
    using T = decltype(zero);
    if (per_row) return;
    T* out = static_cast<T*>(result.out.mutable_data_ptr());
    for (int field = 0; field < (terms ? 1 + kTerms : 1); ++field)
      out[field] = static_cast<T>(
          ordered_sum(static_cast<const T*>(args.loss) + field * rows, rows) * args.scale);
  };
  call.acc == ScalarType::Double ? finish(0.0) : finish(0.0f);
  return result;
}

void Cpu::backward(const Call& call, const Tensor& stats, const Tensor& grad_output,
                   const Tensor& grad, bool filled) {
  if (filled) {
    if (number(grad_output) == 1.0) return;
    // 16-bit gradients are computed anew instead: scaling them would round twice, and cannot bring
    // back what had underflowed in fp16 before a loss scale was applied.
    if (size_of(call.inputs.student_dtype) > 2 || grad.const_data_ptr() == call.inputs.student)
      return multiply_(grad, grad_output);
  }
  const BackwardArgs args = backward_args(call, stats, grad_output, grad);
  if (!filled) prefer_huge_pages(args.grad, gradient_bytes(args));
  const cpu::Kernels& kernels = cpu::kernels();
  torch::stable::parallel_for(
      0, args.rows, grain_rows(args.classes),
      [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

}  // namespace fastkd::glue
