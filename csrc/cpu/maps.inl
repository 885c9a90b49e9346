// The two maps over the elements: x to y, and (dy, x) to dx. Each is written for one register; the walk over planes,
// where a channel's coefficients are constant, and over rows, where they change from lane to lane, is shared.
// kPlain: only x to y, or (dy, x) to dx; else there may be an activation, a residual, or a gradient to leave out.

template <class Element>
BN_INLINE Element* place(Element* data, const Strides& s, int64_t outer, int64_t channel) {
  return data ? data + outer * s.outer + channel * s.channel : nullptr;
}

/// x to y with coefficients center, scale, shift.
template <class D, class P, bool kPlain>
struct Normalize {
  static constexpr int kCoefficients = 3;
  using Element = typename D::Element;
  const P& p;

  struct At {
    const Element *x, *residual;
    Element* y;
  };
  At at(int64_t outer, int64_t channel) const {
    return {place(static_cast<const Element*>(p.x), p.x_strides, outer, channel),
            place(static_cast<const Element*>(p.residual), p.residual_strides, outer, channel),
            place(static_cast<Element*>(p.y), p.y_strides, outer, channel)};
  }
  template <class Count>
  void operator()(const At& a, int64_t i, Count count, const Vec<D>* k) const {
    Vec<D> z = (load<D>(a.x + i, count) - k[0]) * k[1] + k[2];
    if constexpr (!kPlain) {
      if (a.residual) z += load<D>(a.residual + i, count);
      if (p.activation == Activation::relu) z = relu(z);
    }
    store<D>(a.y + i, z, count);
  }
};

/// (dy, x) to dx and dresidual with coefficients center, slope, bend, shift, and the forward's scale and shift.
template <class D, bool kPlain>
struct NormalizeGradient {
  static constexpr int kCoefficients = kPlain ? 4 : 6;
  using Element = typename D::Element;
  const BackwardParams& p;

  struct At {
    UpstreamGradient<D, kPlain> from;
    Element *dx, *dresidual;
  };
  At at(int64_t outer, int64_t channel) const {
    return {UpstreamGradient<D, kPlain>(p, outer, channel, 0),
            place(static_cast<Element*>(p.dx), p.dx_strides, outer, channel),
            place(static_cast<Element*>(p.dresidual), p.dresidual_strides, outer, channel)};
  }
  template <class Count>
  void operator()(const At& a, int64_t i, Count count, const Vec<D>* k) const {
    const Vec<D> deviation = load<D>(a.from.x + i, count) - k[0];
    const Vec<D> dz = a.from.dz(i, count, deviation, k[kCoefficients - 2], k[kCoefficients - 1]);
    const Vec<D> dx = dz * k[1] + (deviation * k[2] + k[3]);
    if (kPlain || a.dx) store<D>(a.dx + i, dx, count);
    if (!kPlain && a.dresidual) store<D>(a.dresidual + i, dz, count);
  }
};

/// The coefficients of every group and column: arrays of [groups, columns], one after another.
template <class T>
struct Coefficients {
  T* data;
  int64_t length;  // groups * columns
  T* row(int k) const { return data + k * length; }
};

/// Applies a map to the planes of the channels, at the given outers.
template <class D, class Map>
__attribute__((flatten)) void map_planes(const Map& map, const Extent& e, const Coefficients<typename D::Compute>& coefficients,
                                         Range outers, Range channels) {
  for (int64_t outer = outers.first; outer < outers.last; ++outer) {
    const int64_t group = group_of(e, outer) * e.channels;
    for (int64_t channel = channels.first; channel < channels.last; ++channel) {
      Vec<D> k[Map::kCoefficients];
      for (int r = 0; r < Map::kCoefficients; ++r) k[r] = splat<D>(coefficients.row(r)[group + channel]);
      const auto at = map.at(outer, channel);
      each_register<D>(e.inner, [&](int64_t i, auto count) { map(at, i, count, k); });
    }
  }
}

/// Applies a map to `width` columns of kRows rows of one group side by side.
template <class D, int kRows, class Map>
__attribute__((flatten)) void map_row_group(const Map& map, const typename Map::At* at, int64_t width,
                                            const typename D::Compute* const* coefficients) {
  each_register<D>(width, [&](int64_t i, auto count) {
    Vec<D> k[Map::kCoefficients];
    for (int r = 0; r < Map::kCoefficients; ++r) k[r] = load<Parameter<D>>(coefficients[r] + i, count);
    for (int row = 0; row < kRows; ++row) map(at[row], i, count, k);
  });
}

/// Applies a map to columns of the rows.
template <class D, class Map>
void map_rows(const Map& map, const Extent& e, const Coefficients<typename D::Compute>& coefficients, Range outers,
              Range columns) {
  constexpr int kRows = 4;
  for (int64_t outer = outers.first; outer < outers.last;) {
    const int64_t group = group_of(e, outer);
    typename Map::At at[kRows];
    const typename D::Compute* k[Map::kCoefficients];
    for (int r = 0; r < Map::kCoefficients; ++r) k[r] = coefficients.row(r) + group * e.channels + columns.first;
    int rows = 0;
    for (; rows < kRows && outer + rows < outers.last && group_of(e, outer + rows) == group; ++rows)
      at[rows] = map.at(outer + rows, columns.first);
    const int64_t width = columns.last - columns.first;
    if (rows == kRows)
      map_row_group<D, kRows>(map, at, width, k);
    else
      for (int row = 0; row < rows; ++row) map_row_group<D, 1>(map, at + row, width, k);
    outer += rows;
  }
}

template <class D, class Map>
void map_elements(const Map& map, const Extent& e, const Coefficients<typename D::Compute>& coefficients, Range outers,
                  Range columns) {
  e.inner == 1 ? map_rows<D>(map, e, coefficients, outers, columns) : map_planes<D>(map, e, coefficients, outers, columns);
}
