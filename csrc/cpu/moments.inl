// The reduction of the forward pass: moments of x, per slice, group and channel.
// Sums within a block are taken around a pivot near the mean, in the compute type; blocks are merged in double.
// The pivot is the mean so far, at first that of another group or of a few elements; a block that turns out to lie
// elsewhere is summed again around its own mean, so one read of memory is enough whatever the data. A block whose sums
// are not finite is taken in double.

/// Two passes in double over n values: for blocks that overflow the compute type or hold NaN or infinity.
template <class At>
__attribute__((noinline)) Moments moments_in_double(int64_t n, const At& at) {
  double mean = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) mean += at(i);
  mean /= double(n);
  for (int64_t i = 0; i < n; ++i) m2 += (at(i) - mean) * (at(i) - mean);
  return {double(n), mean, m2};
}

BN_INLINE bool finite(double a, double b) { return (a - a) + (b - b) == 0; }

/// A pivot may be any number, but must be one.
template <class T>
BN_INLINE T finite_or_zero(T value) {
  return value - value == 0 ? value : T(0);
}

/// Joins the units [first, last) of at most kPlanes of `all` channels to the mean and m2 of `before` earlier samples, 0
/// for none. next: how many channels further on lies what is read soon. `likely`: the means to expect at
/// first, or null. Returns the number of samples then.
template <class D>
__attribute__((flatten)) double join_planes(const ForwardParams& p, const Partition& cut, const GroupOuters& outers,
                                            Range units, Range channels, Range all, int64_t next, double before,
                                            const double* likely, double* __restrict mean, double* __restrict m2) {
  using Compute = typename D::Compute;
  const int width = int(channels.last - channels.first);
  const int64_t away = next * p.x_strides.channel;
  const auto segment = [&](int64_t unit) { return segment_of(p.extent, cut, outers, unit); };
  const auto begin_of = [&](const Segment& s, int c) {
    return static_cast<const typename D::Element*>(p.x) + s.outer * p.x_strides.outer +
           (channels.first + c) * p.x_strides.channel + s.begin;
  };
  Compute pivot[kPlanes];
  double s1[kPlanes], s2[kPlanes], block_mean[kPlanes], block_m2[kPlanes];
  const Segment opening = segment(units.first);
  const int few = int(least(kLanes<D>, opening.count));
  const auto mean_of_few = [&](int c) {
    const auto* from = begin_of(opening, c);
    return sum_of_lanes<D>(few == kLanes<D> ? load<D>(from) : load<D>(from, few)) / few;
  };
  if (before > 0) likely = mean;
  for (int c = 0; c < width; ++c) pivot[c] = finite_or_zero(Compute(likely ? likely[c] : mean_of_few(c)));
  for (int64_t unit = units.first; unit < units.last; unit += cut.whole) {
    const int64_t end = least(unit + cut.whole, units.last);
    int64_t samples = 0;
    for (int64_t u = unit; u < end; ++u) samples += segment(u).count;
    const double count = double(samples), per_sample = 1 / count, weight = count / (before + count);
    const auto sum_around_pivot = [&](int c) {
      Sums<D> sums;
      const Vec<D> center = splat<D>(pivot[c]);
      for (int64_t u = unit; u < end; ++u) {
        const Segment s = segment(u);
        const auto* from = begin_of(s, c);
        prefetch_after<D>(from, p.extent, p.x_strides, channels, all);
        const auto add = [&](int64_t i, auto lanes, Vec<D>& first, Vec<D>& second) {
          const Vec<D> d = keep<D>(load<D>(from + i, lanes) - center, lanes);
          first += d;
          second += d * d;
        };
        sums.add(s.count, add, [=](int64_t i) { prefetch_ahead(from + i + away); });
      }
      s1[c] = sums.total_first();
      s2[c] = sums.total_second();
    };
    for (int c = 0; c < width; ++c) sum_around_pivot(c);
    for (int c = 0; c < width; ++c)
      if (!centred(count, s1[c], s2[c])) {
        pivot[c] += Compute(s1[c] * per_sample);
        sum_around_pivot(c);
      }
    for (int c = 0; c < width; ++c) {
      block_mean[c] = mean_of_sums(per_sample, double(pivot[c]), s1[c]);
      block_m2[c] = m2_of_sums(per_sample, s1[c], s2[c]);
    }
    for (int c = 0; c < width; ++c)
      if (!finite(s1[c], s2[c])) {
        const Moments block = moments_in_double(samples, [&](int64_t i) {
          const Segment s = segment(unit + i / segment(unit).count);
          return element<D>(begin_of(s, c) + i % segment(unit).count);
        });
        block_mean[c] = block.mean;
        block_m2[c] = block.m2;
      }
    for (int c = 0; c < width; ++c) {
      join(mean[c], m2[c], before, block_mean[c], block_m2[c], weight);
      pivot[c] = finite_or_zero(Compute(mean[c]));
    }
    before += count;
  }
  return before;
}

/// Moments of the units [first, last) of the channels, into mean and m2; `likely` as above. Of more channels than are taken
/// side by side a few units each, before the next units: they are one run of memory.
template <class D>
void plane_moments(const ForwardParams& p, const Partition& cut, const GroupOuters& outers, Range units, Range channels,
                   int64_t next, const double* likely, double* mean, double* m2) {
  for (int64_t c = channels.first; c < channels.last; ++c) mean[c] = m2[c] = 0;
  const int64_t step = channels.last - channels.first > kPlanes ? cut.whole : units.last - units.first;
  double before = 0, joined = 0;
  for (int64_t unit = units.first; unit < units.last; unit += step, before = joined)
    for (int64_t c = channels.first; c < channels.last; c += kPlanes)
      joined = join_planes<D>(p, cut, outers, {unit, least(unit + step, units.last)},
                              {c, least(c + kPlanes, channels.last)}, channels, next, before,
                              likely ? likely + c : nullptr, mean + c, m2 + c);
}

/// The sums of deviations and of their squares over n rows, for `width` adjacent columns. One row after another, as memory
/// is quickest to read, while what lies `ahead` of it is fetched. Chains of sums are short where rounding shows.
template <class D>
__attribute__((flatten)) void sum_deviations(const typename D::Element* const* row, int n, int64_t width, int64_t ahead,
                                             const typename D::Compute* pivot, double* __restrict first,
                                             double* __restrict second) {
  using P = Parameter<D>;
  constexpr int kFew = sizeof(typename D::Element) == sizeof(typename D::Compute) ? 8 : kFewRows;
  typename D::Compute few_first[kSkewedBlock<D>], few_second[kSkewedBlock<D>];
  for (int64_t c = 0; c < width; ++c) first[c] = second[c] = 0;
  for (int begin = 0; begin < n; begin += kFew) {
    for (int64_t c = 0; c < width; ++c) few_first[c] = few_second[c] = 0;
    for (int r = begin; r < n && r < begin + kFew; ++r) {
      const typename D::Element* const at = row[r];
      each_register<D>(0, width, [&](int64_t c, auto count) {
        prefetch_ahead(at + c + ahead);
        const Vec<D> d = load<D>(at + c, count) - load<P>(pivot + c, count);
        store<P>(few_first + c, load<P>(few_first + c, count) + d, count);
        store<P>(few_second + c, load<P>(few_second + c, count) + d * d, count);
      });
    }
    for (int64_t c = 0; c < width; ++c) first[c] += double(few_first[c]);
    for (int64_t c = 0; c < width; ++c) second[c] += double(few_second[c]);
  }
}

/// Joins n rows to the mean and m2 of `before` earlier ones, for `width` columns.
template <class D>
void join_row_block(const typename D::Element* const* row, int n, int64_t width, int64_t ahead, double before,
                    double* __restrict mean, double* __restrict m2) {
  using Compute = typename D::Compute;
  Compute pivot[kSkewedBlock<D>] = {};
  double first[kSkewedBlock<D>], second[kSkewedBlock<D>];
  if (before == 0) {
    const int few = n < 8 ? n : 8;
    for (int64_t c = 0; c < width; ++c) pivot[c] = 0;
    sum_deviations<D>(row, few, width, ahead, pivot, first, second);
    for (int64_t c = 0; c < width; ++c) pivot[c] = Compute(first[c] / few);
  } else {
    for (int64_t c = 0; c < width; ++c) pivot[c] = Compute(mean[c]);
  }
  for (int64_t c = 0; c < width; ++c) pivot[c] = finite_or_zero(pivot[c]);
  sum_deviations<D>(row, n, width, ahead, pivot, first, second);
  int far = 0, special = 0;
  for (int64_t c = 0; c < width; ++c) far |= !centred(double(n), first[c], second[c]);
  if (far) {
    for (int64_t c = 0; c < width; ++c) pivot[c] += Compute(first[c] / n);
    sum_deviations<D>(row, n, width, ahead, pivot, first, second);
  }
  const double per_sample = 1.0 / n, weight = n / (before + n);
  for (int64_t c = 0; c < width; ++c) special |= !(first[c] - first[c] + (second[c] - second[c]) == 0);
  if (special)
    for (int64_t c = 0; c < width; ++c) {
      const Moments block = moments_in_double(n, [&](int64_t r) { return element<D>(row[r] + c); });
      join(mean[c], m2[c], before, block.mean, block.m2, weight);
    }
  else
    for (int64_t c = 0; c < width; ++c)
      join(mean[c], m2[c], before, mean_of_sums(per_sample, pivot[c], first[c]),
           m2_of_sums(per_sample, first[c], second[c]), weight);
}

/// Moments of the group's outers [rows.first, rows.last), into mean and m2 of the columns, kColumnBlock at most.
template <class D>
void row_moments(const ForwardParams& p, const GroupOuters& outers, Range rows, Range columns, double* mean,
                 double* m2) {
  const auto* x = static_cast<const typename D::Element*>(p.x) + columns.first;
  const int64_t width = columns.last - columns.first, ahead = rows_ahead(width, sizeof *x) * p.x_strides.outer;
  for (int64_t c = columns.first; c < columns.last; ++c) mean[c] = m2[c] = 0;
  for (int64_t begin = rows.first; begin < rows.last; begin += kRowBlock) {
    const int n = int(least(kRowBlock, rows.last - begin));
    const typename D::Element* row[kRowBlock];
    for (int r = 0; r < n; ++r) row[r] = x + outers[begin + r] * p.x_strides.outer;
    join_row_block<D>(row, n, width, ahead, double(begin - rows.first), mean + columns.first, m2 + columns.first);
  }
}
