// Values at which formulas break: every half value, NaN, infinities, constants. For whatever backend, as oracle.h.
#pragma once
#include "cases.h"

namespace torch_bn::testing {

/// Inference as a plain product: mean 0, variance 1, eps 0.
inline void scale_by(const Backend& backend, const Buffer& x, const float* weight, Buffer& y) {
  const float zero = 0, one = 1;
  const int64_t n = x.count;
  const Workspace workspace(backend, x.dtype, {1, 1, n});
  backend.inference({.dtype = x.dtype, .extent = {1, 1, n}, .x = x.data(), .x_strides = {n, n}, .y = y.data(),
                     .y_strides = {n, n}, .weight = weight, .bias = nullptr, .eps = 0, .running_mean = &zero,
                     .running_var = &one, .workspace = workspace.data()},
                    Run::first);
}

inline void check_conversions(const Backend& backend) {
  for (DType d : {DType::f16, DType::bf16}) {
    Buffer x(d, 65536), y(d, 65536);
    for (int64_t i = 0; i < x.count; ++i) static_cast<uint16_t*>(x.data())[i] = uint16_t(i);
    scale_by(backend, x, nullptr, y);
    int wrong = 0;
    for (int64_t i = 0; i < x.count; ++i) {
      const double a = x.get(i), b = y.get(i);
      wrong += std::isnan(a) ? !std::isnan(b) : a != b;
    }
    check(wrong == 0, backend.name + " " + name_of(d) + " identity: " + std::to_string(wrong) + " values changed");
  }
  // Rounding from float: halfway cases, overflow and subnormals, by way of a weight.
  for (DType d : {DType::f16, DType::bf16})
    for (float scale : {1.0f, 1.00048828125f, 1.001953125f, 1.00390625f, 1e-3f, 3e-8f, 6e4f, 1e30f}) {
      Buffer x(d, 4096), y(d, 4096), rounded(d, 1);
      for (int64_t i = 0; i < x.count; ++i) x.set(i, double(i - 2048) / 64.0);
      scale_by(backend, x, &scale, y);
      int wrong = 0;
      for (int64_t i = 0; i < x.count; ++i) {
        rounded.set(0, float(x.get(i)) * scale);
        wrong += rounded.get(0) != y.get(i);
      }
      check(wrong == 0, backend.name + " " + name_of(d) + " rounding at " + std::to_string(scale) + ": " +
                            std::to_string(wrong));
    }
}

/// At NaN, 0 and on either side of it, with z = residual.
inline void check_relu(const Backend& backend) {
  for (const Extent e : {Extent{12, 4, 1}, Extent{3, 2, 8}, Extent{3, 2, 7}}) {
    const Strides s = dense(e, 0);
    const int64_t n = span(e, s);
    Buffer x(DType::f32, n), residual(DType::f32, n), y(DType::f32, n), dy(DType::f32, n), dx(DType::f32, n),
        dresidual(DType::f32, n);
    const double zs[] = {NAN, 0, 1, -1};
    for (int64_t i = 0; i < n; ++i) x.set(i, 0), residual.set(i, zs[i % 4]), dy.set(i, 2);
    const std::vector<float> running_mean(e.channels, 0.0f), running_var(e.channels, 1.0f);
    const std::vector<double> mean(e.channels, 0.0), invstd(e.channels, 1.0);
    const Workspace workspace(backend, DType::f32, e), workspace_back(backend, DType::f32, e);
    backend.inference({.dtype = DType::f32, .extent = e, .activation = Activation::relu, .x = x.data(), .x_strides = s,
                       .residual = residual.data(), .residual_strides = s, .y = y.data(), .y_strides = s,
                       .weight = nullptr, .bias = nullptr, .eps = 0, .running_mean = running_mean.data(),
                       .running_var = running_var.data(), .workspace = workspace.data()},
                      Run::first);
    backend.backward({.dtype = DType::f32, .extent = e, .activation = Activation::relu, .training = false,
                      .dy = dy.data(), .dy_strides = s, .x = x.data(), .x_strides = s, .residual = residual.data(),
                      .residual_strides = s, .weight = nullptr, .bias = nullptr, .mean = mean.data(),
                      .invstd = invstd.data(), .dx = dx.data(), .dx_strides = s, .dresidual = dresidual.data(),
                      .dresidual_strides = s, .dweight = nullptr, .dbias = nullptr,
                      .workspace = workspace_back.data()},
                     Run::first);
    int wrong = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double z = zs[i % 4], passes = std::isnan(z) || z > 0 ? 2 : 0;
      wrong += std::isnan(z) ? !std::isnan(y.get(i)) : y.get(i) != std::max(z, 0.0);
      wrong += dx.get(i) != passes || dresidual.get(i) != passes;
    }
    check(wrong == 0, backend.name + " relu at NaN, 0, 1, -1: " + std::to_string(wrong) + " wrong");
  }
}

/// A channel with a NaN, an infinity, huge values or a constant does what arithmetic says, and its neighbours nothing.
inline void check_far_values(const Backend& backend, const std::vector<Extent>& extents) {
  for (const Extent& e : extents) {
    const Strides s = dense(e, 0);
    const int64_t n = e.outer * e.inner;
    Buffer x(DType::f32, span(e, s)), y(DType::f32, span(e, s));
    for (int64_t i = 0; i < x.count; ++i) x.set(i, double(i * 7919 % 1000) / 100.0);
    const auto fill = [&](int64_t channel, auto value) {
      for (int64_t o = 0; o < e.outer; ++o)
        for (int64_t i = 0; i < e.inner; ++i) x.set(offset(s, o, channel, i), value(o * e.inner + i));
    };
    x.set(offset(s, e.outer - 1, 0, e.inner - 1), NAN);
    x.set(offset(s, e.outer / 2, 1, e.inner / 2), INFINITY);
    fill(2, [n](int64_t i) { return (i % 2 == 1) == (i < n / 2) ? 1e30 : -1e30; });  // whatever is read together
    fill(3, [](int64_t) { return 12345.678; });
    fill(4, [](int64_t i) { return i == 0 ? 1e7 : double(i % 2); });  // the first element is no guide to the rest
    std::vector<double> mean(e.channels), invstd(e.channels);
    std::vector<float> running_mean(e.channels), running_var(e.channels);
    const Workspace workspace(backend, DType::f32, e);
    backend.forward({.dtype = DType::f32, .extent = e, .x = x.data(), .x_strides = s, .y = y.data(), .y_strides = s,
                     .weight = nullptr, .bias = nullptr, .eps = 1e-5, .mean = mean.data(), .invstd = invstd.data(),
                     .running = {.mean = running_mean.data(), .var = running_var.data(), .momentum = 1,
                                 .cumulative = false, .renorm = {}},
                     .unbiased = true, .workspace = workspace.data()},
                    Run::first);
    const auto y_at = [&](int64_t channel) { return y.get(offset(s, 0, channel, 0)); };
    const std::string where = backend.name + " [" + std::to_string(e.outer) + ", " + std::to_string(e.inner) + "] ";
    const bool spread = std::isnan(mean[0]) && std::isnan(y_at(0)) && std::isnan(running_var[0]);
    check(spread, where + "NaN spreads over its channel");
    check(std::isinf(running_mean[1]) && std::isnan(running_var[1]) && std::isnan(y_at(1)), where + "infinity spreads");
    check(std::fabs(std::fabs(y_at(2)) - 1) < 1e-2 && std::isfinite(y_at(2)), where + "1e30 is normalised");
    check(y_at(3) == 0 && std::fabs(invstd[3] - 1 / std::sqrt(1e-5)) < 1e-2, where + "a constant channel gives 0");
    double m = 0, v = 0;
    for (int64_t i = 0; i < n; ++i) m += (i == 0 ? 1e7 : double(i % 2)) / double(n);
    for (int64_t i = 0; i < n; ++i) v += std::pow((i == 0 ? 1e7 : double(i % 2)) - m, 2) / double(n);
    check(std::fabs(invstd[4] * std::sqrt(v) - 1) < 1e-5, where + "a misleading first element");
    for (int64_t i = 0; i < e.inner; ++i)
      if (!std::isfinite(y.get(offset(s, 0, 5, i)))) check(false, where + "a neighbour is spoilt");
  }
}

}  // namespace torch_bn::testing
