// Every activation by its definition, in double, and what the kernels make of z of every size: for whatever backend, as
// oracle.h.
#pragma once
#include "cases.h"

namespace torch_bn::testing {

struct Curve {
  const char* name;
  Activation activation;
  double number;
  std::function<double(double)> value, slope;
  double kink = NAN;  // beside 0, on either side
};

/// Values at NaN and beyond all bounds, and slopes at kinks, are those that torch gives. All that there are, but none.
inline const std::vector<Curve>& curves() {
  static const double root = std::sqrt(0.5), density = std::sqrt(0.5 / M_PI), steep = std::sqrt(2 / M_PI);
  const auto leaky = [](double number) {
    return Curve{"leaky_relu", Activation::leaky_relu, number, [=](double z) { return z > 0 ? z : z * number; },
                 [=](double z) { return z > 0 ? 1 : number; }, 0};
  };
  const auto elu = [](double number) {
    return Curve{"elu", Activation::elu, number, [=](double z) { return z > 0 ? z : number * std::expm1(z); },
                 [=](double z) { return z > 0 ? 1 : number * std::exp(z); }, 0};
  };
  static const auto twice = [](double z) { return 2 * steep * (z + 0.044715 * z * z * z); };
  static const std::vector<Curve> all = {
      {"relu", Activation::relu, 0, [](double z) { return z < 0 ? 0 : z; }, [](double z) { return z <= 0 ? 0 : 1; }, 0},
      leaky(0.01), leaky(0.3), elu(1), elu(1.7),
      {"silu", Activation::silu, 0, [](double z) { return z / (1 + std::exp(-z)); },
       [](double z) {
         const double s = 1 / (1 + std::exp(-z)), c = 1 / (1 + std::exp(z));
         return s * (1 + z * c);
       }},
      {"gelu", Activation::gelu, 0, [](double z) { return z * std::erfc(-z * root) / 2; },
       [](double z) { return std::erfc(-z * root) / 2 + z * std::exp(-z * z / 2) * density; }},
      {"gelu_tanh", Activation::gelu_tanh, 0, [](double z) { return z / (1 + std::exp(-twice(z))); },
       [](double z) {
         const double s = 1 / (1 + std::exp(-twice(z))), c = 1 / (1 + std::exp(twice(z)));
         return s + z * s * c * 2 * steep * (1 + 3 * 0.044715 * z * z);
       }},
      {"hardswish", Activation::hardswish, 0,
       [](double z) { return std::isnan(z) ? z : z * std::min(std::max(z + 3, 0.0), 6.0) / 6; },
       [](double z) { return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5; }, 3}};
  return all;
}

inline const Curve& curve_of(Activation activation, double number) {
  static const Curve none{"", Activation::none, 0, [](double z) { return z; }, [](double) { return 1; }};
  for (const Curve& curve : curves())
    if (curve.activation == activation && curve.number == number) return curve;
  return none;
}

/// y and dz for each z, with dy of 1, by inference and its gradient: z is the residual, and x is 0.
struct Activated {
  Buffer y, dz;
  Activated(const Backend& backend, const Curve& curve, const Buffer& z, const Extent& e)
      : y(z.dtype, z.count), dz(z.dtype, z.count) {
    const Strides s = dense(e, 0);
    Buffer x(z.dtype, z.count), dy(z.dtype, z.count), dx(z.dtype, z.count);
    for (int64_t i = 0; i < z.count; ++i) x.set(i, 0), dy.set(i, 1);
    const Buffer running_mean = make_parameters(z.dtype, std::vector<double>(e.channels, 0));
    const Buffer running_var = make_parameters(z.dtype, std::vector<double>(e.channels, 1));
    const std::vector<double> mean(e.channels, 0.0), invstd(e.channels, 1.0);
    const Workspace workspace(backend, z.dtype, e), workspace_back(backend, z.dtype, e);
    backend.inference({.dtype = z.dtype, .extent = e, .activation = curve.activation,
                       .activation_number = curve.number, .x = x.data(), .x_strides = s, .residual = z.data(),
                       .residual_strides = s, .y = y.data(), .y_strides = s, .weight = nullptr, .bias = nullptr,
                       .eps = 0, .running_mean = running_mean.data(), .running_var = running_var.data(),
                       .workspace = workspace.data()},
                      Run::first);
    backend.backward({.dtype = z.dtype, .extent = e, .activation = curve.activation,
                      .activation_number = curve.number, .training = false, .dy = dy.data(), .dy_strides = s,
                      .x = x.data(), .x_strides = s, .residual = z.data(), .residual_strides = s, .weight = nullptr,
                      .bias = nullptr, .mean = mean.data(), .invstd = invstd.data(), .dx = dx.data(),
                      .dx_strides = s, .dresidual = dz.data(), .dresidual_strides = s, .dweight = nullptr,
                      .dbias = nullptr, .workspace = workspace_back.data()},
                     Run::first);
    int64_t apart = 0;
    for (int64_t i = 0; i < z.count; ++i)
      apart += std::isnan(dz.get(i)) ? !std::isnan(dx.get(i)) : dx.get(i) != dz.get(i);
    check(apart == 0, backend.name + " " + curve.name + ": dx is not dresidual");
  }
};

/// So much less than that may be 0, as there is no more left of an exponential than that: 100 times the least float.
constexpr double kLeast = 2e-36;

/// At NaN, infinities, zeros, kinks and their neighbours, and far out: what arithmetic in double makes of them, as the
/// neighbours in a vector are all different.
inline void check_special_activations(const Backend& backend) {
  const double zs[] = {NAN, 0,         -0.0,       1,         -1,         3,     -3,     INFINITY, -INFINITY,
                       2.9999998, -2.9999998, 3.0000002, -3.0000002, 1e-30, -1e-30, 88.7,   -88.7,    104,
                       -104,      1e4,        -1e4,      3e18,       -3e18};
  for (const Curve& curve : curves())
    for (DType d : {DType::f32, DType::f64, DType::bf16, DType::f16})
      for (const Extent e : {Extent{36, 4, 1}, Extent{3, 2, 24}, Extent{3, 2, 23}}) {
        Buffer z(d, e.outer * e.channels * e.inner);
        for (int64_t i = 0; i < z.count; ++i) z.set(i, zs[i % std::size(zs)]);
        const Activated found(backend, curve, z, e);
        std::string wrong;
        for (int64_t i = 0; i < z.count; ++i) {
          const double unit = epsilon_of(d), least = d == DType::f64 ? 0 : d == DType::f16 ? 1e-7 : kLeast;
          const auto compare = [&](const char* what, double got, double exact) {
            Buffer rounded(d, 1);  // 3e18 is none of half's
            rounded.set(0, exact);
            const double want = rounded.get(0);
            const bool equal = std::isnan(want) ? std::isnan(got) : got == want;
            if (!equal && !(std::fabs(got - want) <= 2 * unit * std::fabs(want) + least))
              wrong = std::string(what) + " of " + std::to_string(z.get(i)) + " is " + std::to_string(got) + ", not " +
                      std::to_string(want);
          };
          compare("y", found.y.get(i), curve.value(z.get(i)));
          compare("dz", found.dz.get(i), curve.slope(z.get(i)));
        }
        check(wrong.empty(), backend.name + " " + name_of(d) + " " + curve.name + ": " + wrong);
      }
}

/// Errors of y in units of the last place of float, and of dz in those of 1, over z of every size.
struct ActivationErrors {
  Worst y, dz;
  double y_at = 0, dz_at = 0;
};
inline ActivationErrors activation_errors(const Backend& backend, const Curve& curve, uint32_t step) {
  constexpr int64_t kCount = 1 << 14;
  ActivationErrors errors;
  std::vector<float> values;
  const auto flush = [&] {
    Buffer z(DType::f32, int64_t(values.size()));
    std::memcpy(z.data(), values.data(), values.size() * sizeof(float));
    const Activated found(backend, curve, z, {1, 1, z.count});
    for (int64_t i = 0; i < z.count; ++i) {
      const double want = curve.value(z.get(i)), slope = curve.slope(z.get(i));
      const double unit = std::ldexp(1.0, std::max(std::ilogb(want), -126) - 23);
      // The argument of gelu_tanh's exponential is rounded, and as many times over is its value.
      const double more = curve.activation == Activation::gelu_tanh ? 1 + 2 * z.get(i) * z.get(i) : 1;
      const double y = std::max(std::fabs(found.y.get(i) - want) - kLeast, 0.0) / unit / more;
      const double dz = std::fabs(found.dz.get(i) - slope) / 0x1p-24;
      if (!(y <= errors.y.value)) errors.y_at = z.get(i);
      if (!(dz <= errors.dz.value)) errors.dz_at = z.get(i);
      errors.y.include(y), errors.dz.include(dz);
    }
    values.clear();
  };
  for (uint32_t bits = 0x30000000; bits < 0x43000000; bits += step)  // 5e-10 to 128
    for (uint32_t sign : {0u, 0x80000000u}) {
      const uint32_t signed_bits = bits | sign;
      float value;
      std::memcpy(&value, &signed_bits, sizeof value);
      values.push_back(value);
      if (int64_t(values.size()) == kCount) flush();
    }
  flush();
  return errors;
}

inline void check_activations(const Backend& backend, uint32_t step) {
  for (const Curve& curve : curves()) {
    const ActivationErrors errors = activation_errors(backend, curve, step);
    check(errors.y.value <= 6 && errors.dz.value <= 5,
          backend.name + " " + curve.name + ": y is " + std::to_string(errors.y.value) + " units off at " +
              std::to_string(errors.y_at) + ", dz " + std::to_string(errors.dz.value) + " at " +
              std::to_string(errors.dz_at));
  }
  check_special_activations(backend);
}

}  // namespace torch_bn::testing
