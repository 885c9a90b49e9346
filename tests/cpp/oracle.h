// Every kernel against plain loops in double, for whatever backend: test_kernels.cpp beside this file runs it on the
// CPU's tables, tests/cuda_emulation/test_kernels.cpp on the CUDA kernels.
// Every buffer is exactly as large as the contract says, so that a sanitizer sees one element too many, and what a
// kernel must write is NaN before.
#pragma once
#include <optional>
#include <random>

#include "activations.h"

namespace torch_bn::testing {

/// The tensors of one case, and what should come of them.
class Problem {
 public:
  Problem(const Backend& backend, const Case& c, unsigned seed);

  void check_forward();
  void check_backward(bool training);
  void check_inference();

 private:
  const Backend& backend;
  const Case& c;
  const Extent& e = c.extent;
  const Curve& curve = curve_of(c.activation, c.number);
  const int64_t C = e.channels, G = e.groups;
  static constexpr double eps = 1e-5;
  std::mt19937 random;
  std::normal_distribution<double> normal;
  const Strides xs = dense(e, c.padded ? 3 * e.inner : 0, c.apart), ys = dense(e, 0);
  const Strides dys = c.expanded ? Strides{0, e.inner == 1 ? 1 : 0} : xs;
  const Extent one{1, e.inner == 1 ? e.channels : 1, e.inner};
  Buffer x = tensor(0, span(e, xs)), residual = tensor(1, span(e, ys)), y = tensor(2, span(e, ys));
  Buffer dy = tensor(3, c.expanded ? span(one, dense(one, 0)) : span(e, dys));
  std::vector<double> gamma = std::vector<double>(C, 1), beta = std::vector<double>(C, 0);
  std::vector<double> old_mean{}, old_var{}, old_renorm_mean{}, old_stddev{};
  std::unique_ptr<Buffer> weight{}, bias{};
  std::unique_ptr<State> state{};
  std::vector<uint8_t> mask = std::vector<uint8_t>(c.masked ? backend.mask_bytes(c.dtype, e) : 0);
  std::vector<double> mean = absent(G * C), invstd = absent(G * C), correction = absent(2 * C);
  // From here on as it should be: of the groups, and of the batch as the running statistics see it.
  std::vector<long double> n, m, v;
  std::vector<double> batch_mean, batch_var, r, d;
  double rounding = 0;  // doubles hold a mean only so finely

  static std::vector<double> absent(int64_t count) { return std::vector<double>(count, NAN); }
  Buffer tensor(int index, int64_t count) const { return {c.dtype, count, c.shifted >> index & 1 ? c.shift : 0}; }
  State initial_state() const {
    return {c, make_parameters(c.dtype, old_mean), make_parameters(c.dtype, old_var),
            make_parameters(c.dtype, old_renorm_mean), make_parameters(c.dtype, old_stddev),
            make_parameters(c.dtype, {State::kWeights[0]}), make_parameters(c.dtype, {State::kWeights[1]})};
  }
  void expect(bool ok, const std::string& what) const { check(ok, describe(backend, c, what)); }

  template <class F>
  void each(F body) const {
    for (int64_t o = 0; o < e.outer; ++o)
      for (int64_t ch = 0; ch < C; ++ch)
        for (int64_t i = 0; i < e.inner; ++i) body(o, ch, i, o / e.outer_per_example % G * C + ch);
  }
  double x_at(int64_t o, int64_t ch, int64_t i) const { return x.get(offset(xs, o, ch, i)); }
  double scale_at(int64_t k) const { return double(1 / std::sqrt(v[k] / n[k] + eps)); }
  double xhat_at(int64_t o, int64_t ch, int64_t i, int64_t k) const {
    return double((x_at(o, ch, i) - m[k]) / std::sqrt(v[k] / n[k] + eps));
  }
  double z_at(int64_t o, int64_t ch, int64_t i, int64_t k) const {
    const double more = c.residual ? residual.get(offset(ys, o, ch, i)) : 0;
    return (xhat_at(o, ch, i, k) * r[ch] + d[ch]) * gamma[ch] + beta[ch] + more;
  }
  double dz_at(int64_t o, int64_t ch, int64_t i, int64_t k) const {
    const double gradient = dy.get(offset(dys, o, ch, i));
    return gradient * curve.slope(z_at(o, ch, i, k));
  }

  struct Sums {  // of dz and dz * xhat, and of their absolute values
    std::vector<double> s1, s2, size1, size2;
  };
  struct Gradients {
    Buffer dx, dresidual, dweight, dbias;
  };

  uint8_t* kept() { return mask.empty() ? nullptr : mask.data(); }
  void launch_forward(const Buffer& x, Buffer& y, State& state, double* statistics, Run run);
  void launch_inference(Buffer& y, Run run);
  void check_overwriting();
  void find_moments();
  void find_batch();
  void check_moments() const;
  void check_correction();
  void check_y() const;
  void check_state(const State& after) const;
  Gradients launch_backward(bool training, unsigned absent, Run run);
  void check_gradients(const Gradients& found, const Sums& sums, bool training) const;
  void check_parameter_gradients(const Gradients& found, const Sums& sums) const;
  void check_partly(const Gradients& whole, bool training);
};

inline Problem::Problem(const Backend& backend, const Case& c, unsigned seed) : backend(backend), c(c), random(seed) {
  for (int64_t i = 0; i < x.count; ++i) x.set(i, c.mean + c.deviation * normal(random));
  for (int64_t i = 0; i < residual.count; ++i) residual.set(i, normal(random));
  for (int64_t i = 0; i < dy.count; ++i) dy.set(i, 0.5 + normal(random));
  for (int64_t i = 0; i < C; ++i) {
    if (c.affine) gamma[i] = float(1 + 0.3 * normal(random)), beta[i] = float(normal(random));
    old_mean.push_back(float(normal(random))), old_var.push_back(float(1.5 + 0.1 * normal(random)));
    old_renorm_mean.push_back(float(0.4 * (c.mean + 0.5 * normal(random))));       // of weight 0.4
    old_stddev.push_back(float(0.5 * c.deviation * (1 + 0.2 * normal(random))));  // of weight 0.5
  }
  if (c.affine) {
    weight = std::make_unique<Buffer>(make_parameters(c.dtype, gamma));
    bias = std::make_unique<Buffer>(make_parameters(c.dtype, beta));
  }
  state = std::make_unique<State>(initial_state());
  find_moments();
  find_batch();
}

inline void Problem::find_moments() {
  n.assign(G * C, 0), m.assign(G * C, 0), v.assign(G * C, 0);
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) { n[k] += 1, m[k] += x_at(o, ch, i); });
  for (int64_t k = 0; k < G * C; ++k) m[k] /= n[k];
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) { v[k] += std::pow(x_at(o, ch, i) - m[k], 2.0L); });
  long double least_deviation = c.deviation;
  for (int64_t k = 0; k < G * C; ++k) least_deviation = std::min(least_deviation, std::sqrt(v[k] / n[k] + eps));
  rounding = 8e-16 * double((1 + std::fabs(c.mean)) / least_deviation);
}

/// What a batch brings: the mean of its groups. Renorm wants the biased variance.
inline void Problem::find_batch() {
  batch_mean.assign(C, 0), batch_var.assign(C, 0), r.assign(C, 1), d.assign(C, 0);
  for (int64_t ch = 0; ch < C; ++ch) {
    for (int64_t g = 0; g < G; ++g) {
      const long double count = n[g * C + ch];
      batch_mean[ch] += double(m[g * C + ch]) / G;
      batch_var[ch] += double(v[g * C + ch] / (c.unbiased && !c.renorm ? std::max(count - 1, 1.0L) : count)) / G;
    }
    if (!c.renorm) continue;
    const double to = old_stddev[ch] + (1 - State::kWeights[1]) * std::sqrt(batch_var[ch] + eps);
    const double reference = old_renorm_mean[ch] + (1 - State::kWeights[0]) * batch_mean[ch];
    r[ch] = std::min(std::max(std::sqrt(batch_var[ch] + eps) / to, 0.8), 1.1);
    d[ch] = std::min(std::max((batch_mean[ch] - reference) / to, -0.4), 0.4);
  }
}

inline void Problem::launch_forward(const Buffer& x, Buffer& y, State& state, double* statistics, Run run) {
  const Workspace workspace(backend, c.dtype, e);
  backend.forward({.dtype = c.dtype, .extent = e, .activation = c.activation, .activation_number = c.number,
                   .x = x.data(), .x_strides = xs,
                   .residual = c.residual ? residual.data() : nullptr, .residual_strides = ys, .mask = kept(),
                   .y = y.data(), .y_strides = ys, .weight = weight ? weight->data() : nullptr, 
                   .bias = bias ? bias->data() : nullptr, .eps = eps, .mean = mean.data(), .invstd = invstd.data(),
                   .correction = c.renorm ? correction.data() : nullptr, .running = state.running(),
                   .unbiased = c.unbiased, .statistics = statistics, .workspace = workspace.data()},
                  run);
}

inline void Problem::check_forward() {
  Buffer y_kept = tensor(2, span(e, ys));
  std::vector<double> kept = absent(2 * C);
  State unchanged = initial_state(), updated = initial_state();
  launch_forward(x, y_kept, unchanged, kept.data(), Run::second);
  expect(unchanged.same_bits_as(*state), "statistics are only kept");
  const std::vector<double> mean_kept = mean, invstd_kept = invstd;
  const std::vector<uint8_t> mask_kept = mask;
  mean = absent(G * C), invstd = absent(G * C), correction = absent(2 * C);
  launch_forward(x, y, *state, nullptr, Run::first);
  check_overwriting();
  expect(same_bits(y, y_kept), "the other run changes y");
  expect(mean == mean_kept && invstd == invstd_kept, "the other run changes the statistics");
  expect(mask == mask_kept, "the other run changes the mask");
  check_moments();
  check_correction();
  check_y();
  check_state(*state);
  Worst worst;
  for (int64_t ch = 0; ch < C; ++ch) {
    worst.include(kept[ch], batch_mean[ch]);
    worst.include(kept[C + ch], batch_var[ch]);
  }
  expect(worst.value < 1e-5, "kept statistics");
  backend.update({.dtype = parameters_of(c.dtype), .channels = C, .statistics = kept.data(), .eps = eps,
                  .running = updated.running()});
  check_state(updated);
}

/// y may take the place of x.
inline void Problem::check_overwriting() {
  if (c.padded || c.apart || c.shifted) return;
  Buffer both = tensor(0, x.count);
  std::memcpy(both.data(), x.data(), x.count * size_of(c.dtype));
  State again = initial_state();
  launch_forward(both, both, again, nullptr, Run::second);
  expect(same_bits(both, y), "y in the place of x");
  expect(again.same_bits_as(*state), "running statistics, y in the place of x");
}

/// The moments are exact to the compute type relative to the deviation, however far the mean.
inline void Problem::check_moments() const {
  const double fine = (c.dtype == DType::f64 ? 1e-13 : 2e-6) + rounding;
  Worst worst;
  for (int64_t k = 0; k < G * C; ++k) {
    const double off = double(std::fabs(mean[k] - m[k])) * scale_at(k), wide = std::fabs(invstd[k] / scale_at(k) - 1);
    worst.include(off / fine), worst.include(wide / fine / 2);
  }
  expect(worst.value <= 1, "statistics, error over bound " + std::to_string(worst.value));
}

inline void Problem::check_correction() {
  for (int64_t ch = 0; c.renorm && ch < C; ++ch) {
    const double far = 1e-5 + 1e-6 * std::fabs(c.mean) / std::sqrt(batch_var[ch] + eps);
    expect(std::fabs(correction[ch] - r[ch]) < 1e-5 && std::fabs(correction[C + ch] - d[ch]) < far, "r and d");
    r[ch] = correction[ch], d[ch] = correction[C + ch];
  }
}

inline void Problem::check_y() const {
  Worst worst;
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) {
    worst.include(y.get(offset(ys, o, ch, i)), curve.value(z_at(o, ch, i, k)));
  });
  const double unit = epsilon_of(c.dtype);
  expect(worst.value <= 4 * unit + rounding, "y, error " + std::to_string(worst.value / unit));
}

inline void Problem::check_state(const State& after) const {
  expect(*after.batches == (c.stateless ? 3 : 4), "the counter");
  const double momentum = c.cumulative ? 0.25 : State::kMomentum, more = State::kRenormMomentum, less = 1 - more;
  Worst worst;
  const double new_weights[] = {less * State::kWeights[0] + more, less * State::kWeights[1] + more};
  for (int64_t ch = 0; ch < C; ++ch) {
    double mean_entered = batch_mean[ch], var_entered = batch_var[ch];
    if (c.renorm) {
      const double average = less * old_renorm_mean[ch] + more * batch_mean[ch];
      const double stddev = less * old_stddev[ch] + more * std::sqrt(batch_var[ch] + eps);
      worst.include(after.renorm_mean.get(ch), average);
      worst.include(after.renorm_stddev.get(ch), stddev);
      mean_entered = average / new_weights[0], var_entered = std::pow(stddev / new_weights[1], 2) - eps;
    }
    if (c.stateless) continue;
    worst.include(after.mean.get(ch), (1 - momentum) * old_mean[ch] + momentum * mean_entered);
    worst.include(after.var.get(ch), (1 - momentum) * old_var[ch] + momentum * var_entered);
  }
  if (c.renorm) {
    worst.include(after.mean_weight.get(0), new_weights[0]);
    worst.include(after.stddev_weight.get(0), new_weights[1]);
  }
  expect(worst.value < 1e-5, "running statistics");
}

/// absent: bit by bit dx, dresidual, dweight, dbias.
inline Problem::Gradients Problem::launch_backward(bool training, unsigned absent, Run run) {
  Gradients found{tensor(4, span(e, ys)), tensor(5, span(e, ys)), make_parameters(c.dtype, Problem::absent(C)),
                  make_parameters(c.dtype, Problem::absent(C))};
  const auto data = [&](Buffer& buffer, int bit) { return absent >> bit & 1 ? nullptr : buffer.data(); };
  const Workspace workspace(backend, c.dtype, e);
  backend.backward({.dtype = c.dtype, .extent = e, .activation = c.activation, .activation_number = c.number,
                    .training = training, .dy = dy.data(),
                    .dy_strides = dys, .x = x.data(), .x_strides = xs,
                    .residual = c.residual && !kept() ? residual.data() : nullptr, .residual_strides = ys, .mask = kept(),
                    .weight = weight ? weight->data() : nullptr, .bias = bias && !kept() ? bias->data() : nullptr,
                    .mean = mean.data(), .invstd = invstd.data(),
                    .correction = c.renorm && training ? correction.data() : nullptr, .dx = data(found.dx, 0),
                    .dx_strides = ys, .dresidual = c.residual ? data(found.dresidual, 1) : nullptr,
                    .dresidual_strides = ys, .dweight = data(found.dweight, 2), .dbias = data(found.dbias, 3),
                    .workspace = workspace.data()},
                   run);
  return found;
}

/// After check_forward.
inline void Problem::check_backward(bool training) {
  if (!training) r.assign(C, 1), d.assign(C, 0);
  const Gradients found = launch_backward(training, 0, training ? Run::first : Run::second);
  const std::vector<double> zeros(G * C);
  Sums sums{zeros, zeros, zeros, zeros};
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) {
    const double dz = dz_at(o, ch, i, k), xhat = xhat_at(o, ch, i, k);
    sums.s1[k] += dz, sums.s2[k] += dz * xhat;
    sums.size1[k] += std::fabs(dz), sums.size2[k] += std::fabs(dz * xhat);
  });
  check_gradients(found, sums, training);
  check_parameter_gradients(found, sums);
  if (c.partly) check_partly(found, training);
}

inline void Problem::check_gradients(const Gradients& found, const Sums& sums, bool training) const {
  const double unit = epsilon_of(c.dtype), fine = c.dtype == DType::f64 ? 1e-13 + rounding : 2e-5;
  const double least = least_step_of(c.dtype) / 4;  // a whole step at the bound of 4
  Worst worst;
  each([&](int64_t o, int64_t ch, int64_t i, int64_t k) {
    // An element at the activation's kink may fall on either side.
    if (std::fabs(std::fabs(z_at(o, ch, i, k)) - curve.kink) < 1e-4) return;
    const double xhat = xhat_at(o, ch, i, k), dz = dz_at(o, ch, i, k), count = double(n[k]);
    const double scale = gamma[ch] * r[ch] * scale_at(k);
    const double want = scale * (training ? dz - sums.s1[k] / count - xhat * sums.s2[k] / count : dz);
    const double size =
        std::fabs(scale) * (std::fabs(dz) + sums.size1[k] / count + std::fabs(xhat) * sums.size2[k] / count);
    const double got = found.dx.get(offset(ys, o, ch, i));
    // NB: size is 0 where all of dz is.
    worst.include(got == want ? 0 : std::fabs(got - want) / (size * (unit + fine) + least));
    if (!c.residual) return;
    const double passed_on = found.dresidual.get(offset(ys, o, ch, i));
    worst.include(std::fabs(passed_on - dz) / (1 + std::fabs(dz)) / (unit + rounding));
  });
  expect(worst.value <= 4, "dx or dresidual, error " + std::to_string(worst.value));
}

inline void Problem::check_parameter_gradients(const Gradients& found, const Sums& sums) const {
  const double fine = c.dtype == DType::f64 ? 1e-13 + rounding : 2e-5;
  Worst worst;
  for (int64_t ch = 0; ch < C; ++ch) {
    double dgamma = 0, dbeta = 0, size = 1e-3;
    for (int64_t k = ch; k < G * C; k += C) {
      dgamma += sums.s2[k] * r[ch] + d[ch] * sums.s1[k], dbeta += sums.s1[k];
      size += sums.size1[k] + sums.size2[k];
    }
    const double off = std::fabs(found.dweight.get(ch) - dgamma) + std::fabs(found.dbias.get(ch) - dbeta);
    worst.include(off / size / fine);
  }
  expect(worst.value <= 4, "dweight or dbias, error " + std::to_string(worst.value));
}

/// What is asked for does not depend on what else is, nor on the run; what is not asked for stays.
inline void Problem::check_partly(const Gradients& whole, bool training) {
  const Buffer none = make_parameters(c.dtype, Problem::absent(C));
  for (unsigned absent : {0u, 1u, 2u, 4u, 8u, 12u, 3u}) {
    const Gradients part = launch_backward(training, absent, training ? Run::second : Run::first);
    const auto same = [&](int bit, const Buffer& got, const Buffer& want, const Buffer& untouched) {
      return same_bits(got, absent >> bit & 1 ? untouched : want);
    };
    expect(same(0, part.dx, whole.dx, tensor(4, whole.dx.count)) &&
               same(1, part.dresidual, whole.dresidual, tensor(5, whole.dresidual.count)) &&
               same(2, part.dweight, whole.dweight, none) && same(3, part.dbias, whole.dbias, none),
           "backward without " + std::to_string(absent));
  }
}

inline void Problem::launch_inference(Buffer& y, Run run) {
  const Workspace workspace(backend, c.dtype, e);
  backend.inference({.dtype = c.dtype, .extent = e, .activation = c.activation, .activation_number = c.number,
                     .x = x.data(), .x_strides = xs,
                     .residual = c.residual ? residual.data() : nullptr, .residual_strides = ys, .mask = kept(),
                     .y = y.data(), .y_strides = ys, .weight = weight ? weight->data() : nullptr,
                     .bias = bias ? bias->data() : nullptr, .eps = eps, .running_mean = state->mean.data(),
                     .running_var = state->var.data(), .workspace = workspace.data()},
                    run);
}

inline void Problem::check_inference() {
  y.reset();
  Buffer again = tensor(2, span(e, ys));
  launch_inference(again, Run::first);
  const std::vector<uint8_t> mask_again = mask;
  launch_inference(y, Run::second);
  expect(same_bits(y, again), "the other run changes y in inference");
  expect(mask == mask_again, "the other run changes the mask in inference");
  std::optional<Gradients> found;  // of the residual: dy where the mask says so
  if (kept()) found = launch_backward(false, 1, Run::first);
  bool mask_fits = true;
  Worst worst;
  each([&](int64_t o, int64_t ch, int64_t i, int64_t) {
    const double rm = state->mean.get(ch), rv = state->var.get(ch);
    const double term = (x_at(o, ch, i) - rm) / std::sqrt(rv + eps) * gamma[ch];
    const double z = term + beta[ch] + (c.residual ? residual.get(offset(ys, o, ch, i)) : 0), want = curve.value(z);
    const double got = y.get(offset(ys, o, ch, i)), size = 1 + std::fabs(term) + std::fabs(want);
    worst.include(std::fabs(got - want) / size);
    if (!found || std::fabs(z) < 1e-4) return;
    mask_fits &= found->dresidual.get(offset(ys, o, ch, i)) == (z > 0 ? dy.get(offset(dys, o, ch, i)) : 0);
  });
  expect(mask_fits, "the mask");
  const double unit = epsilon_of(c.dtype);
  expect(worst.value <= 4 * unit, "inference, error " + std::to_string(worst.value / unit));
}

inline void run_case(const Backend& backend, const Case& c, unsigned seed) {
  Problem problem(backend, c, seed);
  problem.check_forward();
  problem.check_backward(true);
  problem.check_backward(false);
  if (c.extent.groups == 1) problem.check_inference();
}

}  // namespace torch_bn::testing
