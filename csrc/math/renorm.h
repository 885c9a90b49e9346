// Batch Renormalization (Ioffe 2017, arXiv:1702.03275) with the averages of TensorFlow 1: they start at zero, and what they
// lack in weight the batch itself makes up for, so that the first step is plain batch normalization.
#pragma once
#include <math.h>

#include "portable.h"
#include "running.h"

namespace torch_bn {

/// y is normalised by averages in place of the batch's statistics where x is normalised by the batch, scaled by r and
/// moved by d. Both are constants for derivatives.
struct Correction {
  double r, d;
};

/// NB: comparisons that NaN fails, so that it passes.
BN_INLINE double clipped(double value, double low, double high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

/// `mean` and `variance`, the biased one, of the batch; the averages as they were before it.
template <class Renorm>
BN_INLINE Correction renorm_correction(const Renorm& renorm, const RenormWeights& weights, double average_mean,
                                       double average_stddev, double mean, double variance, double eps) {
  const double stddev = ::sqrt(variance + eps);
  const double mean_reference = average_mean + (1 - weights.mean) * mean;
  const double stddev_reference = average_stddev + (1 - weights.stddev) * stddev;
  const double r = stddev / stddev_reference, d = (mean - mean_reference) / stddev_reference;
  return {clipped(r, renorm.rmin, renorm.rmax), clipped(d, -renorm.dmax, renorm.dmax)};
}

}  // namespace torch_bn
