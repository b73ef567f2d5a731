// Mixtures of teachers: as an op of their own, and, on CPU tensors, in place of a call's teacher.
// The formula for other devices and layouts is in python/fastkd/mixture.py.
#include "cpu.h"

namespace fastkd::glue {

Mixture make_mixture(const Teachers& teachers, bool in_double) {
  const std::vector<Tensor>& tensors = teachers.tensors;
  STD_TORCH_CHECK(!tensors.empty() && tensors.size() == teachers.shares.size(),
                  "teachers must be as many as shares, and one at least");
  Mixture mixture;
  MixtureArgs& args = mixture.args;
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].sizes().equals(tensors[0].sizes()),
                    "all teachers must have the same shape");
    const Options none{1, 1, 0, 1, 0, -100, 0, 0.5};
    // One tensor's rows are walked like those of two that are laid out alike.
    const Call call =
        prepare(tensors[i], tensors[i], std::nullopt, std::nullopt, none, false, nullptr, false);
    const Inputs& in = call.inputs;
    mixture.teachers.push_back(
        {in.student, in.student_dtype, in.group_rows, in.student_stride, teachers.shares[i]});
    mixture.kept.push_back(call.student);
    args.rows = in.rows, args.classes = in.classes;
  }
  args.teachers = mixture.teachers.data();
  args.count = static_cast<int64_t>(mixture.teachers.size());
  args.probabilities = teachers.probabilities;
  args.ensemble = static_cast<Ensemble>(teachers.ensemble);
  args.temperature = teachers.temperature;
  args.teacher_temperature = teachers.teacher_temperature;
  args.in_double = in_double;
  if (teachers.row_temperatures) {
    const ScalarType acc = in_double ? ScalarType::Double : ScalarType::Float;
    mixture.kept.push_back(
        checked_rows(*teachers.row_temperatures, acc, args.rows, "row_temperatures", 2));
    args.row_temperatures = mixture.kept.back().const_data_ptr();
    if (teachers.row_temperatures->is_cpu())
      check_temperatures(args.row_temperatures, args.rows, in_double);
  }
  return mixture;
}

Call prepare_mixed(const Tensor& student, const Mixture& mixture,
                   const std::optional<Tensor>& labels, const std::optional<Tensor>& row_settings,
                   const Options& options, const Tensor* grad, bool inplace) {
  // In the teacher's place for now, so that there is nothing to lay out but the student.
  Call call = prepare(student, student, labels, std::nullopt, options, true, grad, inplace);
  Inputs& in = call.inputs;
  STD_TORCH_CHECK(mixture.args.rows == in.rows && mixture.args.classes == in.classes,
                  "student and teacher logits must have the same shape");
  call.acc = mixture.args.in_double ? ScalarType::Double : ScalarType::Float;
  call.mixture = &mixture.args;
  in.teacher = nullptr;
  in.teacher_dtype = mixture.args.in_double ? DType::kFloat64 : DType::kFloat32;
  in.teacher_stride = {in.classes, in.group_rows * in.classes, 1};
  take_row_settings(&call, row_settings);
  return call;
}

void Cpu::mix(const MixtureArgs& args, const Tensor& out) {
  prefer_huge_pages(args.mixed, static_cast<size_t>(out.numel()) * out.element_size());
  const cpu::Kernels& kernels = cpu::kernels();
  torch::stable::parallel_for(
      0, args.rows, grain_rows(args.classes),
      [&](int64_t begin, int64_t end) { kernels.mixture(args, begin, end); });
}

namespace {

template <class Backend>
Tensor mixture(std::vector<Tensor> teachers, std::optional<Tensor> row_temperatures,
               std::vector<double> shares, bool probabilities, int64_t ensemble, double temperature,
               double teacher_temperature, bool in_double) {
  const Mixture made = make_mixture({teachers, shares, probabilities, ensemble, row_temperatures,
                                     temperature, teacher_temperature},
                                    in_double);
  MixtureArgs args = made.args;
  const Tensor out = torch::stable::new_empty(teachers[0], teachers[0].sizes(),
                                              in_double ? ScalarType::Double : ScalarType::Float);
  args.mixed = out.mutable_data_ptr();
  Backend::mix(args, out);
  return out;
}

bool in_double(const Tensor& student, const std::vector<Tensor>& teachers) {
  bool found = student.scalar_type() == ScalarType::Double;
  for (const Tensor& teacher : teachers) found |= teacher.scalar_type() == ScalarType::Double;
  return found;
}

std::tuple<Tensor, Tensor> ensemble_loss_into(
    std::optional<Tensor> grad, const Tensor& student, std::vector<Tensor> teachers,
    std::optional<Tensor> row_temperatures, std::vector<double> shares, bool probabilities,
    int64_t ensemble, double mixture_temperature, double teachers_temperature,
    std::optional<Tensor> labels, std::optional<Tensor> row_settings,
    std::optional<Tensor> denominator, double temperature, double teacher_temperature,
    double hard_weight, double soft_weight, double label_smoothing, int64_t ignore_index,
    int64_t divergence, double mix, int64_t reduction, double normalizer, bool with_terms,
    bool with_stats) {
  STD_TORCH_CHECK(!grad || static_cast<Reduction>(reduction) != Reduction::kNone,
                  "a gradient is written for reduction mean or sum");
  const Mixture mixture = make_mixture({teachers, shares, probabilities, ensemble, row_temperatures,
                                        mixture_temperature, teachers_temperature},
                                       in_double(student, teachers));
  const Tensor* const out = grad ? &*grad : nullptr;
  const bool inplace = grad && grad->const_data_ptr() == student.const_data_ptr();
  const Call call = prepare_mixed(student, mixture, labels, row_settings,
                                  {temperature, teacher_temperature, hard_weight, soft_weight,
                                   label_smoothing, ignore_index, divergence, mix},
                                  out, inplace);
  const ForwardResult result =
      Cpu::forward(call, {static_cast<Reduction>(reduction), normalizer, denominator}, with_terms,
                   with_stats, out);
  return {result.out, result.stats};
}

void ensemble_loss_backward_(const Tensor& grad, const Tensor& grad_output, const Tensor& stats,
                             const Tensor& student, std::vector<Tensor> teachers,
                             std::optional<Tensor> row_temperatures, std::vector<double> shares,
                             bool probabilities, int64_t ensemble, double mixture_temperature,
                             double teachers_temperature, std::optional<Tensor> labels,
                             std::optional<Tensor> row_settings, double temperature,
                             double teacher_temperature, double hard_weight, double soft_weight,
                             double label_smoothing, int64_t ignore_index, int64_t divergence,
                             double mix, bool filled) {
  const Mixture mixture = make_mixture({teachers, shares, probabilities, ensemble, row_temperatures,
                                        mixture_temperature, teachers_temperature},
                                       in_double(student, teachers));
  const Call call = prepare_mixed(student, mixture, labels, row_settings,
                                  {temperature, teacher_temperature, hard_weight, soft_weight,
                                   label_smoothing, ignore_index, divergence, mix},
                                  &grad, false);
  Cpu::backward(call, stats, grad_output, grad, filled);
}

}  // namespace

#define FASTKD_TEACHERS                                                                   \
  "Tensor[] teachers, Tensor? row_temperatures, float[] shares, bool probabilities, int " \
  "ensemble, "

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // teachers: each (..., C), of one shape; row_temperatures: acc [2, rows], which replaces the two
  // numbers. Gives acc (..., C), contiguous.
  m.def("mixture(" FASTKD_TEACHERS
        "float temperature, float teacher_temperature, bool in_double) -> Tensor");
  // As loss of library.cpp with such a mixture for the teacher, of which no more is in memory than
  // some rows; the gradient is written into a contiguous `grad`, which may be the student.
  m.def("ensemble_loss_into(Tensor(a!)? grad, Tensor student, " FASTKD_TEACHERS
        "float mixture_temperature, float teachers_temperature, Tensor? labels, Tensor? "
        "row_settings, Tensor? denominator, float temperature, float teacher_temperature, float "
        "hard_weight, float soft_weight, float label_smoothing, int ignore_index, int divergence, "
        "float mix, int reduction, float normalizer, bool with_terms, bool with_stats) -> (Tensor "
        "out, Tensor stats)");
  m.def(
      "ensemble_loss_backward_(Tensor(a!) grad, Tensor grad_output, Tensor stats, Tensor "
      "student, " FASTKD_TEACHERS
      "float mixture_temperature, float teachers_temperature, Tensor? labels, Tensor? "
      "row_settings, float temperature, float teacher_temperature, float hard_weight, float "
      "soft_weight, float label_smoothing, int ignore_index, int divergence, float mix, bool "
      "filled) -> ()");
}

#undef FASTKD_TEACHERS

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("mixture", TORCH_BOX(&mixture<Cpu>));
  m.impl("ensemble_loss_into", TORCH_BOX(&ensemble_loss_into));
  m.impl("ensemble_loss_backward_", TORCH_BOX(&ensemble_loss_backward_));
}

#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("mixture", TORCH_BOX(&mixture<Cuda>)); }
#endif

}  // namespace fastkd::glue
