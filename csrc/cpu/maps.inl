// The two maps over the elements: x to y, and (dy, x) to dx. Each is written for one register; the walks over planes and
// rows are shared (mapping.inl).

template <class Element>
BN_INLINE Element* place(Element* data, const Strides& s, int64_t outer, int64_t channel) {
  return data ? data + outer * s.outer + channel * s.channel : nullptr;
}
template <class Element>
BN_INLINE void advance(Element*& place, const Strides& s) {
  if (place) place += s.outer;
}

/// How an output is written: as any memory, or past the caches, where planes do or do not join within lines.
enum class Writing { cached, joined, streamed };

/// Large outputs go past the caches: they would push out of the last one what is needed sooner, and each of their lines
/// would be fetched before it is overwritten. In training sooner than in inference, after which the output is read soonest:
/// there a reader at once, which then has to fetch it, gives back what was gained. With AVX2 planes sooner than rows, with
/// which a reader lost a tenth. Whole lines only, because one of which other stores write a part is fetched all the same.
/// Two planes of the one output that there is may share a line, of which each writes whole registers soon after the other.
template <class D>
Writing way_of_writing(const Extent& e, const void* out, const Strides& s, bool training, const Executor& executor,
                       bool one_output = true) {
  constexpr int64_t kBytes = sizeof(typename D::Element), kLine = 64;
  const bool planes = e.inner > 1;
  const int64_t large = executor.cache_bytes / (!training ? 4 : planes && BN_VECTOR_BYTES < 64 ? 32 : 16);
  if (!kHasLines<D> || e.outer * e.channels * e.inner * kBytes < large || (planes && s.channel != e.inner))
    return Writing::cached;
  const int64_t apart = (s.outer | (planes ? e.inner : 0)) * kBytes;
  const int64_t least_apart = planes && one_output ? BN_VECTOR_BYTES : kLine;
  if ((reinterpret_cast<uintptr_t>(out) | uintptr_t(apart)) % least_apart == 0) return Writing::streamed;
  return planes && e.inner * kBytes >= kLine ? Writing::joined : Writing::cached;
}

/// Asks for what will be read so far from a place: in a map memory is idle for reading. Once for a pair.
/// NB: not even a question whether there is anything to ask for: after it coefficients would be loaded before they are used.
template <class Element, class Count>
BN_INLINE void prefetch_away(const Element* place, int64_t away, Count) {
  if (!kIsSecond<Count>) prefetch_ahead(place + away);
}

/// What a map makes of one register.
/// NB: no function may return it that is not inlined: GCC 12 clears the upper halves of AVX2's registers before it does.
template <class D, int kCount>
struct Results {
  Vec<D> values[kCount];
};

/// What the forward and the inference map have in common.
struct NormalizeParams {
  const void* x;
  Strides x_strides;
  const void* residual;
  Strides residual_strides;
  uint8_t* mask;
  void* y;
  Strides y_strides;
  Activation activation;
  double activation_number;
  int64_t x_away, residual_away;  // to what is read soon: the next channels to be reduced; the next outer
  bool from_cache;                // comes x, as a reduction has just read it
};

/// x to y with coefficients center, scale, shift and, for F32, scale_rest. kWithin: as in mark().
template <class D, Ending kEnding, bool kWithin = false>
struct Normalize {
  static constexpr int kOutputs = 1, kCoefficients = D::kWithRest ? 4 : 3;
  static constexpr bool kMayLackOutput = false, kMarksTwo = kEnding == Ending::masked && D::kAlternates;
  static constexpr bool kInOrder = kEnding == Ending::masked && !kMarksTwo;  // as the bits it writes
  using Element = typename D::Element;
  const NormalizeParams p;
  const Extent& extent;

  struct Channel {
    Vec<D> center, scale, shift, scale_rest;
    template <class Read>
    explicit Channel(const Read& read) : center(read(0)), scale(read(1)), shift(read(2)), scale_rest{} {
      if constexpr (D::kWithRest) scale_rest = read(3);
    }
  };
  struct At {
    Element* out[1];
    const Element *x, *residual;
    MarksAt mask;
    const typename D::Compute* found;  // what a curved activation has made
  };
  At at(int64_t outer, int64_t channel) const {
    return {{place(static_cast<Element*>(p.y), p.y_strides, outer, channel)},
            place(static_cast<const Element*>(p.x), p.x_strides, outer, channel),
            place(static_cast<const Element*>(p.residual), p.residual_strides, outer, channel),
            kEnding == Ending::masked ? mask_place<D>(p.mask, extent, outer, channel, 0) : MarksAt{}, nullptr};
  }
  int64_t channel_stride() const { return p.y_strides.channel; }
  bool overwrites() const { return p.x == p.y; }
  bool from_cache() const { return p.from_cache; }
  bool adds() const { return p.residual; }
  static void skip(At& a, int64_t count) {
    a.x += count;
    if (a.residual) a.residual += count;
    if constexpr (kEnding == Ending::masked) a.mask.skip(count);
    if constexpr (kIsCurved<D>) a.found += count;
  }
  void next(At& a) const {
    advance(a.x, p.x_strides);
    advance(a.residual, p.residual_strides);
    advance(a.out[0], p.y_strides);
    if constexpr (kEnding == Ending::masked) a.mask.skip(mask_strides<D>(extent).outer);
  }
  /// Before the residual and the activation.
  template <class Count>
  BN_INLINED Vec<D> normalized(const At& a, int64_t i, Count count, const Channel& k) const {
    prefetch_away(a.x + i, p.x_away, count);
    const Vec<D> deviation = load<D>(a.x + i, count) - k.center;
    if constexpr (D::kWithRest)
      return multiply_add<D>(deviation, k.scale, multiply_add<D>(deviation, k.scale_rest, k.shift));
    else
      return deviation * k.scale + k.shift;
  }
  /// Finds y of n elements, as many as a block holds, at a curved activation; channel_at as map_run() takes it.
  template <class ChannelAt>
  void find(At& a, int64_t n, const ChannelAt& channel_at, CurvedBlock<D>& block) const {
    each_register<D>(0, n, [&](int64_t i, auto count) BN_INLINED {
      Vec<D> z = normalized(a, i, count, channel_at(i, count));
      if (a.residual) z += load<D>(a.residual + i, count);
      store<Parameter<D>>(block.z + i, z);
    });
    block.activate(p.activation, p.activation_number, n);
    a.found = block.z;
  }
  template <class Count>
  BN_INLINED Results<D, 1> operator()(const At& a, int64_t i, Count count, const Channel& k) const {
    if constexpr (kIsCurved<D>) return {{load<Parameter<D>>(a.found + i, count)}};
    Vec<D> z = normalized(a, i, count, k);
    if constexpr (kEnding == Ending::masked) {
      prefetch_away(a.residual + i, p.residual_away, count);
      z += load<D>(a.residual + i, count);
      constexpr bool kIsEndedByTwo = kMarksTwo && (kIsFirst<Count> || kIsSecond<Count>);
      if constexpr (!kIsEndedByTwo) {
        mark<D, kWithin>(a.mask, i, z, count);
        z = relu(z);
      }
    }
    if constexpr (kEnding == Ending::relu) z = relu(z);
    if constexpr (kEnding == Ending::general) {
      if (a.residual) {
        prefetch_away(a.residual + i, p.residual_away, count);
        z += load<D>(a.residual + i, count);
      }
      if (p.activation == Activation::relu) z = relu(z);
    }
    return {{z}};
  }
  /// The ending of two registers, from which the bits of both are made at once.
  BN_INLINED void end_two(const At& a, int64_t i, Results<D, 1>& even, Results<D, 1>& odd) const {
    mark_two<D, kWithin>(a.mask, i, even.values[0], odd.values[0]);
    even.values[0] = relu(even.values[0]);
    odd.values[0] = relu(odd.values[0]);
  }
};

/// (dy, x) to dx and dresidual with coefficients center, slope, bend, shift, and the forward's scale and shift.
/// kInPlace: dx may be where dy is. kMayLack: of two outputs one may be null.
template <class D, Ending kEnding, bool kInPlace = false, bool kMayLack = has_two_gradients(kEnding)>
struct NormalizeGradient {
  static constexpr int kOutputs = has_two_gradients(kEnding) ? 2 : 1, kCoefficients = forwards_again(kEnding) ? 6 : 4;
  static constexpr bool kMayLackOutput = kMayLack, kMarksTwo = false, kInOrder = false;
  using Element = typename D::Element;
  const BackwardParams& p;
  const int64_t x_away, dy_away;  // as in Normalize
  const bool cached;

  struct Channel {
    Vec<D> center, slope, bend, shift, forward_scale, forward_shift;
    template <class Read>
    explicit Channel(const Read& read)
        : center(read(0)), slope(read(1)), bend(read(2)), shift(read(3)), forward_scale{}, forward_shift{} {
      if constexpr (forwards_again(kEnding)) forward_scale = read(4), forward_shift = read(5);
    }
  };
  struct At {
    Element* out[kOutputs];
    UpstreamGradient<D, kEnding> from;
  };
  At at(int64_t outer, int64_t channel) const {
    At a;
    a.from = UpstreamGradient<D, kEnding>(p, outer, channel, 0);
    a.out[0] = place(static_cast<Element*>(p.dx), p.dx_strides, outer, channel);
    if constexpr (kOutputs > 1)
      a.out[1] = place(static_cast<Element*>(p.dresidual), p.dresidual_strides, outer, channel);
    return a;
  }
  int64_t channel_stride() const { return p.dx_strides.channel; }
  static constexpr bool overwrites() { return kInPlace; }
  bool from_cache() const { return cached; }
  static constexpr bool adds() { return false; }
  static void skip(At& a, int64_t count) {
    a.from.dy += count;
    a.from.x += count;
    if (a.from.residual) a.from.residual += count;
    if constexpr (kEnding == Ending::masked) a.from.mask.skip(count);
    if constexpr (kIsCurved<D>) a.from.curved.found += count;
  }
  void next(At& a) const {
    advance(a.from.x, p.x_strides);
    advance(a.from.dy, p.dy_strides);
    advance(a.from.residual, p.residual_strides);
    if constexpr (kEnding == Ending::masked) a.from.mask.skip(mask_strides<D>(p.extent).outer);
    advance(a.out[0], p.dx_strides);
    if constexpr (kOutputs > 1) advance(a.out[1], p.dresidual_strides);
  }
  template <class ChannelAt>
  void find(At& a, int64_t n, const ChannelAt& channel_at, CurvedBlock<D>& block) const {
    const auto forwarded_at = [&](int64_t i, auto count) BN_INLINED {
      const auto& k = channel_at(i, count);
      return ForwardedLanes<D>{k.center, k.forward_scale, k.forward_shift};
    };
    a.from.find(n, forwarded_at, block);
  }
  template <class Count>
  BN_INLINED Results<D, kOutputs> operator()(const At& a, int64_t i, Count count, const Channel& k) const {
    prefetch_away(a.from.x + i, x_away, count);
    prefetch_away(a.from.dy + i, dy_away, count);
    const Vec<D> deviation = load<D>(a.from.x + i, count) - k.center;
    const Vec<D> dz = a.from.dz(i, count, deviation, k.forward_scale, k.forward_shift);
    const Vec<D> dx = dz * k.slope + (deviation * k.bend + k.shift);
    if constexpr (kOutputs > 1) return {{dx, dz}};
    else return {{dx}};
  }
};
