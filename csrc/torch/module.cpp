// The Python module fastkd._C. Importing the module registers the ops (library.cpp, topk.cpp,
// mixture.cpp). The module's own functions serve bug reports and tests; they take no tensors, so no
// torch header is included.
#include <pybind11/pybind11.h>

#include <string>

#include "../kernels.h"

namespace py = pybind11;
using fastkd::cpu::Kernels;

namespace {

py::tuple available_isas() {
  py::list names;
  for (const Kernels* const* entry = fastkd::cpu::available(); *entry; ++entry)
    names.append((*entry)->name);
  return py::tuple(names);
}

void use_isa(const std::string& name) {
  if (fastkd::cpu::select(name.c_str())) return;
  const auto known = py::str(", ").attr("join")(available_isas()).cast<std::string>();
  throw py::value_error("isa '" + name + "' is not available here; available: " + known);
}

// Replace float32 numbers x, contiguous, by 2^x.
void exp2_(const py::buffer& numbers, bool by_registers) {
  const py::buffer_info info = numbers.request(/*writable=*/true);
  if (info.format != py::format_descriptor<float>::format() || info.ndim != 1 ||
      info.strides[0] != info.itemsize)
    throw py::value_error("numbers must be one contiguous dimension of float32");
  float* const data = static_cast<float*>(info.ptr);
  fastkd::cpu::kernels().exp2(data, data, info.size, by_registers);
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
  m.def("exp2_", &exp2_, py::arg("numbers"), py::arg("by_registers"));
}
