// All checks of arguments, for every operator and device. Types and texts are torch's own where they do not start with
// "batch_norm:". reference.py makes the same checks for the path without kernels. Only ops.cpp includes this.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

namespace torch_bn {

using OptionalTensor = std::optional<at::Tensor>;

/// What the operators share. Absent tensors are nullopt.
struct Arguments {
  const at::Tensor& input;
  const OptionalTensor &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  int64_t axis;
};

inline bool is_float(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

inline int64_t values_per_channel(const at::Tensor& input, int64_t axis) {
  int64_t count = 1;
  for (int64_t i = 0; i < input.dim(); ++i)
    if (i != axis) count *= input.size(i);
  return count;
}

/// As Python shows a float: with a point, the shortest digits that give it back.
inline std::string python_float(double value) {
  for (int digits = 1; digits <= 17; ++digits) {
    std::ostringstream text;
    text.precision(digits);
    text << value;
    if (value != value || std::stod(text.str()) == value)
      return text.str().find_first_of(".eni") == std::string::npos ? text.str() + ".0" : text.str();
  }
  return std::to_string(value);
}

inline void check_length(const OptionalTensor& tensor, const char* name, int64_t channels) {
  TORCH_CHECK(!tensor || tensor->numel() == channels, name, " should contain ", channels, " elements not ",
              tensor ? tensor->numel() : 0);
}

inline void check_buffer(const OptionalTensor& tensor, const char* name, int64_t channels, bool training) {
  TORCH_CHECK(tensor || training, name, " must be defined in evaluation mode");
  check_length(tensor, name, channels);
}

inline void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), "batch_norm: input is on ", input.device(), " but ", name, " is on ",
              tensor.device());
}

inline void check_kind(const OptionalTensor& tensor, const char* name, const at::Tensor& input) {
  if (!tensor) return;
  TORCH_CHECK_TYPE(is_float(*tensor), "batch_norm: ", name, " must be Float, Double, Half or BFloat16, got ",
                   tensor->scalar_type());
  check_device(*tensor, name, input);
}

inline void check_constant(const OptionalTensor& tensor, const char* name) {
  TORCH_CHECK(!tensor || !tensor->requires_grad() || !at::GradMode::is_enabled(),
              "The function 'batch_norm' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

inline int64_t check_axis(const at::Tensor& input, int64_t axis) {
  const int64_t rank = input.dim();
  TORCH_CHECK_VALUE(rank >= 1, "batch_norm: input must have at least 1 dimension, got 0");
  TORCH_CHECK_VALUE(axis >= -rank && axis < rank, "batch_norm: axis must be in [", -rank, ", ", rank - 1,
                    "] for an input of rank ", rank, ", got ", axis);
  return axis < 0 ? axis + rank : axis;
}

inline void check_dtype(const at::Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_float(input), "\"batch_norm\" not implemented for '", input.scalar_type(), "'");
}

/// Throws for bad arguments, before anything is changed; otherwise returns the axis counted from 0.
inline int64_t check(const Arguments& a) {
  const at::Tensor& input = a.input;
  const int64_t axis = check_axis(input, a.axis);
  TORCH_CHECK_VALUE(!a.training || values_per_channel(input, axis) != 1,
                    "Expected more than 1 value per channel when training, got input size torch.Size(", input.sizes(),
                    ")");
  TORCH_CHECK_VALUE(!a.training || a.eps > 0, "batch_norm eps must be positive during training, but got ",
                    python_float(a.eps));
  TORCH_CHECK_VALUE(a.eps >= 0, "batch_norm eps must be non-negative, but got ", python_float(a.eps));

  const int64_t channels = input.size(axis);
  check_buffer(a.running_mean, "running_mean", channels, a.training);
  check_buffer(a.running_var, "running_var", channels, a.training);
  check_length(a.weight, "weight", channels);
  check_length(a.bias, "bias", channels);
  TORCH_CHECK_VALUE(a.running_mean.has_value() == a.running_var.has_value(),
                    "running_mean and running_var must either both be None or neither be None");
  TORCH_CHECK_VALUE(!a.training || a.momentum || !a.running_mean || a.num_batches_tracked,
                    "batch_norm: momentum=None averages over all batches and needs num_batches_tracked, got None");

  check_dtype(input);
  check_kind(a.weight, "weight", input);
  check_kind(a.bias, "bias", input);
  check_kind(a.running_mean, "running_mean", input);
  check_kind(a.running_var, "running_var", input);
  if (a.num_batches_tracked) {
    const at::Tensor& counter = *a.num_batches_tracked;
    TORCH_CHECK_TYPE(counter.scalar_type() == at::kLong, "batch_norm: num_batches_tracked must be Long, got ",
                     counter.scalar_type());
    check_device(counter, "num_batches_tracked", input);
    TORCH_CHECK_VALUE(counter.numel() == 1, "batch_norm: num_batches_tracked must have 1 element, got ",
                      counter.numel());
  }
  check_constant(a.running_mean, "running_mean");
  check_constant(a.running_var, "running_var");
  return axis;
}

/// The same for the backward operator, whose other arguments come from the forward one.
inline int64_t check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                              const at::Tensor& mean, const at::Tensor& invstd, int64_t axis) {
  axis = check_axis(input, axis);
  check_dtype(input);
  check_length(weight, "weight", input.size(axis));
  check_kind(weight, "weight", input);
  TORCH_CHECK(is_float(grad_output) && grad_output.sizes() == input.sizes(),
              "batch_norm: grad_output must be floating point with the input's shape ", input.sizes(), ", got ",
              grad_output.scalar_type(), " with ", grad_output.sizes());
  check_device(grad_output, "grad_output", input);
  for (const auto& [tensor, name] : {std::pair{&mean, "mean"}, {&invstd, "invstd"}}) {
    TORCH_CHECK(tensor->scalar_type() == at::kDouble && tensor->numel() == input.size(axis), "batch_norm: ", name,
                " must be Double with ", input.size(axis), " elements, got ", tensor->scalar_type(), " with ",
                tensor->numel());
    check_device(*tensor, name, input);
  }
  return axis;
}

}  // namespace torch_bn
