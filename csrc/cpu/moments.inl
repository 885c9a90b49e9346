// The reduction of the forward pass: moments of x, per slice, group and channel.
// Sums within a block are taken around a pivot near the mean, in the compute type; blocks are merged in double.
// The pivot is the mean so far; a block that turns out to lie elsewhere is summed again around its own mean, so one
// read of memory is enough whatever the data. A block whose sums are not finite is taken in double.

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

/// Moments of the units [first, last) of one channel, whose planes begin at x.
template <class D>
Moments plane_moments(const ForwardParams& p, const Partition& cut, const GroupOuters& outers, Range units,
                      const typename D::Element* x) {
  using Compute = typename D::Compute;
  Moments total{0, 0, 0};
  if (units.first == units.last) return total;
  const auto segment = [&](int64_t unit) { return segment_of(p.extent, cut, outers, unit); };
  const auto begin_of = [&](const Segment& s) { return x + s.outer * p.x_strides.outer + s.begin; };
  Compute pivot = Compute(element<D>(begin_of(segment(units.first))));
  for (int64_t unit = units.first; unit < units.last; unit += cut.whole) {
    const int64_t end = least(unit + cut.whole, units.last);
    const auto sums_around = [&](Compute centre) {
      Sums<D> sums;
      const Vec<D> c = splat<D>(centre);
      for (int64_t u = unit; u < end; ++u) {
        const Segment s = segment(u);
        const auto* from = begin_of(s);
        sums.add(s.count, [&](int64_t i, auto count, Vec<D>& s1, Vec<D>& s2) {
          const Vec<D> d = keep<D>(load<D>(from + i, count) - c, count);
          s1 += d;
          s2 += d * d;
        });
      }
      return sums;
    };
    int64_t n = 0;
    for (int64_t u = unit; u < end; ++u) n += segment(u).count;
    Sums<D> sums = sums_around(pivot);
    double s1 = sums.total_first(), s2 = sums.total_second();
    if (!centred(double(n), s1, s2)) {
      pivot += Compute(s1 / double(n));
      sums = sums_around(pivot);
      s1 = sums.total_first(), s2 = sums.total_second();
    }
    Moments block = moments_of_sums(double(n), double(pivot), s1, s2);
    if (!finite(s1, s2)) {
      block = moments_in_double(n, [&](int64_t i) {
        const Segment s = segment(unit + i / segment(unit).count);
        return element<D>(begin_of(s) + i % segment(unit).count);
      });
    }
    total = merge(total, block);
    pivot = Compute(total.mean);
    if (!finite(pivot, 0)) pivot = 0;
  }
  return total;
}

/// Joins the moments of n rows to `mean` and `m2` of `before` earlier ones, for `lanes` channels in W registers,
/// the last of which has `count` lanes.
template <class D, int W, class Count>
void join_row_block(const typename D::Element* const* row, int n, Count count, int lanes, double before, double* mean,
                    double* m2) {
  using Compute = typename D::Compute;
  constexpr int L = kLanes<D>;
  Compute pivot[W * L] = {}, first[W * L], second[W * L];
  const auto sum = [&] {
    Vec<D> centre[W], s1[W] = {}, s2[W] = {};
    __builtin_memcpy(centre, pivot, sizeof centre);
    for (int r = 0; r < n; ++r)
      for (int w = 0; w < W; ++w) {
        const Vec<D> d = load<D>(row[r] + w * L, count) - centre[w];
        s1[w] += d;
        s2[w] += d * d;
      }
    __builtin_memcpy(first, s1, sizeof first);
    __builtin_memcpy(second, s2, sizeof second);
  };
  for (int i = 0; i < lanes; ++i) {
    const Compute start = before == 0 ? Compute(element<D>(row[0] + i)) : Compute(mean[i]);
    pivot[i] = start - start == 0 ? start : Compute(0);
  }
  sum();
  bool far = false, special = false;
  for (int i = 0; i < lanes; ++i) far |= !centred(Compute(n), first[i], second[i]);
  if (far) {
    for (int i = 0; i < lanes; ++i) pivot[i] += first[i] / Compute(n);
    sum();
  }
  for (int i = 0; i < lanes; ++i) special |= !finite(first[i], second[i]);
  const auto join = [&](int i, const Moments& block) {
    const Moments joined = merge({before, mean[i], m2[i]}, block);
    mean[i] = joined.mean;
    m2[i] = joined.m2;
  };
  if (special)
    for (int i = 0; i < lanes; ++i) join(i, moments_in_double(n, [&](int64_t r) { return element<D>(row[r] + i); }));
  else
    for (int i = 0; i < lanes; ++i) join(i, moments_of_sums(n, double(pivot[i]), double(first[i]), double(second[i])));
}

/// Moments of the group's outers [rows.first, rows.last), into mean and m2 of channels [first, last).
template <class D>
void row_moments(const ForwardParams& p, const GroupOuters& outers, Range rows, Range channels, double* mean,
                 double* m2) {
  using Element = typename D::Element;
  constexpr int kWide = 4, L = kLanes<D>;
  const auto* x = static_cast<const Element*>(p.x);
  for (int64_t begin = rows.first; begin < rows.last; begin += kRowBlock) {
    const int n = int(least(kRowBlock, rows.last - begin));
    const double before = double(begin - rows.first);
    const Element* row[kRowBlock];
    for (int r = 0; r < n; ++r) row[r] = x + outers[begin + r] * p.x_strides.outer + channels.first;
    int64_t c = channels.first;
    const auto step = [&](int64_t lanes) {
      for (int r = 0; r < n; ++r) row[r] += lanes;
      c += lanes;
    };
    for (; c + kWide * L <= channels.last; step(kWide * L))
      join_row_block<D, kWide>(row, n, All{}, kWide * L, before, mean + c, m2 + c);
    for (; c + L <= channels.last; step(L)) join_row_block<D, 1>(row, n, All{}, L, before, mean + c, m2 + c);
    const int rest = int(channels.last - c);
    if (rest > 0) join_row_block<D, 1>(row, n, rest, rest, before, mean + c, m2 + c);
  }
}
