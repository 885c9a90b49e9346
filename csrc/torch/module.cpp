// The Python module torch_bn._C: importing it registers the operators (ops.cpp). It exports facts about the build, the
// choice of the CPU table, and a short way to the operator that users call.
#include <Python.h>
#include <torch/version.h>

#include "../kernels.h"
#include "backend.h"
#include "direct.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  PyObject* openmp = Py_True;
#else
  PyObject* openmp = Py_False;
#endif
  const int cuda = torch_bn::cuda_backend ? torch_bn::cuda_backend->cuda : 0;
  PyObject* version = cuda ? PyUnicode_FromFormat("%d.%d", cuda / 1000, cuda % 1000 / 10) : Py_NewRef(Py_None);
  return Py_BuildValue("{s:s,s:s,s:O,s:N}", "torch", TORCH_VERSION, "compiler", compiler, "openmp", openmp, "cuda",
                       version);
}

PyObject* cpu_table(PyObject*, PyObject*) { return PyUnicode_FromString(torch_bn::cpu::selected().name); }

PyObject* cpu_tables(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const torch_bn::Kernels* const* table = torch_bn::cpu::supported(); names && *table; ++table) {
    PyObject* name = PyUnicode_FromString((*table)->name);
    if (!name || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* use_cpu_table(PyObject* self, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  if (!text) return nullptr;
  if (torch_bn::cpu::force(text)) Py_RETURN_NONE;
  if (PyObject* names = cpu_tables(self, nullptr)) {
    PyErr_Format(PyExc_ValueError, "use_cpu_table: name must be one of %R, got '%s'", names, text);
    Py_DECREF(names);
  }
  return nullptr;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What the extension was built with."},
    {"cpu_table", cpu_table, METH_NOARGS, "The table in use."},
    {"cpu_tables", cpu_tables, METH_NOARGS, "The kernel tables that this CPU can run, best first."},
    {"use_cpu_table", use_cpu_table, METH_O, "Chooses the table for the whole process."},
    {"direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(torch_bn::direct)), METH_FASTCALL,
     "torch.ops.torch_bn.batch_norm on its first ten arguments and functional's Extras and Ending, or None each; or None,\n"
     "with nothing done, where an argument is not of the most usual type, the device has no kernels, or a mode, a\n"
     "transform, a trace or a backward is active."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "torch_bn._C",
    "The compiled kernels of torch_bn: facts about them; the operators are in torch.ops.torch_bn.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
