// Registers of one instruction set, and how each dtype is read into and written from them.
// Included inside a target region and an anonymous namespace; BN_VECTOR_BYTES is the width of the registers,
// BN_FUSED_MULTIPLY_ADD whether a * b + c is one operation.

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

typedef VectorOf<uint32_t, BN_VECTOR_BYTES>::type Bits;
typedef VectorOf<uint16_t, BN_VECTOR_BYTES / 2>::type HalfBits;
typedef VectorOf<float, BN_VECTOR_BYTES>::type Floats;

typedef VectorOf<uint16_t, BN_VECTOR_BYTES>::type BothHalves;

template <int... kIndex>
BN_INLINE BothHalves joined(HalfBits low, HalfBits high, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(low, high, kIndex...);
}
BN_INLINE BothHalves joined(HalfBits low, HalfBits high) {
  return joined(low, high, std::make_integer_sequence<int, BN_VECTOR_BYTES / 2>{});
}

/// The even lanes of one register and the odd lanes of another.
template <int... kLane>
BN_INLINE BothHalves alternating(BothHalves even, BothHalves odd, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(even, odd, (kLane % 2 ? int(sizeof...(kLane)) + kLane : kLane)...);
}

/// a - b, or 0 where b is more. GCC makes three operations of one.
BN_INLINE BothHalves difference_or_zero(BothHalves a, BothHalves b) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && BN_VECTOR_BYTES == 32
  typedef VectorOf<short, BN_VECTOR_BYTES>::type Shorts;
  return (BothHalves)__builtin_ia32_psubusw256((Shorts)a, (Shorts)b);
#else
  return (a - b) & (BothHalves)(a > b);
#endif
}

/// The high halves of 32-bit lanes, of one register or two, and 32-bit lanes of high halves over zeros: one shuffle, where
/// compilers make several of conversions and shifts. SSE2 has no such shuffle.
#if BN_VECTOR_BYTES > 16
template <int... kIndex>
BN_INLINE auto high_halves(BothHalves low, BothHalves high, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(low, high, (2 * kIndex + 1)...);
}
template <int... kIndex>
BN_INLINE BothHalves as_high_halves(HalfBits h, std::integer_sequence<int, kIndex...>) {
  constexpr int kZero = sizeof...(kIndex) / 2;
  return __builtin_shufflevector(h, HalfBits{}, (kIndex % 2 ? kIndex / 2 : kZero)...);
}
BN_INLINE HalfBits high_halves(Bits v) {
  return high_halves((BothHalves)v, (BothHalves)v, std::make_integer_sequence<int, BN_VECTOR_BYTES / 4>{});
}
BN_INLINE BothHalves high_halves(Bits low, Bits high) {
  return high_halves((BothHalves)low, (BothHalves)high, std::make_integer_sequence<int, BN_VECTOR_BYTES / 2>{});
}
BN_INLINE Bits as_high_halves(HalfBits h) {
  return (Bits)as_high_halves(h, std::make_integer_sequence<int, BN_VECTOR_BYTES / 2>{});
}
#else
BN_INLINE HalfBits high_halves(Bits v) { return __builtin_convertvector(v >> 16, HalfBits); }
BN_INLINE BothHalves high_halves(Bits low, Bits high) { return joined(high_halves(low), high_halves(high)); }
BN_INLINE Bits as_high_halves(HalfBits h) { return __builtin_convertvector(h, Bits) << 16; }
#endif

/// How elements are stored, and the type that all arithmetic on them uses. kWithRest: coefficients of that type are not
/// fine enough for results of it (float64 has no finer type to find the rest in). kTrained: what networks are trained with
/// on a CPU; only there more kinds of loops pay for the time it takes to compile them. kAlternates: two registers are the
/// even and the odd ones of adjacent elements (registers.inl).
struct F32 {
  static constexpr bool kWithRest = true;
  static constexpr bool kTrained = true;
  static constexpr bool kAlternates = false;
  typedef float Element;
  typedef float Compute;
  typedef Floats Stored;
  BN_INLINE Floats widen(Floats v) { return v; }
  BN_INLINE Floats narrow(Floats v) { return v; }
};

struct F64 {
  static constexpr bool kWithRest = false;
  static constexpr bool kTrained = false;
  static constexpr bool kAlternates = false;
  typedef double Element;
  typedef double Compute;
  typedef VectorOf<double, BN_VECTOR_BYTES>::type Stored;
  BN_INLINE Stored widen(Stored v) { return v; }
  BN_INLINE Stored narrow(Stored v) { return v; }
};

struct BF16 {
  static constexpr bool kWithRest = false;
  static constexpr bool kTrained = true;
  static constexpr bool kAlternates = BN_VECTOR_BYTES == 32;
  typedef uint16_t Element;
  typedef float Compute;
  typedef HalfBits Stored;
  BN_INLINE Floats widen(HalfBits h) { return (Floats)as_high_halves(h); }
  BN_INLINE HalfBits narrow(Floats v) { return high_halves(rounded(v)); }
  BN_INLINE BothHalves narrow(Floats low, Floats high) { return high_halves(rounded(low), rounded(high)); }

  BN_INLINE Floats even(BothHalves h) { return (Floats)((Bits)h << 16); }
  BN_INLINE Floats odd(BothHalves h) { return (Floats)((Bits)h & 0xffff0000u); }
  /// As rounded(), for both registers at once: what is dropped rounds up if it is more than a half, less one of its units
  /// where the number kept is even.
  BN_INLINE BothHalves narrow_alternating(Floats even, Floats odd) {
    constexpr auto kAll = std::make_integer_sequence<int, BN_VECTOR_BYTES / 2>{};
    const BothHalves kept = alternating((BothHalves)((Bits)even >> 16), (BothHalves)odd, kAll);
    const BothHalves dropped = alternating((BothHalves)even, (BothHalves)((Bits)odd << 16), kAll);
    return kept + (difference_or_zero(dropped, ~kept & 1) >> 15);
  }

 private:
  /// To nearest even, in the high halves. NaN stays NaN: no element has one that would carry into the sign, nor has a
  /// coefficient (Workspace::set), nor what arithmetic makes of those.
  BN_INLINE Bits rounded(Floats v) {
    const Bits bits = (Bits)v;
    return bits + 0x7fff + ((bits >> 16) & 1);
  }
};

struct F16 {
  static constexpr bool kWithRest = false;
  static constexpr bool kTrained = false;
  static constexpr bool kAlternates = false;
  typedef uint16_t Element;
  typedef float Compute;
  typedef HalfBits Stored;
  /// Moves the exponent's bias from 15 to 127; subnormals gain their implicit bit by a subtraction.
  BN_INLINE Floats widen(HalfBits h) {
    const Bits half = __builtin_convertvector(h, Bits), shifted = (half & 0x7fff) << 13;
    const Bits exponent = shifted & (0x7c00u << 13), rebiased = shifted + (112u << 23);
    const Bits normalized = (Bits)((Floats)(rebiased + (1u << 23)) - (Floats)(Bits{} + (113u << 23)));
    const Bits others = exponent == (0x7c00u << 13) ? rebiased + (112u << 23) : rebiased;
    return (Floats)((exponent == 0 ? normalized : others) | ((half & 0x8000) << 16));
  }
  /// Rounds to nearest even, into subnormals too; 65520 and more become infinite, NaN stays NaN.
  BN_INLINE HalfBits narrow(Floats v) {
    const Bits sign = (Bits)v & 0x80000000u, magnitude = (Bits)v ^ sign;
    const Bits magic = Bits{} + (126u << 23);
    const Bits subnormal = (Bits)((Floats)magnitude + (Floats)magic) - magic;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits special = magnitude > 0x7f800000u ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    const Bits finite = magnitude < (113u << 23) ? subnormal : normal;
    return __builtin_convertvector((magnitude >= (143u << 23) ? special : finite) | (sign >> 16), HalfBits);
  }
  BN_INLINE BothHalves narrow(Floats low, Floats high) { return joined(narrow(low), narrow(high)); }
};

template <class D>
using Vec = typename VectorOf<typename D::Compute, BN_VECTOR_BYTES>::type;

template <class D>
constexpr int kLanes = BN_VECTOR_BYTES / sizeof(typename D::Compute);

template <class D>
BN_INLINE Vec<D> splat(typename D::Compute value) {
  return Vec<D>{} + value;
}

/// a * b + c, rounded once: the product of two floats is exact in double.
template <class D>
BN_INLINE Vec<D> multiply_add(Vec<D> a, Vec<D> b, Vec<D> c) {
#if BN_FUSED_MULTIPLY_ADD
  return a * b + c;
#else
  typedef typename VectorOf<double, kLanes<D> * sizeof(double)>::type Doubles;
  const auto wide = [](Vec<D> v) { return __builtin_convertvector(v, Doubles); };
  return __builtin_convertvector(wide(a) * wide(b) + wide(c), Vec<D>);
#endif
}

/// A whole register from memory of any alignment.
template <class D>
BN_INLINE Vec<D> load(const typename D::Element* p) {
  typename D::Stored stored;
  __builtin_memcpy(&stored, p, sizeof stored);
  return D::widen(stored);
}

/// The first `count` lanes from memory, zero in the others. Compiles to masked loads where there are any.
template <class D>
__attribute__((noinline)) Vec<D> load(const typename D::Element* p, int count) {
  typename D::Element lanes[kLanes<D>];
  for (int i = 0; i < kLanes<D>; ++i) lanes[i] = i < count ? p[i] : typename D::Element(0);
  return load<D>(lanes);
}

template <class D>
BN_INLINE void store(typename D::Element* p, Vec<D> v) {
  const typename D::Stored stored = D::narrow(v);
  __builtin_memcpy(p, &stored, sizeof stored);
}

template <class D>
__attribute__((noinline)) void store(typename D::Element* p, Vec<D> v, int count) {
  typename D::Element lanes[kLanes<D>];
  store<D>(lanes, v);
  for (int i = 0; i < kLanes<D>; ++i)
    if (i < count) p[i] = lanes[i];
}

/// How many registers of the compute type fill one when they are stored, and that one.
template <class D>
constexpr int kNarrowing = sizeof(typename D::Compute) / sizeof(typename D::Element);
template <class D>
using Whole = typename VectorOf<typename D::Element, BN_VECTOR_BYTES>::type;

/// Whether there are loops for large outputs and for short planes, where registers are whole lines or halves of them.
template <class D>
constexpr bool kHasLines = D::kTrained && BN_VECTOR_BYTES >= 32;
constexpr int kRegistersOfLine = 64 / BN_VECTOR_BYTES;

/// A whole register past the caches, to an address that is a multiple of its size. The store may be seen late:
/// end_streaming() orders it before what follows.
template <class D>
BN_INLINE void stream(typename D::Element* p, Whole<D> elements) {
#if defined(__clang__)
  __builtin_nontemporal_store(elements, reinterpret_cast<Whole<D>*>(p));
#elif defined(__x86_64__) && BN_VECTOR_BYTES == 64
  typedef typename VectorOf<long long, BN_VECTOR_BYTES>::type Words;
  __builtin_ia32_movntdq512(reinterpret_cast<Words*>(p), (Words)elements);
#elif defined(__x86_64__) && BN_VECTOR_BYTES == 32
  typedef typename VectorOf<long long, BN_VECTOR_BYTES>::type Words;
  __builtin_ia32_movntdq256(reinterpret_cast<Words*>(p), (Words)elements);
#else
  __builtin_memcpy(p, &elements, sizeof elements);
#endif
}
BN_INLINE void end_streaming() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

/// v in the first `count` lanes, zero in the others.
template <class D>
BN_INLINE Vec<D> keep(Vec<D> v, int count) {
  for (int i = 0; i < kLanes<D>; ++i) v[i] = i < count ? v[i] : 0;
  return v;
}

template <class V, int... kLane>
BN_INLINE auto lower_half(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, kLane...);
}
template <class V, int... kLane>
BN_INLINE auto upper_half(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (int(sizeof...(kLane)) + kLane)...);
}

/// The sum of kCount lanes, by halves: one after another, each addition would wait for the one before.
template <int kCount, class V>
BN_INLINE auto sum_of_halves(V v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    constexpr auto kHalf = std::make_integer_sequence<int, kCount / 2>{};
    return sum_of_halves<kCount / 2>(lower_half(v, kHalf) + upper_half(v, kHalf));
  }
}

/// Sums of lanes in double, which take twice the registers of floats.
template <class D>
struct WideSum {
  static constexpr int kDoubles = BN_VECTOR_BYTES / sizeof(double), kRegisters = kLanes<D> / kDoubles;
  typedef typename VectorOf<double, BN_VECTOR_BYTES>::type Doubles;
  Doubles registers[kRegisters];

  /// GCC makes two conversions of one for four lanes.
  static Doubles as_doubles(typename VectorOf<float, BN_VECTOR_BYTES / 2>::type v) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && BN_VECTOR_BYTES == 32
    return __builtin_ia32_cvtps2pd256(v);
#else
    return __builtin_convertvector(v, Doubles);
#endif
  }
  WideSum() = default;
  explicit WideSum(Vec<D> v) {
    if constexpr (kRegisters == 1) {
      registers[0] = v;
    } else {
      constexpr auto kHalf = std::make_integer_sequence<int, kDoubles>{};
      registers[0] = as_doubles(lower_half(v, kHalf));
      registers[1] = as_doubles(upper_half(v, kHalf));
    }
  }
  /// NB: GCC copies the whole by halves of registers.
  void set(const WideSum& other) {
    for (int i = 0; i < kRegisters; ++i) registers[i] = other.registers[i];
  }
  void add(const WideSum& other) {
    for (int i = 0; i < kRegisters; ++i) registers[i] += other.registers[i];
  }
  double total() const {
    if constexpr (kRegisters == 1) return sum_of_halves<kDoubles>(registers[0]);
    else return sum_of_halves<kDoubles>(registers[0] + registers[1]);
  }
};

template <class D>
BN_INLINE typename D::Compute sum_of_lanes(Vec<D> v) {
  return sum_of_halves<kLanes<D>>(v);
}

/// One element, through the same conversion.
template <class D>
BN_INLINE double element(const typename D::Element* p) {
  return load<D>(p, 1)[0];
}

/// The per-channel parameters of a dtype.
template <class D>
struct ParameterOf {
  typedef F32 type;
};
template <>
struct ParameterOf<F64> {
  typedef F64 type;
};
template <class D>
using Parameter = typename ParameterOf<D>::type;
