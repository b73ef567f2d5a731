// Mixtures of teachers: an op, and, on CPU tensors, the teacher of a call of the loss.
// python/fastkd/_core/dense.py calls the op. The formula is in docs/maths.md, section 12, and in
// python/fastkd/reference/dense.py.
#include "backends.h"

namespace fastkd::glue {

Mixture::Mixture(ArgumentReader* reader) {
  reader->take(&tensors, &row_temperatures, &shares, &args.probabilities, &ensemble,
               &args.temperature, &args.teacher_temperature);
}

void Mixture::prepare(bool in_double) {
  STD_TORCH_CHECK(!tensors.empty() && tensors.size() == shares.size(),
                  "teachers must be as many as shares, and one at least");
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].sizes().equals(tensors[0].sizes()),
                    "all teachers must have the same shape");
    // The teacher is also passed as the student, because prepare() lays out two tensors.
    const Call call = glue::prepare(tensors[i], tensors[i], std::nullopt, Inputs(), false, nullptr);
    const Inputs& in = call.inputs;
    tensors[i] = call.student;
    teachers.push_back({in.student, in.student_dtype, in.group_rows, in.student_stride, shares[i]});
    args.rows = in.rows, args.classes = in.classes;
  }
  args.teachers = teachers.data();
  args.count = static_cast<int64_t>(teachers.size());
  args.ensemble = checked_enum(ensemble, Ensemble::kLogits, "ensemble");
  args.in_double = in_double;
  if (row_temperatures) {
    row_temperatures = checked_rows(*row_temperatures, tensors[0], acc_type(in_double), args.rows,
                                    "row_temperatures", 2);
    args.row_temperatures = row_temperatures->const_data_ptr();
  }
}

namespace {

void mixture(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader in(stack);
  Mixture mixture(&in);
  const bool in_double = in.take<bool>();
  mixture.prepare(in_double);
  const Tensor& like = mixture.tensors[0];
  const Tensor out = torch::stable::new_empty(like, like.sizes(), acc_type(in_double));
  mixture.args.mixed = out.mutable_data_ptr();
  backend_of(out).mix(mixture.args, out);
  return_results(stack, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // Return the mixture of teachers as logits: acc (..., C), contiguous. The arguments but in_double
  // are those of the op `loss`, whose mixture_temperature and teachers_temperature are temperature
  // and teacher_temperature here.
  m.def(
      "mixture(Tensor[] teachers, Tensor? row_temperatures, float[] shares, bool probabilities, "
      "int ensemble, float temperature, float teacher_temperature, bool in_double) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("mixture", &mixture); }

#if FASTKD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("mixture", &mixture); }
#endif

}  // namespace fastkd::glue
