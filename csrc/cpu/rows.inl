// How the reductions walk rows: several side by side where that is quicker, with what comes next asked for.

/// What rows are summed in: two sums of each column, and constants of them, each at a place of its own within a page. Left
/// to the frames of two functions the places came and went with changes elsewhere, and with them up to 8 % of the forward.
template <class D, int kConstants>
class RowScratch {
  using Compute = typename D::Compute;
  static constexpr int64_t kBytes = kColumnBlock<D> * sizeof(Compute);
  static constexpr int64_t kPage = 4096, kHalf = kPage / 2;
  static constexpr int64_t kPlaces[] = {0, kBytes + kHalf, 2 * kBytes + kPage + kHalf, 3 * kBytes + 2 * kPage,
                                        4 * kBytes + 2 * kPage};

 public:
  Compute* first() { return at(0); }
  Compute* second() { return at(1); }
  Compute* constant(int k) { return at(2 + k); }

 private:
  Compute* at(int i) { return reinterpret_cast<Compute*>(memory_ + kPlaces[i]); }
  alignas(64) char memory_[kPlaces[1 + kConstants] + kBytes];
};

/// How many rows are taken side by side, whose sums are loaded and stored once for all, and whether they are one run of
/// memory.
template <int kCount, bool kIsOneRun>
struct RowsTogether {
  static constexpr int kRows = kCount;
  static constexpr bool kOneRun = kIsOneRun;
};

/// Rows so long that several are read side by side as quickly as one after another.
template <class D>
constexpr int64_t kLongRow = 2048 / kNarrowing<D>;

/// Whether rows of any length are: where they are one run of memory, and the tensor is not so large that a cache has none of
/// it.
template <class D>
BN_INLINE bool side_by_side(const Extent& e, bool one_run) {
  constexpr int64_t kFar = 8 << 20;
  return one_run && e.outer * e.channels * e.inner * int64_t(sizeof(typename D::Element)) < kFar;
}

/// The sum of what rows side by side add to a column: a chain of such sums rounds as often as one of a part of the rows.
template <class V>
BN_INLINE V sum_of(V a) {
  return a;
}
template <class V>
BN_INLINE V sum_of(V a, V b) {
  return a + b;
}
template <class V>
BN_INLINE V sum_of(V a, V b, V c, V d) {
  return (a + b) + (c + d);
}

/// Calls f with the numbers of kRows rows, from 0 on.
template <int... kRow, class F>
BN_INLINE void with_rows(std::integer_sequence<int, kRow...>, const F& f) {
  f(kRow...);
}
template <int kRows, class F>
BN_INLINE void with_rows(const F& f) {
  with_rows(std::make_integer_sequence<int, kRows>{}, f);
}

/// Calls f(RowsTogether, r) on as many of the rows [r, last) as come kCount at a time, and tells where the rest begins.
template <int kCount, bool kIsOneRun, class F>
BN_INLINE int64_t each_rows(int64_t r, int64_t last, const F& f) {
  for (; r + kCount <= last; r += kCount) f(RowsTogether<kCount, kIsOneRun>{}, r);
  return r;
}

/// Asks for what comes some kilobytes behind such rows: where they are one run, in the order of memory, though they are read
/// side by side.
template <class D, class Rows>
class RowsAhead {
  using Element = typename D::Element;
  static constexpr int64_t kStep = (D::kAlternates ? 2 : 1) * kLanes<D>;  // of each_pair()

 public:
  RowsAhead(const Element* first, int64_t width, int64_t stride)
      : from_(first + most(Rows::kRows, ceil_div(8192, width * sizeof(Element))) * stride), stride_(stride) {}
  void ask(int64_t column) const BN_FETCHES {
#pragma GCC unroll 4
    for (int64_t k = 0; k < Rows::kRows; ++k)
      if constexpr (Rows::kOneRun)
        prefetch_ahead(from_ + Rows::kRows * column + k * kStep);
      else
        prefetch_ahead(from_ + column + k * stride_);
  }

 private:
  const Element* from_;
  int64_t stride_;
};
