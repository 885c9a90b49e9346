// The step between the reduction and the map, for one channel: moments to coefficients, saved and running statistics.
// P is ForwardParams or BackwardParams of kernels.h, T the type of its per-channel parameters; machines differ only in
// how they hold the partial results, which they hand in as functions of the group.
#pragma once
#include "affine.h"
#include "moments.h"
#include "running.h"

namespace torch_bn {

template <typename T>
BN_INLINE double parameter(const void* values, long channel, double missing) {
  return values ? double(static_cast<const T*>(values)[channel]) : missing;
}

/// Calls store(group, affine) for every group. Several groups enter the running statistics with the mean of their
/// means and of their unbiased variances, in one step.
template <typename T, class P, class MomentsOf, class Store>
BN_INLINE void finish_forward(const P& p, long channel, double momentum, const MomentsOf& moments_of,
                              const Store& store) {
  const long channels = p.extent.channels, groups = p.extent.groups;
  const double gamma = parameter<T>(p.weight, channel, 1), beta = parameter<T>(p.bias, channel, 0);
  double mean = 0, variance = 0;
  for (long group = 0; group < groups; ++group) {
    const Moments m = moments_of(group);
    const double invstd = inverse_deviation(biased_variance(m), p.eps);
    p.mean[group * channels + channel] = m.mean;
    p.invstd[group * channels + channel] = invstd;
    store(group, normalizing_affine<T>(m.mean, invstd, gamma, beta));
    mean += m.mean;
    variance += unbiased_variance(m);
  }
  const auto update = [&](void* running, double value) {
    T& old_value = static_cast<T*>(running)[channel];
    old_value = T(moving_average(old_value, value, momentum));
  };
  if (p.running_mean) update(p.running_mean, mean / groups);
  if (p.running_var) update(p.running_var, variance / groups);
}

/// The sums over one group of dz and of dz * (x - center), with center_of the mean.
struct GradientSums {
  double count, dz, dz_deviation;
};

/// Calls store(group, affine) for every group.
template <typename T, class P, class SumsOf, class Store>
BN_INLINE void finish_backward(const P& p, long channel, const SumsOf& sums_of, const Store& store) {
  const long channels = p.extent.channels, groups = p.extent.groups;
  const double gamma = parameter<T>(p.weight, channel, 1);
  double dgamma = 0, dbeta = 0;
  for (long group = 0; group < groups; ++group) {
    const double mean = p.mean[group * channels + channel], invstd = p.invstd[group * channels + channel];
    const GradientSums s = sums_of(group);
    const double deviation = s.dz_deviation - (mean - double(center_of<T>(mean, invstd))) * s.dz;
    dgamma += deviation * invstd;
    dbeta += s.dz;
    store(group, p.training ? training_gradient<T>(mean, invstd, gamma, s.count, s.dz, deviation)
                            : inference_gradient<T>(mean, invstd, gamma));
  }
  if (p.dweight) static_cast<T*>(p.dweight)[channel] = T(dgamma);
  if (p.dbias) static_cast<T*>(p.dbias)[channel] = T(dbeta);
}

}  // namespace torch_bn
