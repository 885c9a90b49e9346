// How adjacent elements are taken: register by register, the last ones of a run in a part of one, or two at once.
// Included after vector.inl, inside a target region and an anonymous namespace.

/// A register's worth of lanes, where the number of lanes is otherwise given.
struct All {};
template <class Count>
constexpr bool kIsAll = false;
template <>
constexpr bool kIsAll<All> = true;
template <class D> BN_INLINE Vec<D> load(const typename D::Element* p, All) { return load<D>(p); }
template <class D> BN_INLINE void store(typename D::Element* p, Vec<D> v, All) { store<D>(p, v); }
template <class D> BN_INLINE Vec<D> keep(Vec<D> v, All) { return v; }

/// A whole register of which only the last lanes have not been seen before.
struct Last {
  int lanes;
};
template <class D> BN_INLINE Vec<D> load(const typename D::Element* p, Last) { return load<D>(p); }
template <class D> BN_INLINE void store(typename D::Element* p, Vec<D> v, Last) { store<D>(p, v); }
template <class D> BN_INLINE Vec<D> keep(Vec<D> v, Last last) {
  for (int i = 0; i < kLanes<D>; ++i) v[i] = i >= kLanes<D> - last.lanes ? v[i] : 0;
  return v;
}

/// Calls f(i, count) on every register of the adjacent elements from i to n: whole ones, then the rest.
template <class D, class F>
BN_INLINE void each_register(int64_t i, int64_t n, const F& f) {
  for (; i + kLanes<D> <= n; i += kLanes<D>) f(i, All{});
  if (i < n) f(i, int(n - i));
}

/// The same, where the rest may reach back over elements already seen, which is quicker than a part of a
/// register: f gives the same result for them again, or keeps them out of its sums.
template <class D, class F>
BN_INLINE void each_register_overlapping(int64_t i, int64_t n, const F& f) {
  for (; i + kLanes<D> <= n; i += kLanes<D>) f(i, All{});
  if (i == n) return;
  n < kLanes<D> ? f(i, int(n - i)) : f(n - kLanes<D>, Last{int(n - i)});
}

/// One and the other of two registers of adjacent elements, from the same place of memory: one after the other or, where
/// a dtype is read and written quicker so, the even and the odd ones. Sums do not mind; maps need their coefficients
/// arranged likewise, unless those are all the same.
struct First {};
struct Second {};
template <class Count>
constexpr bool kIsFirst = false;
template <>
constexpr bool kIsFirst<First> = true;
template <class Count>
constexpr bool kIsSecond = false;
template <>
constexpr bool kIsSecond<Second> = true;

template <class D>
BN_INLINE Whole<D> load_whole(const typename D::Element* p) {
  Whole<D> whole;
  __builtin_memcpy(&whole, p, sizeof whole);
  return whole;
}
template <class D>
BN_INLINE Vec<D> load(const typename D::Element* p, First) {
  if constexpr (D::kAlternates) return D::even(load_whole<D>(p));
  else return load<D>(p);
}
template <class D>
BN_INLINE Vec<D> load(const typename D::Element* p, Second) {
  if constexpr (D::kAlternates) return D::odd(load_whole<D>(p));
  else return load<D>(p + kLanes<D>);
}
template <class D> BN_INLINE void store(typename D::Element* p, Vec<D> v, First) { store<D>(p, v); }
template <class D> BN_INLINE void store(typename D::Element* p, Vec<D> v, Second) { store<D>(p + kLanes<D>, v); }
template <class D> BN_INLINE Vec<D> keep(Vec<D> v, First) { return v; }
template <class D> BN_INLINE Vec<D> keep(Vec<D> v, Second) { return v; }

/// The places of a register's lanes, as First or Second read them, among the elements of both.
template <class D, int... kLane>
BN_INLINE Vec<D> places_from(int first, int step, std::integer_sequence<int, kLane...>) {
  return Vec<D>{typename D::Compute(first + step * kLane)...};
}
template <class D>
BN_INLINE Vec<D> places(First) {
  return places_from<D>(0, D::kAlternates ? 2 : 1, std::make_integer_sequence<int, kLanes<D>>{});
}
template <class D>
BN_INLINE Vec<D> places(Second) {
  return places_from<D>(D::kAlternates ? 1 : kLanes<D>, D::kAlternates ? 2 : 1, std::make_integer_sequence<int, kLanes<D>>{});
}

template <class D, int... kLane>
BN_INLINE void to_order(Vec<D>& first, Vec<D>& second, std::integer_sequence<int, kLane...>) {
  constexpr int L = kLanes<D>;
  const Vec<D> low = __builtin_shufflevector(first, second, (kLane / 2 + kLane % 2 * L)...);
  second = __builtin_shufflevector(first, second, (L / 2 + kLane / 2 + kLane % 2 * L)...);
  first = low;
}
/// One after the other, from what first and second read.
template <class D>
BN_INLINE void to_order(Vec<D>& first, Vec<D>& second) {
  if constexpr (D::kAlternates) to_order<D>(first, second, std::make_integer_sequence<int, kLanes<D>>{});
}

template <class D, int... kLane>
BN_INLINE void from_order(Vec<D>& low, Vec<D>& high, std::integer_sequence<int, kLane...>) {
  const Vec<D> even = __builtin_shufflevector(low, high, (2 * kLane)...);
  high = __builtin_shufflevector(low, high, (2 * kLane + 1)...);
  low = even;
}

/// How many of n adjacent elements are mapped in pairs: the rest may reach back over one register that is in order.
template <class D>
BN_INLINE int64_t in_pairs(int64_t n) {
  constexpr int64_t L = kLanes<D>;
  const int64_t rest = n % (2 * L);
  return n - rest - (rest > 0 && rest < L && n > rest ? 2 * L : 0);
}

/// The coefficients of n adjacent elements, all in pairs, as first and second read those.
template <class D>
BN_INLINE void arrange(typename D::Compute* coefficients, int64_t n) {
  using P = Parameter<D>;
  if constexpr (D::kAlternates)
    for (auto* at = coefficients; at < coefficients + n; at += 2 * kLanes<D>) {
      Vec<D> low = load<P>(at, First{}), high = load<P>(at, Second{});
      from_order<D>(low, high, std::make_integer_sequence<int, kLanes<D>>{});
      store<P>(at, low, First{}), store<P>(at, high, Second{});
    }
}

/// A copy of the coefficients of n adjacent elements, arranged as far as those are taken in pairs.
template <class D>
BN_INLINE void copy_arranged(const typename D::Compute* coefficients, int64_t n, typename D::Compute* to) {
  __builtin_memcpy(to, coefficients, n * sizeof *to);
  arrange<D>(to, in_pairs<D>(n));
}

/// Back from that, of sums.
template <class D>
BN_INLINE void put_in_order(typename D::Compute* sums, int64_t n) {
  using P = Parameter<D>;
  if constexpr (D::kAlternates)
    for (auto* at = sums; at < sums + n; at += 2 * kLanes<D>) {
      Vec<D> first = load<P>(at, First{}), second = load<P>(at, Second{});
      to_order<D>(first, second);
      store<P>(at, first, First{}), store<P>(at, second, Second{});
    }
}

/// Calls f(i, count) on every register of n adjacent elements, of an alternating dtype in pairs as far as in_pairs().
template <class D, class F>
BN_INLINE void each_pair(int64_t n, const F& f) {
  int64_t i = 0;
  if constexpr (D::kAlternates)
    for (const int64_t end = in_pairs<D>(n); i < end; i += 2 * kLanes<D>) f(i, First{}), f(i, Second{});
  each_register<D>(i, n, f);
}

/// What two registers' worth of results is as elements, in the order of memory.
template <class D>
BN_INLINE Whole<D> narrow_two(Vec<D> first, Vec<D> second, First) {
  if constexpr (D::kAlternates) return D::narrow_alternating(first, second);
  else return D::narrow(first, second);
}
template <class D>
BN_INLINE Whole<D> narrow_two(Vec<D> low, Vec<D> high, All) {
  return D::narrow(low, high);
}

/// Writes a register of elements.
template <class D, bool kStreamed>
BN_INLINE void put(typename D::Element* to, Whole<D> elements) {
  if constexpr (kStreamed)
    stream<D>(to, elements);
  else
    __builtin_memcpy(to, &elements, sizeof elements);
}
/// The same of two registers of results, which `one` and its other have read.
template <class D, bool kStreamed, class Count>
BN_INLINE void put_two(typename D::Element* to, Vec<D> first, Vec<D> second, Count one) {
  if constexpr (kNarrowing<D> == 1) {
    put<D, kStreamed>(to, D::narrow(first));
    put<D, kStreamed>(to + kLanes<D>, D::narrow(second));
  } else {
    put<D, kStreamed>(to, narrow_two<D>(first, second, one));
  }
}

/// Whether a map may take two registers at once: because they are one as elements, or parts of one line.
template <class D>
constexpr bool kTakesTwo = kNarrowing<D> > 1 || kRegistersOfLine > 1;
