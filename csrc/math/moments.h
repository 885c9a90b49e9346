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

/// Mean and squared deviations of `1 / per_sample` samples whose deviations from a nearby `pivot` sum to `s1` and whose
/// squares sum to `s2`. With |mean - pivot| of the order of the deviation itself nothing cancels: the corrected
/// two-pass algorithm (Chan, Golub, LeVeque 1983, eq. 1.7).
BN_INLINE double mean_of_sums(double per_sample, double pivot, double s1) { return pivot + s1 * per_sample; }
BN_INLINE double m2_of_sums(double per_sample, double s1, double s2) { return s2 - s1 * s1 * per_sample; }

/// Whether `pivot` was near enough for that: |mean - pivot| is at most sqrt(3) deviations.
/// NB: !centred(...) in the caller, so that NaN counts as far.
template <typename T>
BN_INLINE bool centred(T count, T s1, T s2) {
  return s1 * s1 <= T(0.75) * count * s2;
}

/// Joins disjoint samples (Chan, Golub, LeVeque 1979) to `count` earlier ones; `weight` is the share of the new ones in
/// all. The mean is a weighted sum rather than mean + delta * weight, so that an infinite mean stays infinite; equal means
/// stay as they are, so that a constant is found constant. To none, of mean and m2 0, whatever finite samples join
/// exactly: no square of delta stands alone, which might overflow.
BN_INLINE void join(double& mean, double& m2, double count, double new_mean, double new_m2, double weight) {
  const double delta = new_mean - mean;
  m2 += new_m2 + count * weight * delta * delta;
  mean = delta == 0 ? mean : mean * (1 - weight) + new_mean * weight;
}

/// Moments of the union of two disjoint sets of samples.
BN_INLINE Moments merge(Moments a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  join(a.mean, a.m2, a.count, b.mean, b.m2, b.count / (a.count + b.count));
  a.count += b.count;
  return a;
}

/// Moments of the union of `sets` disjoint sets of `count` samples each.
BN_INLINE Moments merge_equal(long sets, double count, const double* mean, const double* m2) {
  double apart = 0, sum_mean = 0, sum_m2 = 0, between = 0;
  for (long i = 0; i < sets; ++i) {
    apart += mean[i] - mean[0];
    sum_mean += mean[i];
  }
  // NB: a difference of infinities is none.
  const double total_mean = apart - apart == 0 ? mean[0] + apart / double(sets) : sum_mean / double(sets);
  for (long i = 0; i < sets; ++i) {
    const double delta = mean[i] - total_mean;
    sum_m2 += m2[i];
    between += delta * delta;
  }
  return {count * double(sets), total_mean, sum_m2 + count * between};
}

BN_INLINE double biased_variance(const Moments& m) { return m.m2 / m.count; }

/// Bessel's correction of a biased variance; a single sample has no deviation to correct.
BN_INLINE double bessel(double count) { return count / (count > 1 ? count - 1 : 1); }

}  // namespace torch_bn
