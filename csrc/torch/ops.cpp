// The operators: their schemas, and one function per operator, for every device, that checks, allocates, fills the
// struct and calls the table of kernels. autograd.cpp makes them differentiable, torch_bn/_fake.py gives their shapes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <fstream>

#include "../kernels.h"
#include "checks.h"
#include "layout.h"

namespace torch_bn {
namespace {

/// NB: not sysconf, which in a virtual machine may count the caches of a whole server.
int64_t last_level_cache() {
  int64_t kibibytes = 32 << 10;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
  return kibibytes << 10;
}

Executor host_threads() {
  const auto parallel_for = [](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    if (count <= grain) return body(context, 0, count);
    at::parallel_for(0, count, grain, [=](int64_t first, int64_t last) { body(context, first, last); });
  };
  static const int64_t cache_bytes = last_level_cache();
  return {parallel_for, at::in_parallel_region() ? 1 : at::get_num_threads(), cache_bytes, nullptr};
}

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    default: return DType::f16;
  }
}

/// Scratch for one call; small ones need no allocation.
class Workspace {
 public:
  Workspace(int64_t bytes, const at::Tensor& input) {
    if (bytes > int64_t(sizeof small_)) large_ = at::empty({bytes}, input.options().dtype(at::kByte));
  }
  void* data() { return large_.defined() ? large_.mutable_data_ptr() : small_; }

 private:
  alignas(64) char small_[8192];
  at::Tensor large_;
};

/// NB: Tensor::to() goes through the dispatcher even when there is nothing to do.
at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

/// A per-channel argument in the type that the kernels take: the tensor itself, or a copy.
class Parameter {
 public:
  Parameter(const OptionalTensor& tensor, at::ScalarType type) {
    if (tensor) values_ = as_type(*tensor, type).contiguous();
  }
  const void* data() const { return values_.defined() ? values_.const_data_ptr() : nullptr; }

 private:
  at::Tensor values_;
};

/// A running statistic in that type; write_back() takes the values of a copy to where they belong.
class Buffer {
 public:
  Buffer(const OptionalTensor& tensor, at::ScalarType type) {
    if (!tensor) return;
    buffer_ = *tensor;
    values_ = as_type(buffer_, type).contiguous();
  }
  void* data() { return values_.defined() ? values_.mutable_data_ptr() : nullptr; }
  void write_back() {
    if (!values_.defined()) return;
    if (!values_.is_same(buffer_)) buffer_.copy_(values_.view(buffer_.sizes()));
    else if (!buffer_.is_inference()) buffer_.unsafeGetTensorImpl()->bump_version();
  }

 private:
  at::Tensor buffer_, values_;
};

at::ScalarType parameter_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, int64_t axis) {
  axis = check({input, weight, bias, running_mean, running_var, num_batches_tracked, true, momentum, eps, axis});
  const Layout layout(input, axis);
  const Extent& extent = layout.extent();
  at::Tensor output = layout.empty(input.options());
  const auto statistics = input.options().dtype(at::kDouble).memory_format(std::nullopt);
  at::Tensor mean = at::empty({extent.channels}, statistics), invstd = at::empty({extent.channels}, statistics);
  if (input.numel() == 0) {
    if (num_batches_tracked) num_batches_tracked->add_(1);
    return {output, mean.zero_(), invstd.zero_()};
  }
  at::Tensor x = input;
  const Strides x_strides = layout.fit(x);
  const auto type = parameter_type(input);
  const Parameter gamma(weight, type), beta(bias, type);
  Buffer new_mean(running_mean, type), new_var(running_var, type), counter(num_batches_tracked, at::kLong);
  const Kernels& kernels = cpu::selected();
  const DType dtype = dtype_of(input);
  Workspace workspace(kernels.workspace(dtype, extent), input);
  kernels.forward({.dtype = dtype,
                   .extent = extent,
                   .x = x.const_data_ptr(),
                   .x_strides = x_strides,
                   .y = output.mutable_data_ptr(),
                   .y_strides = *layout.strides(output),
                   .weight = gamma.data(),
                   .bias = beta.data(),
                   .eps = eps,
                   .mean = mean.mutable_data_ptr<double>(),
                   .invstd = invstd.mutable_data_ptr<double>(),
                   .running_mean = new_mean.data(),
                   .running_var = new_var.data(),
                   .num_batches_tracked = static_cast<int64_t*>(counter.data()),
                   .momentum = momentum.value_or(0),
                   .cumulative = !momentum,
                   .workspace = workspace.data()},
                  host_threads());
  new_mean.write_back();
  new_var.write_back();
  counter.write_back();
  return {output, mean, invstd};
}

at::Tensor inference(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps, int64_t axis) {
  axis = check({input, weight, bias, running_mean, running_var, {}, false, 0.0, eps, axis});
  const Layout layout(input, axis);
  const Extent& extent = layout.extent();
  at::Tensor output = layout.empty(input.options());
  if (input.numel() == 0) return output;
  at::Tensor x = input;
  const Strides x_strides = layout.fit(x);
  const auto type = parameter_type(input);
  const Parameter gamma(weight, type), beta(bias, type), mean(running_mean, type), var(running_var, type);
  const Kernels& kernels = cpu::selected();
  const DType dtype = dtype_of(input);
  Workspace workspace(kernels.workspace(dtype, extent), input);
  kernels.inference({.dtype = dtype,
                     .extent = extent,
                     .x = x.const_data_ptr(),
                     .x_strides = x_strides,
                     .y = output.mutable_data_ptr(),
                     .y_strides = *layout.strides(output),
                     .weight = gamma.data(),
                     .bias = beta.data(),
                     .eps = eps,
                     .running_mean = mean.data(),
                     .running_var = var.data(),
                     .workspace = workspace.data()},
                    host_threads());
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                        const OptionalTensor& weight, const at::Tensor& mean,
                                                        const at::Tensor& invstd, bool training, double /*eps*/,
                                                        int64_t axis, bool needs_input_grad) {
  axis = check_backward(grad_output, input, weight, mean, invstd, axis);
  const Layout layout(input, axis);
  const Extent& extent = layout.extent();
  const auto parameters = input.options().dtype(parameter_type(input)).memory_format(std::nullopt);
  at::Tensor grad_input = needs_input_grad ? layout.empty(input.options()) : at::empty({0}, input.options());
  if (input.numel() == 0)
    return {grad_input, at::zeros({extent.channels}, parameters), at::zeros({extent.channels}, parameters)};
  at::Tensor grad_weight = at::empty({extent.channels}, parameters), grad_bias = at::empty({extent.channels}, parameters);
  at::Tensor x = input, dy = as_type(grad_output, input.scalar_type());
  const Strides x_strides = layout.fit(x), dy_strides = layout.fit(dy);
  const Parameter gamma(weight, parameter_type(input)), batch_mean(mean, at::kDouble), batch_invstd(invstd, at::kDouble);
  const Kernels& kernels = cpu::selected();
  const DType dtype = dtype_of(input);
  Workspace workspace(kernels.workspace(dtype, extent), input);
  kernels.backward({.dtype = dtype,
                    .extent = extent,
                    .training = training,
                    .dy = dy.const_data_ptr(),
                    .dy_strides = dy_strides,
                    .x = x.const_data_ptr(),
                    .x_strides = x_strides,
                    .weight = gamma.data(),
                    .bias = nullptr,
                    .mean = static_cast<const double*>(batch_mean.data()),
                    .invstd = static_cast<const double*>(batch_invstd.data()),
                    .dx = needs_input_grad ? grad_input.mutable_data_ptr() : nullptr,
                    .dx_strides = needs_input_grad ? *layout.strides(grad_input) : Strides{},
                    .dweight = grad_weight.mutable_data_ptr(),
                    .dbias = grad_bias.mutable_data_ptr(),
                    .workspace = workspace.data()},
                   host_threads());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY(torch_bn, m) {
  // What users call: training normalises with the statistics of the batch and moves the running ones, else the running
  // ones are used. momentum None averages over all batches. Differentiable any number of times.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, int axis) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // The two directions of that, below autograd. mean and invstd: float64 [C].
  m.def(
      "_batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, int axis) "
      "-> (Tensor output, Tensor mean, Tensor invstd)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "float eps, int axis) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // training: mean and invstd depend on input. grad_weight and grad_bias: [C] in float32, in float64 for such an input.
  // Without needs_input_grad, grad_input is empty.
  m.def(
      "_batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, "
      "bool training, float eps, int axis, bool needs_input_grad) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(torch_bn, CPU, m) {
  m.impl("_batch_norm_forward", &forward);
  m.impl("_batch_norm_inference", &inference);
  m.impl("_batch_norm_backward", &backward);
}

}  // namespace torch_bn
