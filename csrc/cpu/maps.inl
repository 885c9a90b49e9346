// The two maps over the elements: x to y, and (dy, x) to dx. Each is written for one register; the walk over planes,
// where a channel's coefficients are constant, and over rows, where they change from lane to lane, is shared.
// kPlain: only x to y, or (dy, x) to dx; else there may be an activation, a residual, or a gradient to leave out.

template <class Element>
BN_INLINE Element* place(Element* data, const Strides& s, int64_t outer, int64_t channel) {
  return data ? data + outer * s.outer + channel * s.channel : nullptr;
}

/// Whether to write an output past the caches: it would push out of the last one what is needed sooner. Whole lines
/// only, because a line written in two parts is slow, and one that other stores share is fetched again.
template <class D>
bool worth_streaming(const Extent& e, const void* out, const Strides& s, const Executor& executor) {
  constexpr int64_t kBytes = sizeof(typename D::Element), kLine = 64;
  if (sizeof(typename D::Stored) < kLine) return false;
  const int64_t apart = (s.outer | (e.inner == 1 ? 0 : s.channel)) * kBytes;
  return (reinterpret_cast<uintptr_t>(out) | uintptr_t(apart)) % kLine == 0 &&
         e.outer * e.channels * e.inner * kBytes >= executor.cache_bytes / 4;
}

template <class D>
BN_INLINE void put(typename D::Element* p, Vec<D> v, All, bool streamed) {
  streamed ? stream<D>(p, v) : store<D>(p, v);
}
template <class D> BN_INLINE void put(typename D::Element* p, Vec<D> v, Last, bool) { store<D>(p, v); }
template <class D> BN_INLINE void put(typename D::Element* p, Vec<D> v, int count, bool) { store<D>(p, v, count); }

/// What the forward and the inference map have in common.
struct NormalizeParams {
  const void* x;
  Strides x_strides;
  const void* residual;
  Strides residual_strides;
  void* y;
  Strides y_strides;
  Activation activation;
};

/// x to y with coefficients center, scale, shift and, for F32, scale_rest.
template <class D, bool kPlain>
struct Normalize {
  using Element = typename D::Element;
  const NormalizeParams p;
  const bool streamed;

  struct Channel {
    Vec<D> center, scale, shift, scale_rest;
    template <class Read>
    explicit Channel(const Read& read) : center(read(0)), scale(read(1)), shift(read(2)), scale_rest{} {
      if constexpr (D::kWithRest) scale_rest = read(3);
    }
  };
  struct At {
    const Element *x, *residual;
    Element* y;
  };
  At at(int64_t outer, int64_t channel) const {
    return {place(static_cast<const Element*>(p.x), p.x_strides, outer, channel),
            place(static_cast<const Element*>(p.residual), p.residual_strides, outer, channel),
            place(static_cast<Element*>(p.y), p.y_strides, outer, channel)};
  }
  void prefetch(const At& a, int64_t count) const { prefetch_next_channel<D>(a.y, p.y_strides.channel, count); }
  template <class Count>
  void operator()(const At& a, int64_t i, Count count, const Channel& k) const {
    const Vec<D> deviation = load<D>(a.x + i, count) - k.center;
    Vec<D> z;
    if constexpr (D::kWithRest)
      z = multiply_add<D>(deviation, k.scale, multiply_add<D>(deviation, k.scale_rest, k.shift));
    else
      z = deviation * k.scale + k.shift;
    if constexpr (!kPlain) {
      if (a.residual) z += load<D>(a.residual + i, count);
      if (p.activation == Activation::relu) z = relu(z);
    }
    put<D>(a.y + i, z, count, streamed);
  }
};

/// (dy, x) to dx and dresidual with coefficients center, slope, bend, shift, and the forward's scale and shift.
template <class D, bool kPlain>
struct NormalizeGradient {
  using Element = typename D::Element;
  const BackwardParams& p;
  const bool streamed;

  struct Channel {
    Vec<D> center, slope, bend, shift, forward_scale, forward_shift;
    template <class Read>
    explicit Channel(const Read& read)
        : center(read(0)), slope(read(1)), bend(read(2)), shift(read(3)), forward_scale{}, forward_shift{} {
      if constexpr (!kPlain) forward_scale = read(4), forward_shift = read(5);
    }
  };
  struct At {
    UpstreamGradient<D, kPlain> from;
    Element *dx, *dresidual;
  };
  At at(int64_t outer, int64_t channel) const {
    return {UpstreamGradient<D, kPlain>(p, outer, channel, 0),
            place(static_cast<Element*>(p.dx), p.dx_strides, outer, channel),
            place(static_cast<Element*>(p.dresidual), p.dresidual_strides, outer, channel)};
  }
  void prefetch(const At& a, int64_t count) const { prefetch_next_channel<D>(a.dx, p.dx_strides.channel, count); }
  template <class Count>
  void operator()(const At& a, int64_t i, Count count, const Channel& k) const {
    const Vec<D> deviation = load<D>(a.from.x + i, count) - k.center;
    const Vec<D> dz = a.from.dz(i, count, deviation, k.forward_scale, k.forward_shift);
    const Vec<D> dx = dz * k.slope + (deviation * k.bend + k.shift);
    if (kPlain || a.dx) put<D>(a.dx + i, dx, count, streamed);
    if (!kPlain && a.dresidual) store<D>(a.dresidual + i, dz, count);
  }
};

/// The coefficients of every group and column: arrays of [groups, columns], one after another.
template <class T>
struct Coefficients {
  T* data;
  int64_t length;  // groups * columns
  T* row(int k) const { return data + k * apart(length); }
  static int64_t apart(int64_t length) { return length + kCacheSkew / int64_t(sizeof(T)); }
};

/// Applies a map to the planes of the channels, at the given outers.
template <class D, class Map>
__attribute__((flatten)) void map_planes(const Map map, const Extent& e,
                                         const Coefficients<typename D::Compute>& coefficients, Range outers,
                                         Range channels) {
  const int64_t inner = e.inner;
  for (int64_t outer = outers.first; outer < outers.last; ++outer) {
    const int64_t group = group_of(e, outer) * e.channels;
    for (int64_t channel = channels.first; channel < channels.last; ++channel) {
      const typename Map::Channel k([&](int row) { return splat<D>(coefficients.row(row)[group + channel]); });
      const auto at = map.at(outer, channel);
      if (!map.streamed) map.prefetch(at, inner);
      each_register_overlapping<D>(inner, [=](int64_t i, auto count) { map(at, i, count, k); });
    }
  }
}

/// Applies a map to `width` columns of kRows rows side by side.
/// NB: arguments by value, so that no store can be taken to change them.
template <class D, int kRows, class Map>
__attribute__((flatten)) void map_row_group(const Map map, const typename Map::At* rows, int64_t width,
                                            const Coefficients<typename D::Compute> coefficients, int64_t first) {
  struct {
    typename Map::At at[kRows];
  } group;
  __builtin_memcpy(&group, rows, sizeof group);
  each_register_overlapping<D>(width, [=](int64_t i, auto count) {
    const auto read = [=](int row) { return load<Parameter<D>>(coefficients.row(row) + first + i, count); };
    const typename Map::Channel k(read);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) map(group.at[row], i, count, k);
  });
}

/// Applies a map to columns of the rows.
template <class D, class Map>
void map_rows(const Map& map, const Extent& e, const Coefficients<typename D::Compute>& coefficients, Range outers,
              Range columns) {
  constexpr int kRows = 4;
  const RowOrder order = RowOrder::of(kRows, e, sizeof(typename D::Element));
  const int64_t width = columns.last - columns.first, block = order.block();
  const bool side_by_side = order.run > 1 || !order.rotated;
  for (int64_t outer = outers.first; outer < outers.last;) {
    const int64_t first = group_of(e, outer) * e.channels + columns.first;
    if (side_by_side && outer + block <= outers.last && in_one_group(e, outer, block)) {
      typename Map::At at[4 * kRows];
      for (int64_t i = 0; i < block; ++i) at[i] = map.at(outer + order(i), columns.first);
      for (int64_t i = 0; i < block; i += kRows) map_row_group<D, kRows>(map, at + i, width, coefficients, first);
      outer += block;
    } else {
      const typename Map::At at = map.at(outer, columns.first);
      map_row_group<D, 1>(map, &at, width, coefficients, first);
      ++outer;
    }
  }
}

template <class D, class Map>
void map_elements(const Map& map, const Extent& e, const Coefficients<typename D::Compute>& coefficients, Range outers,
                  Range columns) {
  if (e.inner == 1) return map_rows<D>(map, e, coefficients, outers, columns);
  map_planes<D>(map, e, coefficients, outers, columns);
}
