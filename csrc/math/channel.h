// The step between the reduction and the map, for one channel: moments to coefficients, saved and running statistics.
// P is ForwardParams or BackwardParams of kernels.h, T the type of its per-channel parameters; machines differ only in
// where partial results and coefficients lie.
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
BN_INLINE Weights corrected(const Weights& w, const Correction& correction) {
  return {w.gamma * correction.r, plus(w.beta, w.gamma, correction.d)};
}
template <typename T, class P>
BN_INLINE Weights corrected_weights(const P& p, long channel, const Correction& correction) {
  return corrected({parameter<T>(p.weight, channel, 1), parameter<T>(p.bias, channel, 0)}, correction);
}

/// From the batch's mean and variance to the weights of the map, with the running statistics. Several groups share one
/// correction and enter in one step: mean and variance are then the means of theirs.
template <typename T, class P>
BN_INLINE Weights finish_forward(const P& p, long channel, const RunningStep& step, double mean, double variance) {
  Correction correction{1, 0};
  if (p.running.renorm.mean) {
    const auto average = [&](const void* values) { return double(static_cast<const T*>(values)[channel]); };
    correction = renorm_correction(p.running.renorm, step.renorm, average(p.running.renorm.mean),
                                   average(p.running.renorm.stddev), mean, variance, p.eps);
    p.correction[channel] = correction.r;
    p.correction[p.extent.channels + channel] = correction.d;
  }
  if (p.statistics) {
    p.statistics[channel] = mean;
    p.statistics[p.extent.channels + channel] = variance;
  } else {
    update_running<T>(p.running, step, channel, mean, variance, p.eps);
  }
  return corrected_weights<T>(p, channel, correction);
}

/// The sums over one group of dz and of dz * (x - center), with center_of the mean.
struct GradientSums {
  double count, dz, dz_deviation;
};

/// What one group adds to the gradients of weight and bias, and the coefficients of its map.
template <typename T>
struct GroupGradient {
  double dgamma, dbeta;
  GradientAffine<T> affine;
};
template <typename T>
BN_INLINE GroupGradient<T> finish_backward(bool training, double mean, double invstd, double gamma,
                                           const Correction& correction, const GradientSums& s) {
  const double deviation = s.dz_deviation - (mean - double(center_of<T>(mean, invstd))) * s.dz;
  return {plus(deviation * invstd * correction.r, s.dz, correction.d), s.dz,
          training ? training_gradient<T>(mean, invstd, gamma * correction.r, s.count, s.dz, deviation)
                   : inference_gradient<T>(mean, invstd, gamma)};
}

}  // namespace torch_bn
