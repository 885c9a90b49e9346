// One bit for each element that relu let through, so that backward need not read the residual again. In the order of
// memory; each plane or row begins with a byte.

template <class P>
struct IntegersOf {
  typedef Bits type;
};
template <>
struct IntegersOf<F64> {
  typedef VectorOf<uint64_t, BN_VECTOR_BYTES>::type type;
};
template <class D>
using Integers = typename IntegersOf<Parameter<D>>::type;

/// The lowest bits, one for each lane: whether relu_gradient() lets its gradient through.
template <class D>
BN_INLINE unsigned let_through(Vec<D> z) {
  [[maybe_unused]] constexpr unsigned kAll = (1u << kLanes<D>) - 1;
  constexpr bool kDouble = sizeof(typename D::Compute) == 8;
#if defined(__x86_64__) && BN_VECTOR_BYTES == 64
  constexpr int kNotLessOrEqual = 6, kCurrentRounding = 4;
  if constexpr (kDouble)
    return uint8_t(__builtin_ia32_cmppd512_mask(z, Vec<D>{}, kNotLessOrEqual, -1, kCurrentRounding));
  else
    return uint16_t(__builtin_ia32_cmpps512_mask(z, Vec<D>{}, kNotLessOrEqual, -1, kCurrentRounding));
#elif defined(__x86_64__)
  const auto stopped = (Vec<D>)(z <= Vec<D>{});
#if BN_VECTOR_BYTES == 32
  if constexpr (kDouble) return unsigned(__builtin_ia32_movmskpd256(stopped)) ^ kAll;
  else return unsigned(__builtin_ia32_movmskps256(stopped)) ^ kAll;
#else
  if constexpr (kDouble) return unsigned(__builtin_ia32_movmskpd(stopped)) ^ kAll;
  else return unsigned(__builtin_ia32_movmskps(stopped)) ^ kAll;
#endif
#else
  const auto stopped = z <= Vec<D>{};
  unsigned bits = kAll;
  for (int i = 0; i < kLanes<D>; ++i) bits ^= stopped[i] ? 1u << i : 0;
  return bits;
#endif
}

/// Writes the first `lanes` bits as those of the elements from i on, after those before.
template <class D>
BN_INLINE void put_bits(uint8_t* mask, int64_t i, unsigned bits, int lanes) {
  uint8_t* const to = mask + uint64_t(i) / 8;
  if constexpr (kLanes<D> >= 8)
    for (int byte = 0; 8 * byte < lanes; ++byte) to[byte] = uint8_t(bits >> 8 * byte);
  else
    *to = uint8_t((uint64_t(i) % 8 ? *to : 0) | bits << uint64_t(i) % 8);
}
template <class D>
BN_INLINE void mark(uint8_t* mask, int64_t i, Vec<D> z, All) {
  put_bits<D>(mask, i, let_through<D>(z), kLanes<D>);
}
template <class D>
BN_INLINE void mark(uint8_t* mask, int64_t i, Vec<D> z, int lanes) {
  put_bits<D>(mask, i, let_through<D>(z) & ((1u << lanes) - 1), lanes);
}
template <class D>
BN_INLINE void mark(uint8_t* mask, int64_t i, Vec<D> z, Last last) {
  const int seen = kLanes<D> - last.lanes;
  put_bits<D>(mask, i + seen, let_through<D>(z) >> seen, last.lanes);
}

template <class D, int... kIndex>
BN_INLINE Vec<D> keep_marked(Vec<D> v, unsigned bits, std::integer_sequence<int, kIndex...>) {
  constexpr Integers<D> kLaneBits = {(1u << kIndex)...};
  return ((Integers<D>{} + bits) & kLaneBits) != 0 ? v : Vec<D>{};
}

/// The bits of `lanes` elements from i on.
template <class D>
BN_INLINE unsigned get_bits(const uint8_t* mask, int64_t i, int lanes) {
  const int before = int(uint64_t(i) % 8);
  unsigned bits = 0;
  for (int byte = 0; 8 * byte < before + lanes; ++byte) bits |= unsigned(mask[uint64_t(i) / 8 + byte]) << 8 * byte;
  return bits >> before;
}
template <class D>
BN_INLINE unsigned get_bits(const uint8_t* mask, int64_t i, All) {
  uint16_t both;
  if constexpr (kLanes<D> < 16) return unsigned(mask[uint64_t(i) / 8]) >> uint64_t(i) % 8;
  __builtin_memcpy(&both, mask + uint64_t(i) / 8, sizeof both);
  return both;
}
template <class D>
BN_INLINE unsigned get_bits(const uint8_t* mask, int64_t i, Last) {
  return get_bits<D>(mask, i, kLanes<D>);
}

/// v where the bits from that of element i on are set, else 0.
template <class D, class Count>
BN_INLINE Vec<D> keep_marked(Vec<D> v, const uint8_t* mask, int64_t i, Count count) {
  return keep_marked<D>(v, get_bits<D>(mask, i, count), std::make_integer_sequence<int, kLanes<D>>{});
}

/// In bits.
BN_INLINE Strides mask_strides(const Extent& e) {
  const int64_t plane = 8 * ceil_div(e.inner, 8);
  return e.inner == 1 ? Strides{e.channels, 1} : Strides{e.channels * plane, plane};
}

/// The mask's first byte of the elements from (outer, channel, begin) on.
template <class Byte>
BN_INLINE Byte* mask_place(Byte* mask, const Extent& e, int64_t outer, int64_t channel, int64_t begin) {
  const Strides s = mask_strides(e);
  return mask + uint64_t(outer * s.outer + channel * s.channel + begin) / 8;
}

/// None for what would have to be walked in another way, because bytes would have to be shared: planes that are walked
/// as rows, and rows, of a number of elements that is no multiple of 8.
int64_t mask_bytes(const Extent& e) {
  const bool shared = e.inner == 1 ? e.channels % 8 != 0 : e.inner % 8 != 0 && e.inner <= kTinyPlane;
  return shared ? 0 : e.outer * mask_strides(e).outer / 8;
}
