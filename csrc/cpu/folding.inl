// Shapes that are walked as rows of more columns than channels, and the memory in which a pass keeps what it finds out
// about each column.

constexpr int kCoefficientRows = 6;

/// The walk over rows serves two more shapes, whose rows hold several columns of one channel each: tiny planes, whose
/// `repeat` elements are adjacent columns, and few channels, where `fold` rows are taken as one. The walk over planes serves
/// groups as if they were more channels: where each has the outer next to that of the one before, those of all are taken as
/// one, and `channels` are those of all groups.
struct Folding {
  int64_t channels, repeat, fold, groups = 1;
};

BN_INLINE Folding folding_of(const Extent& e) {
  constexpr int64_t kManyPlanes = 16, kManyRows = 64, kWide = 256;
  if (e.inner > 1) return {e.channels, e.inner <= kTinyPlane && e.outer >= kManyPlanes * e.groups ? e.inner : 1, 1};
  const int64_t rows = e.groups == 1 ? e.outer : e.outer_per_example;  // of one group, one after another
  int64_t fold = 1;
  while (2 * e.channels * fold <= kWide && rows % (2 * fold) == 0 && e.outer / fold > kManyRows * e.groups) fold *= 2;
  return {e.channels, 1, fold};
}

/// Of planes of equal groups; else there is none.
BN_INLINE Folding folding_of_groups(const Extent& e) {
  const bool side_by_side = e.inner > 1 && e.outer_per_example == 1 && e.outer % e.groups == 0;
  const int64_t groups = side_by_side ? e.groups : 1;
  return {groups * e.channels, 1, 1, groups};
}

/// The extent of what is walked, where there is folding.
BN_INLINE Extent folded(const Extent& e, const Folding& f) {
  if (f.groups > 1) return {e.outer / f.groups, f.channels, e.inner, 1, 1};
  if (f.repeat * f.fold == 1) return e;
  const int64_t per_example = e.groups == 1 ? 1 : e.outer_per_example / f.fold;
  return {e.outer / f.fold, e.channels * f.repeat * f.fold, 1, per_example, e.groups};
}

/// Whether a tensor of these strides can be walked so, and its strides then.
BN_INLINE bool foldable(const Extent& e, const Folding& f, const void* data, const Strides& s) {
  return !data || ((f.repeat == 1 || s.channel == e.inner) && (f.fold == 1 || s.outer == e.channels) &&
                   (f.groups == 1 || s.outer == e.channels * s.channel));
}
BN_INLINE Strides folded(const Folding& f, const Strides& s) {
  return {s.outer * f.fold * f.groups, f.repeat * f.fold == 1 ? s.channel : 1};
}

int64_t workspace_bytes(DType dtype, const Extent& e) {
  const int64_t compute = dtype == DType::f64 ? sizeof(double) : sizeof(float), block = column_block(compute);
  const auto bytes = [&](const Extent& walked) {
    const int64_t length = walked.groups * walked.channels;
    return 2 * partition_of(walked, block).slices * length * int64_t(sizeof(double)) +
           kCoefficientRows * (length * compute + kCacheSkew);
  };
  return most(bytes(e), bytes(folded(e, folding_of(e))));
}

/// Where a pass keeps what its steps hand to each other. T is the type of the per-channel parameters.
template <class T>
struct Workspace {
  Folding folding;
  Partition cut;
  Extent extent;           // folded
  Grouping grouping;       // of that
  int64_t channels;        // of one group
  double *first, *second;  // [slices, groups, columns], the partial results
  Coefficients<T> coefficients;

  Workspace(void* memory, const Extent& e, const Folding& f, int64_t block)
      : folding(f), cut(partition_of(e, block)), extent(e), grouping(e), channels(f.channels / f.groups) {
    const int64_t length = e.groups * e.channels, parts = cut.slices * length;
    first = static_cast<double*>(memory);
    second = first + parts;
    coefficients = {reinterpret_cast<T*>(second + parts), length, e.channels};
  }
  /// The first of a channel's columns in some group.
  int64_t first_column(int64_t group, int64_t channel) const {
    return group * channels * folding.repeat * folding.fold + channel * folding.repeat;
  }
  /// Sets a coefficient of some channels, in all their columns. NaN without its payload, which BF16 could not round.
  void set(int row, int64_t group, Range channels, const T* __restrict values) const {
    T* __restrict at = coefficients.row(row) + first_column(group, channels.first);
    const int64_t n = channels.last - channels.first, repeat = folding.repeat;
    const auto without_payload = [=](int64_t c) { return values[c] == values[c] ? values[c] : T(__builtin_nan("")); };
    if (repeat == 1)
      for (int64_t i = 0; i < folding.fold; ++i)
        for (int64_t c = 0; c < n; ++c) at[i * folding.channels + c] = without_payload(c);
    else
      for (int64_t c = 0; c < n; ++c)
        for (int64_t i = 0; i < repeat; ++i) at[c * repeat + i] = without_payload(c);
  }
};
