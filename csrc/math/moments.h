// Count, mean and squared deviations of samples of one channel, and how they are joined.
#pragma once
#include "portable.h"

namespace torch_bn {

/// Counts are exact: double holds every integer below 2^53.
struct Moments {
  double count;
  double mean;
  double m2;  // sum of squared deviations from the mean
};

/// Moments of samples whose deviations from a nearby `pivot` sum to `s1` and whose squares sum to `s2`.
/// With |mean - pivot| of the order of the deviation itself nothing cancels: the corrected two-pass
/// algorithm (Chan, Golub, LeVeque 1983, eq. 1.7).
BN_INLINE Moments moments_of_sums(double count, double pivot, double s1, double s2) {
  return {count, pivot + s1 / count, s2 - s1 * s1 / count};
}

/// Whether `pivot` was near enough for moments_of_sums: |mean - pivot| is at most sqrt(3) deviations.
/// NB: !(a <= b) in the caller, so that NaN counts as far.
template <typename T>
BN_INLINE bool centred(T count, T s1, T s2) {
  return s1 * s1 <= T(0.75) * count * s2;
}

/// Moments of the union of two disjoint sets of samples (Chan, Golub, LeVeque 1979).
/// The mean is a weighted sum rather than a + delta * weight, so that an infinite mean stays infinite.
BN_INLINE Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, weight = b.count / count, delta = b.mean - a.mean;
  return {count, a.mean * (1 - weight) + b.mean * weight, a.m2 + b.m2 + delta * delta * a.count * weight};
}

BN_INLINE double biased_variance(const Moments& m) { return m.m2 / m.count; }

/// Bessel's correction; a single sample has no deviation to correct.
BN_INLINE double unbiased_variance(const Moments& m) { return m.m2 / (m.count > 1 ? m.count - 1 : 1); }

}  // namespace torch_bn
