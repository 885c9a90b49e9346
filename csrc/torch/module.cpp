// The Python module torch_bn._C: importing it registers the operators (ops.cpp). It exports facts about the build and
// the choice of the CPU table, nothing else.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace py = pybind11;

namespace {


py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = py::none();
  return info;
}

py::list cpu_tables() {
  py::list names;
  for (const torch_bn::Kernels* const* table = torch_bn::cpu::supported(); *table; ++table) names.append((*table)->name);
  return names;
}

void use_cpu_table(const std::string& name) {
  if (torch_bn::cpu::force(name.c_str())) return;
  throw py::value_error("use_cpu_table: name must be one of " + std::string(py::str(cpu_tables())) + ", got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled kernels of torch_bn: facts about them; the operators are in torch.ops.torch_bn.";
  m.def("build_info", &build_info, "What the extension was built with.");
  m.def("cpu_tables", &cpu_tables, "The kernel tables that this CPU can run, best first.");
  m.def("cpu_table", [] { return torch_bn::cpu::selected().name; }, "The table in use.");
  m.def("use_cpu_table", &use_cpu_table, py::arg("name"), "Chooses the table for the whole process.");
}
