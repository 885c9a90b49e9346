// The maps where the output goes past the caches and its planes begin and end within lines, as those of 14x14 do: a line
// of which two stores write a part each would be fetched, so the part of one plane waits for that of the next.

/// A line of an output of which two planes have a part each.
template <class D>
class SharedLine {
  using Element = typename D::Element;

 public:
  static constexpr int64_t kElements = 64 / sizeof(Element), kRegister = sizeof(Whole<D>) / sizeof(Element);

  /// Where to put a line's worth of elements so that the first is its i-th; what lies beyond it is lost.
  Element* at(int64_t i) { return room_ + kElements + i; }
  void write(Element* line) const {
#pragma GCC unroll 2
    for (int64_t k = 0; k < kElements; k += kRegister) {
      Whole<D> part;
      __builtin_memcpy(&part, room_ + kElements + k, sizeof part);
      stream<D>(line + k, part);
    }
  }
  /// Of a line that others write too.
  void write_part(Element* line, int64_t first, int64_t last) const {
    for (; first < last; ++first) line[first] = room_[kElements + first];
  }

 private:
  alignas(64) Element room_[3 * kElements];
};

/// Applies a map to a plane of n elements, a line's worth at least. Whole lines go past the caches; what is part of one is
/// found in whole registers that reach over others of the plane, and waits in `lines` for the other part. begins, ends:
/// whether there is no plane before or behind.
template <class D, class Map>
BN_INLINE void join_plane(const Map& map, const typename Map::At& place, int64_t n, const typename Map::Channel& k,
                          bool begins, bool ends, SharedLine<D> (&lines)[Map::kOutputs]) {
  constexpr int64_t kLine = SharedLine<D>::kElements, kRegister = SharedLine<D>::kRegister;
  const auto* const out = place.out[0] ? place.out[0] : place.out[Map::kOutputs - 1];
  const int64_t before = int64_t(reinterpret_cast<uintptr_t>(out) % 64 / sizeof *out);
  const int64_t head = before ? kLine - before : 0, tail = (n - head) % kLine, whole = n - head - tail;
  const auto each_output = [&](const auto& f) BN_INLINED {
    for (int o = 0; o < Map::kOutputs; ++o)
      if (!Map::kMayLackOutput || place.out[o]) f(o, place.out[o]);
  };
  const auto channel_at = [&](int64_t, auto) -> const auto& { return k; };
  const auto map_part = [&](int64_t from, int64_t count, int64_t to) BN_INLINED {
    typename Map::At at[1] = {place};
    map.skip(at[0], from);
    each_output([&](int o, auto*) BN_INLINED { at[0].out[o] = lines[o].at(to); });
    map_run<D, 1, 0, !Map::kInOrder>(map, at, count, count, channel_at);
  };
  const auto in_registers = [](int64_t count) { return count <= kRegister ? kRegister : kLine; };
  if (head > 0) {
    map_part(0, in_registers(head), before);
    each_output([&](int o, auto* to) BN_INLINED {
      begins ? lines[o].write_part(to - before, before, kLine) : lines[o].write(to - before);
    });
  }
  typename Map::At at[1] = {place};
  map.skip(at[0], head);
  each_output([&](int o, auto* to) BN_INLINED { at[0].out[o] = to + head; });
  const int64_t two = in_twos<D>(map, whole);
  if constexpr (Map::kOutputs > 1) map_in_turn<D, !Map::kInOrder>(map, at[0], whole, two, channel_at);
  else map_run<D, 1, 1, !Map::kInOrder>(map, at, whole, two, channel_at);
  if (tail > 0) {
    const int64_t count = in_registers(tail);
    map_part(n - count, count, tail - count);
    if (ends) each_output([&](int o, auto* to) BN_INLINED { lines[o].write_part(to + n - tail, 0, tail); });
  }
}

/// Applies a map to the planes of the channels, which lie side by side, at the given outers; in turn, but for half types and
/// with a residual, which lose by it.
template <class D, class Map>
__attribute__((flatten)) void join_planes(const Map map, const Extent& e,
                                          const Coefficients<typename D::Compute>& coefficients, Range outers,
                                          Range channels) {
  constexpr int kInTurn = kMapsInTurn<D, true, Map> && kNarrowing<D> == 1 ? kPlanesInTurn : 1;
  const int64_t inner = e.inner, most_in_turn = map.adds() ? 1 : kInTurn;
  SharedLine<D> lines[kInTurn][Map::kOutputs];
  for (int64_t outer = outers.first, count; outer < outers.last; outer += count) {
    count = least(most_in_turn, least(outers.last - outer, rest_of_group(e, outer)));
    const int64_t group = group_of(e, outer) * coefficients.columns;
    for (int64_t channel = channels.first; channel < channels.last; ++channel) {
      const typename Map::Channel k([&](int row) { return splat<D>(coefficients.row(row)[group + channel]); });
      const bool begins = channel == channels.first, ends = channel + 1 == channels.last;
      for (int64_t i = 0; i < count; ++i)
        join_plane<D>(map, map.at(outer + i, channel), inner, k, begins, ends, lines[i]);
    }
  }
}

/// in_runs: whether planes are walked so, where all outers are mapped. With AVX2 longer ones lose less by their ends than by
/// as many coefficients for each element as the backward has.
template <class D, class Map>
void map_elements(const Map& map, Writing writing, bool in_runs, const Extent& e,
                  const Coefficients<typename D::Compute>& coefficients, Range outers, Range columns) {
  if constexpr (kHasLines<D>) {
    const bool joins = !kIsCurved<D> && writing == Writing::joined;
    constexpr bool kRatherJoins = BN_VECTOR_BYTES < 64 && Map::kOutputs == 1 && Map::kCoefficients > 3;
    if (in_runs && !(kRatherJoins && joins && e.inner > kSoonEnding) && outers.last - outers.first == e.outer) {
      if (writing == Writing::cached) return map_runs<D, false>(map, e, coefficients, columns);
      const int64_t bytes = (columns.last - columns.first) * e.inner * int64_t(sizeof(typename D::Element));
      if (runs_are_lines(map, bytes, columns)) return map_runs<D, true>(map, e, coefficients, columns);
    }
    if (writing == Writing::streamed) return map_elements<D, true>(map, e, coefficients, outers, columns);
    if constexpr (!kIsCurved<D>)
      if (joins) return join_planes<D>(map, e, coefficients, outers, columns);
  }
  map_elements<D, false>(map, e, coefficients, outers, columns);
}
