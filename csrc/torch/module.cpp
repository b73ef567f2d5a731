// The Python module fastkd._C: importing it registers the ops (library.cpp); what it holds itself
// is what a bug report and the tests need. No tensor passes through here, and no torch header is
// included.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

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

py::array_t<float> exp2_of(
    const py::array_t<float, py::array::c_style | py::array::forcecast>& in) {
  py::array_t<float> out(in.size());
  fastkd::cpu::kernels().exp2(in.data(), out.mutable_data(), in.size());
  return out;
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
  m.def("exp2", &exp2_of, py::arg("values"));
}
