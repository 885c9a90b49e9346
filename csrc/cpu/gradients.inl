// The reduction of the backward pass: sums of dz and of dz * (x - center), per slice, group and channel, where dz is dy
// through the activation. Blocks are summed in the compute type and added up in double.

/// Whether the reduction leaves the gradient at a curved activation, which is more arithmetic than memory, where the map
/// then reads it: in dresidual or dx. Half types would round it.
template <class D>
constexpr bool kKeepsGradient = kIsCurved<D> && kNarrowing<D> == 1 && BN_VECTOR_BYTES < 64;

/// Where dz of a curved activation has been found, the activation's number, and where dz is kept.
template <class D, bool kCurved = kIsCurved<D>>
struct CurvedGradient {};
template <class D>
struct CurvedGradient<D, true> {
  const typename D::Compute* found;
  double number;
  typename D::Element* kept;
};

/// The forward's coefficients of one register, to find the normalised value again.
template <class D>
struct ForwardedLanes {
  Vec<D> center, scale, shift;
};

/// dy, and dz made of it, at one place of memory.
template <class D, Ending kEnding>
struct UpstreamGradient {
  using Element = typename D::Element;
  const Element *dy, *x, *residual;
  MarkedAt mask;
  Activation activation;
  [[no_unique_address]] CurvedGradient<D> curved;

  UpstreamGradient() = default;
  UpstreamGradient(const BackwardParams& p, int64_t outer, int64_t channel, int64_t begin) {
    const auto at = [&](const void* data, const Strides& s) {
      return data ? static_cast<const Element*>(data) + outer * s.outer + channel * s.channel + begin : nullptr;
    };
    dy = at(p.dy, p.dy_strides);
    x = at(p.x, p.x_strides);
    residual = at(p.residual, p.residual_strides);
    if constexpr (kEnding == Ending::masked) mask = mask_place<D>(p.mask, p.extent, outer, channel, begin);
    activation = p.activation;
    if constexpr (kIsCurved<D>) curved.number = p.activation_number;
    if constexpr (kKeepsGradient<D>)
      curved.kept = const_cast<Element*>(p.dresidual ? at(p.dresidual, p.dresidual_strides) : at(p.dx, p.dx_strides));
  }
  /// Finds dz of n elements, as many as a block holds, at a curved activation; forwarded_at(i, count) as dz() takes it.
  template <class ForwardedAt>
  void find(int64_t n, const ForwardedAt& forwarded_at, CurvedBlock<D>& block) {
    each_register<D>(0, n, [&](int64_t i, auto count) BN_INLINED {
      const ForwardedLanes<D>& k = forwarded_at(i, count);
      Vec<D> z = (load<D>(x + i, count) - k.center) * k.scale + k.shift;
      if (residual) z += load<D>(residual + i, count);
      store<Parameter<D>>(block.z + i, z);
    });
    block.differentiate(activation, curved.number, n, dy);
    curved.found = block.gradient;
  }
  /// Leaves dz where dz() would, but past the caches.
  void keep_past_cache(int64_t n, const CurvedBlock<D>& block) {
    constexpr int64_t L = kLanes<D>;
    const int64_t whole = n / L * L;
    for (int64_t i = 0; i < whole; i += L) stream<D>(curved.kept + i, load_whole<Parameter<D>>(block.gradient + i));
    for (int64_t i = whole; i < n; ++i) curved.kept[i] = block.gradient[i];
    curved.kept = nullptr;
  }
  /// dz of one register; scale and shift are the forward's, to find the normalised value again.
  template <class Count>
  Vec<D> dz(int64_t i, Count count, Vec<D> deviation, Vec<D> scale, Vec<D> shift) const {
    if constexpr (kIsCurved<D>) {
      const Vec<D> dz = load<Parameter<D>>(curved.found + i, count);
      if constexpr (kKeepsGradient<D>)
        if (curved.kept) store<D>(curved.kept + i, dz, count);
      return dz;
    }
    if constexpr (kEnding == Ending::masked) return load_marked<D>(dy, mask, i, count);
    const Vec<D> gradient = load<D>(dy + i, count);
    if (kEnding == Ending::none || (kEnding == Ending::general && activation == Activation::none)) return gradient;
    Vec<D> z = deviation * scale + shift;
    if (kEnding == Ending::general && residual) z += load<D>(residual + i, count);
    return relu_gradient(z, gradient);
  }
};

/// What the reduction needs to know of the forward map, and whether rows keep their gradient past the caches.
template <class D>
struct Forwarded {
  const typename D::Compute *center, *scale, *shift;  // [columns]
  bool kept_past_cache = false;
};

/// The sums over the units [first, last) of at most kPlanes channels.
template <class D, Ending kEnding>
__attribute__((flatten)) void plane_group_gradients(const BackwardParams& p, const Partition& cut,
                                                    const GroupOuters& outers, Range units, Range channels, Range all,
                                                    const Forwarded<D>& forwarded,
                                                    double* __restrict sum_dz, double* __restrict sum_dz_deviation) {
  [[maybe_unused]] CurvedBlock<D> block;
  WideSums<D> wide[kPlanes];
  for (int64_t unit = units.first; unit < units.last; unit += cut.together) {
    const Segments segments(p.extent, cut, outers, {unit, least(unit + cut.together, units.last)});
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const Vec<D> center = splat<D>(forwarded.center[c]), scale = splat<D>(forwarded.scale[c]),
                   shift = splat<D>(forwarded.shift[c]);
      FoldedSums<D> sums;
      const auto sum_about = [&](const auto& deviation) BN_INLINED {
        for (int k = 0; k < segments.count; ++k) {
          const Segment s = segments.at[k];
          UpstreamGradient<D, kEnding> from(p, s.outer, c, s.begin);
          if constexpr (kIsCurved<D>)
            from.find(s.count, [&](int64_t, auto) BN_INLINED { return ForwardedLanes<D>{center, scale, shift}; }, block);
          prefetch_after<D>(from.x, p.extent, p.x_strides, channels, all);
          prefetch_after<D>(from.dy, p.extent, p.dy_strides, channels, all);
          const auto add = [&](int64_t i, auto count, Vec<D>& s1, Vec<D>& s2) {
            const Vec<D> d = deviation(load<D>(from.x + i, count));
            const Vec<D> dz = from.dz(i, count, d, scale, shift);
            s1 += keep<D>(dz, count);
            s2 += keep<D>(dz * d, count);
          };
          sums.add(s.count, add, [](int64_t) {});
        }
      };
      const auto from_center = [=](Vec<D> x) BN_INLINED { return x - center; };
      if constexpr (kIsArithmetic<D> && !kIsCurved<D>)
        forwarded.center[c] == 0 ? sum_about([](Vec<D> x) BN_INLINED { return x; }) : sum_about(from_center);
      else
        sum_about(from_center);
      wide[c - channels.first].add(sums, unit == units.first);
    }
  }
  for (int64_t c = channels.first; c < channels.last; ++c) {
    sum_dz[c] = wide[c - channels.first].first.total();
    sum_dz_deviation[c] = wide[c - channels.first].second.total();
  }
}

/// Adds those of one register of some rows to the sums, each at the same place.
template <class D, Ending kEnding, int kRows, class Count>
BN_INLINE void add_gradients(const UpstreamGradient<D, kEnding> (&rows)[kRows], int64_t c, Count count,
                             const Forwarded<D>& forwarded, typename D::Compute* first, typename D::Compute* second) {
  using P = Parameter<D>;
  const Vec<D> center = load<P>(forwarded.center + c, count);
  Vec<D> scale = {}, shift = {};
  if constexpr (forwards_again(kEnding))
    scale = load<P>(forwarded.scale + c, count), shift = load<P>(forwarded.shift + c, count);
  Vec<D> s1 = load<P>(first + c, count), s2 = load<P>(second + c, count);
  with_rows<kRows>([&](auto... row) BN_INLINED {
    const Vec<D> deviation[] = {(load<D>(rows[row].x + c, count) - center)...};
    const Vec<D> dz[] = {rows[row].dz(c, count, deviation[row], scale, shift)...};
    s1 += sum_of((dz[row])...);
    s2 += sum_of((dz[row] * deviation[row])...);
  });
  store<P>(first + c, s1, count);
  store<P>(second + c, s2, count);
}

/// Adds those of a row through a curved activation, a block at a time.
template <class D, Ending kEnding>
BN_INLINE void add_curved_gradients(const BackwardParams& p, int64_t outer, int64_t column, int64_t width,
                                    const Forwarded<D>& forwarded, typename D::Compute* first,
                                    typename D::Compute* second) {
  constexpr int64_t kMost = CurvedBlock<D>::kMost;
  CurvedBlock<D> block;
  for (int64_t begin = 0; begin < width; begin += kMost) {
    const int64_t n = least(kMost, width - begin);
    const Forwarded<D> here{forwarded.center + begin, forwarded.scale + begin, forwarded.shift + begin};
    const auto forwarded_at = [=](int64_t c, auto count) BN_INLINED {
      const auto at = [=](const auto* values) BN_INLINED { return load<Parameter<D>>(values + c, count); };
      return ForwardedLanes<D>{at(here.center), at(here.scale), at(here.shift)};
    };
    UpstreamGradient<D, kEnding> row[] = {{p, outer, column, begin}};
    row->find(n, forwarded_at, block);
    if constexpr (kKeepsGradient<D> && kHasLines<D>)
      if (forwarded.kept_past_cache && row->curved.kept) row->keep_past_cache(n, block);
    each_register<D>(0, n, [&](int64_t c, auto count) {
      add_gradients<D, kEnding>(row, c, count, here, first + begin, second + begin);
    });
  }
}

BN_INLINE bool is_one_run(const BackwardParams& p, int64_t width) {
  return p.x_strides.outer == width && p.dy_strides.outer == width;
}

/// How many rows are taken side by side.
template <class D>
int rows_together(const BackwardParams& p, int64_t width) {
  if (kIsCurved<D>) return 1;
  if (kIsArithmetic<D> && side_by_side<D>(p.extent, is_one_run(p, width))) return 4;
  return width >= kLongRow<D> ? 2 : 1;
}

/// Sums over the rows [rows.first, rows.last) of the group, for `width` adjacent columns from `column` on.
template <class D, Ending kEnding>
__attribute__((flatten)) void sum_few_gradients(const BackwardParams& p, const GroupOuters& outers, Range rows,
                                                int64_t column, int64_t width, int together,
                                                const Forwarded<D>& forwarded, typename D::Compute* first,
                                                typename D::Compute* second) {
  OuterWalk walk(outers, rows.first);
  for (int64_t c = 0; c < width; ++c) first[c] = second[c] = 0;
  const int64_t x_stride = p.x_strides.outer, dy_stride = p.dy_strides.outer;
  const auto add = [&](auto some, int64_t) BN_INLINED {
    using Together = decltype(some);
    constexpr int kRows = Together::kRows;
    if constexpr (kIsCurved<D>)
      return add_curved_gradients<D, kEnding>(p, walk.next(), column, width, forwarded, first, second);
    UpstreamGradient<D, kEnding> row[kRows];
    for (int k = 0; k < kRows; ++k) row[k] = UpstreamGradient<D, kEnding>(p, walk.next(), column, 0);
    const RowsAhead<D, Together> next_x(row->x, width, x_stride), next_dy(row->dy, width, dy_stride);
    each_pair<D>(width, [&](int64_t c, auto count) BN_INLINED {
      if (!kIsSecond<decltype(count)>) next_x.ask(c), next_dy.ask(c);
      add_gradients<D, kEnding, kRows>(row, c, count, forwarded, first, second);
    });
  };
  int64_t r = rows.first;
  if constexpr (!kIsCurved<D>) {
    if constexpr (kIsArithmetic<D>)
      if (together == 4) r = each_rows<4, true>(r, rows.last, add);
    if (together == 2)
      r = is_one_run(p, width) ? each_rows<2, true>(r, rows.last, add) : each_rows<2, false>(r, rows.last, add);
  }
  each_rows<1, true>(r, rows.last, add);
}

/// The same of one run of channels, over whole planes; next as for the moments.
template <class D, Ending kEnding>
__attribute__((flatten)) void run_gradients(const BackwardParams& p, const GroupOuters& outers, Range planes,
                                            Range channels, int64_t next, const Forwarded<D>& forwarded,
                                            double* __restrict sum_dz, double* __restrict sum_dz_deviation) {
  const int64_t inner = p.extent.inner, c = channels.first, width = channels.last - c;
  const int64_t x_away = next * p.x_strides.channel, dy_away = next * p.dy_strides.channel;
  constexpr bool kForwarded = forwards_again(kEnding);
  alignas(64) typename D::Compute center[kReducedRun + kSlack], scale[kForwarded ? kReducedRun + kSlack : 1],
      shift[kForwarded ? kReducedRun + kSlack : 1];
  WideSums<Parameter<D>> wide[kRunChannels];
  spread_to_reduce<D>(forwarded.center + c, width, inner, center);
  if constexpr (kForwarded) {
    spread_to_reduce<D>(forwarded.scale + c, width, inner, scale);
    spread_to_reduce<D>(forwarded.shift + c, width, inner, shift);
  }
  const auto fetch = [&](const auto& row, int64_t i) BN_FETCHES {
    if constexpr (kNarrowing<D> > 1) return;  // conversions leave no time for it
    prefetch_ahead(row.x + i + x_away), prefetch_ahead(row.dy + i + dy_away);
  };
  const auto add = [&](const auto& row, int64_t i, auto lanes, Vec<D>& s1, Vec<D>& s2) {
    const auto at = [&](const auto* run) { return load<Parameter<D>>(run + i, lanes); };
    const Vec<D> deviation = load<D>(row.x + i, lanes) - at(center);
    Vec<D> forward_scale = {}, forward_shift = {};
    if constexpr (kForwarded) forward_scale = at(scale), forward_shift = at(shift);
    const Vec<D> dz = row.dz(i, lanes, deviation, forward_scale, forward_shift);
    s1 += dz;
    s2 += dz * deviation;
  };
  for (int64_t plane = planes.first; plane < planes.last; plane += kRunRows<D>) {
    const int64_t rows = least(kRunRows<D>, planes.last - plane);
    if constexpr (kIsCurved<D>) {
      typename D::Compute first[kReducedRun + kSlack], second[kReducedRun + kSlack];
      const Forwarded<D> here{center, scale, shift};
      sum_few_gradients<D, kEnding>(p, outers, {plane, plane + rows}, c, width * inner, 1, here, first, second);
      add_columns<Parameter<D>>(width, inner, first, second, wide, plane == planes.first);
    } else {
      UpstreamGradient<D, kEnding> row[kRunRows<D>];
      for (int64_t j = 0; j < rows; ++j) row[j] = UpstreamGradient<D, kEnding>(p, outers[plane + j], c, 0);
      add_runs<D>(row, rows, width, inner, fetch, add, wide, plane == planes.first);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    sum_dz[c + i] = wide[i].first.total();
    sum_dz_deviation[c + i] = wide[i].second.total();
  }
}

/// in_runs: whether planes may be walked so.
template <class D, Ending kEnding>
void plane_gradients(const BackwardParams& p, const Partition& cut, const GroupOuters& outers, Range units,
                     Range channels, int64_t next, bool in_runs, const Forwarded<D>& forwarded, double* sum_dz,
                     double* sum_dz_deviation) {
  if constexpr (kHasLines<D>) {
    if (const int64_t run = in_runs ? channels_reduced_as_run<D>(p.extent) : 0) {
      for (int64_t c = channels.first; c < channels.last; c += run)
        run_gradients<D, kEnding>(p, outers, units, {c, least(c + run, channels.last)}, next, forwarded, sum_dz,
                                 sum_dz_deviation);
      return;
    }
  }
  for (int64_t c = channels.first; c < channels.last; c += kPlanes)
    plane_group_gradients<D, kEnding>(p, cut, outers, units, {c, least(c + kPlanes, channels.last)}, channels, forwarded,
                                      sum_dz, sum_dz_deviation);
}

/// The sums over the group's outers [rows.first, rows.last), for the columns, kColumnBlock at most.
template <class D, Ending kEnding>
void row_gradients(const BackwardParams& p, const GroupOuters& outers, Range rows, Range columns,
                   const Forwarded<D>& forwarded, double* __restrict sum_dz, double* __restrict sum_dz_deviation) {
  constexpr int kConstants = forwards_again(kEnding) ? 3 : 1;
  const int64_t c = columns.first, width = columns.last - c;
  RowScratch<D, kConstants> scratch;
  const auto copy = [&](int k, const typename D::Compute* values) {
    copy_arranged<D>(values + c, width, scratch.constant(k));
    return scratch.constant(k);
  };
  Forwarded<D> here{copy(0, forwarded.center), nullptr, nullptr, forwarded.kept_past_cache};
  if constexpr (kConstants > 1) here.scale = copy(1, forwarded.scale), here.shift = copy(2, forwarded.shift);
  auto *const first = scratch.first(), *const second = scratch.second();
  for (int64_t i = 0; i < width; ++i) sum_dz[c + i] = sum_dz_deviation[c + i] = 0;
  const int together = rows_together<D>(p, width);
  const int64_t few = together * kFewRows;
  for (int64_t r = rows.first; r < rows.last; r += few) {
    sum_few_gradients<D, kEnding>(p, outers, {r, least(r + few, rows.last)}, c, width, together, here, first, second);
    put_in_order<D>(first, in_pairs<D>(width)), put_in_order<D>(second, in_pairs<D>(width));
    for (int64_t i = 0; i < width; ++i) sum_dz[c + i] += double(first[i]);
    for (int64_t i = 0; i < width; ++i) sum_dz_deviation[c + i] += double(second[i]);
  }
}
