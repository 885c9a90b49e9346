// The step between the reduction and the map, for one channel: moments to coefficients, saved and running statistics.
// P is ForwardParams or BackwardParams of kernels.h, T the type of its per-channel parameters; machines differ only in
// how they hold the partial results, which they hand in as functions of the group.
#pragma once
#include "affine.h"
#include "moments.h"
#include "renorm.h"
#include "running.h"

namespace torch_bn {

template <typename T>
BN_INLINE double parameter(const void* values, long channel, double missing) {
  return values ? double(static_cast<const T*>(values)[channel]) : missing;
}

/// The correction of one channel that the forward has kept.
template <class P>
BN_INLINE Correction kept_correction(const P& p, long channel) {
  return p.correction ? Correction{p.correction[channel], p.correction[p.extent.channels + channel]} : Correction{1, 0};
}

/// a + b * d, where d may be none at all and b infinite.
BN_INLINE double plus(double a, double b, double d) { return d == 0 ? a : a + b * d; }

/// The weight and bias of the map x_hat * weight + bias that corrects first.
struct Weights {
  double gamma, beta;
};
template <typename T, class P>
BN_INLINE Weights corrected_weights(const P& p, long channel, const Correction& correction) {
  const double gamma = parameter<T>(p.weight, channel, 1), beta = parameter<T>(p.bias, channel, 0);
  return {gamma * correction.r, plus(beta, gamma, correction.d)};
}

/// From what the groups have brought, mean_of(group) and variance_of(group), to the weights of the map, with the running
/// statistics. Several groups share one correction and enter in one step, with the mean of their means and variances.
template <typename T, class P, class MeanOf, class VarianceOf>
BN_INLINE Weights finish_forward(const P& p, long channel, const RunningStep& step, const MeanOf& mean_of,
                                 const VarianceOf& variance_of) {
  const long channels = p.extent.channels, groups = p.extent.groups;
  double mean = 0, variance = 0;
  for (long group = 0; group < groups; ++group) {
    mean += mean_of(group);
    variance += variance_of(group);
  }
  mean /= groups;
  variance /= groups;
  Correction correction{1, 0};
  if (p.running.renorm.mean) {
    const auto average = [&](const void* values) { return double(static_cast<const T*>(values)[channel]); };
    correction = renorm_correction(p.running.renorm, step.renorm, average(p.running.renorm.mean),
                                   average(p.running.renorm.stddev), mean, variance, p.eps);
    p.correction[channel] = correction.r;
    p.correction[channels + channel] = correction.d;
  }
  if (p.statistics) {
    p.statistics[channel] = mean;
    p.statistics[channels + channel] = variance;
  } else {
    update_running<T>(p.running, step, channel, mean, variance, p.eps);
  }
  return corrected_weights<T>(p, channel, correction);
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
  const Correction correction = kept_correction(p, channel);
  double dgamma = 0, dbeta = 0;
  for (long group = 0; group < groups; ++group) {
    const double mean = p.mean[group * channels + channel], invstd = p.invstd[group * channels + channel];
    const GradientSums s = sums_of(group);
    const double deviation = s.dz_deviation - (mean - double(center_of<T>(mean, invstd))) * s.dz;
    dgamma += plus(deviation * invstd * correction.r, s.dz, correction.d);
    dbeta += s.dz;
    store(group, p.training ? training_gradient<T>(mean, invstd, gamma * correction.r, s.count, s.dz, deviation)
                            : inference_gradient<T>(mean, invstd, gamma));
  }
  if (p.dweight) static_cast<T*>(p.dweight)[channel] = T(dgamma);
  if (p.dbias) static_cast<T*>(p.dbias)[channel] = T(dbeta);
}

}  // namespace torch_bn
