// How the elements are walked: which outer indices a group has, how they are cut into slices and blocks,
// and the inner loops over one plane (adjacent elements of one channel) and over rows (adjacent channels).
// Included after vector.inl, inside a target region and an anonymous namespace.

BN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
BN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/// What comes after the normalisation, as far as the loops differ: nothing; relu alone; anything, also a gradient to leave
/// out; or a residual and then relu, of which a mask is kept.
enum class Ending { none, relu, general, masked };

/// Whether backward finds again what came before the ending, and whether it has two gradients to write.
constexpr bool forwards_again(Ending ending) { return ending == Ending::relu || ending == Ending::general; }
constexpr bool has_two_gradients(Ending ending) { return ending == Ending::general || ending == Ending::masked; }

/// Elements of a plane that are summed in one loop: in four chains of sixteen registers, as rounding grows with their length.
constexpr int64_t kPlaneBlock = 4 * 16 * BN_VECTOR_BYTES / sizeof(float);

/// How many elements may be added up in the same chains: of half types, which round more themselves, twice as many.
template <class D>
constexpr int64_t kChained = kPlaneBlock * kNarrowing<D>;

/// Whether reductions are arithmetic rather than memory, so that it pays to leave out a pivot or center of 0, and to take
/// more rows side by side.
template <class D>
constexpr bool kIsArithmetic = D::kTrained && kNarrowing<D> > 1;

/// Two sums over the same elements, in four independent chains.
template <class D>
struct Sums {
  Vec<D> first[4] = {}, second[4] = {};

  Vec<D> all_first() const { return (first[0] + first[1]) + (first[2] + first[3]); }
  Vec<D> all_second() const { return (second[0] + second[1]) + (second[2] + second[3]); }

  /// Calls f(i, count, first, second) on every register of n adjacent elements, and before it visit(i) for every line.
  template <class F, class Visit>
  void add(int64_t n, const F& f, const Visit& visit) {
    constexpr int64_t L = kLanes<D>, kLine = 64 / sizeof(typename D::Element);
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4 * L; k += kLine) visit(i + k);
      f(i, First{}, first[0], second[0]);
      f(i, Second{}, first[1], second[1]);
      f(i + 2 * L, First{}, first[2], second[2]);
      f(i + 2 * L, Second{}, first[3], second[3]);
    }
    for (int64_t k = i; k < n; k += kLine) visit(k);
    const int64_t whole = (n - i) / L;
    if (whole > 0) f(i, All{}, first[0], second[0]);
    if (whole > 1) f(i + L, All{}, first[1], second[1]);
    if (whole > 2) f(i + 2 * L, All{}, first[2], second[2]);
    i += whole * L;
    if (i == n) return;
    n < L ? f(i, int(n - i), first[3], second[3]) : f(n - L, Last{int(n - i)}, first[3], second[3]);
  }
};

/// Such sums of many segments, of kPlaneBlock elements at most, whose chains are folded into one when they have grown long.
template <class D>
struct FoldedSums {
  Sums<D> chains;
  Vec<D> first = {}, second = {};
  int64_t chained = 0;

  Vec<D> all_first() const { return first + chains.all_first(); }
  Vec<D> all_second() const { return second + chains.all_second(); }
  template <class F, class Visit>
  void add(int64_t n, const F& f, const Visit& visit) {
    chained += n;
    if (chained > kChained<D>) {
      first = all_first(), second = all_second(), chained = n;
      for (int k = 0; k < 4; ++k) chains.first[k] = chains.second[k] = Vec<D>{};
    }
    chains.add(n, f, visit);
  }
};

/// Sums of many such sums, lane by lane in double: lanes are added up once, at the end. The first begins them, as clearing
/// them would take as long as adding.
template <class D>
struct WideSums {
  WideSum<D> first, second;

  template <class S>
  void add(const S& sums, bool begin) {
    const WideSum<D> new_first(sums.all_first()), new_second(sums.all_second());
    if (begin) {
      first.set(new_first);
      second.set(new_second);
    } else {
      first.add(new_first);
      second.add(new_second);
    }
  }
};

/// The outer indices of one group, numbered from 0.
struct GroupOuters {
  int64_t count, group, groups, per_example;

  int64_t operator[](int64_t j) const {
    if (groups == 1) return j;
    return per_example == 1 ? j * groups + group : (j / per_example * groups + group) * per_example + j % per_example;
  }
};

/// The outers of one group from the j-th on, one after another: to divide for each takes as long as to add up a short row.
class OuterWalk {
 public:
  OuterWalk(const GroupOuters& outers, int64_t j)
      : outer_(outers[j]), rest_(outers.per_example - j % outers.per_example), per_example_(outers.per_example),
        apart_((outers.groups - 1) * outers.per_example) {}
  int64_t next() {
    const int64_t outer = outer_++;
    if (--rest_ == 0) outer_ += apart_, rest_ = per_example_;
    return outer;
  }

 private:
  int64_t outer_, rest_, per_example_, apart_;
};

/// Which outers belong to each group. Divides, so it is made once.
class Grouping {
 public:
  explicit Grouping(const Extent& e) : per_example_(e.outer_per_example), groups_(e.groups) {
    const int64_t examples = e.outer / per_example_;
    least_ = examples / groups_;
    larger_ = examples % groups_;
  }
  int64_t count(int64_t group) const { return (least_ + (group < larger_)) * per_example_; }
  GroupOuters outers(int64_t group) const { return {count(group), group, groups_, per_example_}; }

  /// The first outer of the i-th example, where the groups come one after another.
  int64_t first_outer(int64_t i) const {
    const int64_t in_larger = larger_ * (least_ + 1), size = least_ + (i < in_larger);
    const int64_t group = i < in_larger ? i / size : larger_ + (i - in_larger) / size;
    const int64_t before = i < in_larger ? i % size : (i - in_larger) % size;
    return (before * groups_ + group) * per_example_;
  }

 private:
  int64_t per_example_, groups_, least_, larger_;  // the first `larger_` groups have one example more
};

BN_INLINE int64_t group_of(const Extent& e, int64_t outer) {
  return e.groups == 1 ? 0 : outer / e.outer_per_example % e.groups;
}

/// How many outers from `outer` on surely belong to its group.
BN_INLINE int64_t rest_of_group(const Extent& e, int64_t outer) {
  return e.groups == 1 ? e.outer - outer : e.outer_per_example - outer % e.outer_per_example;
}

/// A number as a type.
template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

/// How a reduction is cut. A function of the shape alone: the order in which sums are merged, and with it every bit of
/// the result, does not depend on the number of threads.
struct Partition {
  int64_t slices;    // of one group's outers (and of its planes, where they are long), merged in order
  int64_t block;     // elements of a plane, or rows, that are summed in one loop
  int64_t parts;     // blocks in a plane; 1 for rows
  int64_t together;  // blocks, or planes where they are short, that are summed in the compute type
};

/// Columns of a row that are reduced at once: as many as leave what belongs to them in the nearest cache. Rows that are
/// read whole are one run of memory.
constexpr int64_t column_block(int64_t compute_bytes) { return 8192 / compute_bytes; }
template <class D>
constexpr int64_t kColumnBlock = column_block(sizeof(typename D::Compute));

/// Elements of a plane that is so short that all planes side by side are walked as one row.
constexpr int64_t kTinyPlane = 16;

/// Elements of a plane that is so short that several may be walked as one run: eight lines.
template <class D>
constexpr int64_t kShortPlane = 8 * 64 / sizeof(typename D::Element);

/// By how many bytes arrays are set apart that are read at the same place, lest whole pages between them put the same
/// place of all into one set of the nearest cache.
constexpr int64_t kCacheSkew = 320;
template <class D>
constexpr int64_t kSkewedBlock = kColumnBlock<D> + kCacheSkew / sizeof(typename D::Compute);

constexpr int64_t kRowBlock = 512, kRowSlice = 128, kSliceElements = 1 << 18, kPlaneSlice = 32768;
constexpr int kFewRows = 32, kMostPlanes = 32, kMostParts = 8;  // are summed before they are added up in double

/// Whether a tensor is small enough to be found in the cores' own caches, where another walk is quick than in memory.
BN_INLINE bool is_near(const Extent& e, int64_t element_bytes) {
  constexpr int64_t kNear = 2 << 20;
  return e.outer * e.channels * e.inner * element_bytes < kNear;
}

/// The largest that is at most n, or 1: slices that any usual number of threads shares evenly.
BN_INLINE int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

BN_INLINE Partition partition_of(const Extent& e, int64_t block) {
  const int64_t outers = ceil_div(e.outer, e.groups);
  if (e.inner == 1) {
    const int64_t all = least(64, most(4, e.outer * e.channels / kSliceElements));
    const int64_t wanted = ceil_div(all, e.groups * ceil_div(e.channels, block));
    return {power_of_two(least(outers / kRowSlice, wanted)), kRowBlock, 1, 1};
  }
  const int64_t wanted = ceil_div(256, e.groups * e.channels), parts = ceil_div(e.inner, kPlaneBlock);
  return {most(1, least(outers * e.inner / kPlaneSlice, wanted)), kPlaneBlock, parts,
          parts > 1 ? least(kMostParts, parts) : least(kMostPlanes, 2 * kPlaneBlock / e.inner)};
}

/// Units (parts of planes, or rows) [first, last) of one slice of one group.
struct Range {
  int64_t first, last;
};

BN_INLINE Range slice_of(int64_t units, int64_t slice, int64_t slices) {
  if (slices == 1) return {0, units};
  return {units * slice / slices, units * (slice + 1) / slices};
}

/// One run of adjacent elements of a channel: `count` from position `begin` of the plane at `outer`.
struct Segment {
  int64_t outer, begin, count;
};

BN_INLINE Segment segment_of(const Extent& e, const Partition& cut, const GroupOuters& outers, int64_t unit) {
  if (cut.parts == 1) return {outers[unit], 0, e.inner};
  const int64_t begin = unit % cut.parts * cut.block;
  return {outers[unit / cut.parts], begin, least(cut.block, e.inner - begin)};
}

/// The segments of such units together, found once for all channels side by side.
struct Segments {
  static constexpr int kMost = kMostPlanes > kMostParts ? kMostPlanes : kMostParts;
  int count = 0;
  Segment at[kMost];

  Segments(const Extent& e, const Partition& cut, const GroupOuters& outers, Range units) {
    for (int64_t unit = units.first; unit < units.last; ++unit) at[count++] = segment_of(e, cut, outers, unit);
  }
};

/// Where a segment of a channel begins.
template <class D>
BN_INLINE const typename D::Element* place_of(const void* data, const Strides& s, const Segment& segment, int64_t channel) {
  return static_cast<const typename D::Element*>(data) + segment.outer * s.outer + channel * s.channel + segment.begin;
}

constexpr int kPlanes = 8;  // channels that are reduced side by side: one alone would wait for each of its own results

#define BN_INLINED __attribute__((always_inline))

/// NB: GCC drops a call that does nothing but prefetch, unless it is inlined before it looks.
#define BN_FETCHES BN_INLINED

/// The same number or address, as one of which the compiler knows nothing: in a loop it else keeps one for each array, and
/// has no registers for so many.
template <class T>
BN_INLINE T opaque(T value) {
  asm("" : "+r"(value));
  return value;
}

/// Whether the reductions of planes ask for what is read soon: memory is idle meanwhile. With AVX2 the maps alone do, which
/// was measured to be quicker there.
constexpr bool kReductionsFetch = BN_VECTOR_BYTES == 64;

/// Asks for what is going to be read next.
BN_INLINE void prefetch_ahead(const void* place) { __builtin_prefetch(place); }

/// Asks for a plane: short ones lie too far apart for the processor to foresee the next.
template <class D, int kLocality = 3>
BN_INLINE void prefetch_plane(const typename D::Element* plane, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(typename D::Element), kShort = 16 * kLine;
  if (count > kShort) return;
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(plane + i, /*write=*/0, kLocality);
}

/// While a reduction reads a plane of some of the channels, asks for that of the next channel. Of the shortest planes a
/// group has too few to wait for the first of a channel: there for that of the next channels side by side or, after the
/// last, for that of the next group.
template <class D>
BN_INLINE void prefetch_after(const typename D::Element* plane, const Extent& e, const Strides& s, Range some,
                              Range channels) {
  if constexpr (!kReductionsFetch) return;
  constexpr int64_t kShortest = 256 / sizeof(typename D::Element);
  if (e.groups == 1 || e.inner > kShortest) return prefetch_plane<D>(plane + s.channel, e.inner);
  const int64_t next_group = e.outer_per_example * s.outer - (some.first - channels.first) * s.channel;
  prefetch_plane<D, 2>(plane + (some.last < channels.last ? kPlanes * s.channel : next_group), e.inner);
}

/// How many samples of one channel a slice of so many outers holds.
BN_INLINE double slice_count(const Extent& e, const Partition& cut, int64_t outers, int64_t slice) {
  const Range units = slice_of(outers * cut.parts, slice, cut.slices);
  const auto before = [&](int64_t unit) {  // whole planes, and the whole blocks of the last one
    return unit / cut.parts * e.inner + unit % cut.parts * cut.block;
  };
  return double(cut.parts == 1 ? (units.last - units.first) * e.inner : before(units.last) - before(units.first));
}
