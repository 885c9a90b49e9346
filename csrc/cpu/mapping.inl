// The walks of the maps: over planes, where a channel's coefficients are constant, over runs of short ones and over rows,
// where they change from lane to lane.
// kStreamed: the outputs go past the caches. A template argument, as a branch in the innermost loop costs a tenth.

/// The coefficients of every group and column: arrays of [groups, columns], one after another.
template <class T>
struct Coefficients {
  T* data;
  int64_t length, columns;  // groups * columns; the map may walk the first of the columns alone
  T* row(int k) const { return data + k * apart(length); }
  static int64_t apart(int64_t length) { return length + kCacheSkew / int64_t(sizeof(T)); }
};

/// How many of n adjacent elements a map takes two registers at once. Parts of a line only from a cache: memory is read
/// quickest by the smallest steps.
template <class D, class Map>
BN_INLINE int64_t in_twos(const Map& map, int64_t n) {
  return kNarrowing<D> > 1 || map.from_cache() ? n : 0;
}

/// Applies a map to n adjacent elements at kRows places side by side, as far as `two` two registers at once; channel_at(i,
/// count) gives the coefficients of a register. kInPairs: those of two are arranged for pairs.
/// kStreams: how many of the outputs, from the first on, go past the caches.
/// kTurn: how many steps are taken at one place before it is the turn of the next.
/// NB: what is passed by reference must be the caller's own copy, so that no store can be taken to change it.
template <class D, int kRows, int kStreams, bool kInPairs, int kTurn = 1, class Map, class ChannelAt>
BN_INLINE void map_run(const Map& map, const typename Map::At (&at)[kRows], int64_t n, int64_t two,
                       const ChannelAt& channel_at) {
  using Element = typename D::Element;
  constexpr int64_t L = kLanes<D>;
  // NB: two outputs are written past the caches a line each in turn; half lines in turn take twice the time.
  constexpr int kPairs = kStreams > 1 && kNarrowing<D> > 1 ? kRegistersOfLine : 1;
  int64_t i = 0;
  const auto map_pairs = [&](auto pairs, int row, int64_t begin, int64_t apart, auto one, auto other) BN_INLINED {
    constexpr int kCount = decltype(pairs)::value;
    Results<D, Map::kOutputs> firsts[kCount], seconds[kCount];
#pragma GCC unroll 2
    for (int pair = 0; pair < kCount; ++pair) {
      const int64_t first = begin + pair * 2 * L, second = first + apart;
      const auto &k = channel_at(first, one), &next = channel_at(second, other);
      firsts[pair] = map(at[row], first, one, k), seconds[pair] = map(at[row], second, other, next);
      if constexpr (Map::kMarksTwo && kInPairs) map.end_two(at[row], first, firsts[pair], seconds[pair]);
    }
#pragma GCC unroll 2
    for (int o = 0; o < Map::kOutputs; ++o) {
      if (Map::kMayLackOutput && !at[row].out[o]) continue;
#pragma GCC unroll 2
      for (int pair = 0; pair < kCount; ++pair) {
        Element* const to = at[row].out[o] + begin + pair * 2 * L;
        if (o < kStreams) put_two<D, true>(to, firsts[pair].values[o], seconds[pair].values[o], one);
        else put_two<D, false>(to, firsts[pair].values[o], seconds[pair].values[o], one);
      }
    }
  };
  const int64_t paired = kTakesTwo<D> ? two / (2 * L) * (2 * L) : 0;
  const auto map_all = [&](auto pairs, auto turn) BN_INLINED {
    constexpr int64_t kStep = decltype(pairs)::value * 2 * L, kAll = decltype(turn)::value * kStep;
    for (const int64_t end = paired / kAll * kAll; i < end; i += kAll) {
      i = opaque(i);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 1
        for (int64_t begin = i, steps = 0; steps < decltype(turn)::value; ++steps, begin += kStep) {
          begin = opaque(begin);
          if constexpr (kInPairs) map_pairs(pairs, row, begin, 0, First{}, Second{});
          else map_pairs(pairs, row, begin, L, All{}, All{});
        }
    }
  };
  if constexpr (kTurn > 1) map_all(Number<kPairs>{}, Number<kTurn>{});
  map_all(Number<kPairs>{}, Number<1>{});
  if constexpr (kPairs > 1) map_all(Number<1>{}, Number<1>{});
  const auto map_rest = [&](int64_t rest, auto count) {
    const auto& k = channel_at(rest, count);
    for (int row = 0; row < kRows; ++row) {
      const auto results = map(at[row], rest, count, k);
      for (int o = 0; o < Map::kOutputs; ++o) {
        if (Map::kMayLackOutput && !at[row].out[o]) continue;
        Element* const to = at[row].out[o] + rest;
        if constexpr (kNarrowing<D> == 1 && kIsAll<decltype(count)>) {
          if (o < kStreams) put<D, true>(to, D::narrow(results.values[o]));
          else put<D, false>(to, D::narrow(results.values[o]));
        } else {
          store<D>(to, results.values[o], count);
        }
      }
    }
  };
  if (map.overwrites()) each_register<D>(paired, n, map_rest);
  else each_register_overlapping<D>(paired, n, map_rest);
}

template <class Map, bool kStreamed>
constexpr int kStreamsOf = kStreamed ? Map::kOutputs : 0;

/// The same at one place, where of two outputs one goes past the caches at once, the other some lines at a time.
template <class D, bool kInPairs, class Map, class ChannelAt>
BN_INLINE void map_in_turn(const Map& map, typename Map::At place, int64_t n, int64_t two, const ChannelAt& channel_at) {
  using Element = typename D::Element;
  constexpr int64_t kTurn = 1024 / sizeof(Element), kRegister = sizeof(Whole<D>) / sizeof(Element);
  alignas(64) Element waiting[kTurn];
  for (int64_t begin = 0; begin < n; begin += kTurn) {
    const int64_t count = least(kTurn, n - begin);
    typename Map::At at[1] = {place};
    if (place.out[1]) at[0].out[1] = waiting;
    map_run<D, 1, 1, kInPairs>(map, at, count, most(0, least(two - begin, count)), [&](int64_t i, auto lanes) BN_INLINED
                               -> decltype(auto) { return channel_at(begin + i, lanes); });
    map.skip(place, count);
    if (place.out[0]) place.out[0] += count;
    if (!place.out[1]) continue;
    int64_t i = 0;
    for (; i + kRegister <= count; i += kRegister) stream<D>(place.out[1] + i, load_whole<D>(waiting + i));
    for (; i < count; ++i) place.out[1][i] = waiting[i];
    place.out[1] += count;
  }
}

/// Whether two outputs lie at the same place of a page, or the first a line before it: written a line of each in turn, they
/// then take up to 1.6 times as long.
template <class Element>
BN_INLINE bool collide(Element* const (&out)[2]) {
  const uintptr_t apart = reinterpret_cast<uintptr_t>(out[0]) - reinterpret_cast<uintptr_t>(out[1]);
  return (apart + 64) % 4096 <= 64;
}

/// map_run() at one place.
template <class D, bool kStreamed, bool kInPairs, class Map, class ChannelAt>
BN_INLINE void map_place(const Map& map, const typename Map::At (&at)[1], int64_t n, int64_t two,
                         const ChannelAt& channel_at) {
  if constexpr (kStreamed && Map::kOutputs == 2)
    if (collide(at[0].out)) return map_in_turn<D, kInPairs>(map, at[0], n, two, channel_at);
  map_run<D, 1, kStreamsOf<Map, kStreamed>, kInPairs>(map, at, n, two, channel_at);
}

/// The same with a curved activation.
template <class D, bool kStreamed, class Map, class ChannelAt>
BN_INLINE void map_curved(const Map& map, typename Map::At place, int64_t n, const ChannelAt& channel_at) {
  constexpr int64_t kMost = CurvedBlock<D>::kMost;
  CurvedBlock<D> block;
  typename Map::At at[1] = {place};
  for (int64_t begin = 0; begin < n; begin += kMost) {
    const int64_t count = least(kMost, n - begin);
    const auto here = [&](int64_t i, auto lanes) BN_INLINED -> decltype(auto) { return channel_at(begin + i, lanes); };
    map.find(at[0], count, here, block);
    map_place<D, kStreamed, false>(map, at, count, count, here);
    map.skip(at[0], count);
    for (int o = 0; o < Map::kOutputs; ++o)
      if (at[0].out[o]) at[0].out[o] += count;
  }
}

/// Applies a map to n adjacent elements at one place, as map_run() does.
template <class D, bool kStreamed, bool kInPairs, class Map, class ChannelAt>
BN_INLINE void map_adjacent(const Map& map, const typename Map::At (&at)[1], int64_t n, int64_t two,
                            const ChannelAt& channel_at) {
  if constexpr (kIsCurved<D>) map_curved<D, kStreamed>(map, at[0], n, channel_at);
  else map_place<D, kStreamed, kInPairs>(map, at, n, two, channel_at);
}

/// Whether the runs of these channels are whole lines of every output, at all outers if at the first two.
template <class Map>
bool runs_are_lines(const Map& map, int64_t bytes, Range channels) {
  uintptr_t apart = uintptr_t(bytes);
  for (int64_t outer = 0; outer < 2; ++outer)
    for (const auto* out : map.at(outer, channels.first).out) apart |= reinterpret_cast<uintptr_t>(out);
  return apart % 64 == 0;
}

/// How many planes of a channel are mapped in turn, some whole lines of each: past the caches a core writes two runs of memory
/// quicker than one. As measured with AVX2, and not with two outputs, which are two runs already, nor where two inputs come
/// from memory.
constexpr int kPlanesInTurn = BN_VECTOR_BYTES == 32 ? 2 : 1;
template <class D, bool kStreamed, class Map>
constexpr bool kMapsInTurn = kPlanesInTurn > 1 && kStreamed && Map::kOutputs == 1 && !kIsCurved<D>;

/// Applies a map to the planes of the channels, at the given outers.
template <class D, bool kStreamed, class Map>
__attribute__((flatten)) void map_planes(const Map map, const Extent& e,
                                         const Coefficients<typename D::Compute>& coefficients, Range outers,
                                         Range channels) {
  constexpr bool kInTurn = kMapsInTurn<D, kStreamed, Map>;
  const int64_t inner = e.inner, two = in_twos<D>(map, inner);
  const bool in_turn = kInTurn && (map.from_cache() || !map.adds()) &&
                       runs_are_lines(map, inner * int64_t(sizeof(typename D::Element)), channels);
  for (int64_t outer = outers.first, count; outer < outers.last; outer += count) {
    count = in_turn ? least(kPlanesInTurn, least(outers.last - outer, rest_of_group(e, outer))) : 1;
    const int64_t group = group_of(e, outer) * coefficients.columns;
    for (int64_t channel = channels.first; channel < channels.last; ++channel) {
      const typename Map::Channel k([&](int row) { return splat<D>(coefficients.row(row)[group + channel]); });
      const auto channel_at = [&](int64_t, auto) -> const auto& { return k; };
      if constexpr (kInTurn)
        if (count == kPlanesInTurn) {
          constexpr int kTurn = 4;  // as measured: with 2 or 8 some types gain less
          const typename Map::At both[kPlanesInTurn] = {map.at(outer, channel), map.at(outer + 1, channel)};
          map_run<D, kPlanesInTurn, 1, !Map::kInOrder, kTurn>(map, both, inner, inner, channel_at);
          continue;
        }
      const typename Map::At at[1] = {map.at(outer, channel)};
      if constexpr (!kStreamed) prefetch_plane<D>(at[0].out[0] + map.channel_stride(), inner);
      map_adjacent<D, kStreamed, !Map::kInOrder>(map, at, inner, two, channel_at);
    }
  }
}

/// Applies a map to runs of the planes of the channels, at all outers.
template <class D, bool kStreamed, class Map>
__attribute__((flatten)) void map_runs(const Map map, const Extent& e,
                                       const Coefficients<typename D::Compute>& coefficients, Range channels) {
  using Compute = typename D::Compute;
  alignas(64) Compute run[Map::kCoefficients][kMappedRun + kSlack];
  const int64_t inner = e.inner, beginning = channels_of_run<D>(e), at_once = kMappedRun / (beginning * inner) * beginning;
  const Grouping grouping(e);
  for (int64_t group = 0; group < e.groups; ++group) {
    const GroupOuters outers = grouping.outers(group);
    for (int64_t channel = channels.first; channel < channels.last; channel += at_once) {
      const int64_t some = least(at_once, channels.last - channel);
      const int64_t n = some * inner, two = in_twos<D>(map, in_pairs<D>(n));
      for (int k = 0; k < Map::kCoefficients; ++k) {
        const Compute* const values = coefficients.row(k) + group * coefficients.columns + channel;
        if constexpr (Map::kInOrder) spread<D>(values, some, inner, run[k]);
        else spread_in_pairs<D>(values, some, inner, two, run[k]);
      }
      for (int64_t j = 0; j < outers.count; ++j) {
        const typename Map::At at[1] = {map.at(outers[j], channel)};
        map_adjacent<D, kStreamed, !Map::kInOrder>(map, at, n, two, [&](int64_t i, auto count) {
          return typename Map::Channel([&](int k) { return load<Parameter<D>>(run[k] + i, count); });
        });
      }
    }
  }
}

/// Applies a map to `width` columns of kRows rows side by side.
template <class D, int kRows, bool kStreamed, class Map>
__attribute__((flatten)) void map_row_group(const Map map, const typename Map::At* rows, int64_t width,
                                            const Coefficients<typename D::Compute> coefficients, int64_t first) {
  typename Map::At at[kRows];
  __builtin_memcpy(at, rows, sizeof at);
  map_run<D, kRows, kStreamsOf<Map, kStreamed>, false>(map, at, width, in_twos<D>(map, width), [=](int64_t i, auto count) {
    return typename Map::Channel([=](int k) { return load<Parameter<D>>(coefficients.row(k) + first + i, count); });
  });
}

/// Coefficients of adjacent columns: each kind `apart` from the one before, a number that the compiler may know.
template <class T, class Apart>
struct ColumnCoefficients {
  const T* first;
  Apart apart;
};

/// Applies a map to `width` columns of `count` rows, one after another. kInPairs: as in map_run().
template <class D, bool kStreamed, bool kInPairs, class Map, class Apart>
__attribute__((flatten, noinline)) void map_row_run(const Map map, typename Map::At row, int64_t count, int64_t width,
                                                    const ColumnCoefficients<typename D::Compute, Apart> coefficients) {
  const int64_t two = in_twos<D>(map, kInPairs ? in_pairs<D>(width) : width);
  for (; count > 0; --count, map.next(row)) {
    const typename Map::At at[1] = {row};
    map_adjacent<D, kStreamed, kInPairs>(map, at, width, two, [=](int64_t i, auto lanes) {
      const auto* const place = coefficients.first + i;
      const auto* const here = D::kAlternates ? opaque(place) : place;
      return typename Map::Channel([=](int k) { return load<Parameter<D>>(here + k * coefficients.apart, lanes); });
    });
  }
}

/// The same with copies of the coefficients, kColumnBlock columns at most: arranged for pairs, and at distances that the
/// compiler knows, as the addresses of all arrays would not leave it the registers for those of inputs and outputs.
template <class D, bool kStreamed, class Map>
void map_row_run_of_copies(const Map& map, const typename Map::At& row, int64_t count, int64_t width,
                           const ColumnCoefficients<typename D::Compute, int64_t>& coefficients) {
  using Compute = typename D::Compute;
  struct Apart {
    operator int64_t() const { return kSkewedBlock<D>; }
  };
  alignas(64) Compute arranged[Map::kCoefficients][kSkewedBlock<D>];
  for (int k = 0; k < Map::kCoefficients; ++k)
    copy_arranged<D>(coefficients.first + k * coefficients.apart, width, arranged[k]);
  map_row_run<D, kStreamed, D::kAlternates>(map, row, count, width, ColumnCoefficients<Compute, Apart>{arranged[0], {}});
}

/// Applies a map to columns of the rows: one after another, as memory is quickest to read, where the coefficients stay
/// in the nearest cache, else several side by side, so that each coefficient is read less often. Not past the caches
/// where a line is several registers: half-written lines of several rows would go to memory one by one.
template <class D, bool kStreamed, class Map>
void map_rows(const Map& map, const Extent& e, const Coefficients<typename D::Compute>& coefficients, Range outers,
              Range columns) {
  constexpr int kRows = 4, kNarrow = 6144 / sizeof(typename D::Compute);
  const int64_t width = columns.last - columns.first;
  constexpr bool kOneByOne = kIsCurved<D> || (kStreamed && kRegistersOfLine > 1);
  constexpr bool kManyAddresses = kRegistersOfLine > 1 || Map::kCoefficients > 4;
  constexpr bool kCopied = D::kTrained && kManyAddresses && !kIsCurved<D> && !(D::kAlternates && Map::kInOrder);
  constexpr int64_t kFewestRows = 8;
  const bool side_by_side = !kOneByOne && e.channels > kNarrow && !is_near(e, sizeof(typename D::Element));
  for (int64_t outer = outers.first; outer < outers.last;) {
    const int64_t count = least(outers.last - outer, rest_of_group(e, outer));
    const int64_t first = group_of(e, outer) * coefficients.columns + columns.first;
    if (side_by_side && count >= kRows) {
      typename Map::At at[kRows];
      for (int i = 0; i < kRows; ++i) at[i] = map.at(outer + i, columns.first);
      map_row_group<D, kRows, kStreamed>(map, at, width, coefficients, first);
      outer += kRows;
      continue;
    }
    const typename Map::At at = map.at(outer, columns.first);
    const ColumnCoefficients<typename D::Compute, int64_t> here{coefficients.row(0) + first,
                                                                coefficients.apart(coefficients.length)};
    outer += count;
    if constexpr (kCopied)
      if (count >= kFewestRows && width <= kColumnBlock<D>) {
        map_row_run_of_copies<D, kStreamed>(map, at, count, width, here);
        continue;
      }
    map_row_run<D, kStreamed, false>(map, at, count, width, here);
  }
}

template <class D, bool kStreamed, class Map>
void map_elements(const Map& map, const Extent& e, const Coefficients<typename D::Compute>& coefficients, Range outers,
                  Range columns) {
  if (e.inner == 1) return map_rows<D, kStreamed>(map, e, coefficients, outers, columns);
  map_planes<D, kStreamed>(map, e, coefficients, outers, columns);
}
