// Every activation but relu, in kernels of their own: in those of relu they would cost registers.
#pragma once
#include "../math/activation.h"
#include "vector.cuh"

namespace torch_bn::cuda {

/// The Kind of a kernel that ends in one of them.
template <class K>
struct Curved : K {};
template <class K>
constexpr bool kIsCurved = false;
template <class K>
constexpr bool kIsCurved<Curved<K>> = true;

inline bool is_curved(Activation activation) { return activation > Activation::relu; }

/// M of math/activation.h for float. NB: not the intrinsics of --use_fast_math: CUDA's Math API bounds expf by 1 unit in
/// the last place, expm1f by 1, normcdff by 5, and __expf by 2 + |1.173 x|.
struct FloatFunctions {
  using Scalar = float;
  BN_INLINE float minus_abs(float x) { return -::fabsf(x); }
  BN_INLINE float exp(float x) { return ::expf(x); }
  BN_INLINE float expm1(float x) { return ::expm1f(x); }
  BN_INLINE Normal<float> normal(float z) { return {::normcdff(z), ::expf(z * z * -0.5f) * 0.398942280f}; }
};
template <class T>
struct FunctionsOf {
  using Type = FloatFunctions;
};
template <>
struct FunctionsOf<double> {
  using Type = DoubleFunctions;
};

/// Of one element, for params that name the activation.
template <class P, class T>
__device__ T curved(const P& p, T z) {
  return activated<typename FunctionsOf<T>::Type>(p.activation, T(p.activation_number), z);
}
template <class P, class T>
__device__ T curved_gradient(const P& p, T z, T dy) {
  return activated_gradient<typename FunctionsOf<T>::Type>(p.activation, T(p.activation_number), z, dy);
}

}  // namespace torch_bn::cuda
