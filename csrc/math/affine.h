// The per-channel coefficients of the two maps over the elements.
#pragma once
#include <math.h>

#include "portable.h"

namespace torch_bn {

/// y = (x - center) * scale + ((x - center) * scale_rest + shift).
/// Centring first keeps the digits of x when |mean| is many deviations; `center` is the mean rounded to T, or 0 where the
/// mean is less than a deviation away and x - center would only be rounded once more. `shift` takes up the rest of the
/// mean, so that it counts with all its digits, and `scale_rest` what rounding to T leaves of the scale: with fused
/// multiply-add y is then rounded once. Types that are stored in fewer digits than T need no scale_rest.
template <typename T>
struct Affine {
  T center, scale, shift, scale_rest;
};

template <typename T>
BN_INLINE T center_of(double mean, double invstd) {
  return mean * mean * invstd * invstd < 1 ? T(0) : T(mean);
}

template <typename T>
BN_INLINE Affine<T> normalizing_affine(double mean, double invstd, double gamma, double beta) {
  const T center = center_of<T>(mean, invstd);
  const double scale = gamma * invstd;
  return {center, T(scale), T(beta - (mean - double(center)) * scale), T(scale - double(T(scale)))};
}

/// dx = dz * slope + (x - center) * bend + shift, where dz is the gradient of the normalised value.
template <typename T>
struct GradientAffine {
  T center, slope, bend, shift;
};

/// Through batch statistics (Ioffe and Szegedy 2015, section 3): with n elements per channel,
/// dx = gamma * invstd * (dz - sum(dz) / n - (x - mean) * invstd^2 * sum(dz * (x - mean)) / n).
template <typename T>
BN_INLINE GradientAffine<T> training_gradient(double mean, double invstd, double gamma, double count,
                                              double sum_dz, double sum_dz_deviation) {
  const T center = center_of<T>(mean, invstd);
  const double slope = gamma * invstd;
  const double bend = -slope * invstd * invstd * sum_dz_deviation / count;
  return {center, T(slope), T(bend), T(-slope * sum_dz / count - (mean - double(center)) * bend)};
}

/// Through constant statistics: dx = gamma * invstd * dz.
template <typename T>
BN_INLINE GradientAffine<T> inference_gradient(double mean, double invstd, double gamma) {
  return {center_of<T>(mean, invstd), T(gamma * invstd), T(0), T(0)};
}

BN_INLINE double inverse_deviation(double variance, double eps) { return 1 / ::sqrt(variance + eps); }

}  // namespace torch_bn
