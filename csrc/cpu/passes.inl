// The passes: prepare, reduce, finish, map, each over some channels or columns. What the steps hand to each other lies
// in the workspace; schedule.inl decides in which order their pieces go to the threads.

/// Joins every channel's slices and folded columns to the first of them. Calls join(n, into, from, before, count) for n
/// adjacent columns of `before` and `count` samples each: many channels at a time, as one alone would wait for its own
/// chain of divisions. What is left are the columns of a folded plane.
template <class T, class Join>
void join_parts(const Workspace<T>& work, int64_t group, Range channels, const Join& join) {
  const Folding& f = work.folding;
  const int64_t begin = work.first_column(group, channels.first), width = channels.last - channels.first;
  double samples = 0;
  for (int64_t slice = 0; slice < work.cut.slices; ++slice) {
    const double count = slice_count(work.extent, work.cut, group, slice);
    if (slice > 0 && count > 0)
      for (int64_t i = 0; i < f.fold; ++i) {
        const int64_t into = begin + i * f.channels;
        join(width * f.repeat, into, into + slice * work.coefficients.length, samples, count);
      }
    samples += count;
  }
  for (int64_t i = 1; i < f.fold; ++i) join(width, begin, begin + i * f.channels, double(i) * samples, samples);
}

/// The coefficients of one group's map, from the weights that finish_moments has left in the place of the sums.
template <class T>
void set_affine(const ForwardParams& p, const Workspace<T>& work, int64_t group, Range channels) {
  const int64_t n = channels.last - channels.first, repeat = work.folding.repeat;
  const int64_t from = work.first_column(0, channels.first), kept = group * p.extent.channels + channels.first;
  const double *gamma = work.first + from, *beta = work.second + from;
  const double *mean = p.mean + kept, *invstd = p.invstd + kept;
  T* __restrict row[4];
  for (int k = 0; k < 4; ++k) row[k] = work.coefficients.row(k) + work.first_column(group, channels.first);
  T *__restrict center = row[0], *__restrict scale = row[1], *__restrict shift = row[2], *__restrict rest = row[3];
  for (int64_t i = 0; i < n; ++i) {
    const Affine<T> affine = normalizing_affine<T>(mean[i], invstd[i], gamma[i * repeat], beta[i * repeat]);
    const int64_t at = i * repeat;
    center[at] = affine.center;
    scale[at] = affine.scale;
    shift[at] = affine.shift;
    rest[at] = affine.scale_rest;
  }
  if (work.columns() > 1)
    for (int k = 0; k < 4; ++k)
      for (int64_t i = 0; i < n; ++i) work.set(group, channels.first + i, k, row[k][i * repeat]);
}

/// Moments from slices and columns to coefficients, with the running statistics.
template <class T>
void finish_moments(const ForwardParams& p, const Workspace<T>& work, const RunningStep& step, Range channels) {
  double *__restrict mean = work.first, *__restrict m2 = work.second;
  for (int64_t group = 0; group < p.extent.groups; ++group)
    join_parts(work, group, channels, [=](int64_t n, int64_t into, int64_t from, double before, double count) {
      const double weight = count / (before + count);
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c)
        torch_bn::join(mean[into + c], m2[into + c], before, mean[from + c], m2[from + c], weight);
    });
  // Loops over channels that do one thing each run on registers; where roots and divisions wait for each other they do
  // not. From here on `m2` holds variances, and then the two hold the weights of the map.
  const GroupSizes outers(p.extent);
  const int64_t C = p.extent.channels, n = channels.last - channels.first, repeat = work.folding.repeat;
  const int64_t per_outer = p.extent.inner / repeat;
  for (int64_t group = 0; group < p.extent.groups; ++group) {
    const int64_t at = work.first_column(group, channels.first);
    double* __restrict kept = p.mean + group * C + channels.first;
    double* __restrict invstd = p.invstd + group * C + channels.first;
    const double count = double(outers[group] * per_outer), eps = p.eps;
    if (repeat > 1)
      for (int64_t i = 0; i < n; ++i) {
        const Moments m = merge_equal(repeat, count, mean + at + i * repeat, m2 + at + i * repeat);
        kept[i] = m.mean;
        m2[at + i * repeat] = biased_variance(m);
        invstd[i] = inverse_deviation(biased_variance(m), eps);
      }
    else
      for (int64_t i = 0; i < n; ++i) {
        const double variance = biased_variance({count, mean[at + i], m2[at + i]});
        kept[i] = mean[at + i];
        m2[at + i] = variance;
        invstd[i] = inverse_deviation(variance, eps);
      }
  }
  const bool unbiased = p.unbiased && !p.running.renorm.mean;
  const auto factor_of = [&](int64_t group) { return unbiased ? bessel(double(outers[group] * p.extent.inner)) : 1; };
  const double first_factor = factor_of(0), last_factor = factor_of(p.extent.groups - 1);
  for (int64_t c = channels.first; c < channels.last; ++c) {
    const Weights weights = finish_forward<T>(
        p, c, step, [&](int64_t group) { return p.mean[group * C + c]; },
        [&](int64_t group) {
          return m2[work.first_column(group, c)] * (outers[group] == outers[0] ? first_factor : last_factor);
        });
    mean[work.first_column(0, c)] = weights.gamma;
    m2[work.first_column(0, c)] = weights.beta;
  }
  for (int64_t group = 0; group < p.extent.groups; ++group) set_affine(p, work, group, channels);
}

/// What the backward pass must know of the forward's map.
template <class T>
void prepare_gradients(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  for (int64_t group = 0; group < p.extent.groups; ++group)
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const int64_t at = group * p.extent.channels + c;
      const Weights weights = corrected_weights<T>(p, c, kept_correction(p, c));
      const Affine<T> affine = normalizing_affine<T>(p.mean[at], p.invstd[at], weights.gamma, weights.beta);
      work.set(group, c, 0, affine.center);
      work.set(group, c, 4, affine.scale);
      work.set(group, c, 5, affine.shift);
    }
}

template <class T>
void finish_gradients(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  double *__restrict dz = work.first, *__restrict dz_deviation = work.second;
  for (int64_t group = 0; group < p.extent.groups; ++group)
    join_parts(work, group, channels, [=](int64_t n, int64_t into, int64_t from, double, double) {
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
        dz[into + c] += dz[from + c];
        dz_deviation[into + c] += dz_deviation[from + c];
      }
    });
  const GroupSizes outers(p.extent);
  for (int64_t c = channels.first; c < channels.last; ++c) {
    const auto sums_of = [&](int64_t group) {
      GradientSums total{double(outers[group] * p.extent.inner), 0, 0};
      for (int64_t at = work.first_column(group, c); at < work.first_column(group, c + 1); ++at) {
        total.dz += dz[at];
        total.dz_deviation += dz_deviation[at];
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
  const Folding f = folding_of(p.extent, sizeof(typename D::Element));
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
void normalize(const P& p, bool streamed, const Coefficients<typename D::Compute>& coefficients, Range outers,
               Range columns) {
  const NormalizeParams n{p.x, p.x_strides, p.residual, p.residual_strides, p.y, p.y_strides, p.activation};
  if (p.activation == Activation::none && !p.residual)
    map_elements<D>(Normalize<D, true>{n}, streamed, p.extent, coefficients, outers, columns);
  else
    map_elements<D>(Normalize<D, false>{n}, streamed, p.extent, coefficients, outers, columns);
}

template <class D>
struct Forward {
  typedef D Type;
  using Element = typename D::Element;
  const ForwardParams& given;
  const Folding folding;
  const ForwardParams p, mapped;  // folded
  Workspace<typename D::Compute> work;
  const bool streamed;
  const RunningStep step;

  Forward(const ForwardParams& params, const Executor& executor)
      : given(params), folding(folding_of_map<D>(params)), p(folded_map(params, folding)),
        mapped(folded_map(params, narrowed(folding))), work(p.workspace, p.extent, folding, kColumnBlock<D>),
        streamed(worth_streaming<D>(mapped.extent, p.y, mapped.y_strides, true, executor)),
        step(step_of<typename D::Compute>(p.running)) {
    if (!p.statistics) count_batch<typename D::Compute>(p.running, step);
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
  void finish(Range channels) const { finish_moments(given, work, step, channels); }
  void map(Range outers, Range columns) const { normalize<D>(mapped, streamed, work.coefficients, outers, columns); }
};

template <class D>
struct Backward {
  typedef D Type;
  const BackwardParams& given;
  const Folding folding;
  const BackwardParams p, mapped;  // folded
  Workspace<typename D::Compute> work;
  const bool streamed;

  Backward(const BackwardParams& params, const Executor& executor)
      : given(params), folding(folding_of_all(params)), p(folded_all(params, folding)),
        mapped(folded_all(params, narrowed(folding))), work(p.workspace, p.extent, folding, kColumnBlock<D>),
        streamed(worth_streaming<D>(mapped.extent, p.dx, mapped.dx_strides, p.training, executor)) {}

  static Folding folding_of_all(const BackwardParams& p) {
    const Folding f = folding_of(p.extent, sizeof(typename D::Element));
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
      map_elements<D>(NormalizeGradient<D, true>{mapped}, streamed, mapped.extent, work.coefficients, outers, columns);
    else if (p.dx || p.dresidual)
      map_elements<D>(NormalizeGradient<D, false>{mapped}, streamed, mapped.extent, work.coefficients, outers, columns);
  }
};

template <class D>
struct Inference {
  typedef D Type;
  const Folding folding;
  const InferenceParams p, mapped;  // folded
  Workspace<typename D::Compute> work;
  const bool streamed;

  Inference(const InferenceParams& params, const Executor& executor)
      : folding(narrowed(folding_of_map<D>(params))), p(folded_map(params, folding)), mapped(p),
        work(p.workspace, p.extent, folding, kColumnBlock<D>),
        streamed(worth_streaming<D>(p.extent, p.y, p.y_strides, false, executor)) {
    prepare_inference(params, work);
  }
  void prepare(Range) const {}
  void reduce(int64_t, int64_t, Range) const {}
  void finish(Range) const {}
  void map(Range outers, Range columns) const { normalize<D>(p, streamed, work.coefficients, outers, columns); }
};
