// Short planes, as those of 7x7: each alone would end within a register and cost more steps than arithmetic, so those of
// several adjacent channels are walked as one run of memory, in which each element has its channel's coefficients. Only
// over several planes of a channel, which coefficients spread once serve.

constexpr int64_t kMappedRun = 2048, kReducedRun = 1024;  // elements at most: their coefficients stay in the nearest cache
constexpr int kRunChannels = kReducedRun / (kTinyPlane + 1) + 1;  // at most are reduced as one run
constexpr int64_t kSlack = kLanes<F32>;                           // what is spread may reach as far beyond a run

/// Planes of a channel that are summed in the compute type.
template <class D>
constexpr int64_t kRunRows = 16 * kNarrowing<D>;

constexpr int64_t kSoonEnding = 64;  // elements of a plane that loses much by its end

/// How many planes of a channel pay for the coefficients of its run.
template <class D>
int64_t planes_worth_a_run(int64_t inner) {
  return inner <= kSoonEnding ? 3 : 6 * kNarrowing<D>;
}

/// How many channels begin a run, so that it is whole lines: a power of two. 0 where planes are walked one by one.
template <class D>
int64_t channels_of_run(const Extent& e) {
  constexpr int64_t kLine = 64 / sizeof(typename D::Element);
  if (!kHasLines<D> || e.inner == 1 || e.inner > kShortPlane<D>) return 0;
  if (e.outer < planes_worth_a_run<D>(e.inner) * e.groups) return 0;
  int64_t channels = 1;
  while (channels * e.inner % kLine != 0) channels *= 2;
  return channels * e.inner <= kMappedRun ? channels : 0;
}

/// Each channel's value in all its elements of a run, from an element on. Registers reach into the next channel's, which
/// then overwrite theirs.
template <class D>
BN_INLINE void spread(const typename D::Compute* values, int64_t channels, int64_t inner, typename D::Compute* run,
                      int64_t from = 0) {
  using P = Parameter<D>;
  constexpr int64_t L = kLanes<D>;
  for (int64_t c = from / inner; c < channels; ++c) {
    const int64_t begin = most(from, c * inner), end = (c + 1) * inner;
    const Vec<D> value = splat<D>(values[c]);
    store<P>(run + begin, value);
    for (int64_t i = begin / L * L + L; i < end; i += L) store<P>(run + i, value);
  }
}

/// The same as pairs of registers read it, of the first `paired` elements; the others are in order.
template <class D>
BN_INLINE void spread_in_pairs(const typename D::Compute* values, int64_t channels, int64_t inner, int64_t paired,
                               typename D::Compute* run) {
  if constexpr (!D::kAlternates) return spread<D>(values, channels, inner, run);
  using P = Parameter<D>;
  constexpr int64_t L = kLanes<D>, kPair = 2 * L;
  for (int64_t c = 0; c * inner < paired; ++c) {
    const int64_t begin = c * inner, end = least(begin + inner, paired), shared = begin / kPair * kPair;
    const Vec<D> value = splat<D>(values[c]);
    if (shared < begin) {
      const Vec<D> before = splat<D>(typename D::Compute(begin - shared));
      const auto fill = [&](auto one) BN_INLINED {
        const Vec<D> others = load<P>(run + shared, one);
        store<P>(run + shared, places<D>(one) < before ? others : value, one);
      };
      fill(First{}), fill(Second{});
    }
    for (int64_t i = ceil_div(begin, kPair) * kPair; i < end; i += kPair)
      store<P>(run + i, value, First{}), store<P>(run + i, value, Second{});
  }
  spread<D>(values, channels, inner, run, paired);
}

/// How many channels are reduced as one run, 0 where planes are.
template <class D>
int64_t channels_reduced_as_run(const Extent& e) {
  const bool shorter = e.inner > kTinyPlane && e.inner <= kSoonEnding;
  return shorter && channels_of_run<D>(e) ? kReducedRun / e.inner / 8 * 8 : 0;
}

constexpr int kRegisters = 6;  // are summed at once: as many as have room for both sums

/// What a reduction adds up with: each channel's value in all its elements of a run, as it reads those.
template <class D>
BN_INLINE void spread_to_reduce(const typename D::Compute* values, int64_t channels, int64_t inner,
                                typename D::Compute* run) {
  constexpr int64_t kAtOnce = kRegisters * kLanes<D>;
  spread_in_pairs<D>(values, channels, inner, channels * inner / kAtOnce * kAtOnce, run);
}

/// Two sums of each channel over its elements of a run.
template <class P>
BN_INLINE void add_columns(int64_t channels, int64_t inner, const typename P::Compute* first,
                           const typename P::Compute* second, WideSums<P>* wide, bool begin) {
  for (int64_t c = 0; c < channels; ++c) {
    Sums<P> sums;
    const auto add_column = [&](int64_t k, auto lanes, Vec<P>& s1, Vec<P>& s2) {
      s1 += keep<P>(load<P>(first + c * inner + k, lanes), lanes);
      s2 += keep<P>(load<P>(second + c * inner + k, lanes), lanes);
    };
    sums.add(inner, add_column, [](int64_t) {});
    wide[c].add(sums, begin);
  }
}

/// Two sums of each channel over one run of each of `rows` outers. row[j]: what the j-th is read with; fetch(row, i): asks
/// for what will be read where the line at i is now; add(row, i, lanes, first, second): adds a register. begin: whether
/// `wide` has no sums yet.
template <class D, class Row, class Fetch, class Add>
BN_INLINE void add_runs(const Row* row, int64_t rows, int64_t channels, int64_t inner, const Fetch& fetch, const Add& add,
                        WideSums<Parameter<D>>* wide, bool begin) {
  using P = Parameter<D>;
  constexpr int64_t L = kLanes<D>, kLine = 64 / sizeof(typename D::Element);
  const int64_t width = channels * inner;
  alignas(64) typename D::Compute first[kReducedRun + kSlack], second[kReducedRun + kSlack];
  int64_t i = 0;
  for (; i + kRegisters * L <= width; i += kRegisters * L) {
    Vec<D> s1[kRegisters] = {}, s2[kRegisters] = {};
    for (int64_t j = 0; j < rows; ++j) {
#pragma GCC unroll 6
      for (int64_t k = 0; k < kRegisters * L; k += kLine) fetch(row[j], i + k);
#pragma GCC unroll 6
      for (int k = 0; k < kRegisters; k += 2) {
        add(row[j], i + k * L, First{}, s1[k], s2[k]);
        add(row[j], i + k * L, Second{}, s1[k + 1], s2[k + 1]);
      }
    }
#pragma GCC unroll 6
    for (int k = 0; k < kRegisters; k += 2) {
      to_order<D>(s1[k], s1[k + 1]), to_order<D>(s2[k], s2[k + 1]);
      store<P>(first + i + k * L, s1[k]), store<P>(second + i + k * L, s2[k]);
      store<P>(first + i + (k + 1) * L, s1[k + 1]), store<P>(second + i + (k + 1) * L, s2[k + 1]);
    }
  }
  each_register<D>(i, width, [&](int64_t at, auto lanes) {
    Vec<D> s1 = {}, s2 = {};
    for (int64_t j = 0; j < rows; ++j) {
      fetch(row[j], at);
      add(row[j], at, lanes, s1, s2);
    }
    store<P>(first + at, s1, lanes), store<P>(second + at, s2, lanes);
  });
  add_columns<P>(channels, inner, first, second, wide, begin);
}
