// The ops on CPU tensors: counts rows, splits the work among torch's threads, sums the row losses
// in order.
#include "cpu.h"

#include <array>
#include <cmath>
#include <new>
#include <vector>

namespace fastkd::glue {
namespace {

bool in_double(const Inputs& in) { return computes_in_double(in.student_dtype, in.teacher_dtype); }
int64_t acc_bytes(const Inputs& in) { return in_double(in) ? 8 : 4; }
ScalarType acc_type(const Inputs& in) {
  return in_double(in) ? ScalarType::Double : ScalarType::Float;
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

}  // namespace

void check_temperatures(const void* of_rows, int64_t rows, bool in_double) {
  for (int64_t at = 0; at < 2 * rows; ++at) {
    const double t = in_double ? static_cast<const double*>(of_rows)[at]
                               : static_cast<const float*>(of_rows)[at];
    STD_TORCH_CHECK(t > 0 && std::isfinite(t), "temperature must be positive and finite; row ",
                    at % rows, " has ", t);
  }
}

int64_t count_rows(const Inputs& in) {
  static_assert(kTemperature == 0 && kTeacherTemperature == 1);
  if (in.row_settings) check_temperatures(in.row_settings, in.rows, in_double(in));
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

double scale_of(const Reducing& reducing, int64_t count) {
  if (reducing.reduction != Reduction::kMean) return 1.0;
  double divisor = static_cast<double>(count);
  if (reducing.denominator) divisor = value_of(*reducing.denominator);
  if (!reducing.denominator && reducing.normalizer > 0) divisor = reducing.normalizer;
  return count > 0 ? 1.0 / divisor : 1.0;
}

bool scale_filled(const Inputs& inputs, const Tensor& grad_output, const Tensor& grad) {
  const double factor = value_of(grad_output);
  if (factor == 1.0) return true;
  // Scaling rounds a 16-bit gradient a second time, and a loss scale cannot restore what has
  // underflowed in fp16. In bf16 a power of two is exact: it changes the exponent alone, whose
  // range is that of float32.
  int exponent = 0;
  const bool exact = inputs.student_dtype == DType::kBFloat16 && std::isfinite(factor) &&
                     std::fabs(std::frexp(factor, &exponent)) == 0.5;
  if (size_of(inputs.student_dtype) == 2 && !exact && grad.const_data_ptr() != inputs.student)
    return false;
  multiply_(grad, grad_output);
  return true;
}

RowLosses::RowLosses(const Inputs& inputs, Reduction reduction, int64_t fields, void* out)
    : inputs_(inputs),
      acc_bytes_(acc_bytes(inputs)),
      fields_(fields),
      out_(reduction == Reduction::kNone ? nullptr : out),
      data_(out) {
  if (out_ == nullptr) return;
  const int64_t numbers = fields * inputs.rows;
  constexpr int64_t kMost = INT64_MAX / 8;  // beyond, the tensor's error is that of its size
  if (numbers <= kMost)
    own_.reset(new (std::nothrow) char[static_cast<size_t>(numbers * acc_bytes_)]);
  data_ = own_.get();
  if (data_ != nullptr) return;
  tensor_ = torch::stable::empty({numbers}, acc_type(inputs));
  data_ = tensor_->mutable_data_ptr();
}

void RowLosses::add_up(double scale) const {
  if (out_ == nullptr) return;
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    const T* values = static_cast<const T*>(data_);
    for (int64_t field = 0; field < fields_; ++field) {
      double sum = 0;  // in order
      for (int64_t row = 0; row < inputs_.rows; ++row) sum += static_cast<double>(*values++);
      static_cast<T*>(out_)[field] = static_cast<T>(sum * scale);
    }
  };
  in_double(inputs_) ? of_type(0.0) : of_type(0.0f);
}

namespace {

// Logits in a thread's buffer for a mixture of teachers, or one row if a row is longer. The buffer
// is written and read a few rows at a time, and is to stay in L2.
constexpr int64_t kMixedClasses = 65536;

// Runs rows of a call, on one thread or on all. A mixture takes the teacher's place a few rows at a
// time.
class Runner {
 public:
  explicit Runner(const Inputs& in, const MixtureArgs* mixture = nullptr)
      : mixture_(mixture),
        classes_(in.classes),
        row_bytes_(classes_ * acc_bytes(in)),
        step_(std::max<int64_t>(1, kMixedClasses / classes_)) {
    if (mixture_ == nullptr) return;
    const int64_t rows = in.rows, grain = grain_rows(classes_);
    threads_ = std::min<int64_t>(torch::stable::get_num_threads(), (rows + grain - 1) / grain);
    threads_ = std::max<int64_t>(1, threads_);
    if (step_ > kTile) step_ -= step_ % kTile;
    step_ = std::min(step_, (rows + threads_ - 1) / threads_);
    room_ = torch::stable::empty({threads_, step_, classes_}, acc_type(in));
  }

  // Calls run(args, begin, end) for whole rows [0, rows), on all threads.
  template <class Args, class Run>
  void on_all_threads(const Args& args, int64_t rows, const Run& run) const {
    if (mixture_ == nullptr) {
      torch::stable::parallel_for(0, rows, grain_rows(classes_),
                                  [&](int64_t begin, int64_t end) { run(args, begin, end); });
      return;
    }
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread)
        on_thread(thread, args, rows * thread / threads_, rows * (thread + 1) / threads_, run);
    });
  }

  // Calls run(args, begin, end) on the calling thread.
  template <class Args, class Run>
  void here(const Args& args, int64_t begin, int64_t end, const Run& run) const {
    mixture_ == nullptr ? run(args, begin, end) : on_thread(0, args, begin, end, run);
  }

 private:
  static constexpr int64_t kTile = 64;  // rows: a multiple of the tiles that short rows make

  template <class Args, class Run>
  void on_thread(int64_t thread, Args args, int64_t begin, int64_t end, const Run& run) const {
    MixtureArgs mixture = *mixture_;
    char* const room = static_cast<char*>(room_.mutable_data_ptr()) + thread * step_ * row_bytes_;
    mixture.mixed = room;
    for (int64_t at = begin; at < end; at += step_) {
      const int64_t last = std::min(at + step_, end);
      mixture.first_row = at;
      cpu::kernels().mixture(mixture, at, last);
      // The address that row 0 would have.
      const uintptr_t first =
          reinterpret_cast<uintptr_t>(room) - static_cast<size_t>(at * row_bytes_);
      args.teacher = reinterpret_cast<const void*>(first);
      run(args, at, last);
    }
  }

  const MixtureArgs* mixture_;
  int64_t classes_, row_bytes_, step_;
  int64_t threads_ = 1;
  Tensor room_;  // of each thread, for so many rows
};

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

void run_forward(const ForwardArgs& args, const Runner& runner) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t threads = torch::stable::get_num_threads();
  // Every thread gets the same number of whole rows. The remaining rows are shared segment by
  // segment if that ends sooner than giving one more row to some of the threads.
  const int64_t segments = (args.classes + cpu::kSegment - 1) / cpu::kSegment;
  const int64_t rest = cpu::has_apart_classes(args) ? 0 : args.rows % threads;
  const int64_t whole = rest < std::min(threads, segments) ? args.rows - rest : args.rows;
  runner.on_all_threads(args, whole, kernels.forward);
  runner.here(args, whole, args.rows,
              [&](const ForwardArgs& with_teacher, int64_t begin, int64_t end) {
                forward_split(kernels, with_teacher, begin, end);
              });
}

}  // namespace

ForwardResult Cpu::forward(const Call& call, const Reducing& reducing, bool terms, bool with_stats,
                           const Tensor* grad) {
  ForwardArgs args;
  static_cast<Inputs&>(args) = call.inputs;
  args.reduction = reducing.reduction;
  // With a gradient, no statistics: 14 MB for 524288 rows of 19 classes, whose logits are 40 MB.
  with_stats = with_stats && grad == nullptr;
  const ForwardResult result{empty_out(call, terms, args.reduction == Reduction::kNone),
                             with_stats ? empty_stats(call) : nothing(call)};
  if (with_stats) args.stats = result.stats.mutable_data_ptr();
  if (grad) {
    args.grad = grad->mutable_data_ptr();
    args.grad_stride = call.grad_stride;
  }
  args.scale = scale_of(reducing, count_rows(args));
  const RowLosses losses(args, args.reduction, terms ? 1 + kTerms : 1,
                         result.out.mutable_data_ptr());
  args.loss = losses.loss();
  if (terms) args.terms = losses.terms();
  run_forward(args, Runner(args, call.mixture));
  losses.add_up(args.scale);
  return result;
}

namespace {

// Write `factor` times the gradient by the forward pass, bit for bit what the backward pass would
// write from statistics.
void write_gradient(const Call& call, const BackwardArgs& args, const Reducing& reducing,
                    double factor) {
  ForwardArgs forward;
  static_cast<Inputs&>(forward) = call.inputs;
  forward.reduction = reducing.reduction;
  forward.grad = args.grad;
  forward.grad_stride = args.grad_stride;
  forward.grad_output = factor;
  forward.scale = scale_of(reducing, count_rows(forward));
  double total = 0;
  const RowLosses losses(forward, reducing.reduction, 1, &total);
  forward.loss = losses.loss();
  run_forward(forward, Runner(forward, call.mixture));
}

}  // namespace

void Cpu::backward(const Call& call, const BackwardArgs& args, const Reducing& reducing,
                   const Tensor& grad_output, const Tensor& grad, bool filled) {
  if (filled && scale_filled(args, grad_output, grad)) return;
  if (args.stats == nullptr) return write_gradient(call, args, reducing, value_of(grad_output));
  count_rows(args);  // called for its checks of labels and temperatures
  Runner(args, call.mixture).on_all_threads(args, args.rows, cpu::kernels().backward);
}

}  // namespace fastkd::glue
