// Mixtures of teachers: as an op of their own, and, on CPU tensors, in place of a call's teacher.
// python/fastkd/_core/dense.py calls it; the formula is in python/fastkd/reference/dense.py.
#include "cpu.h"
#include "huge_pages.h"

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
        prepare(tensors[i], tensors[i], std::nullopt, std::nullopt, none, false, nullptr);
    const Inputs& in = call.inputs;
    mixture.teachers.push_back(
        {in.student, in.student_dtype, in.group_rows, in.student_stride, teachers.shares[i]});
    mixture.kept.push_back(call.student);
    args.rows = in.rows, args.classes = in.classes;
  }
  args.teachers = mixture.teachers.data();
  args.count = static_cast<int64_t>(mixture.teachers.size());
  args.probabilities = teachers.probabilities;
  args.ensemble = checked_enum(teachers.ensemble, Ensemble::kLogits, "ensemble");
  args.temperature = teachers.temperature;
  args.teacher_temperature = teachers.teacher_temperature;
  args.in_double = in_double;
  if (teachers.row_temperatures) {
    const ScalarType acc = in_double ? ScalarType::Double : ScalarType::Float;
    mixture.kept.push_back(checked_rows(*teachers.row_temperatures, tensors[0], acc, args.rows,
                                        "row_temperatures", 2));
    args.row_temperatures = mixture.kept.back().const_data_ptr();
    if (teachers.row_temperatures->is_cpu())
      check_temperatures(args.row_temperatures, args.rows, in_double);
  }
  return mixture;
}

Call prepare_mixed(const Tensor& student, const Mixture& mixture,
                   const std::optional<Tensor>& labels, const std::optional<Tensor>& row_settings,
                   const Options& options, const Tensor* grad) {
  // The student is passed as the teacher, too, because the mixture has no layout of its own yet.
  Call call = prepare(student, student, labels, std::nullopt, options, true, grad);
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
void mixture(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  const Teachers teachers{in.take<std::vector<Tensor>>(),
                          in.take<std::optional<Tensor>>(),
                          in.take<std::vector<double>>(),
                          in.take<bool>(),
                          in.take<int64_t>(),
                          in.take<double>(),
                          in.take<double>()};
  const bool in_double = in.take<bool>();
  const Mixture prepared = make_mixture(teachers, in_double);
  MixtureArgs args = prepared.args;
  const Tensor& like = teachers.tensors[0];
  const Tensor out = torch::stable::new_empty(like, like.sizes(),
                                              in_double ? ScalarType::Double : ScalarType::Float);
  args.mixed = out.mutable_data_ptr();
  Backend::mix(args, out);
  return_results(stack, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // Return the mixture of teachers as logits: acc (..., C), contiguous. The arguments are those of
  // the op `loss`.
  m.def(
      "mixture(Tensor[] teachers, Tensor? row_temperatures, float[] shares, bool probabilities, "
      "int ensemble, float temperature, float teacher_temperature, bool in_double) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("mixture", &mixture<Cpu>); }

#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("mixture", &mixture<Cuda>); }
#endif

}  // namespace fastkd::glue
