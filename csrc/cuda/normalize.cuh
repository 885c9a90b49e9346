// The map of the forward pass and of inference: y = activation((x - mean) * scale + shift + residual).
#pragma once
#include "../math/activation.h"
#include "../math/affine.h"
#include "activations.cuh"
#include "walk.cuh"

namespace torch_bn::cuda {

/// With `deviation`, x - center. The one place for it: backward must find the sign that the forward has found.
template <class D>
__device__ typename D::Compute normalized(typename D::Compute deviation, const Affine<typename D::Compute>& a) {
  if constexpr (D::kWithRest) return fma(deviation, a.scale, fma(deviation, a.scale_rest, a.shift));
  return fma(deviation, a.scale, a.shift);
}

/// What ForwardParams and InferenceParams have in common.
struct NormalizeParams {
  const void* x;
  Strides x_strides;
  const void* residual;
  Strides residual_strides;
  uint8_t* mask;
  void* y;
  Strides y_strides;
  Activation activation;
  double activation_number;

  template <class P>
  __device__ explicit NormalizeParams(const P& p)
      : x(p.x), x_strides(p.x_strides), residual(p.residual), residual_strides(p.residual_strides), mask(p.mask),
        y(p.y), y_strides(p.y_strides), activation(p.activation), activation_number(p.activation_number) {}
};

/// What a thread reads at one place, and what it writes there.
template <class K>
struct Normalize {
  static constexpr int kUnroll = kIsCurved<K> ? K::kUnroll / 2 : K::kUnroll;
  typename K::Vector x, residual;

  __device__ void load(const NormalizeParams& p, const Walk<K>& walk) {
    x = walk.load(p.x, p.x_strides);
    if (p.residual) residual = walk.load(p.residual, p.residual_strides);
  }
  __device__ void store(const NormalizeParams& p, const Walk<K>& walk,
                        const Affine<typename K::Compute> (&affines)[K::kChannels]) const {
    using T = typename K::Compute;
    const auto from = x.elements();
    typename K::Vector::Elements to;
#pragma unroll
    for (int e = 0; e < K::kVector; ++e) {
      const Affine<T>& affine = affines[K::kPlanes ? 0 : e];
      T z = normalized<typename K::D>(from[e] - affine.center, affine);
      if (p.residual) z += residual.elements()[e];
      if constexpr (kIsCurved<K>) z = curved(p, z);
      else if (p.activation == Activation::relu) z = relu(z);
      to.set(e, z);
    }
    walk.store(p.y, p.y_strides, to.packed());
    if constexpr (!kIsCurved<K>) {
      if (!p.mask) return;
      unsigned passed = 0;  // NB: found from what is stored, as registers are few
#pragma unroll
      for (int e = 0; e < K::kVector; ++e) passed |= unsigned(passes_relu(to[e])) << e;
      p.mask[walk.position()] = uint8_t(passed);
    }
  }
};

/// affine(i): of the i-th channel of the thread.
template <class K, class F>
__device__ void normalize(const NormalizeParams& p, Walk<K> walk, const F& affine) {
  if (!walk.inside()) return;
  Affine<typename K::Compute> affines[K::kChannels];
  for (int i = 0; i < K::kChannels; ++i) affines[i] = affine(i);
  map_batches(walk, Normalize<K>{}, p, affines);
}

}  // namespace torch_bn::cuda
