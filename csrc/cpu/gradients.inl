// The reduction of the backward pass: sums of dz and of dz * (x - center), per slice, group and channel, where dz is dy
// through the activation. Blocks are summed in the compute type and added up in double.

/// dy, and dz made of it, at one place of memory. kPlain: there is no activation, so dz is dy.
template <class D, bool kPlain>
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
    if (kPlain || activation == Activation::none) return gradient;
    Vec<D> z = deviation * scale + shift;
    if (residual) z += load<D>(residual + i, count);
    return relu_gradient(z, gradient);
  }
};

/// What the reduction needs to know of the forward map.
template <class D>
struct Forwarded {
  const typename D::Compute *center, *scale, *shift;  // [columns]
};

/// Adds the sums over the units [first, last) of at most kPlanes channels.
template <class D, bool kPlain>
__attribute__((flatten)) void plane_group_gradients(const BackwardParams& p, const Partition& cut,
                                                    const GroupOuters& outers, Range units, Range channels,
                                                    const Forwarded<D>& forwarded, double* __restrict sum_dz,
                                                    double* __restrict sum_dz_deviation) {
  for (int64_t unit = units.first; unit < units.last; unit += cut.whole)
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const Vec<D> center = splat<D>(forwarded.center[c]), scale = splat<D>(forwarded.scale[c]),
                   shift = splat<D>(forwarded.shift[c]);
      Sums<D> sums;
      for (int64_t u = unit; u < least(unit + cut.whole, units.last); ++u) {
        const Segment s = segment_of(p.extent, cut, outers, u);
        const UpstreamGradient<D, kPlain> from(p, s.outer, c, s.begin);
        prefetch_next_channel<D>(from.x, p.x_strides.channel, s.count);
        prefetch_next_channel<D>(from.dy, p.dy_strides.channel, s.count);
        sums.add(s.count, [&](int64_t i, auto count, Vec<D>& s1, Vec<D>& s2) {
          const Vec<D> deviation = load<D>(from.x + i, count) - center;
          const Vec<D> dz = from.dz(i, count, deviation, scale, shift);
          s1 += keep<D>(dz, count);
          s2 += keep<D>(dz * deviation, count);
        });
      }
      sum_dz[c] += sums.total_first();
      sum_dz_deviation[c] += sums.total_second();
    }
}

template <class D, bool kPlain>
void plane_gradients(const BackwardParams& p, const Partition& cut, const GroupOuters& outers, Range units,
                     Range channels, const Forwarded<D>& forwarded, double* sum_dz, double* sum_dz_deviation) {
  for (int64_t c = channels.first; c < channels.last; c += kPlanes)
    plane_group_gradients<D, kPlain>(p, cut, outers, units, {c, least(c + kPlanes, channels.last)}, forwarded, sum_dz,
                                     sum_dz_deviation);
}

/// Adds the sums over n rows, for `width` adjacent columns.
template <class D, bool kPlain>
__attribute__((flatten)) void add_row_block(const UpstreamGradient<D, kPlain>* row, int n, int64_t width,
                                            const Forwarded<D>& forwarded, double* __restrict sum_dz,
                                            double* __restrict sum_dz_deviation) {
  using P = Parameter<D>;
  typename D::Compute first[kSkewedBlock<D>], second[kSkewedBlock<D>];
  for (int64_t c = 0; c < width; ++c) first[c] = second[c] = 0;
  const auto add = [&](int begin, auto rows) {
    each_register<D>(width, [&](int64_t c, auto count) {
      const Vec<D> center = load<P>(forwarded.center + c, count);
      Vec<D> scale = {}, shift = {};
      if constexpr (!kPlain) scale = load<P>(forwarded.scale + c, count), shift = load<P>(forwarded.shift + c, count);
      Vec<D> s1 = {}, s2 = {};
      for (int r = begin; r < begin + decltype(rows)::value; ++r) {
        if (r + kRowGroup < n) prefetch_ahead(row[r + kRowGroup].x + c), prefetch_ahead(row[r + kRowGroup].dy + c);
        const Vec<D> deviation = load<D>(row[r].x + c, count) - center;
        const Vec<D> dz = row[r].dz(c, count, deviation, scale, shift);
        s1 += dz;
        s2 += dz * deviation;
      }
      store<P>(first + c, load<P>(first + c, count) + s1, count);
      store<P>(second + c, load<P>(second + c, count) + s2, count);
    });
  };
  int r = 0;
  for (; r + kRowGroup <= n; r += kRowGroup) add(r, Number<kRowGroup>{});
  for (; r < n; ++r) add(r, Number<1>{});
  for (int64_t c = 0; c < width; ++c) sum_dz[c] += first[c];
  for (int64_t c = 0; c < width; ++c) sum_dz_deviation[c] += second[c];
}

/// Adds the sums over the group's outers [rows.first, rows.last), for the columns, kColumnBlock at most.
template <class D, bool kPlain>
void row_gradients(const BackwardParams& p, const GroupOuters& outers, Range rows, Range columns,
                   const Forwarded<D>& forwarded, double* sum_dz, double* sum_dz_deviation) {
  const int64_t c = columns.first;
  for (int64_t begin = rows.first; begin < rows.last; begin += kRowBlock) {
    const int n = int(least(kRowBlock, rows.last - begin));
    UpstreamGradient<D, kPlain> row[kRowBlock];
    order_rows<D>(p.extent, n, [&](int64_t i, int64_t r) {
      row[i] = UpstreamGradient<D, kPlain>(p, outers[begin + r], c, 0);
    });
    add_row_block<D, kPlain>(row, n, columns.last - c, {forwarded.center + c, forwarded.scale + c, forwarded.shift + c},
                             sum_dz + c, sum_dz_deviation + c);
  }
}
