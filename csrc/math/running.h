// Moving averages of a batch's statistics.
#pragma once
#include <math.h>

#include "portable.h"

namespace torch_bn {

/// `weight` is that of the new value: PyTorch's momentum, one minus TensorFlow's.
BN_INLINE double moving_average(double old_value, double new_value, double weight) {
  return (1 - weight) * old_value + weight * new_value;
}

/// The weights of the averages of Batch Renormalization before and after a batch, one for all channels.
struct RenormWeights {
  double mean = 0, new_mean = 0, stddev = 0, new_stddev = 0;
};

/// How much a batch weighs in the averages.
struct RunningStep {
  double momentum;
  RenormWeights renorm;
};

/// The step of one batch, before anything has changed. T is the type of the running statistics.
template <typename T, class Running>
BN_INLINE RunningStep step_of(const Running& running) {
  RunningStep step{running.momentum, {}};
  if (running.cumulative) step.momentum = 1 / double(running.num_batches_tracked ? *running.num_batches_tracked + 1 : 1);
  if (running.renorm.mean) {
    const double mean = *static_cast<const T*>(running.renorm.mean_weight);
    const double stddev = *static_cast<const T*>(running.renorm.stddev_weight);
    step.renorm = {mean, moving_average(mean, 1, running.renorm.momentum), stddev,
                   moving_average(stddev, 1, running.renorm.momentum)};
  }
  return step;
}

/// What the batch changes beside the channels.
template <typename T, class Running>
BN_INLINE void count_batch(const Running& running, const RunningStep& step) {
  if (running.num_batches_tracked) ++*running.num_batches_tracked;
  if (running.renorm.mean) {
    *static_cast<T*>(running.renorm.mean_weight) = T(step.renorm.new_mean);
    *static_cast<T*>(running.renorm.stddev_weight) = T(step.renorm.new_stddev);
  }
}

/// Enters a value into a channel's moving one, and returns what that is now.
template <typename T>
BN_INLINE double enter(void* values, long channel, double value, double weight) {
  T& at = static_cast<T*>(values)[channel];
  const double entered = moving_average(at, value, weight);
  at = T(entered);
  return entered;
}

/// Enters a channel's statistics into the averages of renorm, and makes of them what the moving ones follow (TensorFlow
/// 1.8): these averages, divided by their weights. The variance comes back from a deviation that includes eps.
template <typename T, class Renorm>
BN_INLINE void enter_averages(const Renorm& renorm, const RenormWeights& weights, long channel, double& mean,
                              double& variance, double eps) {
  mean = enter<T>(renorm.mean, channel, mean, renorm.momentum) / weights.new_mean;
  const double stddev =
      enter<T>(renorm.stddev, channel, ::sqrt(variance + eps), renorm.momentum) / weights.new_stddev;
  variance = stddev * stddev - eps;
}

/// Enters a channel's statistics.
template <typename T, class Running>
BN_INLINE void update_running(const Running& running, const RunningStep& step, long channel, double mean, double variance,
                              double eps) {
  if (running.renorm.mean) enter_averages<T>(running.renorm, step.renorm, channel, mean, variance, eps);
  if (running.mean) enter<T>(running.mean, channel, mean, step.momentum);
  if (running.var) enter<T>(running.var, channel, variance, step.momentum);
}

}  // namespace torch_bn
