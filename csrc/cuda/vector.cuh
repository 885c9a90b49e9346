// The dtypes, and reading and writing neighbours of one at a time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace torch_bn::cuda {

struct F32 {
  using Element = float;
  using Compute = float;
  static constexpr bool kWithRest = true;  // of the scale, in normalizing_affine
  static __device__ float read(float x) { return x; }
  static __device__ float rounded(float x) { return x; }
};
struct F64 {
  using Element = double;
  using Compute = double;
  static constexpr bool kWithRest = false;
  static __device__ double read(double x) { return x; }
  static __device__ double rounded(double x) { return x; }
};
struct BF16 {
  using Element = __nv_bfloat16;
  using Compute = float;
  static constexpr bool kWithRest = false;
  static __device__ float read(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 rounded(float x) { return __float2bfloat16_rn(x); }
};
struct F16 {
  using Element = __half;
  using Compute = float;
  static constexpr bool kWithRest = false;
  static __device__ float read(__half x) { return __half2float(x); }
  static __device__ __half rounded(float x) { return __float2half_rn(x); }
};

template <int kBytes>
struct Word;
template <>
struct Word<16> { using Type = uint4; };
template <>
struct Word<8> { using Type = uint2; };
template <>
struct Word<4> { using Type = unsigned; };
template <>
struct Word<2> { using Type = unsigned short; };

/// Neighbours that are read and written in one instruction.
/// NB: kept as the word that was read, and taken apart only where an element is needed, with more reads on their way.
template <class D, int kVector>
struct Vector {
  using Element = typename D::Element;
  using Word = typename cuda::Word<kVector * int(sizeof(Element))>::Type;
  Word word;

  static __device__ Vector load(const Element* from) { return {*reinterpret_cast<const Word*>(from)}; }
  __device__ void store(Element* to) const { *reinterpret_cast<Word*>(to) = word; }

  struct Elements {
    Element values[kVector];
    __device__ typename D::Compute operator[](int i) const { return D::read(values[i]); }
    __device__ void set(int i, typename D::Compute value) { values[i] = D::rounded(value); }
    __device__ Vector packed() const {
      Vector vector;
      memcpy(&vector.word, values, sizeof values);
      return vector;
    }
  };
  __device__ Elements elements() const {
    Elements elements;
    memcpy(static_cast<void*>(elements.values), &word, sizeof word);
    return elements;
  }
};

/// One shape of kernel: a dtype, how many neighbours a thread reads at a time, and whether these are samples of one
/// channel (planes) or one sample each of as many channels (rows).
template <class D_, int kVector_, bool kPlanes_>
struct Kind {
  using D = D_;
  using Compute = typename D::Compute;
  static constexpr int kVector = kVector_;
  static constexpr bool kPlanes = kPlanes_;
  static constexpr int kBytes = kVector * int(sizeof(typename D::Element));
  static constexpr int kChannels = kPlanes ? 1 : kVector;  // of a thread
  static constexpr int kSamples = kPlanes ? kVector : 1;   // of each, in what it reads at a time
  static constexpr int kUnroll = kBytes >= 8 ? 4 : 8;      // reads in flight
  using Vector = cuda::Vector<D, kVector>;
};

template <class D, bool kPlanes, class F>
cudaError_t with_vector(int bytes, const F& f) {
  constexpr int kSize = sizeof(typename D::Element);
  if (bytes == 16) return f(Kind<D, 16 / kSize, kPlanes>{});
  if constexpr (kSize < 8)
    if (bytes == 8) return f(Kind<D, 8 / kSize, kPlanes>{});
  return f(Kind<D, 1, kPlanes>{});
}

/// Calls f with the Kind for params of that dtype and vectors of so many bytes, or of one element.
template <class F>
cudaError_t with_kind(DType dtype, bool planes, int bytes, const F& f) {
  const auto with = [&](auto d) {
    using D = decltype(d);
    return planes ? with_vector<D, true>(bytes, f) : with_vector<D, false>(bytes, f);
  };
  switch (dtype) {
    case DType::f32: return with(F32{});
    case DType::f64: return with(F64{});
    case DType::bf16: return with(BF16{});
    case DType::f16: return with(F16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace torch_bn::cuda
