// The maps where the output goes past the caches and its planes begin and end within lines, as those of 14x14 do: a line
// of which two stores write a part each would be fetched, so results are gathered until lines are whole.

/// Adjacent elements on their way to memory.
template <class D>
class Gathered {
  using Element = typename D::Element;
  static constexpr int64_t kLine = 64 / sizeof(Element), kRegister = sizeof(Whole<D>) / sizeof(Element);
  static constexpr int64_t kRoom = 3072 / sizeof(Element);

 public:
  static constexpr int64_t kMost = kRoom / 2;
  static_assert(kMost % 8 == 0, "masks are read and written by bytes");

  /// to: where the first element goes; null to write nothing.
  void start(Element* to) {
    first_ = end_ = int64_t(reinterpret_cast<uintptr_t>(to) % 64 / sizeof(Element));
    to_ = to ? to - first_ : nullptr;
  }
  /// Where to put the next `count` elements, kMost at most.
  Element* next(int64_t count) {
    if (!to_) return nullptr;
    if (end_ + count > kRoom) write_lines();
    end_ += count;
    return lines_ + end_ - count;
  }
  void finish() {
    if (!to_) return;
    write_lines();
    write_part(end_);
  }

 private:
  void write_lines() {
    int64_t i = 0;
    if (first_ > 0 && end_ >= kLine) write_part(i = kLine);
    for (; i + kLine <= end_; i += kLine)
#pragma GCC unroll 2
      for (int64_t k = i; k < i + kLine; k += kRegister) {
        Whole<D> part;
        __builtin_memcpy(&part, lines_ + k, sizeof part);
        stream<D>(to_ + k, part);
      }
    for (int64_t k = 0; k < kLine; ++k) lines_[k] = lines_[i + k];
    to_ += i;
    end_ -= i;
  }
  /// Of the line that others write too.
  void write_part(int64_t end) {
    for (; first_ < end; ++first_) to_[first_] = lines_[first_];
    first_ = 0;
  }

  int64_t first_, end_;  // of what lines_ has
  Element* to_;          // the place of lines_[0]
  alignas(64) Element lines_[kRoom + kLine];
};

template <class D, class Map>
__attribute__((flatten)) void gather_planes(const Map map, const Extent& e,
                                            const Coefficients<typename D::Compute>& coefficients, Range outers,
                                            Range channels) {
  constexpr int64_t kMost = Gathered<D>::kMost;
  const int64_t inner = e.inner;
  Gathered<D> gathered[Map::kOutputs];
  for (int64_t outer = outers.first; outer < outers.last; ++outer) {
    const int64_t group = group_of(e, outer) * coefficients.columns;
    const typename Map::At start = map.at(outer, channels.first);
    for (int o = 0; o < Map::kOutputs; ++o) gathered[o].start(start.out[o]);
    for (int64_t channel = channels.first; channel < channels.last; ++channel) {
      const typename Map::Channel k([&](int row) { return splat<D>(coefficients.row(row)[group + channel]); });
      typename Map::At at[1] = {map.at(outer, channel)};
      for (int64_t i = 0; i < inner; i += kMost, map.skip(at[0], kMost)) {
        const int64_t count = least(kMost, inner - i);
        for (int o = 0; o < Map::kOutputs; ++o) at[0].out[o] = gathered[o].next(count);
        map_adjacent<D, false, !Map::kInOrder>(map, at, count, in_twos<D>(map, count),
                                               [&](int64_t, auto) -> const auto& { return k; });
      }
    }
    for (int o = 0; o < Map::kOutputs; ++o) gathered[o].finish();
  }
}

/// Whether the runs of these channels are whole lines of every output, at all outers if at the first two.
template <class Map>
bool runs_are_lines(const Map& map, int64_t bytes, Range channels) {
  uintptr_t apart = uintptr_t(bytes);
  for (int64_t outer = 0; outer < 2; ++outer)
    for (const auto* out : map.at(outer, channels.first).out) apart |= reinterpret_cast<uintptr_t>(out);
  return apart % 64 == 0;
}

/// in_runs: whether planes are walked so, where all outers are mapped.
template <class D, class Map>
void map_elements(const Map& map, Writing writing, bool in_runs, const Extent& e,
                  const Coefficients<typename D::Compute>& coefficients, Range outers, Range columns) {
  if constexpr (kHasLines<D>) {
    if (in_runs && outers.last - outers.first == e.outer) {
      if (writing == Writing::cached) return map_runs<D, false>(map, e, coefficients, columns);
      const int64_t bytes = (columns.last - columns.first) * e.inner * int64_t(sizeof(typename D::Element));
      if (runs_are_lines(map, bytes, columns)) return map_runs<D, true>(map, e, coefficients, columns);
    }
    if (writing == Writing::streamed) return map_elements<D, true>(map, e, coefficients, outers, columns);
    if (writing == Writing::gathered) return gather_planes<D>(map, e, coefficients, outers, columns);
  }
  map_elements<D, false>(map, e, coefficients, outers, columns);
}
