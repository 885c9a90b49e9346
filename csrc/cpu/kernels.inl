// The kernels of one instruction set: every pass is prepare, reduce, finish, map, and `run` decides in which order the
// pieces of a pass go to the threads.

constexpr int kCoefficientRows = 6;
constexpr int64_t kSerialElements = 1 << 15;  // less is not worth waking a thread

/// The walk over rows serves two more shapes, whose rows hold several columns of one channel each: tiny planes, whose
/// `repeat` elements are adjacent columns, and few channels, where `fold` rows are taken as one.
struct Folding {
  int64_t channels, repeat, fold;
};

BN_INLINE Folding folding_of(const Extent& e, int64_t block) {
  constexpr int64_t kTinyPlane = 16, kManyPlanes = 16, kManyRows = 64;
  if (e.inner > 1) return {e.channels, e.inner <= kTinyPlane && e.outer >= kManyPlanes * e.groups ? e.inner : 1, 1};
  int64_t fold = 1;
  while (e.groups == 1 && e.channels * fold < block && e.outer % (2 * fold) == 0 && e.outer / fold > kManyRows)
    fold *= 2;
  return {e.channels, 1, fold};
}

/// The extent of the rows, where there is folding.
BN_INLINE Extent folded(const Extent& e, const Folding& f) {
  if (f.repeat * f.fold == 1) return e;
  return {e.outer / f.fold, e.channels * f.repeat * f.fold, 1, e.outer_per_example, e.groups};
}

/// Whether a tensor of these strides can be walked so, and its strides then.
BN_INLINE bool foldable(const Extent& e, const Folding& f, const void* data, const Strides& s) {
  return !data || ((f.repeat == 1 || s.channel == e.inner) && (f.fold == 1 || s.outer == e.channels));
}
BN_INLINE Strides folded(const Folding& f, const Strides& s) {
  return f.repeat * f.fold == 1 ? s : Strides{s.outer * f.fold, 1};
}

int64_t workspace_bytes(DType dtype, const Extent& e) {
  const bool wide = dtype == DType::f64, half = dtype == DType::bf16 || dtype == DType::f16;
  const int64_t block = column_block(wide ? 8 : half ? 2 : 4), compute = wide ? sizeof(double) : sizeof(float);
  const auto bytes = [&](const Extent& walked) {
    const int64_t length = walked.groups * walked.channels;
    return 2 * partition_of(walked, block).slices * length * int64_t(sizeof(double)) +
           kCoefficientRows * (length * compute + kCacheSkew);
  };
  return most(bytes(e), bytes(folded(e, folding_of(e, block))));
}

/// Where a pass keeps what its steps hand to each other. T is the type of the per-channel parameters.
template <class T>
struct Workspace {
  Folding folding;
  Partition cut;
  Extent extent;           // folded
  double *first, *second;  // [slices, groups, columns], the partial results
  Coefficients<T> coefficients;

  Workspace(void* memory, const Extent& e, const Folding& f, int64_t block)
      : folding(f), cut(partition_of(e, block)), extent(e) {
    const int64_t length = e.groups * e.channels, parts = cut.slices * length;
    first = static_cast<double*>(memory);
    second = first + parts;
    coefficients = {reinterpret_cast<T*>(second + parts), length};
  }
  /// A channel's columns: how many, the first of them in some group, and how far apart they are.
  int64_t columns() const { return folding.repeat * folding.fold; }
  int64_t first_column(int64_t group, int64_t channel) const { return group * extent.channels + channel * folding.repeat; }
  int64_t step() const { return folding.fold > 1 ? folding.channels : 1; }

  void set(int64_t group, int64_t channel, int row, T value) const {
    T* at = coefficients.row(row) + first_column(group, channel);
    for (int64_t i = 0; i < columns(); ++i) at[i * step()] = value;
  }
};

/// Moments from slices and columns to coefficients, with the running statistics.
template <class T>
void finish_moments(const ForwardParams& p, const Workspace<T>& work, double momentum, Range channels) {
  for (int64_t c = channels.first; c < channels.last; ++c) {
    const auto moments_of = [&](int64_t group) {
      Moments total{0, 0, 0};
      for (int64_t slice = 0; slice < work.cut.slices; ++slice) {
        const double count = slice_count(work.extent, work.cut, group, slice);
        const int64_t at = slice * work.coefficients.length + work.first_column(group, c);
        total = merge(total, merge_equal(work.columns(), work.step(), count, work.first + at, work.second + at));
      }
      return total;
    };
    finish_forward<T>(p, c, momentum, moments_of, [&](int64_t group, const Affine<T>& affine) {
      work.set(group, c, 0, affine.center);
      work.set(group, c, 1, affine.scale);
      work.set(group, c, 2, affine.shift);
      work.set(group, c, 3, affine.scale_rest);
    });
  }
}

/// What the backward pass must know of the forward's map.
template <class T>
void prepare_gradients(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  for (int64_t group = 0; group < p.extent.groups; ++group)
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const int64_t at = group * p.extent.channels + c;
      const Affine<T> affine =
          normalizing_affine<T>(p.mean[at], p.invstd[at], parameter<T>(p.weight, c, 1), parameter<T>(p.bias, c, 0));
      work.set(group, c, 0, affine.center);
      work.set(group, c, 4, affine.scale);
      work.set(group, c, 5, affine.shift);
    }
}

template <class T>
void finish_gradients(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  for (int64_t c = channels.first; c < channels.last; ++c) {
    const auto sums_of = [&](int64_t group) {
      GradientSums total{double(GroupOuters::of(p.extent, group).count * p.extent.inner), 0, 0};
      for (int64_t slice = 0; slice < work.cut.slices; ++slice)
        for (int64_t i = 0; i < work.columns(); ++i) {
          const int64_t at = slice * work.coefficients.length + work.first_column(group, c) + i * work.step();
          total.dz += work.first[at];
          total.dz_deviation += work.second[at];
        }
      return total;
    };
    finish_backward<T>(p, c, sums_of, [&](int64_t group, const GradientAffine<T>& affine) {
      work.set(group, c, 1, affine.slope);
      work.set(group, c, 2, affine.bend);
      work.set(group, c, 3, affine.shift);
    });
  }
}

template <class T>
void prepare_inference(const InferenceParams& p, const Workspace<T>& work) {
  for (int64_t c = 0; c < p.extent.channels; ++c) {
    const double invstd = inverse_deviation(parameter<T>(p.running_var, c, 1), p.eps);
    const Affine<T> affine = normalizing_affine<T>(parameter<T>(p.running_mean, c, 0), invstd,
                                                   parameter<T>(p.weight, c, 1), parameter<T>(p.bias, c, 0));
    work.set(0, c, 0, affine.center);
    work.set(0, c, 1, affine.scale);
    work.set(0, c, 2, affine.shift);
    work.set(0, c, 3, affine.scale_rest);
  }
}

/// One slice: its units, and where its partial results stand.
struct Part {
  GroupOuters outers;
  Range units;
  int64_t at;

  Part(const Extent& e, const Partition& cut, int64_t group, int64_t slice)
      : outers(GroupOuters::of(e, group)), units(slice_of(outers.count * cut.parts, slice, cut.slices)),
        at((slice * e.groups + group) * e.channels) {}
};

template <class D, class P>
Folding folding_of_map(const P& p) {
  const Folding f = folding_of(p.extent, kColumnBlock<D>);
  const bool all = foldable(p.extent, f, p.x, p.x_strides) && foldable(p.extent, f, p.residual, p.residual_strides) &&
                   foldable(p.extent, f, p.y, p.y_strides);
  return all ? f : Folding{p.extent.channels, 1, 1};
}

/// The params as the walk over elements sees them.
template <class P>
P folded_map(P p, const Folding& f) {
  p.x_strides = folded(f, p.x_strides);
  p.residual_strides = folded(f, p.residual_strides);
  p.y_strides = folded(f, p.y_strides);
  p.extent = folded(p.extent, f);
  return p;
}

template <class D, class P>
void normalize(const P& p, const Coefficients<typename D::Compute>& coefficients, Range outers,
               Range columns) {
  const NormalizeParams n{p.x, p.x_strides, p.residual, p.residual_strides, p.y, p.y_strides, p.activation};
  if (p.activation == Activation::none && !p.residual)
    map_elements<D>(Normalize<D, true>{n}, p.extent, coefficients, outers, columns);
  else
    map_elements<D>(Normalize<D, false>{n}, p.extent, coefficients, outers, columns);
}

template <class D>
struct Forward {
  typedef D Type;
  using Element = typename D::Element;
  const ForwardParams& given;
  const Folding folding;
  const ForwardParams p;  // folded
  Workspace<typename D::Compute> work;
  double momentum;

  Forward(const ForwardParams& params)
      : given(params), folding(folding_of_map<D>(params)), p(folded_map(params, folding)),
        work(p.workspace, p.extent, folding, kColumnBlock<D>), momentum(p.momentum) {
    const int64_t batches = p.num_batches_tracked ? ++*p.num_batches_tracked : 1;
    if (p.cumulative) momentum = 1 / double(batches);
  }
  void prepare(Range) const {}
  void reduce(int64_t group, int64_t slice, Range columns) const {
    const Part part(p.extent, work.cut, group, slice);
    double *mean = work.first + part.at, *m2 = work.second + part.at;
    if (p.extent.inner == 1) return row_moments<D>(p, part.outers, part.units, columns, mean, m2);
    for (int64_t c = columns.first; c < columns.last; ++c) {
      const auto* plane = static_cast<const Element*>(p.x) + c * p.x_strides.channel;
      const Moments m = plane_moments<D>(p, work.cut, part.outers, part.units, plane);
      mean[c] = m.mean;
      m2[c] = m.m2;
    }
  }
  void finish(Range channels) const { finish_moments(given, work, momentum, channels); }
  void map(Range outers, Range columns) const {
    normalize<D>(p, work.coefficients, outers, columns);
  }
};

template <class D>
struct Backward {
  typedef D Type;
  const BackwardParams& given;
  const Folding folding;
  const BackwardParams p;  // folded
  Workspace<typename D::Compute> work;

  Backward(const BackwardParams& params)
      : given(params), folding(folding_of_all(params)), p(folded_all(params, folding)),
        work(p.workspace, p.extent, folding, kColumnBlock<D>) {}

  static Folding folding_of_all(const BackwardParams& p) {
    const Folding f = folding_of(p.extent, kColumnBlock<D>);
    const bool all = foldable(p.extent, f, p.x, p.x_strides) && foldable(p.extent, f, p.dy, p.dy_strides) &&
                     foldable(p.extent, f, p.residual, p.residual_strides) &&
                     foldable(p.extent, f, p.dx, p.dx_strides) &&
                     foldable(p.extent, f, p.dresidual, p.dresidual_strides);
    return all ? f : Folding{p.extent.channels, 1, 1};
  }
  static BackwardParams folded_all(BackwardParams p, const Folding& f) {
    p.x_strides = folded(f, p.x_strides);
    p.dy_strides = folded(f, p.dy_strides);
    p.residual_strides = folded(f, p.residual_strides);
    p.dx_strides = folded(f, p.dx_strides);
    p.dresidual_strides = folded(f, p.dresidual_strides);
    p.extent = folded(p.extent, f);
    return p;
  }
  void prepare(Range channels) const { prepare_gradients(given, work, channels); }
  void reduce(int64_t group, int64_t slice, Range columns) const {
    if (p.activation == Activation::none)
      reduce<true>(group, slice, columns);
    else
      reduce<false>(group, slice, columns);
  }
  template <bool kPlain>
  void reduce(int64_t group, int64_t slice, Range columns) const {
    const Part part(p.extent, work.cut, group, slice);
    const auto row = [&](int k) { return work.coefficients.row(k) + group * p.extent.channels; };
    const Forwarded<D> forwarded{row(0), row(4), row(5)};
    double *dz = work.first + part.at, *dz_deviation = work.second + part.at;
    for (int64_t c = columns.first; c < columns.last; ++c) dz[c] = dz_deviation[c] = 0;
    if (p.extent.inner == 1)
      return row_gradients<D, kPlain>(p, part.outers, part.units, columns, forwarded, dz, dz_deviation);
    for (int64_t c = columns.first; c < columns.last; ++c)
      plane_gradients<D, kPlain>(p, work.cut, part.outers, part.units, c, forwarded, dz + c, dz_deviation + c);
  }
  void finish(Range channels) const { finish_gradients(given, work, channels); }
  void map(Range outers, Range columns) const {
    if (p.activation == Activation::none && p.dx && !p.dresidual)
      map_elements<D>(NormalizeGradient<D, true>{p}, p.extent, work.coefficients, outers, columns);
    else if (p.dx || p.dresidual)
      map_elements<D>(NormalizeGradient<D, false>{p}, p.extent, work.coefficients, outers, columns);
  }
};

template <class D>
struct Inference {
  typedef D Type;
  const Folding folding;
  const InferenceParams p;  // folded
  Workspace<typename D::Compute> work;

  Inference(const InferenceParams& params)
      : folding(folding_of_map<D>(params)), p(folded_map(params, folding)),
        work(p.workspace, p.extent, folding, kColumnBlock<D>) {
    prepare_inference(params, work);
  }
  void prepare(Range) const {}
  void reduce(int64_t, int64_t, Range) const {}
  void finish(Range) const {}
  void map(Range outers, Range columns) const {
    normalize<D>(p, work.coefficients, outers, columns);
  }
};

/// The steps of a pass, each over some channels or columns of channels; `self` is the pass.
struct Steps {
  const void* self;
  Extent extent;  // folded
  Folding folding;
  Partition cut;
  int64_t column_block;
  void (*prepare)(const void* self, Range channels);
  void (*reduce)(const void* self, int64_t group, int64_t slice, Range columns);
  void (*finish)(const void* self, Range channels);
  void (*map)(const void* self, Range outers, Range columns);
};

template <class Pass>
Steps steps_of(const Pass& pass) {
  return {&pass, pass.p.extent, pass.folding, pass.work.cut, kColumnBlock<typename Pass::Type>,
          [](const void* self, Range channels) { static_cast<const Pass*>(self)->prepare(channels); },
          [](const void* self, int64_t group, int64_t slice, Range columns) {
            static_cast<const Pass*>(self)->reduce(group, slice, columns);
          },
          [](const void* self, Range channels) { static_cast<const Pass*>(self)->finish(channels); },
          [](const void* self, Range outers, Range columns) { static_cast<const Pass*>(self)->map(outers, columns); }};
}

/// The last map over everything, tile by tile: some columns of some rows, so that what belongs to the columns stays in the
/// nearest cache, or some planes of one outer.
void run_map(const Steps& steps, const Executor& executor) {
  constexpr int64_t kTile = 1 << 15, kRows = 32;
  const Extent& e = steps.extent;
  const bool rows = e.inner == 1;
  const int64_t width = least(e.channels, rows ? steps.column_block : ceil_div(kTile, e.inner)), across = ceil_div(e.channels, width);
  const int64_t height = rows ? most(kRows, kTile / width) : 1, down = ceil_div(e.outer, height);
  const int64_t grain = ceil_div(kSerialElements, width * height * e.inner);
  parallel_for(executor, down * across, grain, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t outer = tile / across * height, column = tile % across * width;
      steps.map(steps.self, {outer, least(e.outer, outer + height)}, {column, least(e.channels, column + width)});
    }
  });
}

/// Block of channels by block of channels, so that the map finds in the cache what the reduction has read. The columns
/// of a block are adjacent unless rows are folded; then there is one block.
void run_blocks(const Steps& steps, const Executor& executor, int64_t block, int64_t grain) {
  const Extent& e = steps.extent;
  const Folding& f = steps.folding;
  const int64_t slices = steps.cut.slices;
  parallel_for(executor, ceil_div(f.channels, block), grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Range channels{i * block, least(f.channels, (i + 1) * block)};
      const Range columns{channels.first * f.repeat, channels.last * f.repeat * f.fold};
      steps.prepare(steps.self, channels);
      for (int64_t group = 0; group < e.groups; ++group)
        for (int64_t slice = 0; slice < slices; ++slice) steps.reduce(steps.self, group, slice, columns);
      steps.finish(steps.self, channels);
      steps.map(steps.self, {0, e.outer}, columns);
    }
  });
}

/// Each step over everything, one after another.
void run_steps(const Steps& steps, const Executor& executor) {
  const Extent& e = steps.extent;
  const int64_t slices = steps.cut.slices, parts = e.groups * slices;
  const int64_t block = e.inner > 1 ? 1 : steps.column_block, blocks = ceil_div(e.channels, block);
  const int64_t elements = e.outer * e.inner * least(block, e.channels) / parts;
  const auto over_channels = [&](auto step) {
    parallel_for(executor, steps.folding.channels, ceil_div(1 << 10, parts),
                 [&](int64_t first, int64_t last) { step(steps.self, {first, last}); });
  };
  over_channels(steps.prepare);
  parallel_for(executor, parts * blocks, ceil_div(kSerialElements, elements + 1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t part = i / blocks, begin = i % blocks * block;
      steps.reduce(steps.self, part / slices, part % slices, {begin, least(e.channels, begin + block)});
    }
  });
  over_channels(steps.finish);
  run_map(steps, executor);
}

/// Chooses between the two: channels one by one where their planes are long runs of memory and there are enough of them
/// for all threads. Rows are read whole, in order: parts of rows would be short runs, far apart.
void run(const Steps& steps, const Executor& executor) {
  const Extent& e = steps.extent;
  const int64_t per_channel = e.outer * e.inner, columns = steps.folding.repeat * steps.folding.fold;
  if (per_channel * e.channels <= kSerialElements && e.channels <= steps.column_block)
    return run_blocks(steps, executor, e.channels / columns, 1);
  if (e.inner > 1 && e.channels >= 2 * executor.threads)
    return run_blocks(steps, executor, 1, ceil_div(kSerialElements, per_channel));
  run_steps(steps, executor);
}

/// Calls f with the type that stands for a dtype.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(F32{});
    case DType::f64: return f(F64{});
    case DType::bf16: return f(BF16{});
    case DType::f16: return f(F16{});
  }
}

void forward(const ForwardParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) { run(steps_of(Forward<decltype(d)>(p)), executor); });
}

void backward(const BackwardParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) { run(steps_of(Backward<decltype(d)>(p)), executor); });
}

void inference(const InferenceParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) { run_map(steps_of(Inference<decltype(d)>(p)), executor); });
}
