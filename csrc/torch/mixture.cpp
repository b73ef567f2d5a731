// The mixing of teachers as an op on CPU tensors. Its shape for tracing, and the formula for other
// devices and layouts, are in python/fastkd/mixture.py.
#include "../mixture.h"

#include <vector>

#include "cpu.h"

namespace fastkd::glue {
namespace {

Tensor mixture(std::vector<Tensor> teachers, std::vector<double> shares, bool probabilities,
               int64_t ensemble, std::optional<Tensor> row_temperatures, double temperature,
               double teacher_temperature, bool in_double) {
  STD_TORCH_CHECK(!teachers.empty() && teachers.size() == shares.size(),
                  "teachers must be as many as shares, and one at least");
  MixtureArgs args;
  std::vector<MixedTeacher> mixed;
  for (size_t i = 0; i < teachers.size(); ++i) {
    const Tensor& teacher = teachers[i];
    STD_TORCH_CHECK(teacher.sizes().equals(teachers[0].sizes()),
                    "all teachers must have the same shape");
    const Options none{1, 1, 0, 1, 0, -100, 0, 0.5};
    // One tensor's rows are walked like those of two that are laid out alike.
    const Call call =
        prepare(teacher, teacher, std::nullopt, std::nullopt, none, false, nullptr, false);
    const Inputs& in = call.inputs;
    mixed.push_back({in.student, in.student_dtype, in.group_rows, in.student_stride, shares[i]});
    args.rows = in.rows, args.classes = in.classes;
    teachers[i] = call.student;  // what is read lives on
  }
  args.teachers = mixed.data(), args.count = static_cast<int64_t>(mixed.size());
  args.probabilities = probabilities;
  args.ensemble = static_cast<Ensemble>(ensemble);
  args.temperature = temperature, args.teacher_temperature = teacher_temperature;
  args.in_double = in_double;
  const ScalarType acc = in_double ? ScalarType::Double : ScalarType::Float;
  if (row_temperatures) {
    row_temperatures = checked_rows(*row_temperatures, acc, args.rows, "row_temperatures", 2);
    args.row_temperatures = row_temperatures->const_data_ptr();
  }
  const Tensor out = torch::stable::empty(teachers[0].sizes(), acc);
  args.mixed = out.mutable_data_ptr();
  prefer_huge_pages(args.mixed,
                    static_cast<size_t>(args.rows * args.classes * (in_double ? 8 : 4)));
  const cpu::Kernels& kernels = cpu::kernels();
  torch::stable::parallel_for(
      0, args.rows, grain_rows(args.classes),
      [&](int64_t begin, int64_t end) { kernels.mixture(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // teachers: each (..., C), of one shape; row_temperatures: acc [2, rows], which replaces the two
  // numbers. Gives acc (..., C), contiguous.
  m.def(
      "mixture(Tensor[] teachers, float[] shares, bool probabilities, int ensemble, "
      "Tensor? row_temperatures, float temperature, float teacher_temperature, bool in_double) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("mixture", TORCH_BOX(&mixture)); }

}  // namespace fastkd::glue
