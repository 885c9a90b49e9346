// The functions that activations need, on registers: the machine M of math/activation.h. Written for any width, with
// nothing of an instruction set: math/activation.h, which stands in no target region, can inline no code of one.
#pragma once
#include "../math/activation.h"

namespace torch_bn::cpu {
namespace {

/// Minimax polynomials, fitted by Remez exchange in 40 digits; their coefficients are rounded to float one after
/// another, and the rest is fitted again each time. Measured on every 31st float from 5e-10 to 128 and their negatives,
/// with fused multiply-add and without, in units of the last place: elu(z) is at most 0.9 off, silu 3.5, gelu 5.5, in
/// its negative tail. The derivatives are 2.4e-7 off, those of elu 5e-8, of gelu 1.5e-7. kForHalves: what is rounded to
/// a half type needs fewer terms; e^x and the normal distribution are 5e-7 of themselves off.
template <class Floats, class Bits, bool kForHalves>
struct FloatsFunctions {
  typedef float Scalar;

  /// x + rest = n log(2) + r with |r| <= log(2) / 2: 2^n, and e^r - 1.
  struct Power {
    Floats scale, expm1;
  };
  BN_INLINE Power power(Floats x, Floats rest) {
    constexpr float kLog2E = 1.44269504f, kRound = 12582912;  // 1.5 * 2^23: its last bit counts ones
    constexpr float kHigh = 0.693145752f, kLow = 1.42860677e-6f;  // log(2); n * kHigh is exact
    const Floats rounded = x * kLog2E + kRound, n = rounded - kRound;
    const Floats scale = (Floats)(((Bits)rounded << 23) + (127u << 23));
    // (e^r - 1 - r) / r^2; it leaves 4e-10 of e^r - 1.
    constexpr float kTail[] = {1.97642454e-4f, 1.39323424e-3f, 8.33354332e-3f, 4.16664928e-2f, 1.66666657e-1f, 0.5f};
    constexpr float kShortTail[] = {8.33833963e-3f, 4.18728031e-2f, 1.66668281e-1f, 4.9999401e-1f};
    if constexpr (kForHalves) {
      const Floats r = x - n * (kHigh + kLow);
      return {scale, r + r * r * polynomial(kShortTail, r)};
    }
    const Floats r = x - n * kHigh - n * kLow + rest;
    return {scale, r + r * r * polynomial(kTail, r)};
  }
  /// Of x + rest, where x is not positive and rest much smaller; 0 below the least normal number.
  BN_INLINE Floats exp(Floats x, Floats rest) {
    const Power p = power(x, rest);
    return x < -87.33f ? Floats{} : p.scale * p.expm1 + p.scale;
  }
  BN_INLINE Floats exp(Floats x) { return exp(x, Floats{}); }
  BN_INLINE Floats expm1(Floats x) {
    const Floats least = Floats{} - 87.0f;
    const Power p = power(x < least ? least : x, Floats{});
    return p.scale * p.expm1 + (p.scale - 1.0f);
  }
  BN_INLINE Normal<Floats> normal(Floats z) {
    const Floats far = z < Floats{} ? -z : z, farthest = Floats{} + 16.0f, a = far > farthest ? farthest : far;
    return kForHalves ? normal_for_halves(z, a) : normal(z, a);
  }

 private:
  /// a is |z|, or beyond 13.2, where the exponential ends. Near 0 it is 1 / 2 + z P(z^2), and P 3e-9 off. From a = 1 on
  /// the tail beyond is e^(-a^2 / 2) R / (a + 3.125), R a polynomial in (a - 3.125) / (a + 3.125), 1.5e-8 off.
  BN_INLINE Normal<Floats> normal(Floats z, Floats a) {
    // NB: what rounding takes from a^2 would be missing a^2 times over.
    const Floats high = (Floats)((Bits)a & 0xfffff000u), rest = (a - high) * (a + high);
    const Floats bell = exp(high * high * -0.5f, rest * -0.5f), share = 1.0f / (a + 3.125f);
    constexpr float kTail[] = {-1.00602722e-3f, -7.06952123e-5f, 7.96457753e-3f, -5.32565312e-3f,
                               -6.38233423e-2f, 2.52661437e-1f,  -5.24963081e-1f, 7.33453631e-1f};
    constexpr float kCentre[] = {-8.07234301e-6f, 1.14784424e-4f, -1.18782267e-3f,
                                 9.97409597e-3f,  -6.64905310e-2f, 3.98942292e-1f};
    const Floats tail = polynomial(kTail, 1.0f - share * 6.25f) * share * bell, one = Floats{} + 1.0f;
    const Floats centre = z * polynomial(kCentre, a * a) + 0.5f, beyond = z < Floats{} ? tail : one - tail;
    return {a < one ? centre : beyond, bell * 0.398942280f};
  }

  /// One tail for all, in (a - 4.25) / (a + 4.25).
  BN_INLINE Normal<Floats> normal_for_halves(Floats z, Floats a) {
    const Floats bell = exp(a * a * -0.5f), share = 1.0f / (a + 4.25f);
    constexpr float kTail[] = {2.09300802e-3f, -1.04978774e-3f, -1.93713084e-2f, 8.53557661e-2f,
                               -2.20512047e-1f, 4.18219596e-1f, -6.25129879e-1f, 7.59554327e-1f};
    const Floats tail = polynomial(kTail, 1.0f - share * 8.5f) * share * bell;
    return {z < Floats{} ? tail : 1.0f - tail, bell * 0.398942280f};
  }

  template <int kCount>
  BN_INLINE Floats polynomial(const float (&coefficients)[kCount], Floats x) {
    Floats sum = Floats{} + coefficients[0];
#pragma GCC unroll 16
    for (int i = 1; i < kCount; ++i) sum = sum * x + coefficients[i];
    return sum;
  }
};

/// Those for double, one element after another.
template <class Doubles>
struct DoublesFunctions {
  typedef double Scalar;
  static constexpr int kCount = sizeof(Doubles) / sizeof(double);

  BN_INLINE Doubles exp(Doubles x) {
    for (int i = 0; i < kCount; ++i) x[i] = DoubleFunctions::exp(x[i]);
    return x;
  }
  BN_INLINE Doubles expm1(Doubles x) {
    for (int i = 0; i < kCount; ++i) x[i] = DoubleFunctions::expm1(x[i]);
    return x;
  }
  BN_INLINE Normal<Doubles> normal(Doubles z) {
    Normal<Doubles> found;
    for (int i = 0; i < kCount; ++i) {
      const Normal<double> one = DoubleFunctions::normal(z[i]);
      found.cumulative[i] = one.cumulative, found.density[i] = one.density;
    }
    return found;
  }
};

}  // namespace
}  // namespace torch_bn::cpu
