// What the tests of the kernels keep values in, and how they count. The conversions of half types are written apart
// from the kernels' own.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"

namespace torch_bn::testing {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed < 40) std::printf("FAILED %s\n", what.c_str());
}

/// The largest of some errors; NaN is one without bound.
struct Worst {
  double value = 0;
  void include(double error) { value = std::isnan(error) ? INFINITY : std::max(value, error); }
  void include(double got, double want) { include(std::fabs(got - want) / (1 + std::fabs(want))); }
};

/// For main to return.
inline int report() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

inline double from_bits16(uint16_t h, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (h >> mantissa_bits) & ((1 << exponent_bits) - 1), mantissa = h & ((1 << mantissa_bits) - 1);
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

/// The nearest of all 65536 values, ties to the even one: slow and plain.
inline uint16_t to_bits16(double v, int exponent_bits) {
  static std::vector<double> tables[2];
  auto& table = tables[exponent_bits == 8];
  if (table.empty())
    for (int i = 0; i < 0x8000; ++i) table.push_back(from_bits16(uint16_t(i), exponent_bits));
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return 0x7fff;
  const int infinite = exponent_bits == 8 ? 0x7f80 : 0x7c00;
  const double a = std::fabs(v);
  const int above = int(std::lower_bound(table.begin(), table.begin() + infinite, a) - table.begin());
  if (above == 0) return sign;
  const double high = above == infinite ? 2 * table[infinite - 1] - table[infinite - 2] : table[above];
  const double low = table[above - 1];
  const bool up = a - low > high - a || (a - low == high - a && above % 2 == 0);
  return uint16_t(sign | (up ? above : above - 1));
}

inline size_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }
inline const char* name_of(DType d) {
  return d == DType::f32 ? "f32" : d == DType::f64 ? "f64" : d == DType::bf16 ? "bf16" : "f16";
}
inline double epsilon_of(DType d) {
  return d == DType::f64 ? 2e-15 : d == DType::f32 ? 1e-6 : d == DType::bf16 ? 8e-3 : 1e-3;
}
/// Between the numbers nearest 0, where a relative error says nothing. Only float16 has numbers of the data's size there.
inline double least_step_of(DType d) { return d == DType::f16 ? 0x1p-24 : 0; }
inline DType parameters_of(DType d) { return d == DType::f64 ? DType::f64 : DType::f32; }

/// As large tensors are: all at the same place of a page.
constexpr std::align_val_t kAlignment{4096};

struct Free {
  void operator()(char* memory) const { ::operator delete[](memory, kAlignment); }
};
using Bytes = std::unique_ptr<char[], Free>;

/// With nothing behind them.
inline Bytes make_bytes(int64_t count) { return Bytes(new (kAlignment) char[count]); }

/// Memory of exactly n elements, NaN until they are set, which begin so many elements past an aligned place.
struct Buffer {
  DType dtype;
  int64_t count, shift;
  Bytes bytes;
  Buffer(DType dtype, int64_t count, int64_t shift = 0)
      : dtype(dtype), count(count), shift(shift), bytes(make_bytes((shift + count) * int64_t(size_of(dtype)))) {
    reset();
  }
  void reset() { std::memset(bytes.get(), 0xff, (shift + count) * size_of(dtype)); }
  void* data() { return bytes.get() + shift * size_of(dtype); }
  const void* data() const { return bytes.get() + shift * size_of(dtype); }
  double get(int64_t i) const {
    if (dtype == DType::f64) return static_cast<const double*>(data())[i];
    if (dtype == DType::f32) return static_cast<const float*>(data())[i];
    return from_bits16(static_cast<const uint16_t*>(data())[i], dtype == DType::bf16 ? 8 : 5);
  }
  void set(int64_t i, double v) {
    if (dtype == DType::f64) static_cast<double*>(data())[i] = v;
    else if (dtype == DType::f32) static_cast<float*>(data())[i] = float(v);
    else static_cast<uint16_t*>(data())[i] = to_bits16(v, dtype == DType::bf16 ? 8 : 5);
  }
};

inline bool same_bits(const Buffer& a, const Buffer& b) {
  return !std::memcmp(a.data(), b.data(), a.count * size_of(a.dtype));
}

/// [channels], in the type of the dtype's parameters.
inline Buffer make_parameters(DType d, const std::vector<double>& values) {
  Buffer buffer(parameters_of(d), int64_t(values.size()));
  for (size_t i = 0; i < values.size(); ++i) buffer.set(int64_t(i), values[i]);
  return buffer;
}

}  // namespace torch_bn::testing
