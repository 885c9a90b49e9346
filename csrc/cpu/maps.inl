// The two maps over the elements: x to y, and (dy, x) to dx. Each is written for one register; the walk over planes,
// where a channel's coefficients are constant, and over rows, where they change from lane to lane, is shared.

/// x to y with coefficients center, scale, shift.
template <class D, class P>
struct Normalize {
  static constexpr int kCoefficients = 3;
  using Element = typename D::Element;
  const Element *x, *residual;
  Element* y;
  Activation activation;

  Normalize(const P& p, int64_t outer, int64_t channel) : activation(p.activation) {
    x = static_cast<const Element*>(p.x) + outer * p.x_strides.outer + channel * p.x_strides.channel;
    y = static_cast<Element*>(p.y) + outer * p.y_strides.outer + channel * p.y_strides.channel;
    residual = p.residual ? static_cast<const Element*>(p.residual) + outer * p.residual_strides.outer +
                                channel * p.residual_strides.channel
                          : nullptr;
  }
  template <class Count>
  void operator()(int64_t i, Count count, const Vec<D>* k) const {
    Vec<D> z = (load<D>(x + i, count) - k[0]) * k[1] + k[2];
    if (residual) z += load<D>(residual + i, count);
    if (activation == Activation::relu) z = relu(z);
    store<D>(y + i, z, count);
  }
};

/// (dy, x) to dx and dresidual with coefficients center, slope, bend, shift, and the forward's scale and shift.
template <class D>
struct NormalizeGradient {
  static constexpr int kCoefficients = 6;
  using Element = typename D::Element;
  UpstreamGradient<D> from;
  Element *dx, *dresidual;

  NormalizeGradient(const BackwardParams& p, int64_t outer, int64_t channel) : from(p, outer, channel, 0) {
    const auto at = [&](void* data, const Strides& s) {
      return data ? static_cast<Element*>(data) + outer * s.outer + channel * s.channel : nullptr;
    };
    dx = at(p.dx, p.dx_strides);
    dresidual = at(p.dresidual, p.dresidual_strides);
  }
  template <class Count>
  void operator()(int64_t i, Count count, const Vec<D>* k) const {
    const Vec<D> deviation = load<D>(from.x + i, count) - k[0];
    const Vec<D> dz = from.dz(i, count, deviation, k[4], k[5]);
    if (dx) store<D>(dx + i, dz * k[1] + (deviation * k[2] + k[3]), count);
    if (dresidual) store<D>(dresidual + i, dz, count);
  }
};

/// The coefficients of every group and channel: arrays of [groups, channels], one after another.
template <class T>
struct Coefficients {
  T* data;
  int64_t length;  // groups * channels
  T* row(int k) const { return data + k * length; }
};

/// Applies Map to the outers [first, last) of the channels, plane by plane or row by row.
template <class D, class Map, class P>
void map_elements(const P& p, const Coefficients<typename D::Compute>& coefficients, Range outers, Range channels) {
  const Extent& e = p.extent;
  Vec<D> k[Map::kCoefficients];
  for (int64_t outer = outers.first; outer < outers.last; ++outer) {
    const int64_t group = group_of(e, outer) * e.channels;
    if (e.inner == 1) {
      const Map map(p, outer, channels.first);
      each_register<D>(channels.last - channels.first, [&](int64_t i, auto count) {
        for (int r = 0; r < Map::kCoefficients; ++r)
          k[r] = load<Parameter<D>>(coefficients.row(r) + group + channels.first + i, count);
        map(i, count, k);
      });
      continue;
    }
    for (int64_t channel = channels.first; channel < channels.last; ++channel) {
      for (int r = 0; r < Map::kCoefficients; ++r) k[r] = splat<D>(coefficients.row(r)[group + channel]);
      const Map map(p, outer, channel);
      each_register<D>(e.inner, [&](int64_t i, auto count) { map(i, count, k); });
    }
  }
}
