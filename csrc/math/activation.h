// Activations that the last map applies, and their derivatives, for scalars and for vectors of scalars. Values are
// torch's, and so are derivatives at kinks; NaN gives NaN, and its derivative is NaN where z is not only compared.
#pragma once
#include <math.h>

#include "portable.h"

namespace torch_bn {

/// NB: z < 0 ? 0 : z, so that NaN passes, as in torch.
template <typename V>
BN_INLINE V relu(V z) {
  return z < V{} ? V{} : z;
}

/// Where the gradient of a scalar z passes.
template <typename T>
BN_INLINE bool passes_relu(T z) {
  return !(z <= T(0));
}

/// dy where z > 0 or z is NaN; the derivative at 0 is 0, as in torch.
template <typename V>
BN_INLINE V relu_gradient(V z, V dy) {
  return z <= V{} ? V{} : dy;
}

/// The logistic function and 1 - it, each without cancellation; in one division, as a second one costs CUDA registers
/// that it does not have. M has the functions of a machine: minus_abs, exp and expm1 of what is not positive, normal; and
/// Scalar, the type of its constants.
template <typename V>
struct Logistic {
  V value, complement;
};
template <class M, typename V>
BN_INLINE Logistic<V> logistic(V z, V small) {
  const V one = V{} + typename M::Scalar(1), share = one / (one + small), rest = small * share;
  return {z < V{} ? rest : share, z < V{} ? share : rest};
}
/// What it takes beside z: e^-|z|, which never overflows.
template <class M, typename V>
BN_INLINE V falling(V z) {
  return M::exp(M::minus_abs(z));
}
template <class M, typename V>
BN_INLINE Logistic<V> logistic(V z) {
  return logistic<M>(z, falling<M>(z));
}
template <class M, typename V>
BN_INLINE V silu_gradient(V z, V dy, Logistic<V> s) {
  return dy * (s.value * (z * s.complement + typename M::Scalar(1)));
}

/// The standard normal distribution: cumulative, and its density.
template <typename V>
struct Normal {
  V cumulative, density;
};

/// M for double.
struct DoubleFunctions {
  using Scalar = double;
  BN_INLINE double minus_abs(double x) { return -::fabs(x); }
  BN_INLINE double exp(double x) { return ::exp(x); }
  BN_INLINE double expm1(double x) { return ::expm1(x); }
  BN_INLINE Normal<double> normal(double z) {
    constexpr double kRootHalf = 0.70710678118654752, kDensityAt0 = 0.39894228040143268;
    return {::erfc(z * -kRootHalf) * 0.5, ::exp(z * z * -0.5) * kDensityAt0};
  }
};

template <class M, typename V>
BN_INLINE V hardswish(V z) {
  using T = typename M::Scalar;
  const V shifted = z + T(3), positive = shifted < V{} ? V{} : shifted, six = V{} + T(6);
  return z * ((positive > six ? six : positive) * T(1.0 / 6));
}
template <class M, typename V>
BN_INLINE V hardswish_gradient(V z, V dy) {
  using T = typename M::Scalar;
  const V three = V{} + T(3), between = dy * (z * T(1.0 / 3) + T(0.5)), above = z >= three ? dy : between;
  return z <= -three ? V{} : above;
}

/// gelu(approximate="tanh") = z * logistic(z * (a + b z^2)): Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
constexpr double kGeluLinear = 1.5957691216057308, kGeluCubic = 0.044715 * kGeluLinear;  // 2 * sqrt(2 / pi)

/// y of z. Kind is torch_bn::Activation; `number` is the slope of leaky_relu and the alpha of elu.
template <class M, class Kind, typename V>
BN_INLINE V activated(Kind kind, typename M::Scalar number, V z) {
  using T = typename M::Scalar;
  switch (kind) {
    case Kind::none: break;
    case Kind::relu: return relu(z);
    case Kind::leaky_relu: return z > V{} ? z : z * number;
    case Kind::elu: return z > V{} ? z : M::expm1(z > V{} ? V{} : z) * number;
    case Kind::silu: return z * logistic<M>(z).value;
    case Kind::gelu: return z * M::normal(z).cumulative;
    case Kind::gelu_tanh: return z * logistic<M>(z * (z * z * T(kGeluCubic) + T(kGeluLinear))).value;
    case Kind::hardswish: return hardswish<M>(z);
  }
  return z;
}

/// dz of z and dy.
template <class M, class Kind, typename V>
BN_INLINE V activated_gradient(Kind kind, typename M::Scalar number, V z, V dy) {
  using T = typename M::Scalar;
  switch (kind) {
    case Kind::none: break;
    case Kind::relu: return relu_gradient(z, dy);
    case Kind::leaky_relu: return z > V{} ? dy : dy * number;
    case Kind::elu: return z > V{} ? dy : dy * number * M::exp(z > V{} ? V{} : z);
    case Kind::silu: return silu_gradient<M>(z, dy, logistic<M>(z));
    case Kind::gelu: {
      const Normal<V> n = M::normal(z);
      return dy * (z * n.density + n.cumulative);
    }
    case Kind::gelu_tanh: {
      const V square = z * z;
      const Logistic<V> s = logistic<M>(z * (square * T(kGeluCubic) + T(kGeluLinear)));
      return dy * (z * (s.value * s.complement) * (square * T(3 * kGeluCubic) + T(kGeluLinear)) + s.value);
    }
    case Kind::hardswish: return hardswish_gradient<M>(z, dy);
  }
  return dy;
}

}  // namespace torch_bn
