// The reduction of the forward pass: moments of x, per slice, group and channel.
// Sums are taken around a pivot near the mean: within a block in the compute type, over the blocks in double. The pivot of
// planes is the mean of another group or of a few elements, that of rows the mean so far; what turns out to lie elsewhere
// is summed again around its own mean, and what has sums that are not finite is taken in double.

/// Two passes in double over n values, for what overflows the compute type or holds NaN or infinity. each(f) calls f with
/// every value.
template <class Each>
__attribute__((noinline)) Moments moments_in_double(double n, const Each& each) {
  double mean = 0, m2 = 0;
  each([&](double value) { mean += value; });
  mean /= n;
  each([&](double value) { m2 += (value - mean) * (value - mean); });
  return {n, mean, m2};
}

BN_INLINE bool finite(double a, double b) { return (a - a) + (b - b) == 0; }

/// A pivot may be any number, but must be one.
template <class T>
BN_INLINE T finite_or_zero(T value) {
  return value - value == 0 ? value : T(0);
}

/// Of the units [first, last) of at most kPlanes of `all` channels: sums of the deviations from the pivots, and of their
/// squares. next: how many channels further on lies what is read soon.
template <class D>
__attribute__((flatten)) void sum_plane_deviations(const ForwardParams& p, const Partition& cut, const GroupOuters& outers,
                                                   Range units, Range channels, Range all, int64_t next,
                                                   const typename D::Compute* pivot, double* first, double* second) {
  const int width = int(channels.last - channels.first);
  const int64_t away = next * p.x_strides.channel;
  WideSums<D> wide[kPlanes];
  for (int64_t unit = units.first; unit < units.last; unit += cut.together) {
    const Segments segments(p.extent, cut, outers, {unit, least(unit + cut.together, units.last)});
    for (int c = 0; c < width; ++c) {
      FoldedSums<D> sums;
      const auto sum_about = [&](const auto& deviation) BN_INLINED {
        for (int k = 0; k < segments.count; ++k) {
          const Segment s = segments.at[k];
          const auto* from = place_of<D>(p.x, p.x_strides, s, channels.first + c);
          prefetch_after<D>(from, p.extent, p.x_strides, channels, all);
          const auto add = [&](int64_t i, auto lanes, Vec<D>& s1, Vec<D>& s2) {
            const Vec<D> d = keep<D>(deviation(load<D>(from + i, lanes)), lanes);
            s1 += d;
            s2 += d * d;
          };
          sums.add(s.count, add, [=](int64_t i) BN_FETCHES {
            if constexpr (kReductionsFetch) prefetch_ahead(from + i + away);
          });
        }
      };
      const Vec<D> center = splat<D>(pivot[c]);
      const auto from_center = [=](Vec<D> x) BN_INLINED { return x - center; };
      if constexpr (kIsArithmetic<D>)
        pivot[c] == 0 ? sum_about([](Vec<D> x) BN_INLINED { return x; }) : sum_about(from_center);
      else
        sum_about(from_center);
      wide[c].add(sums, unit == units.first);
    }
  }
  for (int c = 0; c < width; ++c) first[c] = wide[c].first.total(), second[c] = wide[c].second.total();
}

/// The same of one run of channels, over whole planes.
template <class D>
__attribute__((flatten)) void sum_run_deviations(const ForwardParams& p, const GroupOuters& outers, Range planes,
                                                 Range channels, int64_t next, const typename D::Compute* pivot,
                                                 double* first, double* second) {
  const int64_t inner = p.extent.inner, width = channels.last - channels.first, away = next * p.x_strides.channel;
  const auto* const x = static_cast<const typename D::Element*>(p.x) + channels.first * p.x_strides.channel;
  alignas(64) typename D::Compute center[kReducedRun + kSlack];
  WideSums<Parameter<D>> wide[kRunChannels];
  spread_to_reduce<D>(pivot, width, inner, center);
  const auto fetch = [&](const auto* row, int64_t i) BN_FETCHES {
    if constexpr (kReductionsFetch) prefetch_ahead(row + i + away);
  };
  const auto add = [&](const auto* row, int64_t i, auto lanes, Vec<D>& s1, Vec<D>& s2) {
    const Vec<D> d = load<D>(row + i, lanes) - load<Parameter<D>>(center + i, lanes);
    s1 += d;
    s2 += d * d;
  };
  for (int64_t plane = planes.first; plane < planes.last; plane += kRunRows<D>) {
    const int64_t rows = least(kRunRows<D>, planes.last - plane);
    const typename D::Element* row[kRunRows<D>];
    for (int64_t j = 0; j < rows; ++j) row[j] = x + outers[plane + j] * p.x_strides.outer;
    add_runs<D>(row, rows, width, inner, fetch, add, wide, plane == planes.first);
  }
  for (int64_t c = 0; c < width; ++c) first[c] = wide[c].first.total(), second[c] = wide[c].second.total();
}

/// Mean and squared deviations of the units, of one channel.
template <class D>
Moments plane_moments_in_double(const ForwardParams& p, const Partition& cut, const GroupOuters& outers, Range units,
                                int64_t channel, double count) {
  return moments_in_double(count, [&](const auto& f) {
    for (int64_t u = units.first; u < units.last; ++u) {
      const Segment s = segment_of(p.extent, cut, outers, u);
      const auto* from = place_of<D>(p.x, p.x_strides, s, channel);
      for (int64_t i = 0; i < s.count; ++i) f(element<D>(from + i));
    }
  });
}

/// Moments of the units [first, last) of the channels, `count` samples of each, into mean and m2. `likely`: the means to
/// expect, or null. in_runs: whether planes may be walked so.
template <class D>
void plane_moments(const ForwardParams& p, const Partition& cut, const GroupOuters& outers, Range units, double count,
                   Range channels, int64_t next, bool in_runs, const double* likely, double* __restrict mean,
                   double* __restrict m2) {
  using Compute = typename D::Compute;
  const int64_t run = in_runs ? channels_reduced_as_run<D>(p.extent) : 0, at_once = run ? run : kPlanes;
  const double per_sample = 1 / count;
  const Segment opening = segment_of(p.extent, cut, outers, units.first);
  const int few = int(least(kLanes<D>, opening.count));
  const Compute per_few = Compute(1) / Compute(few);
  const auto pivot_of = [&](int64_t c) {
    const auto* from = place_of<D>(p.x, p.x_strides, opening, c);
    const Vec<D> x = few == kLanes<D> ? load<D>(from) : load<D>(from, few);
    const Compute mean = likely ? Compute(likely[c]) : sum_of_lanes<D>(x) * per_few;
    if (kIsArithmetic<D> && 2 * mean * mean <= sum_of_lanes<D>(x * x) * per_few) return Compute(0);
    return finite_or_zero(mean);
  };
  Compute pivot[kRunChannels];
  double first[kRunChannels], second[kRunChannels];
  for (int64_t begin = channels.first; begin < channels.last; begin += at_once) {
    const Range some{begin, least(begin + at_once, channels.last)};
    const int width = int(some.last - some.first);
    for (int i = 0; i < width; ++i) pivot[i] = pivot_of(begin + i);
    if constexpr (kHasLines<D>)
      if (run) sum_run_deviations<D>(p, outers, units, some, next, pivot, first, second);
    if (!run)
      sum_plane_deviations<D>(p, cut, outers, units, some, channels, next, pivot, first, second);
    int far = 0, special = 0;
    for (int i = 0; i < width; ++i) far |= !centred(count, first[i], second[i]);
    for (int i = 0; far && i < width; ++i)
      if (!centred(count, first[i], second[i])) {
        const Range one{begin + i, begin + i + 1};
        pivot[i] += Compute(first[i] * per_sample);
        sum_plane_deviations<D>(p, cut, outers, units, one, one, 0, pivot + i, first + i, second + i);
      }
    for (int i = 0; i < width; ++i) special |= !finite(first[i], second[i]);
    for (int i = 0; i < width; ++i) mean[begin + i] = mean_of_sums(per_sample, double(pivot[i]), first[i]);
    for (int i = 0; i < width; ++i) m2[begin + i] = m2_of_sums(per_sample, first[i], second[i]);
    for (int i = 0; special && i < width; ++i)
      if (!finite(first[i], second[i])) {
        const Moments m = plane_moments_in_double<D>(p, cut, outers, units, begin + i, count);
        mean[begin + i] = m.mean;
        m2[begin + i] = m.m2;
      }
  }
}

/// How many runs of memory rows are taken from in turn: so a core has more reads on their way than by any prefetch in one run.
/// As measured with AVX2, and there with x alone.
template <class D>
constexpr int kRunsInTurn = kHasLines<D> && BN_VECTOR_BYTES == 32 ? 4 : 1;

/// Adds those of some rows to the sums of deviations and of their squares.
template <class D, class Rows>
BN_INLINE void add_deviations(Rows, const typename D::Element* const* row, int64_t width, int64_t stride,
                              const typename D::Compute* center, typename D::Compute* first,
                              typename D::Compute* second) {
  using P = Parameter<D>;
  constexpr int kRows = Rows::kRows;
  const typename D::Element* at[kRows];
  for (int k = 0; k < kRows; ++k) at[k] = row[k];
  const RowsAhead<D, Rows> next(at[0], width, stride);
  each_pair<D>(width, [&](int64_t c, auto count) BN_INLINED {
    if (kRunsInTurn<D> == 1 && !kIsSecond<decltype(count)>) next.ask(c);
    const Vec<D> middle = load<P>(center + c, count);
    Vec<D> s1 = load<P>(first + c, count), s2 = load<P>(second + c, count);
    with_rows<kRows>([&](auto... k) BN_INLINED {
      const Vec<D> deviation[] = {(load<D>(at[k] + c, count) - middle)...};
      s1 += sum_of((deviation[k])...);
      s2 += sum_of((deviation[k] * deviation[k])...);
    });
    store<P>(first + c, s1, count);
    store<P>(second + c, s2, count);
  });
}

/// The mean of the first of n rows, of each of `width` adjacent columns; 0 where that is no number.
template <class D>
__attribute__((flatten)) void mean_of_few_rows(const typename D::Element* const* row, int n, int64_t width, int64_t stride,
                                               typename D::Compute* pivot) {
  constexpr int kMost = 8;
  const auto mean_of = [&](auto rows) BN_INLINED {
    const RowsAhead<D, decltype(rows)> next(row[0], width, stride);
    const int few = decltype(rows)::kRows == kMost ? kMost : n;
    const typename D::Compute share = typename D::Compute(1) / typename D::Compute(few);
    each_pair<D>(width, [&](int64_t c, auto count) BN_INLINED {
      if (kRunsInTurn<D> == 1 && !kIsSecond<decltype(count)>) next.ask(c);
      Vec<D> mean = load<D>(row[0] + c, count);
#pragma GCC unroll 8
      for (int r = 1; r < few; ++r) mean += load<D>(row[r] + c, count);
      mean *= share;
      store<Parameter<D>>(pivot + c, mean - mean == 0 ? mean : Vec<D>{}, count);
    });
  };
  if (n < kMost) mean_of(RowsTogether<1, false>{});
  else if (stride == width) mean_of(RowsTogether<kMost, true>{});
  else mean_of(RowsTogether<kMost, false>{});
  put_in_order<D>(pivot, in_pairs<D>(width));
}

/// The sums of deviations and of their squares over n rows, for `width` adjacent columns. stride: how far neighbours are
/// apart. several: whether four are taken side by side. Chains of sums are short where rounding shows.
template <class D>
__attribute__((flatten)) void sum_deviations(const typename D::Element* const* row, int n, int64_t width, int64_t stride,
                                             bool several, const typename D::Compute* pivot, RowScratch<D, 1>& scratch,
                                             double* __restrict first, double* __restrict second) {
  constexpr bool kRounds = kNarrowing<D> == 1;
  constexpr int kFew = kRounds ? 8 : kFewRows, kFewTogether = kRounds ? 16 : 4 * kFewRows;
  typename D::Compute *const few_first = scratch.first(), *const few_second = scratch.second();
  typename D::Compute* const center = scratch.constant(0);
  copy_arranged<D>(pivot, width, center);
  const int few = several ? kFewTogether : kFew;
  for (int begin = 0; begin < n; begin += few) {
    for (int64_t c = 0; c < width; ++c) few_first[c] = few_second[c] = 0;
    const auto add = [&](auto rows, int64_t r) BN_INLINED {
      add_deviations<D>(rows, row + r, width, stride, center, few_first, few_second);
    };
    const int64_t last = least(n, begin + few);
    int64_t r = begin;
    if (several) r = stride == width ? each_rows<4, true>(r, last, add) : each_rows<4, false>(r, last, add);
    each_rows<1, true>(r, last, add);
    put_in_order<D>(few_first, in_pairs<D>(width)), put_in_order<D>(few_second, in_pairs<D>(width));
    if (begin == 0)
      for (int64_t c = 0; c < width; ++c) first[c] = double(few_first[c]), second[c] = double(few_second[c]);
    else
      for (int64_t c = 0; c < width; ++c) first[c] += double(few_first[c]), second[c] += double(few_second[c]);
  }
}

/// Joins n rows to the mean and m2 of `before` earlier ones, for `width` columns.
template <class D>
void join_row_block(const typename D::Element* const* row, int n, int64_t width, int64_t stride, bool several,
                    double before, double* __restrict mean, double* __restrict m2) {
  using Compute = typename D::Compute;
  RowScratch<D, 1> scratch;
  Compute pivot[kColumnBlock<D>] = {};
  double first[kColumnBlock<D>], second[kColumnBlock<D>];
  if (before == 0)
    mean_of_few_rows<D>(row, n, width, stride, pivot);
  else
    for (int64_t c = 0; c < width; ++c) pivot[c] = finite_or_zero(Compute(mean[c]));
  sum_deviations<D>(row, n, width, stride, several, pivot, scratch, first, second);
  int far = 0, special = 0;
  const auto look = [&] {
    far = special = 0;
    for (int64_t c = 0; c < width; ++c) {
      far |= !centred(double(n), first[c], second[c]);
      special |= !finite(first[c], second[c]);
    }
  };
  look();
  if (far) {
    for (int64_t c = 0; c < width; ++c) pivot[c] += Compute(first[c] / n);
    sum_deviations<D>(row, n, width, stride, several, pivot, scratch, first, second);
    look();
  }
  const double per_sample = 1.0 / n, weight = n / (before + n);
  if (special)
    for (int64_t c = 0; c < width; ++c) {
      const Moments block = moments_in_double(n, [&](const auto& f) {
        for (int r = 0; r < n; ++r) f(element<D>(row[r] + c));
      });
      join(mean[c], m2[c], before, block.mean, block.m2, weight);
    }
  else
    for (int64_t c = 0; c < width; ++c)
      join(mean[c], m2[c], before, mean_of_sums(per_sample, pivot[c], first[c]),
           m2_of_sums(per_sample, first[c], second[c]), weight);
}

/// Where n rows of a group begin, from the `begin`-th on, in the order in which they are read.
template <class D>
void place_rows(const typename D::Element* x, int64_t stride, const GroupOuters& outers, int64_t begin, int n,
                const typename D::Element** row) {
  constexpr int kRuns = kRunsInTurn<D>;
  const int length = n / kRuns;
  OuterWalk walk(outers, begin);
  for (int run = 0; run < kRuns; ++run)
    for (int i = 0; i < length; ++i) row[i * kRuns + run] = x + walk.next() * stride;
  for (int r = length * kRuns; r < n; ++r) row[r] = x + walk.next() * stride;
}

/// Moments of the group's outers [rows.first, rows.last), into mean and m2 of the columns, kColumnBlock at most.
template <class D>
void row_moments(const ForwardParams& p, const GroupOuters& outers, Range rows, Range columns, double* mean,
                 double* m2) {
  const auto* x = static_cast<const typename D::Element*>(p.x) + columns.first;
  const int64_t width = columns.last - columns.first, stride = p.x_strides.outer;
  const bool one_run = stride == width, halves = kNarrowing<D> > 1;
  const bool several = kRunsInTurn<D> > 1 || width >= kLongRow<D> || (halves && one_run) ||
                       side_by_side<D>(p.extent, one_run);
  for (int64_t c = columns.first; c < columns.last; ++c) mean[c] = m2[c] = 0;
  for (int64_t begin = rows.first; begin < rows.last; begin += kRowBlock) {
    const int n = int(least(kRowBlock, rows.last - begin));
    const typename D::Element* row[kRowBlock];
    place_rows<D>(x, stride, outers, begin, n, row);
    join_row_block<D>(row, n, width, stride, several, double(begin - rows.first), mean + columns.first, m2 + columns.first);
  }
}
