// The CPU kernels with no Python and no torch: every table that this CPU can run against plain loops in double.
// Every buffer is exactly as large as the contract says, so that a sanitizer sees one element too many.
//   g++ -std=c++20 -O1 -g -fsanitize=address,undefined -Wno-psabi tests/cpp/test_kernels.cpp csrc/cpu/*.cpp && ./a.out
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/kernels.h"

using namespace torch_bn;

namespace {

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed < 40) std::printf("FAILED %s\n", what.c_str());
}

// ---------------------------------------------------------------- dtypes, each written apart from the kernels' own

double from_bits16(uint16_t h, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (h >> mantissa_bits) & ((1 << exponent_bits) - 1), mantissa = h & ((1 << mantissa_bits) - 1);
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

/// The nearest of all 65536 values, ties to the even one: slow and plain.
uint16_t to_bits16(double v, int exponent_bits) {
  static std::vector<double> tables[2];
  auto& table = tables[exponent_bits == 8];
  if (table.empty())
    for (int i = 0; i < 0x8000; ++i) table.push_back(from_bits16(uint16_t(i), exponent_bits));
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return 0x7fff;
  const int infinite = exponent_bits == 8 ? 0x7f80 : 0x7c00;
  const double a = std::fabs(v);
  const int above = int(std::lower_bound(table.begin(), table.begin() + infinite, a) - table.begin());
  if (above == 0) return sign;
  const double high = above == infinite ? 2 * table[infinite - 1] - table[infinite - 2] : table[above];
  const double low = table[above - 1];
  const bool up = a - low > high - a || (a - low == high - a && above % 2 == 0);
  return uint16_t(sign | (up ? above : above - 1));
}

size_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }
const char* name_of(DType d) { return d == DType::f32 ? "f32" : d == DType::f64 ? "f64" : d == DType::bf16 ? "bf16" : "f16"; }
double epsilon_of(DType d) { return d == DType::f64 ? 2e-15 : d == DType::f32 ? 1e-6 : d == DType::bf16 ? 8e-3 : 1e-3; }

struct Free {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

/// Memory of exactly n elements, with nothing behind it, aligned as torch's.
struct Buffer {
  DType dtype;
  int64_t count;
  std::unique_ptr<char[], Free> bytes;
  Buffer(DType dtype, int64_t count)
      : dtype(dtype), count(count), bytes(new (std::align_val_t(64)) char[count * size_of(dtype)]) {
    std::memset(bytes.get(), 0xff, count * size_of(dtype));  // NaN
  }
  double get(int64_t i) const {
    if (dtype == DType::f64) return reinterpret_cast<const double*>(bytes.get())[i];
    if (dtype == DType::f32) return reinterpret_cast<const float*>(bytes.get())[i];
    return from_bits16(reinterpret_cast<const uint16_t*>(bytes.get())[i], dtype == DType::bf16 ? 8 : 5);
  }
  void set(int64_t i, double v) {
    if (dtype == DType::f64) reinterpret_cast<double*>(bytes.get())[i] = v;
    else if (dtype == DType::f32) reinterpret_cast<float*>(bytes.get())[i] = float(v);
    else reinterpret_cast<uint16_t*>(bytes.get())[i] = to_bits16(v, dtype == DType::bf16 ? 8 : 5);
  }
};

struct Parameters {  // [channels], in the type of the dtype's parameters
  Buffer values;
  Parameters(DType d, const std::vector<double>& v) : values(d == DType::f64 ? DType::f64 : DType::f32, int64_t(v.size())) {
    for (size_t i = 0; i < v.size(); ++i) values.set(int64_t(i), v[i]);
  }
};

// ---------------------------------------------------------------- one case

struct Case {
  DType dtype;
  Extent extent;
  Activation activation;
  bool residual, affine, padded;  // padded: x and dy are cut out of larger tensors
  bool expanded;                  // dy repeats one plane or row
  bool renorm, unbiased;
  double mean, deviation;
};

std::string describe(const Kernels& k, const Case& c, const char* what) {
  char text[300];
  std::snprintf(text, sizeof text, "%s %s [%ld, %ld, %ld] per example %ld groups %ld%s%s%s%s%s%s%s mean %g: %s", k.name,
                name_of(c.dtype), long(c.extent.outer), long(c.extent.channels), long(c.extent.inner),
                long(c.extent.outer_per_example), long(c.extent.groups), c.activation == Activation::relu ? " relu" : "",
                c.residual ? " residual" : "", c.affine ? " affine" : "", c.padded ? " padded" : "",
                c.expanded ? " expanded" : "", c.renorm ? " renorm" : "", c.unbiased ? " unbiased" : "", c.mean, what);
  return text;
}

Strides dense(const Extent& e, int64_t pad) { return {e.channels * e.inner + pad, e.inner}; }

int64_t offset(const Extent&, const Strides& s, int64_t o, int64_t c, int64_t i) {
  return o * s.outer + c * s.channel + i;
}

int64_t span(const Extent& e, const Strides& s) { return offset(e, s, e.outer - 1, e.channels - 1, e.inner - 1) + 1; }

/// With a cache too small for any output.
const Executor serial{[](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }, 1, 0, nullptr};

/// Ranges of the least size the grain allows, on three threads, the last range first; with a cache that holds everything.
const Executor threaded{[](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
                          std::vector<std::thread> threads;
                          const int64_t step = std::max(grain, (n + 2) / 3);
                          for (int64_t begin = (n - 1) / step * step; begin >= 0; begin -= step)
                            threads.emplace_back([=] { body(context, begin, std::min(n, begin + step)); });
                          for (auto& t : threads) t.join();
                        },
                        3, int64_t(1) << 60, nullptr};

void run_case(const Kernels& kernels, const Case& c, unsigned seed) {
  const Extent& e = c.extent;
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const auto group_of = [&](int64_t o) { return o / e.outer_per_example % e.groups; };
  const Strides xs = dense(e, c.padded ? 3 * e.inner : 0), ys = dense(e, 0);
  const Strides dys = c.expanded ? Strides{0, e.inner == 1 ? 1 : 0} : xs;
  const Extent one{1, e.inner == 1 ? e.channels : 1, e.inner};
  Buffer x(c.dtype, span(e, xs)), residual(c.dtype, span(e, ys)), y(c.dtype, span(e, ys)), y2(c.dtype, span(e, ys));
  Buffer dy(c.dtype, c.expanded ? span(one, dense(one, 0)) : span(e, dys)), dx(c.dtype, span(e, ys)),
      dresidual(c.dtype, span(e, ys));
  for (int64_t i = 0; i < x.count; ++i) x.set(i, c.mean + c.deviation * normal(random));
  for (int64_t i = 0; i < residual.count; ++i) residual.set(i, normal(random));
  for (int64_t i = 0; i < dy.count; ++i) dy.set(i, 0.5 + normal(random));
  const int64_t C = e.channels, G = e.groups;
  std::vector<double> gamma(C, 1), beta(C, 0), old_mean(C), old_var(C);
  for (int64_t i = 0; i < C; ++i) {
    if (c.affine) gamma[i] = float(1 + 0.3 * normal(random)), beta[i] = float(normal(random));
    old_mean[i] = float(normal(random)), old_var[i] = float(1.5 + 0.1 * normal(random));
  }
  Parameters weight(c.dtype, gamma), bias(c.dtype, beta), running_mean(c.dtype, old_mean), running_var(c.dtype, old_var);
  Parameters dweight(c.dtype, std::vector<double>(C, NAN)), dbias(c.dtype, std::vector<double>(C, NAN));
  std::vector<double> mean(G * C, NAN), invstd(G * C, NAN), correction(2 * C, NAN), old_renorm_mean(C), old_stddev(C);
  for (int64_t i = 0; i < C; ++i) {
    old_renorm_mean[i] = float(0.4 * (c.mean + 0.5 * normal(random)));  // of weight 0.4
    old_stddev[i] = float(0.5 * c.deviation * (1 + 0.2 * normal(random)));  // of weight 0.5
  }
  Parameters renorm_mean(c.dtype, old_renorm_mean), renorm_stddev(c.dtype, old_stddev);
  Parameters weights[] = {Parameters(c.dtype, {0.4f}), Parameters(c.dtype, {0.5f})};
  int64_t batches = 3;
  std::vector<char> workspace(kernels.workspace(c.dtype, e) + 64);
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  const double eps = 1e-5;

  ForwardParams f{.dtype = c.dtype, .extent = e, .activation = c.activation, .x = x.bytes.get(), .x_strides = xs,
                  .residual = c.residual ? residual.bytes.get() : nullptr, .residual_strides = ys, .y = y.bytes.get(),
                  .y_strides = ys, .weight = c.affine ? weight.values.bytes.get() : nullptr,
                  .bias = c.affine ? bias.values.bytes.get() : nullptr, .eps = eps, .mean = mean.data(),
                  .invstd = invstd.data(), .correction = c.renorm ? correction.data() : nullptr,
                  .running = {.mean = running_mean.values.bytes.get(), .var = running_var.values.bytes.get(),
                              .num_batches_tracked = &batches, .momentum = 0.3, .cumulative = false, .renorm = {}},
                  .unbiased = c.unbiased, .workspace = aligned};
  if (c.renorm)
    f.running.renorm = {.mean = renorm_mean.values.bytes.get(), .stddev = renorm_stddev.values.bytes.get(),
                        .mean_weight = weights[0].values.bytes.get(), .stddev_weight = weights[1].values.bytes.get(),
                        .momentum = 0.2, .rmin = 0.8, .rmax = 1.1, .dmax = 0.4};
  std::vector<double> kept(2 * C, NAN);
  f.statistics = kept.data(), f.y = y2.bytes.get();
  kernels.forward(f, threaded);
  check(batches == 3 && running_mean.values.get(0) == old_mean[0], describe(kernels, c, "statistics are only kept"));
  f.statistics = nullptr, f.y = y.bytes.get();
  kernels.forward(f, serial);
  check(batches == 4, describe(kernels, c, "the counter"));

  // The same in long double.
  std::vector<long double> n(G * C), m(G * C), v(G * C);
  const auto each = [&](auto body) {
    for (int64_t o = 0; o < e.outer; ++o)
      for (int64_t ch = 0; ch < C; ++ch)
        for (int64_t i = 0; i < e.inner; ++i) body(o, ch, i, group_of(o) * C + ch);
  };
  const auto x_at = [&](int64_t o, int64_t ch, int64_t i) { return x.get(offset(e, xs, o, ch, i)); };
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) { n[k] += 1, m[k] += x_at(o, ch, i); });
  for (int64_t k = 0; k < G * C; ++k) m[k] /= n[k];
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) { v[k] += std::pow(x_at(o, ch, i) - m[k], 2.0L); });
  const double unit = epsilon_of(c.dtype);
  // Doubles hold a mean only so finely, which shows where few samples happen to lie close together.
  long double least_deviation = c.deviation;
  for (int64_t k = 0; k < G * C; ++k) least_deviation = std::min(least_deviation, std::sqrt(v[k] / n[k] + eps));
  const double rounding = 8e-16 * double((1 + std::fabs(c.mean)) / least_deviation);
  double worst = 0, worst_stats = 0, worst_running = 0;
  for (int64_t k = 0; k < G * C; ++k) {
    const double scale = double(1 / std::sqrt(v[k] / n[k] + eps));
    // The moments are exact to the compute type relative to the deviation, however far the mean.
    const double fine = c.dtype == DType::f64 ? 1e-13 : 2e-6;
    worst_stats = std::max(worst_stats, double(std::fabs(mean[k] - m[k])) * scale / (fine + rounding));
    worst_stats = std::max(worst_stats, std::fabs(invstd[k] / scale - 1) / (fine + rounding) / 2);
  }
  check(worst_stats <= 1, describe(kernels, c, ("statistics, error over bound " + std::to_string(worst_stats)).c_str()));
  // What a batch brings: the mean of its groups. Renorm wants the biased variance.
  std::vector<double> batch_mean(C), batch_var(C), r(C, 1), d(C, 0);
  for (int64_t ch = 0; ch < C; ++ch) {
    for (int64_t g = 0; g < G; ++g) {
      const long double count = n[g * C + ch];
      batch_mean[ch] += double(m[g * C + ch]) / G;
      batch_var[ch] += double(v[g * C + ch] / (c.unbiased && !c.renorm ? std::max(count - 1, 1.0L) : count)) / G;
    }
    if (!c.renorm) continue;
    const double stddev = std::sqrt(batch_var[ch] + eps), to = old_stddev[ch] + double(1 - 0.5f) * stddev;
    r[ch] = std::min(std::max(stddev / to, 0.8), 1.1);
    d[ch] = std::min(std::max((batch_mean[ch] - old_renorm_mean[ch] - double(1 - 0.4f) * batch_mean[ch]) / to, -0.4), 0.4);
    const double far = 1e-5 + 1e-6 * std::fabs(c.mean) / stddev;
    check(std::fabs(correction[ch] - r[ch]) < 1e-5 && std::fabs(correction[C + ch] - d[ch]) < far,
          describe(kernels, c, "r and d"));
    r[ch] = correction[ch], d[ch] = correction[C + ch];
  }
  const auto z_at = [&](int64_t o, int64_t ch, int64_t i, int64_t k) {
    const double xhat = double((x_at(o, ch, i) - m[k]) / std::sqrt(v[k] / n[k] + eps)) * r[ch] + d[ch];
    return xhat * gamma[ch] + beta[ch] + (c.residual ? residual.get(offset(e, ys, o, ch, i)) : 0);
  };
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) {
    double want = z_at(o, ch, i, k);
    if (c.activation == Activation::relu) want = std::max(want, 0.0);
    worst = std::max(worst, std::fabs(y.get(offset(e, ys, o, ch, i)) - want) / (1 + std::fabs(want)));
  });
  check(worst <= 4 * unit + rounding, describe(kernels, c, ("y, error " + std::to_string(worst / unit)).c_str()));
  const auto differs = [](double got, double want) { return std::fabs(got - want) / (1 + std::fabs(want)); };
  for (int64_t ch = 0; ch < C; ++ch) {
    worst_running = std::max({worst_running, differs(kept[ch], batch_mean[ch]), differs(kept[C + ch], batch_var[ch])});
    double mean_entered = batch_mean[ch], var_entered = batch_var[ch];
    if (c.renorm) {
      const double average = 0.8 * old_renorm_mean[ch] + 0.2 * batch_mean[ch];
      const double stddev = 0.8 * old_stddev[ch] + 0.2 * std::sqrt(batch_var[ch] + eps);
      worst_running = std::max({worst_running, differs(renorm_mean.values.get(ch), average),
                                differs(renorm_stddev.values.get(ch), stddev)});
      mean_entered = average / (0.8 * 0.4f + 0.2), var_entered = std::pow(stddev / (0.8 * 0.5f + 0.2), 2) - eps;
    }
    worst_running = std::max({worst_running, differs(running_mean.values.get(ch), 0.7 * old_mean[ch] + 0.3 * mean_entered),
                              differs(running_var.values.get(ch), 0.7 * old_var[ch] + 0.3 * var_entered)});
  }
  if (c.renorm) worst_running = std::max(worst_running, differs(weights[1].values.get(0), 0.8 * 0.5 + 0.2));
  check(worst_running < 1e-5, describe(kernels, c, "running statistics"));

  // Neither the number of threads nor the size of the cache changes a bit.
  check(!std::memcmp(y.bytes.get(), y2.bytes.get(), y.count * size_of(c.dtype)), describe(kernels, c, "threads or the cache change y"));

  BackwardParams b{.dtype = c.dtype, .extent = e, .activation = c.activation, .training = true, .dy = dy.bytes.get(),
                   .dy_strides = dys, .x = x.bytes.get(), .x_strides = xs,
                   .residual = c.residual ? residual.bytes.get() : nullptr, .residual_strides = ys, .weight = f.weight,
                   .bias = f.bias, .mean = mean.data(), .invstd = invstd.data(), .correction = f.correction, .dx = dx.bytes.get(), .dx_strides = ys,
                   .dresidual = c.residual ? dresidual.bytes.get() : nullptr, .dresidual_strides = ys,
                   .dweight = dweight.values.bytes.get(), .dbias = dbias.values.bytes.get(), .workspace = aligned};
  for (bool training : {true, false}) {
    b.training = training;
    b.correction = training ? f.correction : nullptr;
    if (!training) r.assign(C, 1), d.assign(C, 0);
    kernels.backward(b, training ? serial : threaded);
    const auto dz_at = [&](int64_t o, int64_t ch, int64_t i, int64_t k) {
      const double gradient = dy.get(offset(e, dys, o, ch, i));
      return c.activation == Activation::relu && z_at(o, ch, i, k) <= 0 ? 0 : gradient;
    };
    std::vector<double> s1(G * C), s2(G * C), size1(G * C), size2(G * C);
    each([&](int64_t o, int64_t ch, int64_t i, int64_t k) {
      const double dz = dz_at(o, ch, i, k), xhat = double((x_at(o, ch, i) - m[k]) / std::sqrt(v[k] / n[k] + eps));
      s1[k] += dz, s2[k] += dz * xhat, size1[k] += std::fabs(dz), size2[k] += std::fabs(dz * xhat);
    });
    const double fine = c.dtype == DType::f64 ? 1e-13 + rounding : 2e-5;
    double worst_dx = 0, worst_parameters = 0;
    each([&](int64_t o, int64_t ch, int64_t i, int64_t k) {
      const double scale = double(1 / std::sqrt(v[k] / n[k] + eps)), xhat = double(x_at(o, ch, i) - m[k]) * scale;
      const double dz = dz_at(o, ch, i, k);
      double want = gamma[ch] * scale * dz;
      if (training) want = gamma[ch] * r[ch] * scale * (dz - s1[k] / double(n[k]) - xhat * s2[k] / double(n[k]));
      const double size = std::fabs(gamma[ch] * r[ch] * scale) * (std::fabs(dz) + size1[k] / double(n[k]) + std::fabs(xhat) * size2[k] / double(n[k]));
      // An element at the activation's kink may fall on either side.
      const bool kink = c.activation == Activation::relu && std::fabs(z_at(o, ch, i, k)) < 1e-4;
      if (!kink) worst_dx = std::max(worst_dx, std::fabs(dx.get(offset(e, ys, o, ch, i)) - want) / size / (unit + fine));
      if (c.residual && !kink)
        worst_dx = std::max(worst_dx, std::fabs(dresidual.get(offset(e, ys, o, ch, i)) - dz) / (1 + std::fabs(dz)) / unit);
    });
    for (int64_t ch = 0; ch < C; ++ch) {
      double dgamma = 0, dbeta = 0, size = 1e-3;
      for (int64_t g = 0; g < G; ++g)
        dgamma += s2[g * C + ch] * r[ch] + d[ch] * s1[g * C + ch], dbeta += s1[g * C + ch], size += size1[g * C + ch] + size2[g * C + ch];
      worst_parameters = std::max(worst_parameters, std::fabs(dweight.values.get(ch) - dgamma) / size / fine);
      worst_parameters = std::max(worst_parameters, std::fabs(dbias.values.get(ch) - dbeta) / size / fine);
    }
    check(worst_dx <= 4, describe(kernels, c, ("dx, error " + std::to_string(worst_dx)).c_str()));
    check(worst_parameters <= 4, describe(kernels, c, ("dweight or dbias, error " + std::to_string(worst_parameters)).c_str()));
  }

  if (G > 1) return;
  InferenceParams q{.dtype = c.dtype, .extent = e, .activation = c.activation, .x = x.bytes.get(), .x_strides = xs,
                    .residual = f.residual, .residual_strides = ys, .y = y.bytes.get(), .y_strides = ys,
                    .weight = f.weight, .bias = f.bias, .eps = eps, .running_mean = running_mean.values.bytes.get(),
                    .running_var = running_var.values.bytes.get(), .workspace = aligned};
  kernels.inference(q, threaded);
  worst = 0;
  each([&](int64_t o, int64_t ch, int64_t i, int64_t) {
    const double rm = running_mean.values.get(ch), rv = running_var.values.get(ch);
    const double term = (x_at(o, ch, i) - rm) / std::sqrt(rv + eps) * gamma[ch];
    double want = term + beta[ch] + (c.residual ? residual.get(offset(e, ys, o, ch, i)) : 0);
    if (c.activation == Activation::relu) want = std::max(want, 0.0);
    worst = std::max(worst, std::fabs(y.get(offset(e, ys, o, ch, i)) - want) / (1 + std::fabs(term) + std::fabs(want)));
  });
  check(worst <= 4 * unit, describe(kernels, c, ("inference, error " + std::to_string(worst / unit)).c_str()));
}

// ---------------------------------------------------------------- special values

void check_conversions(const Kernels& kernels) {
  // Inference with mean 0 and variance 1 - eps is the identity: every half value must come back to the bit.
  for (DType d : {DType::f16, DType::bf16}) {
    const int64_t n = 65536;
    Buffer x(d, n), y(d, n);
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<uint16_t*>(x.bytes.get())[i] = uint16_t(i);
    const float zero = 0, one = 1;
    std::vector<char> workspace(kernels.workspace(d, {1, 1, n}) + 64);
    kernels.inference({.dtype = d, .extent = {1, 1, n}, .x = x.bytes.get(), .x_strides = {n, n}, .y = y.bytes.get(),
                       .y_strides = {n, n}, .weight = nullptr, .bias = nullptr, .eps = 0, .running_mean = &zero,
                       .running_var = &one, .workspace = workspace.data()}, serial);
    int wrong = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double a = x.get(i), b = y.get(i);
      wrong += std::isnan(a) ? !std::isnan(b) : a != b;
    }
    check(wrong == 0, std::string(kernels.name) + " " + name_of(d) + " identity: " + std::to_string(wrong) + " values changed");
  }
  // Rounding from float: halfway cases, overflow and subnormals, by way of a weight.
  for (DType d : {DType::f16, DType::bf16})
    for (double scale : {1.0, 1.00048828125, 1.001953125, 1.00390625, 1e-3, 3e-8, 6e4, 1e30}) {
      const int64_t n = 4096;
      Buffer x(d, n), y(d, n);
      for (int64_t i = 0; i < n; ++i) x.set(i, (i - 2048) / 64.0);
      const float zero = 0, one = 1, weight = float(scale);
      std::vector<char> workspace(kernels.workspace(d, {1, 1, n}) + 64);
      kernels.inference({.dtype = d, .extent = {1, 1, n}, .x = x.bytes.get(), .x_strides = {n, n}, .y = y.bytes.get(),
                         .y_strides = {n, n}, .weight = &weight, .bias = nullptr, .eps = 0, .running_mean = &zero,
                         .running_var = &one, .workspace = workspace.data()}, serial);
      int wrong = 0;
      for (int64_t i = 0; i < n; ++i) {
        const float exact = float(x.get(i)) * weight;
        Buffer rounded(d, 1);
        rounded.set(0, exact);
        wrong += rounded.get(0) != y.get(i);
      }
      check(wrong == 0, std::string(kernels.name) + " " + name_of(d) + " rounding at " + std::to_string(scale) + ": " + std::to_string(wrong));
    }
}

/// A channel with a NaN, an infinity, huge values or a constant does what arithmetic says, and its neighbours nothing.
void check_special(const Kernels& kernels) {
  for (const Extent e : {Extent{40, 7, 1}, Extent{300, 37, 1}, Extent{640, 6, 1}, Extent{48, 6, 3}, Extent{5, 6, 50},
                         Extent{2, 6, 5000}}) {
    const Strides s = dense(e, 0);
    Buffer x(DType::f32, span(e, s)), y(DType::f32, span(e, s));
    for (int64_t i = 0; i < x.count; ++i) x.set(i, (i * 7919 % 1000) / 100.0);
    const auto fill = [&](int64_t channel, auto value) {
      for (int64_t o = 0; o < e.outer; ++o)
        for (int64_t i = 0; i < e.inner; ++i) x.set(offset(e, s, o, channel, i), value(o * e.inner + i));
    };
    x.set(offset(e, s, e.outer - 1, 0, e.inner - 1), NAN);
    x.set(offset(e, s, e.outer / 2, 1, e.inner / 2), INFINITY);
    fill(2, [](int64_t i) { return i % 2 ? 1e30 : -1e30; });
    fill(3, [](int64_t) { return 12345.678; });
    fill(4, [](int64_t i) { return i == 0 ? 1e7 : i % 2; });  // the first element is no guide to the rest
    const int64_t C = e.channels;
    std::vector<double> mean(C), invstd(C);
    std::vector<float> running_mean(C), running_var(C);
    std::vector<char> workspace(kernels.workspace(DType::f32, e) + 64);
    kernels.forward({.dtype = DType::f32, .extent = e, .x = x.bytes.get(), .x_strides = s, .y = y.bytes.get(), .y_strides = s,
                     .weight = nullptr, .bias = nullptr, .eps = 1e-5, .mean = mean.data(), .invstd = invstd.data(),
                     .running = {.mean = running_mean.data(), .var = running_var.data(), .momentum = 1, .cumulative = false,
                                 .renorm = {}},
                     .unbiased = true, .workspace = workspace.data()}, serial);
    const auto y_at = [&](int64_t channel) { return y.get(offset(e, s, 0, channel, 0)); };
    const std::string where = std::string(kernels.name) + " [" + std::to_string(e.outer) + ", " + std::to_string(e.inner) + "] ";
    check(std::isnan(mean[0]) && std::isnan(y_at(0)) && std::isnan(running_var[0]), where + "NaN spreads over its channel");
    check(std::isinf(running_mean[1]) && std::isnan(running_var[1]) && std::isnan(y_at(1)), where + "infinity spreads");
    check(std::fabs(std::fabs(y_at(2)) - 1) < 1e-2 && std::isfinite(y_at(2)), where + "1e30 is normalised");
    check(y_at(3) == 0 && std::fabs(invstd[3] - 1 / std::sqrt(1e-5)) < 1e-2, where + "a constant channel gives 0");
    const double n = double(e.outer * e.inner), first = 1e7;
    double m = 0, v = 0;
    for (int64_t i = 0; i < int64_t(n); ++i) m += (i == 0 ? first : i % 2) / n;
    for (int64_t i = 0; i < int64_t(n); ++i) v += std::pow((i == 0 ? first : i % 2) - m, 2) / n;
    check(std::fabs(invstd[4] * std::sqrt(v) - 1) < 1e-5, where + "a misleading first element");
    for (int64_t i = 0; i < e.inner; ++i)
      if (!std::isfinite(y.get(offset(e, s, 0, 5, i)))) check(false, where + "a neighbour is spoilt");
  }
}

}  // namespace

int main() {
  for (const Kernels* const* table = cpu::supported(); *table; ++table) {
    const Kernels& k = **table;
    const int64_t lanes = 16;
    std::vector<Extent> extents = {
        {3, 5, 77}, {2, 3, 2}, {7, 1, 2}, {101, 17, 1}, {2, 1, 1}, {2, 3, 1025}, {1, 2, 5000}, {5, lanes + 1, lanes - 1},
        {33, 4 * lanes + 3, 1}, {300, 3 * lanes, 1}, {9, 300, 4}, {2, 600, 1}, {6, 3, 49, 1, 2}, {7, 5, 9, 1, 3},
        {60, 19, 1, 10, 3}, {520, 5, 1, 1, 2}, {3, 2, 40000}, {1100, 2, 64}, {8, 2, 5000, 1, 4}, {1536, 3, 1, 48, 1}, {70, 400, 1},
        {45, 1100, 1}, {9000, 64, 1}, {2560, 12, 1, 512, 2}, {1344, 40, 1, 64, 5}};
    unsigned seed = 1;
    for (const Extent& e : extents)
      for (DType d : {DType::f32, DType::f64, DType::bf16, DType::f16})
        for (int variant = 0; variant < 4; ++variant) {
          const bool large = e.outer * e.channels * e.inner > 50000;
          if (large && variant % 2) continue;
          if (e.outer * e.channels * e.inner > 300000 && d != DType::f32) continue;
          const double mean = variant == 0 ? 0 : variant == 1 ? 10 : d == DType::f32 || d == DType::f64 ? 1e4 : 3;
          run_case(k, {.dtype = d, .extent = e, .activation = variant % 2 ? Activation::relu : Activation::none,
                       .residual = variant >= 2, .affine = variant != 0, .padded = variant == 1 || variant == 2,
                       .expanded = variant == 3, .renorm = variant == 1 || variant == 3, .unbiased = variant < 2,
                       .mean = mean, .deviation = 1.0}, seed++);
        }
    check_conversions(k);
    check_special(k);
  }
  check(!cpu::force("no such table") && cpu::force("baseline") && !std::strcmp(cpu::selected().name, "baseline"), "force");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
