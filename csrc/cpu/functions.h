// The functions that activations need, on registers: the machine M of math/activation.h. Written for any width, with
// nothing of an instruction set: math/activation.h, which stands in no target region, can inline no code of one.
#pragma once
#include "../math/activation.h"

namespace torch_bn::cpu {
namespace {

/// Minimax polynomials, fitted by Remez exchange in 40 digits, that of the normal distribution in float by least squares
/// weighted anew; their coefficients are rounded to float one after another, and the rest is fitted again each time. Measured on every 31st float from 5e-10 to 128 and their negatives,
/// with fused multiply-add and without, in units of the last place: elu(z) is at most 0.9 off, silu 3.5, gelu 5.7. The
/// derivatives are 2.4e-7 off, those of elu 5e-8. kForHalves: what is rounded to a half type needs fewer terms; e^x and
/// the normal distribution are 5e-7 of themselves off.
template <class Floats, class Bits, bool kForHalves>
struct FloatsFunctions {
  typedef float Scalar;

  BN_INLINE Floats minus_abs(Floats x) { return (Floats)((Bits)x | 0x80000000u); }

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
  /// Of x + rest, where x is not positive and rest much smaller; 0 below the least normal number, whatever rest is.
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
  /// The tail beyond a = |z| is e^(-a^2 / 2) R / (a + k), R a polynomial in (a - k) / (a + k), 2.4e-8 off. k is small, as
  /// the sum a + k is rounded. At 13.2 the exponential ends.
  BN_INLINE Normal<Floats> normal(Floats z) {
    constexpr float k = kForHalves ? 4.25f : 1.75f;
    constexpr float kTail[] = {1.02319376e-4f,  4.65611287e-4f, 5.35873929e-4f, -9.64622828e-4f,
                               -3.8772421e-3f,  -3.37342988e-3f, 1.06520979e-2f, 3.36847715e-2f,
                               -1.87399257e-2f, -2.67828345e-1f, 6.4831084e-1f};
    constexpr float kShortTail[] = {2.09300802e-3f,  -1.04978774e-3f, -1.93713084e-2f, 8.53557661e-2f,
                                    -2.20512047e-1f, 4.18219596e-1f,  -6.25129879e-1f, 7.59554327e-1f};
    const Floats a = -minus_abs(z);
    const Floats share = 1.0f / (a + k), place = 1.0f - share * (2 * k), bell = exp_of_square(a);
    const Floats tail = (kForHalves ? polynomial(kShortTail, place) : polynomial(kTail, place)) * share * bell;
    return {z < Floats{} ? tail : 1.0f - tail, bell * 0.398942280f};
  }

 private:
  /// e^(-a^2 / 2).
  BN_INLINE Floats exp_of_square(Floats a) {
    if constexpr (kForHalves) return exp(a * a * -0.5f);
    // NB: what rounding takes from a^2 would be missing a^2 times over.
    const Floats high = (Floats)((Bits)a & 0xfffff000u), rest = (a - high) * (a + high);
    return exp(high * high * -0.5f, rest * -0.5f);
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

  BN_INLINE Doubles minus_abs(Doubles x) {
    for (int i = 0; i < kCount; ++i) x[i] = DoubleFunctions::minus_abs(x[i]);
    return x;
  }
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
