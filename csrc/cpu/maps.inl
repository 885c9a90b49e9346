// The two maps over the elements: x to y, and (dy, x) to dx. Each is written for one register; the walk over planes,
// where a channel's coefficients are constant, and over rows, where they change from lane to lane, is shared.
// kStreamed: the output goes past the caches. A template argument, as a branch in the innermost loop costs a tenth.

template <class Element>
BN_INLINE Element* place(Element* data, const Strides& s, int64_t outer, int64_t channel) {
  return data ? data + outer * s.outer + channel * s.channel : nullptr;
}
template <class Element>
BN_INLINE void advance(Element*& place, const Strides& s) {
  if (place) place += s.outer;
}

/// How an output is written: as any memory, or past the caches, register by register or in lines gathered from those.
enum class Writing { cached, gathered, streamed };

/// Large outputs go past the caches: they would push out of the last one what is needed sooner, and each of their lines
/// would be fetched before it is overwritten. In training sooner than in inference, after which the output is read
/// soonest: there a reader at once, which then has to fetch it, gives back what was gained. Whole lines only, because
/// one of which other stores write a part is fetched all the same. Two planes of the one output that there is may share
/// a line, of which each writes whole registers soon after the other.
template <class D>
Writing way_of_writing(const Extent& e, const void* out, const Strides& s, bool training, const Executor& executor,
                       bool one_output = true) {
  constexpr int64_t kBytes = sizeof(typename D::Element), kLine = 64;
  const bool large = e.outer * e.channels * e.inner * kBytes >= executor.cache_bytes / (training ? 16 : 4);
  const bool planes = e.inner > 1;
  if (!kHasLines<D> || !large || (planes && s.channel != e.inner)) return Writing::cached;
  const int64_t apart = (s.outer | (planes ? e.inner : 0)) * kBytes;
  const int64_t least_apart = planes && one_output ? BN_VECTOR_BYTES : kLine;
  if ((reinterpret_cast<uintptr_t>(out) | uintptr_t(apart)) % least_apart == 0) return Writing::streamed;
  return planes && e.inner * kBytes >= kLine ? Writing::gathered : Writing::cached;
}

/// Asks for what will be read so far from a place, 0 for nothing: in a map memory is idle for reading. Once for a pair.
template <class Element, class Count>
BN_INLINE void prefetch_away(const Element* place, int64_t away, Count) {
  if (!kIsSecond<Count> && away) prefetch_ahead(place + away);
}

/// What a map makes of one register.
/// NB: no function may return it that is not inlined: GCC 12 clears the upper halves of AVX2's registers before it does.
template <class D, int kCount>
struct Results {
  Vec<D> values[kCount];
};

/// What the forward and the inference map have in common.
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
  int64_t x_away, residual_away;  // to what is read soon: the next channels to be reduced; the next outer
  bool from_cache;                // comes x, as a reduction has just read it
};

/// x to y with coefficients center, scale, shift and, for F32, scale_rest. kWithin: as in mark().
template <class D, Ending kEnding, bool kWithin = false>
struct Normalize {
  static constexpr int kOutputs = 1, kCoefficients = D::kWithRest ? 4 : 3;
  static constexpr bool kMayLackOutput = false, kInOrder = kEnding == Ending::masked;  // as the bits it writes
  using Element = typename D::Element;
  const NormalizeParams p;
  const Extent& extent;

  struct Channel {
    Vec<D> center, scale, shift, scale_rest;
    template <class Read>
    explicit Channel(const Read& read) : center(read(0)), scale(read(1)), shift(read(2)), scale_rest{} {
      if constexpr (D::kWithRest) scale_rest = read(3);
    }
  };
  struct At {
    Element* out[1];
    const Element *x, *residual;
    MarksAt mask;
    const typename D::Compute* found;  // what a curved activation has made
  };
  At at(int64_t outer, int64_t channel) const {
    return {{place(static_cast<Element*>(p.y), p.y_strides, outer, channel)},
            place(static_cast<const Element*>(p.x), p.x_strides, outer, channel),
            place(static_cast<const Element*>(p.residual), p.residual_strides, outer, channel),
            kEnding == Ending::masked ? mask_place<D>(p.mask, extent, outer, channel, 0) : MarksAt{}, nullptr};
  }
  int64_t channel_stride() const { return p.y_strides.channel; }
  bool overwrites() const { return p.x == p.y; }
  bool from_cache() const { return p.from_cache; }
  static void skip(At& a, int64_t count) {
    a.x += count;
    if (a.residual) a.residual += count;
    if constexpr (kEnding == Ending::masked) a.mask.skip(count);
  }
  void next(At& a) const {
    advance(a.x, p.x_strides);
    advance(a.residual, p.residual_strides);
    advance(a.out[0], p.y_strides);
    if constexpr (kEnding == Ending::masked) a.mask.skip(mask_strides<D>(extent).outer);
  }
  /// Before the residual and the activation.
  template <class Count>
  BN_INLINED Vec<D> normalized(const At& a, int64_t i, Count count, const Channel& k) const {
    prefetch_away(a.x + i, p.x_away, count);
    const Vec<D> deviation = load<D>(a.x + i, count) - k.center;
    if constexpr (D::kWithRest)
      return multiply_add<D>(deviation, k.scale, multiply_add<D>(deviation, k.scale_rest, k.shift));
    else
      return deviation * k.scale + k.shift;
  }
  /// Finds y of n elements, as many as a block holds, at a curved activation; channel_at as map_run() takes it.
  template <class ChannelAt>
  void find(At& a, int64_t n, const ChannelAt& channel_at, CurvedBlock<D>& block) const {
    each_register<D>(0, n, [&](int64_t i, auto count) BN_INLINED {
      Vec<D> z = normalized(a, i, count, channel_at(i, count));
      if (a.residual) z += load<D>(a.residual + i, count);
      store<Parameter<D>>(block.z + i, z);
    });
    block.activate(p.activation, p.activation_number, n);
    a.found = block.z;
  }
  template <class Count>
  BN_INLINED Results<D, 1> operator()(const At& a, int64_t i, Count count, const Channel& k) const {
    if constexpr (kIsCurved<D>) return {{load<Parameter<D>>(a.found + i, count)}};
    Vec<D> z = normalized(a, i, count, k);
    if constexpr (kEnding == Ending::masked) {
      prefetch_away(a.residual + i, p.residual_away, count);
      z += load<D>(a.residual + i, count);
      mark<D, kWithin>(a.mask, i, z, count);
      z = relu(z);
    }
    if constexpr (kEnding == Ending::relu) z = relu(z);
    if constexpr (kEnding == Ending::general) {
      if (a.residual) {
        prefetch_away(a.residual + i, p.residual_away, count);
        z += load<D>(a.residual + i, count);
      }
      if (p.activation == Activation::relu) z = relu(z);
    }
    return {{z}};
  }
};

/// (dy, x) to dx and dresidual with coefficients center, slope, bend, shift, and the forward's scale and shift.
/// kInPlace: dx may be where dy is.
template <class D, Ending kEnding, bool kInPlace = false>
struct NormalizeGradient {
  static constexpr int kOutputs = has_two_gradients(kEnding) ? 2 : 1, kCoefficients = forwards_again(kEnding) ? 6 : 4;
  static constexpr bool kMayLackOutput = has_two_gradients(kEnding), kInOrder = false;
  using Element = typename D::Element;
  const BackwardParams& p;
  const int64_t x_away, dy_away;  // as in Normalize
  const bool cached;

  struct Channel {
    Vec<D> center, slope, bend, shift, forward_scale, forward_shift;
    template <class Read>
    explicit Channel(const Read& read)
        : center(read(0)), slope(read(1)), bend(read(2)), shift(read(3)), forward_scale{}, forward_shift{} {
      if constexpr (forwards_again(kEnding)) forward_scale = read(4), forward_shift = read(5);
    }
  };
  struct At {
    Element* out[kOutputs];
    UpstreamGradient<D, kEnding> from;
  };
  At at(int64_t outer, int64_t channel) const {
    At a;
    a.from = UpstreamGradient<D, kEnding>(p, outer, channel, 0);
    a.out[0] = place(static_cast<Element*>(p.dx), p.dx_strides, outer, channel);
    if constexpr (kOutputs > 1)
      a.out[1] = place(static_cast<Element*>(p.dresidual), p.dresidual_strides, outer, channel);
    return a;
  }
  int64_t channel_stride() const { return p.dx_strides.channel; }
  static constexpr bool overwrites() { return kInPlace; }
  bool from_cache() const { return cached; }
  static void skip(At& a, int64_t count) {
    a.from.dy += count;
    a.from.x += count;
    if (a.from.residual) a.from.residual += count;
    if constexpr (kEnding == Ending::masked) a.from.mask.skip(count);
  }
  void next(At& a) const {
    advance(a.from.x, p.x_strides);
    advance(a.from.dy, p.dy_strides);
    advance(a.from.residual, p.residual_strides);
    if constexpr (kEnding == Ending::masked) a.from.mask.skip(mask_strides<D>(p.extent).outer);
    advance(a.out[0], p.dx_strides);
    if constexpr (kOutputs > 1) advance(a.out[1], p.dresidual_strides);
  }
  template <class ChannelAt>
  void find(At& a, int64_t n, const ChannelAt& channel_at, CurvedBlock<D>& block) const {
    const auto forwarded_at = [&](int64_t i, auto count) BN_INLINED {
      const auto& k = channel_at(i, count);
      return ForwardedLanes<D>{k.center, k.forward_scale, k.forward_shift};
    };
    a.from.find(n, forwarded_at, block);
  }
  template <class Count>
  BN_INLINED Results<D, kOutputs> operator()(const At& a, int64_t i, Count count, const Channel& k) const {
    prefetch_away(a.from.x + i, x_away, count);
    prefetch_away(a.from.dy + i, dy_away, count);
    const Vec<D> deviation = load<D>(a.from.x + i, count) - k.center;
    const Vec<D> dz = a.from.dz(i, count, deviation, k.forward_scale, k.forward_shift);
    const Vec<D> dx = dz * k.slope + (deviation * k.bend + k.shift);
    if constexpr (kOutputs > 1) return {{dx, dz}};
    else return {{dx}};
  }
};

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
/// NB: what is passed by reference must be the caller's own copy, so that no store can be taken to change it.
template <class D, int kRows, bool kStreamed, bool kInPairs, class Map, class ChannelAt>
BN_INLINE void map_run(const Map& map, const typename Map::At (&at)[kRows], int64_t n, int64_t two,
                       const ChannelAt& channel_at) {
  using Element = typename D::Element;
  constexpr int64_t L = kLanes<D>;
  // NB: two outputs are written past the caches a line each in turn; half lines in turn take twice the time.
  constexpr int kPairs = kStreamed && Map::kOutputs > 1 && kNarrowing<D> > 1 ? kRegistersOfLine : 1;
  int64_t i = 0;
  const auto map_pairs = [&](auto pairs, int64_t apart, auto one, auto other) BN_INLINED {
    constexpr int kCount = decltype(pairs)::value;
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      Results<D, Map::kOutputs> firsts[kCount], seconds[kCount];
#pragma GCC unroll 2
      for (int pair = 0; pair < kCount; ++pair) {
        const int64_t first = i + pair * 2 * L, second = first + apart;
        const auto &k = channel_at(first, one), &next = channel_at(second, other);
        firsts[pair] = map(at[row], first, one, k), seconds[pair] = map(at[row], second, other, next);
      }
#pragma GCC unroll 2
      for (int o = 0; o < Map::kOutputs; ++o) {
        if (Map::kMayLackOutput && !at[row].out[o]) continue;
#pragma GCC unroll 2
        for (int pair = 0; pair < kCount; ++pair)
          put_two<D, kStreamed>(at[row].out[o] + i + pair * 2 * L, firsts[pair].values[o], seconds[pair].values[o], one);
      }
    }
  };
  const int64_t paired = kTakesTwo<D> ? two / (2 * L) * (2 * L) : 0;
  const auto map_all = [&](auto pairs) BN_INLINED {
    constexpr int64_t kStep = decltype(pairs)::value * 2 * L;
    for (const int64_t end = paired / kStep * kStep; i < end; i += kStep) {
      i = opaque(i);
      if constexpr (kInPairs) map_pairs(pairs, 0, First{}, Second{});
      else map_pairs(pairs, L, All{}, All{});
    }
  };
  map_all(Number<kPairs>{});
  if constexpr (kPairs > 1) map_all(Number<1>{});
  const auto map_rest = [&](int64_t rest, auto count) {
    const auto& k = channel_at(rest, count);
    for (int row = 0; row < kRows; ++row) {
      const auto results = map(at[row], rest, count, k);
      for (int o = 0; o < Map::kOutputs; ++o) {
        if (Map::kMayLackOutput && !at[row].out[o]) continue;
        Element* const to = at[row].out[o] + rest;
        if constexpr (kNarrowing<D> == 1 && kIsAll<decltype(count)>) put<D, kStreamed>(to, D::narrow(results.values[o]));
        else store<D>(to, results.values[o], count);
      }
    }
  };
  if (map.overwrites()) each_register<D>(paired, n, map_rest);
  else each_register_overlapping<D>(paired, n, map_rest);
}

/// The same with a curved activation, at one place.
template <class D, bool kStreamed, class Map, class ChannelAt>
BN_INLINE void map_curved(const Map& map, typename Map::At place, int64_t n, const ChannelAt& channel_at) {
  constexpr int64_t kMost = CurvedBlock<D>::kMost;
  CurvedBlock<D> block;
  typename Map::At at[1] = {place};
  for (int64_t begin = 0; begin < n; begin += kMost) {
    const int64_t count = least(kMost, n - begin);
    const auto here = [&](int64_t i, auto lanes) BN_INLINED -> decltype(auto) { return channel_at(begin + i, lanes); };
    map.find(at[0], count, here, block);
    map_run<D, 1, kStreamed, false>(map, at, count, count, here);
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
  else map_run<D, 1, kStreamed, kInPairs>(map, at, n, two, channel_at);
}

/// Applies a map to the planes of the channels, at the given outers.
template <class D, bool kStreamed, class Map>
__attribute__((flatten)) void map_planes(const Map map, const Extent& e,
                                         const Coefficients<typename D::Compute>& coefficients, Range outers,
                                         Range channels) {
  const int64_t inner = e.inner, two = in_twos<D>(map, inner);
  for (int64_t outer = outers.first; outer < outers.last; ++outer) {
    const int64_t group = group_of(e, outer) * coefficients.columns;
    for (int64_t channel = channels.first; channel < channels.last; ++channel) {
      const typename Map::Channel k([&](int row) { return splat<D>(coefficients.row(row)[group + channel]); });
      const typename Map::At at[1] = {map.at(outer, channel)};
      if constexpr (!kStreamed) prefetch_plane<D>(at[0].out[0] + map.channel_stride(), inner);
      map_adjacent<D, kStreamed, !Map::kInOrder>(map, at, inner, two, [&](int64_t, auto) -> const auto& { return k; });
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
      for (int k = 0; k < Map::kCoefficients; ++k)
        spread<Parameter<D>>(coefficients.row(k) + group * coefficients.columns + channel, some, inner, run[k]);
      if constexpr (!Map::kInOrder)
        for (int k = 0; k < Map::kCoefficients; ++k) arrange<D>(run[k], two);
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
  map_run<D, kRows, kStreamed, false>(map, at, width, in_twos<D>(map, width), [=](int64_t i, auto count) {
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
