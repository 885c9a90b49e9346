// The reduction of the backward pass: sums of dz and of dz * (x - center), per slice, group and channel, where dz is dy
// through the activation. Blocks are summed in the compute type and added up in double.

/// dy, and dz made of it, at one place of memory.
template <class D>
struct UpstreamGradient {
  using Element = typename D::Element;
  const Element *dy, *x, *residual;
  Activation activation;

  UpstreamGradient() = default;
  UpstreamGradient(const BackwardParams& p, int64_t outer, int64_t channel, int64_t begin) {
    const auto at = [&](const void* data, const Strides& s) {
      return data ? static_cast<const Element*>(data) + outer * s.outer + channel * s.channel + begin : nullptr;
    };
    dy = at(p.dy, p.dy_strides);
    x = at(p.x, p.x_strides);
    residual = at(p.residual, p.residual_strides);
    activation = p.activation;
  }
  /// dz of one register; scale and shift are the forward's, to find the normalised value again.
  template <class Count>
  Vec<D> dz(int64_t i, Count count, Vec<D> deviation, Vec<D> scale, Vec<D> shift) const {
    const Vec<D> gradient = load<D>(dy + i, count);
    if (activation == Activation::none) return gradient;
    Vec<D> z = deviation * scale + shift;
    if (residual) z += load<D>(residual + i, count);
    return relu_gradient(z, gradient);
  }
};

/// What the reduction needs to know of a channel.
template <class D>
struct Forwarded {
  const typename D::Compute *center, *scale, *shift;  // [channels]
};

template <class D>
void plane_gradients(const BackwardParams& p, const Partition& cut, const GroupOuters& outers, Range units,
                     int64_t channel, const Forwarded<D>& forwarded, double* sum_dz, double* sum_dz_deviation) {
  const Vec<D> center = splat<D>(forwarded.center[channel]), scale = splat<D>(forwarded.scale[channel]),
               shift = splat<D>(forwarded.shift[channel]);
  for (int64_t unit = units.first; unit < units.last; unit += cut.whole) {
    Sums<D> sums;
    for (int64_t u = unit; u < least(unit + cut.whole, units.last); ++u) {
      const Segment s = segment_of(p.extent, cut, outers, u);
      const UpstreamGradient<D> from(p, s.outer, channel, s.begin);
      sums.add(s.count, [&](int64_t i, auto count, Vec<D>& s1, Vec<D>& s2) {
        const Vec<D> deviation = load<D>(from.x + i, count) - center;
        const Vec<D> dz = from.dz(i, count, deviation, scale, shift);
        s1 += dz;
        s2 += keep<D>(dz * deviation, count);
      });
    }
    *sum_dz += sums.total_first();
    *sum_dz_deviation += sums.total_second();
  }
}

/// Adds the sums over n rows, for `lanes` channels from `channel` in W registers, the last of which has `count` lanes.
template <class D, int W, class Count>
void add_row_block(const UpstreamGradient<D>* row, int n, int64_t step, Count count, int lanes,
                   const Forwarded<D>& forwarded, double* sum_dz, double* sum_dz_deviation) {
  using Compute = typename D::Compute;
  constexpr int L = kLanes<D>;
  Vec<D> center[W], scale[W], shift[W], s1[W] = {}, s2[W] = {};
  for (int w = 0; w < W; ++w) {
    center[w] = load<Parameter<D>>(forwarded.center + w * L, count);
    scale[w] = load<Parameter<D>>(forwarded.scale + w * L, count);
    shift[w] = load<Parameter<D>>(forwarded.shift + w * L, count);
  }
  for (int r = 0; r < n; ++r)
    for (int w = 0; w < W; ++w) {
      const Vec<D> deviation = load<D>(row[r].x + step + w * L, count) - center[w];
      const Vec<D> dz = row[r].dz(step + w * L, count, deviation, scale[w], shift[w]);
      s1[w] += dz;
      s2[w] += dz * deviation;
    }
  Compute first[W * L], second[W * L];
  __builtin_memcpy(first, s1, sizeof first);
  __builtin_memcpy(second, s2, sizeof second);
  for (int i = 0; i < lanes; ++i) sum_dz[i] += first[i];
  for (int i = 0; i < lanes; ++i) sum_dz_deviation[i] += second[i];
}

template <class D>
void row_gradients(const BackwardParams& p, const GroupOuters& outers, Range rows, Range channels,
                   const Forwarded<D>& forwarded, double* sum_dz, double* sum_dz_deviation) {
  constexpr int kWide = 4, L = kLanes<D>;
  for (int64_t begin = rows.first; begin < rows.last; begin += kRowBlock) {
    const int n = int(least(kRowBlock, rows.last - begin));
    UpstreamGradient<D> row[kRowBlock];
    for (int r = 0; r < n; ++r) row[r] = UpstreamGradient<D>(p, outers[begin + r], channels.first, 0);
    int64_t c = channels.first;
    const auto add = [&](auto width, auto count, int lanes) {
      const Forwarded<D> here{forwarded.center + c, forwarded.scale + c, forwarded.shift + c};
      add_row_block<D, decltype(width)::value>(row, n, c - channels.first, count, lanes, here, sum_dz + c,
                                                  sum_dz_deviation + c);
      c += lanes;
    };
    while (c + kWide * L <= channels.last) add(Width<kWide>{}, All{}, kWide * L);
    while (c + L <= channels.last) add(Width<1>{}, All{}, L);
    if (c < channels.last) add(Width<1>{}, int(channels.last - c), int(channels.last - c));
  }
}
