// What others ask autograd.cpp, which has torch's headers of autograd: they take 2 s to compile.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace torch_bn {

/// The operator torch_bn::batch_norm; ops.cpp has its schema.
at::Tensor batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                      const std::optional<at::Tensor>& running_var,
                      const std::optional<at::Tensor>& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps, int64_t axis, int64_t groups, bool unbiased,
                      bool strict, const std::optional<at::Tensor>& renorm_mean,
                      const std::optional<at::Tensor>& renorm_stddev,
                      const std::optional<at::Tensor>& renorm_mean_weight,
                      const std::optional<at::Tensor>& renorm_stddev_weight, double renorm_momentum,
                      std::optional<double> rmin, std::optional<double> rmax, std::optional<double> dmax,
                      const std::optional<at::Tensor>& statistics, const std::optional<at::Tensor>& residual,
                      std::optional<std::string_view> activation, double activation_number);

/// Whether this thread runs a backward pass now.
bool inside_backward();

}  // namespace torch_bn
