// The reduction of the forward pass: moments of x, per slice, group and channel.
// Sums within a block are taken around a pivot near the mean, in the compute type; blocks are merged in double.
// The pivot is the mean so far, at first that of a few elements; a block that turns out to lie elsewhere is summed
// again around its own mean, so one read of memory is enough whatever the data. A block whose sums are not finite is
// taken in double.

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
__attribute__((flatten)) Moments plane_moments(const ForwardParams& p, const Partition& cut,
                                               const GroupOuters& outers, Range units,
                                               const typename D::Element* x) {
  using Compute = typename D::Compute;
  Moments total{0, 0, 0};
  if (units.first == units.last) return total;
  const auto segment = [&](int64_t unit) { return segment_of(p.extent, cut, outers, unit); };
  const auto begin_of = [&](const Segment& s) { return x + s.outer * p.x_strides.outer + s.begin; };
  const Segment opening = segment(units.first);
  const int few = int(least(kLanes<D>, opening.count));
  Compute pivot = Compute(sum_of_lanes<D>(load<D>(begin_of(opening), few)) / few);
  if (!finite(pivot, 0)) pivot = 0;
  for (int64_t unit = units.first; unit < units.last; unit += cut.whole) {
    const int64_t end = least(unit + cut.whole, units.last);
    const auto sums_around = [&](Compute centre) {
      Sums<D> sums;
      const Vec<D> c = splat<D>(centre);
      for (int64_t u = unit; u < end; ++u) {
        const Segment s = segment(u);
        const auto* from = begin_of(s);
        prefetch_next_channel<D>(from, p.x_strides.channel, s.count);
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
    Moments block{double(n), mean_of_sums(1 / double(n), double(pivot), s1), m2_of_sums(1 / double(n), s1, s2)};
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

/// Sums of deviations and of their squares over n rows, for `width` adjacent columns.
template <class D>
__attribute__((flatten)) void sum_deviations(const typename D::Element* const* row, int n, int64_t width,
                                             const typename D::Compute* pivot, typename D::Compute* first,
                                             typename D::Compute* second) {
  using P = Parameter<D>;
  for (int64_t c = 0; c < width; ++c) first[c] = second[c] = 0;
  const auto add = [&](int begin, auto rows) {
    each_register<D>(width, [&](int64_t c, auto count) {
      const Vec<D> centre = load<P>(pivot + c, count);
      Vec<D> s1[2] = {}, s2[2] = {};  // short chains: rounding grows with their length
#pragma GCC unroll 8
      for (int r = 0; r < decltype(rows)::value; ++r) {
        const Vec<D> d = load<D>(row[begin + r] + c, count) - centre;
        s1[r % 2] += d;
        s2[r % 2] += d * d;
      }
      store<P>(first + c, load<P>(first + c, count) + (s1[0] + s1[1]), count);
      store<P>(second + c, load<P>(second + c, count) + (s2[0] + s2[1]), count);
    });
  };
  int r = 0;
  for (; r + kRowGroup <= n; r += kRowGroup) add(r, Number<kRowGroup>{});
  for (; r < n; ++r) add(r, Number<1>{});
}

/// Joins n rows to the mean and m2 of `before` earlier ones, for `width` columns.
template <class D>
void join_row_block(const typename D::Element* const* row, int n, int64_t width, double before,
                    double* __restrict mean, double* __restrict m2) {
  using Compute = typename D::Compute;
  Compute pivot[kSkewedBlock<D>] = {}, first[kSkewedBlock<D>], second[kSkewedBlock<D>];
  if (before == 0) {
    const int few = n < 8 ? n : 8;
    for (int64_t c = 0; c < width; ++c) pivot[c] = 0;
    sum_deviations<D>(row, few, width, pivot, first, second);
    for (int64_t c = 0; c < width; ++c) pivot[c] = first[c] / Compute(few);
  } else {
    for (int64_t c = 0; c < width; ++c) pivot[c] = Compute(mean[c]);
  }
  for (int64_t c = 0; c < width; ++c) pivot[c] = pivot[c] - pivot[c] == 0 ? pivot[c] : Compute(0);
  sum_deviations<D>(row, n, width, pivot, first, second);
  int far = 0, special = 0;
  for (int64_t c = 0; c < width; ++c) far |= !centred(Compute(n), first[c], second[c]);
  if (far) {
    for (int64_t c = 0; c < width; ++c) pivot[c] += first[c] / Compute(n);
    sum_deviations<D>(row, n, width, pivot, first, second);
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
  const int64_t width = columns.last - columns.first;
  for (int64_t c = columns.first; c < columns.last; ++c) mean[c] = m2[c] = 0;
  for (int64_t begin = rows.first; begin < rows.last; begin += kRowBlock) {
    const int n = int(least(kRowBlock, rows.last - begin));
    const typename D::Element* row[kRowBlock];
    order_rows<D>(p.extent, n, [&](int64_t i, int64_t r) { row[i] = x + outers[begin + r] * p.x_strides.outer; });
    join_row_block<D>(row, n, width, double(begin - rows.first), mean + columns.first, m2 + columns.first);
  }
}
