// The Python module fastkd._C: importing it registers the ops (library.cpp); what it holds itself
// is what a bug report and the tests need. No tensor passes through here, and no torch header is
// included.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cuda/plan.h"
#include "../kernels.h"

namespace py = pybind11;
using fastkd::cpu::Kernels;

namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* const* entry = fastkd::cpu::available(); *entry; ++entry)
    names.emplace_back((*entry)->name);
  return names;
}

void use_isa(const std::string& name) {
  if (fastkd::cpu::select(name.c_str())) return;
  std::string known;
  for (const std::string& other : available_isas()) known += (known.empty() ? "" : ", ") + other;
  throw py::value_error("isa '" + name + "' is not available here; available: " + known);
}

py::array_t<float> exp2_of(const py::array_t<float, py::array::c_style | py::array::forcecast>& in,
                           bool by_registers) {
  py::array_t<float> out(in.size());
  fastkd::cpu::kernels().exp2(in.data(), out.mutable_data(), in.size(), by_registers);
  return out;
}

// Which kernel the CUDA backend would take on a device that need not be at hand.
py::dict plan_cuda(int64_t rows, int64_t classes, int student_dtype, int teacher_dtype,
                   int processors, int largest_cluster, bool strided) {
  const auto dtype = [](int index) {
    if (index < 0 || index > static_cast<int>(fastkd::DType::kBFloat16))
      throw py::value_error("no dtype has the index " + std::to_string(index));
    return static_cast<fastkd::DType>(index);
  };
  fastkd::cuda::DeviceLimits device;
  device.processors = processors;
  device.largest_cluster = largest_cluster;
  const fastkd::cuda::Plan plan = fastkd::cuda::make_plan(
      rows, classes, dtype(student_dtype), dtype(teacher_dtype), device, false, strided);
  py::dict result;
  result["family"] = fastkd::cuda::name_of(plan.family);
  result["lanes"] = plan.lanes;
  result["threads"] = plan.threads;
  result["rows_per_block"] = plan.rows_per_block;
  result["cluster"] = plan.cluster;
  result["finish_inside"] = plan.finish_inside;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastkd's native library: build facts, the choice of instruction set, and test hooks.";
  m.attr("version") = FASTKD_VERSION;
  m.attr("compiler") = FASTKD_COMPILER;
  m.attr("cuda_architectures") = FASTKD_CUDA_ARCHITECTURES;  // "" without CUDA kernels
  m.attr("segment") = fastkd::cpu::kSegment;
  py::list divergences;
  for (const char* name : fastkd::kDivergenceNames) divergences.append(name);
  m.attr("divergences") = py::tuple(divergences);
  m.def("isa", [] { return std::string(fastkd::cpu::kernels().name); });
  m.def("available_isas", &available_isas);
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("exp2", &exp2_of, py::arg("values"), py::arg("by_registers"));
  m.def("plan_cuda", &plan_cuda, py::arg("rows"), py::arg("classes"), py::arg("student_dtype"),
        py::arg("teacher_dtype"), py::arg("processors"), py::arg("largest_cluster"),
        py::arg("strided") = false);
}
