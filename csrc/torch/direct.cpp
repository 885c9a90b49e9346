// torch_bn::batch_norm called from Python without a detour: torch.ops first makes a list of boxed values of the
// arguments, which takes as long as all the rest of a tiny layer.
#include "direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "autograd.h"
#include "backend.h"

namespace torch_bn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Each reads an argument of the usual type, and returns whether it is one.
bool read(PyObject* from, OptionalTensor& into) {
  if (from == Py_None) return true;
  if (!THPVariable_CheckExact(from)) return false;
  into = THPVariable_Unpack(from);
  return true;
}
bool read(PyObject* from, bool& into) {
  into = from == Py_True;
  return PyBool_Check(from);
}
bool read(PyObject* from, double& into) {
  if (!PyFloat_CheckExact(from)) return false;
  into = PyFloat_AS_DOUBLE(from);
  return true;
}
bool read(PyObject* from, int64_t& into) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow = 0;
  into = PyLong_AsLongLongAndOverflow(from, &overflow);
  return overflow == 0;
}
bool read(PyObject* from, std::optional<double>& into) {
  return from == Py_None || read(from, into.emplace());
}
bool read(PyObject* from, std::optional<std::string_view>& into) {
  if (from == Py_None) return true;
  Py_ssize_t length = 0;
  const char* text = PyUnicode_CheckExact(from) ? PyUnicode_AsUTF8AndSize(from, &length) : nullptr;
  if (!text) PyErr_Clear();
  else into.emplace(text, length);
  return text != nullptr;
}

struct Call {
  OptionalTensor input, weight, bias, running_mean, running_var, num_batches_tracked, residual;
  bool training = false, unbiased = true, strict = true;
  std::optional<double> momentum;
  double eps = 0, activation_number = 0;
  int64_t axis = 0, groups = 1;
  std::optional<std::string_view> activation;
  OptionalTensor renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight;
  double renorm_momentum = 0.01;
  std::optional<double> rmin, rmax, dmax;

  static constexpr Py_ssize_t kArguments = 12;

  bool read_all(PyObject* const* args) {
    return read(args[0], input) && input && read(args[1], weight) && read(args[2], bias) &&
           read(args[3], running_mean) && read(args[4], running_var) && read(args[5], num_batches_tracked) &&
           read(args[6], training) && read(args[7], momentum) && read(args[8], eps) && read(args[9], axis) &&
           read_extras(args[10]) && read_ending(args[11]);
  }
  /// functional.Extras, of which frozen and inplace need another way.
  bool read_extras(PyObject* extras) {
    if (extras == Py_None) return true;
    const auto item = [=](Py_ssize_t i) { return PyTuple_GET_ITEM(extras, i); };
    return PyTuple_Check(extras) && PyTuple_GET_SIZE(extras) == 6 && read(item(0), groups) && read(item(1), unbiased) &&
           read(item(2), strict) && read_renorm(item(3)) && item(4) == Py_False && item(5) == Py_False;
  }
  /// functional.Renorm
  bool read_renorm(PyObject* renorm) {
    if (renorm == Py_None) return true;
    const auto item = [=](Py_ssize_t i) { return PyTuple_GET_ITEM(renorm, i); };
    return PyTuple_Check(renorm) && PyTuple_GET_SIZE(renorm) == 8 && read(item(0), renorm_mean) &&
           read(item(1), renorm_stddev) && read(item(2), renorm_mean_weight) && read(item(3), renorm_stddev_weight) &&
           read(item(4), renorm_momentum) && read(item(5), rmin) && read(item(6), rmax) && read(item(7), dmax);
  }
  /// functional.Ending
  bool read_ending(PyObject* ending) {
    if (ending == Py_None) return true;
    const auto item = [=](Py_ssize_t i) { return PyTuple_GET_ITEM(ending, i); };
    return PyTuple_Check(ending) && PyTuple_GET_SIZE(ending) == 3 && read(item(0), residual) &&
           read(item(1), activation) && read(item(2), activation_number);
  }
  Tensor run() const {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("torch_bn::batch_norm", "").typed<decltype(batch_norm)>();
    return op.call(*input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis,
                   groups, unbiased, strict, renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight,
                   renorm_momentum, rmin, rmax, dmax, /*statistics=*/{}, residual, activation, activation_number);
  }
};

/// Whether something looks on that would not see the call, or would have to change it.
bool observed() {
  return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing() || inside_backward() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool served(const Tensor& input) { return input.is_cpu() || (input.is_cuda() && cuda_backend); }

}  // namespace

PyObject* direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  if (count != Call::kArguments || observed() || !call.read_all(args) || !served(*call.input)) Py_RETURN_NONE;
  Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    output = call.run();
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

}  // namespace torch_bn
