// One bit for each element that relu let through, so that backward need not read the residual again. In the order of
// memory. Each outer begins with a byte, and so does each plane, but for short ones: those of several channels are one run
// of bits, as they are walked.

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

#if defined(__x86_64__) && BN_VECTOR_BYTES == 32
/// The same of two registers whose lanes alternate, in the order of memory.
template <class D>
BN_INLINE unsigned let_through(Vec<D> even, Vec<D> odd) {
  typedef short Shorts __attribute__((vector_size(16)));
  constexpr int kAll = 2 * kLanes<D>;
  constexpr auto kHalf = std::make_integer_sequence<int, kLanes<D>>{};
  const auto stopped = [](Vec<D> z) BN_INLINED { return (BothHalves)(z <= Vec<D>{}); };
  const BothHalves both = alternating(stopped(even), stopped(odd), std::make_integer_sequence<int, kAll>{});
  const auto bytes = __builtin_ia32_packsswb128((Shorts)lower_half(both, kHalf), (Shorts)upper_half(both, kHalf));
  return unsigned(__builtin_ia32_pmovmskb128(bytes)) ^ ((1u << kAll) - 1);
}
#endif

/// Where the bits of a run of adjacent elements begin: at that bit of the first byte.
template <class Byte>
struct BitsAt {
  Byte* bytes;
  int first;

  void skip(int64_t bits) {
    const uint64_t bit = uint64_t(first + bits);
    bytes += bit / 8, first = int(bit % 8);
  }
};
typedef BitsAt<uint8_t> MarksAt;
typedef BitsAt<const uint8_t> MarkedAt;

/// Writes `lanes` bits as those of the elements from i on, behind those before; the others of their last byte are zeros,
/// into which the next can be put.
BN_INLINE void put_bits(const MarksAt& at, int64_t i, unsigned bits, int lanes) {
  const uint64_t from = uint64_t(at.first + i);
  uint8_t* const to = at.bytes + from / 8;
  const int before = int(from % 8);
  if (before > 0) bits = bits << before | *to;
  for (int byte = 0; 8 * byte < before + lanes; ++byte) to[byte] = uint8_t(bits >> 8 * byte);
}

/// The same of kBytes bytes of bits, i a multiple of 8. kWithin: the first may begin within a byte.
template <int kBytes, bool kWithin>
BN_INLINE void put_bytes(const MarksAt& at, int64_t i, unsigned bits) {
  uint8_t* const to = at.bytes + uint64_t(i) / 8;
  if (kWithin && at.first > 0) {
    bits = bits << at.first | *to;
    to[kBytes] = uint8_t(bits >> 8 * kBytes);
  }
  __builtin_memcpy(to, &bits, kBytes);
}

/// Marks what z lets through.
template <class D, bool kWithin>
BN_INLINE void mark(const MarksAt& at, int64_t i, Vec<D> z, All) {
  if constexpr (kLanes<D> % 8 > 0) put_bits(at, i, let_through<D>(z), kLanes<D>);
  else put_bytes<kLanes<D> / 8, kWithin>(at, i, let_through<D>(z));
}
template <class D, bool kWithin>
BN_INLINE void mark_two(const MarksAt& at, int64_t i, Vec<D> even, Vec<D> odd) {
  put_bytes<2 * kLanes<D> / 8, kWithin>(at, i, let_through<D>(even, odd));
}
template <class D, bool kWithin>
BN_INLINE void mark(const MarksAt& at, int64_t i, Vec<D> z, int lanes) {
  put_bits(at, i, let_through<D>(z) & ((1u << lanes) - 1), lanes);
}
template <class D, bool kWithin>
BN_INLINE void mark(const MarksAt& at, int64_t i, Vec<D> z, Last last) {
  const int seen = kLanes<D> - last.lanes;
  put_bits(at, i + seen, let_through<D>(z) >> seen, last.lanes);
}

/// v in the lanes whose bits are set, zero in the others.
template <class D, int... kLane>
BN_INLINE Vec<D> keep_marked(Vec<D> v, unsigned bits, std::integer_sequence<int, kLane...>) {
#if defined(__x86_64__) && BN_VECTOR_BYTES == 64 && !defined(__clang__)
  if constexpr (sizeof(typename D::Compute) == 4) return __builtin_ia32_movaps512_mask(v, Vec<D>{}, uint16_t(bits));
#endif
  constexpr Integers<D> kLaneBits = {(1u << kLane)...};
  return ((Integers<D>{} + bits) & kLaneBits) != 0 ? v : Vec<D>{};
}
/// The same of elements of half types.
template <int... kElement>
BN_INLINE BothHalves keep_marked(BothHalves v, uint16_t bits, std::integer_sequence<int, kElement...>) {
  constexpr BothHalves kBits = {uint16_t(1u << kElement)...};
  return v & (BothHalves)(((BothHalves{} + bits) & kBits) == kBits);
}
template <class D>
using AllElements = std::make_integer_sequence<int, 2 * kLanes<D>>;

constexpr int64_t kSpareBytes = 3;  // behind a mask, so that the bits of a register may be read as one word

/// A gradient where the bits from that of element i on are set, else 0.
template <class D, class Count>
BN_INLINE Vec<D> load_marked(const typename D::Element* gradient, const MarkedAt& at, int64_t i, Count count) {
  constexpr bool kPair = kIsFirst<Count> || kIsSecond<Count>, kAlternate = kPair && D::kAlternates;
  constexpr bool kWholeBytes = (kIsAll<Count> || kPair) && kLanes<D> % 8 == 0;
  const int64_t place = kIsSecond<Count> && !kAlternate ? i + kLanes<D> : i;
  const uint64_t from = uint64_t(kWholeBytes ? place : at.first + place);
  uint32_t bits;
  __builtin_memcpy(&bits, at.bytes + from / 8, sizeof bits);
  bits >>= kWholeBytes ? at.first : from % 8;
  if constexpr (kAlternate) {
    const Whole<D> kept = keep_marked(load_whole<D>(gradient + i), uint16_t(bits), AllElements<D>{});
    return kIsFirst<Count> ? D::even(kept) : D::odd(kept);
  } else {
    return keep_marked<D>(load<D>(gradient + i, count), bits, std::make_integer_sequence<int, kLanes<D>>{});
  }
}

/// In bits.
template <class D>
BN_INLINE Strides mask_strides(const Extent& e) {
  const int64_t plane = e.inner <= kShortPlane<D> ? e.inner : 8 * ceil_div(e.inner, 8);
  return {8 * ceil_div(e.channels * plane, 8), plane};
}

/// The mask's bits of the elements from (outer, channel, begin) on.
template <class D, class Byte>
BN_INLINE BitsAt<Byte> mask_place(Byte* mask, const Extent& e, int64_t outer, int64_t channel, int64_t begin) {
  const Strides s = mask_strides<D>(e);
  const uint64_t bit = uint64_t(outer * s.outer + channel * s.channel + begin);
  return {mask + bit / 8, int(bit % 8)};
}

/// How many channels, or a multiple of that, have bytes of their own, which one thread may write beside others.
template <class D>
BN_INLINE int64_t channels_of_whole_bytes(const uint8_t* mask, const Extent& e) {
  return mask && mask_strides<D>(e).channel % 8 != 0 ? 8 : 1;
}

/// None for rows, and for what is walked as rows, of a number of elements that is no multiple of 8: several may be taken
/// as one.
template <class D>
int64_t bytes_of_mask(const Extent& e) {
  const bool shared = e.inner <= kTinyPlane && e.channels * e.inner % 8 != 0;
  return shared ? 0 : e.outer * mask_strides<D>(e).outer / 8 + kSpareBytes;
}

template <class D>
void clear_spare_bytes(uint8_t* mask, const Extent& e) {
  if (mask) __builtin_memset(mask + e.outer * mask_strides<D>(e).outer / 8, 0, kSpareBytes);
}
