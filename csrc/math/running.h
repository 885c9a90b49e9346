// Moving averages of a statistic.
#pragma once
#include "portable.h"

namespace torch_bn {

/// `weight` is that of the new value: PyTorch's momentum, one minus TensorFlow's.
BN_INLINE double moving_average(double old_value, double new_value, double weight) {
  return (1 - weight) * old_value + weight * new_value;
}

}  // namespace torch_bn
