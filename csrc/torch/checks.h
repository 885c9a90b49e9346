// All checks of arguments, for every operator and device. Types and texts are torch's own where they do not start with
// "batch_norm:". reference.py makes the same checks for the path without kernels. Only ops.cpp includes this.
#pragma once
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "../kernels.h"
#include "activations.h"

namespace torch_bn {

using OptionalTensor = std::optional<at::Tensor>;

/// The averages of Batch Renormalization, all present or none.
struct RenormTensors {
  const OptionalTensor &mean, &stddev, &mean_weight, &stddev_weight;
};

/// What the operators share. Absent tensors are nullopt.
struct Arguments {
  const at::Tensor& input;
  const OptionalTensor &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  int64_t axis;
  bool strict;
  const OptionalTensor& residual;
};

/// What only training has beside them.
struct TrainingArguments {
  int64_t groups;
  RenormTensors renorm;
  double renorm_momentum;
  const OptionalTensor& statistics;
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

inline void check_numel(const OptionalTensor& tensor, const char* name, int64_t count) {
  TORCH_CHECK_VALUE(!tensor || tensor->numel() == count, "batch_norm: ", name, " must have ", count,
                    count == 1 ? " element, got " : " elements, got ", tensor ? tensor->numel() : 0);
}

inline void check_counter(const OptionalTensor& counter, const at::Tensor& input) {
  if (!counter) return;
  TORCH_CHECK_TYPE(counter->scalar_type() == at::kLong, "batch_norm: num_batches_tracked must be Long, got ",
                   counter->scalar_type());
  check_device(*counter, "num_batches_tracked", input);
  check_numel(counter, "num_batches_tracked", 1);
}

inline void check_renorm(const RenormTensors& renorm, double momentum, const at::Tensor& input, int64_t channels) {
  const OptionalTensor* tensors[] = {&renorm.mean, &renorm.stddev, &renorm.mean_weight, &renorm.stddev_weight};
  const char* names[] = {"renorm_mean", "renorm_stddev", "renorm_mean_weight", "renorm_stddev_weight"};
  for (int i = 0; i < 4; ++i) {
    TORCH_CHECK_VALUE(tensors[i]->has_value() == renorm.mean.has_value(), "batch_norm: ", names[i],
                      " must be given with renorm_mean and not without, got ", tensors[i]->has_value() ? "it" : "None");
    check_numel(*tensors[i], names[i], i < 2 ? channels : 1);
    check_kind(*tensors[i], names[i], input);
    check_constant(*tensors[i], names[i]);
  }
  TORCH_CHECK_VALUE(!renorm.mean || momentum != 0,
                    "batch_norm: renorm_momentum must not be 0, which lets nothing in, got 0.0");
}

inline void check_statistics(const OptionalTensor& statistics, const at::Tensor& input, int64_t channels) {
  if (!statistics) return;
  TORCH_CHECK_VALUE(statistics->scalar_type() == at::kDouble && statistics->is_contiguous() && statistics->dim() == 2 &&
                        statistics->size(0) == 2 && statistics->size(1) == channels,
                    "batch_norm: statistics must be contiguous Double of [2, ", channels, "], got ",
                    statistics->scalar_type(), " of ", statistics->sizes());
  check_device(*statistics, "statistics", input);
}

inline void check_groups(const at::Tensor& input, int64_t axis, int64_t groups) {
  if (groups == 1) return;
  TORCH_CHECK_VALUE(axis != 0, "batch_norm: groups divide the examples of dimension 0, so axis must be another, got 0");
  TORCH_CHECK_VALUE(groups >= 1 && groups <= std::max<int64_t>(1, input.size(0)), "batch_norm: groups must be in [1, ",
                    std::max<int64_t>(1, input.size(0)), "], the number of examples, got ", groups);
}

inline void check_dtype(const at::Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_float(input), "\"batch_norm\" not implemented for '", input.scalar_type(), "'");
}

/// Whether the smallest group has a single value per channel.
inline bool has_single_values(const at::Tensor& input, int64_t axis, int64_t groups) {
  const int64_t values = values_per_channel(input, axis);
  return values > 0 && (groups == 1 ? values : input.size(0) / groups * (values / input.size(0))) == 1;
}

/// What torch refuses and TensorFlow does not.
inline void check_strictly(const Arguments& a, int64_t axis, int64_t groups) {
  TORCH_CHECK_VALUE(!a.training || !has_single_values(a.input, axis, groups),
                    "Expected more than 1 value per channel when training, got input size torch.Size(", a.input.sizes(),
                    ")", groups > 1 ? " in " + std::to_string(groups) + " groups" : "");
  TORCH_CHECK_VALUE(!a.training || a.eps > 0, "batch_norm eps must be positive during training, but got ",
                    python_float(a.eps));
  TORCH_CHECK_VALUE(a.eps >= 0, "batch_norm eps must be non-negative, but got ", python_float(a.eps));
}

inline void check_residual(const OptionalTensor& residual, const at::Tensor& input) {
  if (!residual) return;
  TORCH_CHECK_VALUE(residual->sizes() == input.sizes(), "batch_norm: residual must have the input's shape ",
                    input.sizes(), ", got ", residual->sizes());
  check_kind(residual, "residual", input);
}

/// Throws for bad arguments, before anything is changed; otherwise returns the axis counted from 0.
inline int64_t check(const Arguments& a, const TrainingArguments* t = nullptr) {
  const at::Tensor& input = a.input;
  const int64_t axis = check_axis(input, a.axis);
  if (t) check_groups(input, axis, t->groups);
  if (a.strict) check_strictly(a, axis, t ? t->groups : 1);

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
  check_counter(a.num_batches_tracked, input);
  check_constant(a.running_mean, "running_mean");
  check_constant(a.running_var, "running_var");
  if (t) {
    check_renorm(t->renorm, t->renorm_momentum, input, channels);
    check_statistics(t->statistics, input, channels);
  }
  check_residual(a.residual, input);
  return axis;
}

/// The same for what enters a batch's statistics into the running ones.
inline void check_update(const at::Tensor& statistics, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                         std::optional<double> momentum, const RenormTensors& renorm, double renorm_momentum) {
  const int64_t channels = statistics.dim() == 2 ? statistics.size(1) : 0;
  check_statistics(statistics, statistics, channels);
  check_buffer(running_mean, "running_mean", channels, true);
  check_buffer(running_var, "running_var", channels, true);
  check_kind(running_mean, "running_mean", statistics);
  check_kind(running_var, "running_var", statistics);
  TORCH_CHECK_VALUE(momentum || !running_mean || num_batches_tracked,
                    "batch_norm: momentum=None averages over all batches and needs num_batches_tracked, got None");
  check_counter(num_batches_tracked, statistics);
  check_renorm(renorm, renorm_momentum, statistics, channels);
}

/// The same for the backward operator, whose other arguments come from the forward one.
inline int64_t check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                              const at::Tensor& saved, int64_t axis, int64_t groups, const OptionalTensor& bias,
                              const OptionalTensor& residual) {
  axis = check_axis(input, axis);
  check_groups(input, axis, groups);
  check_dtype(input);
  const int64_t channels = input.size(axis);
  check_length(weight, "weight", channels);
  check_kind(weight, "weight", input);
  check_length(bias, "bias", channels);
  check_kind(bias, "bias", input);
  check_residual(residual, input);
  TORCH_CHECK(is_float(grad_output) && grad_output.sizes() == input.sizes(),
              "batch_norm: grad_output must be floating point with the input's shape ", input.sizes(), ", got ",
              grad_output.scalar_type(), " with ", grad_output.sizes());
  check_device(grad_output, "grad_output", input);
  TORCH_CHECK(saved.scalar_type() == at::kDouble && saved.dim() == 2 && saved.is_contiguous() &&
                  (saved.size(0) == 2 * groups || saved.size(0) == 2 * groups + 2) && saved.size(1) == channels,
              "batch_norm: saved must be contiguous Double of [", 2 * groups, " or ", 2 * groups + 2, ", ", channels,
              "], got ", saved.scalar_type(), " of ", saved.sizes());
  check_device(saved, "saved", input);
  return axis;
}

/// What y may overwrite.
inline void check_out(const OptionalTensor& out, const at::Tensor& input) {
  if (!out) return;
  TORCH_CHECK(out->is_same(input), "batch_norm: out must be the input itself or None");
  at::assert_no_internal_overlap(input);
}

inline void check_mask(const OptionalTensor& mask, const at::Tensor& input, int64_t bytes) {
  if (!mask) return;
  TORCH_CHECK(mask->scalar_type() == at::kByte && mask->is_contiguous() && mask->dim() == 1 && mask->numel() == bytes,
              "batch_norm: mask must be contiguous Byte of [", bytes, "], as the forward has made it of an input in this "
              "layout, got ", mask->scalar_type(), " of ", mask->sizes());
  check_device(*mask, "mask", input);
}

}  // namespace torch_bn
