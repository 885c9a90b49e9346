// What the nodes of the graph keep beside tensors.
#pragma once
#include <ATen/core/ivalue.h>

#include "activations.h"

namespace torch_bn {

/// What BatchNorm and BatchNormBackward keep beside tensors.
struct Constants {
  bool training;
  double eps;
  int64_t axis, groups;
  Activation activation;
  double number;               // of the activation
  bool first, second;          // of BatchNorm: has a bias, a residual; of BatchNormBackward: needs dx, the residual's
  bool masked, channels_last;  // there is a mask, in the order of such an input

  bool activated() const { return activation != Activation::none; }
  /// The derivative of z depends on z, not only on its sign.
  bool curved() const { return activation > Activation::relu; }

  /// NB: a tiny layer's backward notices every element of the tuple, and more than three are memory of their own.
  c10::IValue pack() const {
    const int64_t whole = training | first << 1 | second << 2 | masked << 3 | channels_last << 4 |
                          int64_t(activation) << 8 | (axis & 0xffff) << 16 | groups << 32;
    if (has_number(activation)) return c10::ivalue::Tuple::create(whole, eps, number);
    return c10::ivalue::Tuple::create(whole, eps);
  }
  static Constants unpack(const c10::IValue& packed) {
    const auto tuple = packed.toTuple();
    const auto& v = tuple->elements();
    const int64_t whole = v[0].toInt();
    const auto flag = [=](int place) { return bool(whole >> place & 1); };
    const double number = v.size() > 2 ? v[2].toDouble() : 0;
    return {flag(0), v[1].toDouble(), int16_t(whole >> 16), whole >> 32, Activation(uint8_t(whole >> 8)), number,
            flag(1), flag(2), flag(3), flag(4)};
  }
};

}  // namespace torch_bn
