// What module.cpp takes from direct.cpp, which has torch's headers of Python: they take 8 s to compile.
#pragma once
#include <Python.h>

namespace torch_bn {

/// The function direct of the Python module, METH_FASTCALL.
PyObject* direct(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace torch_bn
