// The passes: prepare, reduce, finish, map, each over some channels or columns. What the steps hand to each other lies
// in the workspace; schedule.inl decides in which order their pieces go to the threads.

/// One slice: its units, and where its partial results stand.
struct Part {
  GroupOuters outers;
  Range units;
  int64_t at;

  template <class T>
  Part(const Workspace<T>& work, int64_t group, int64_t slice)
      : outers(work.grouping.outers(group)), units(slice_of(outers.count * work.cut.parts, slice, work.cut.slices)),
        at((slice * work.extent.groups + group) * work.extent.channels) {}
};

template <class D, class P>
bool inputs_foldable(const P& p, const Folding& f) {
  return foldable(p.extent, f, p.x, p.x_strides) && foldable(p.extent, f, p.residual, p.residual_strides) &&
         foldable(p.extent, f, p.mask, mask_strides<D>(p.extent));
}
template <class D, class P>
bool all_foldable(const P& p, const Folding& f) {
  return inputs_foldable<D>(p, f) && foldable(p.extent, f, p.y, p.y_strides);
}
template <class D>
bool all_foldable(const BackwardParams& p, const Folding& f) {
  return inputs_foldable<D>(p, f) && foldable(p.extent, f, p.dy, p.dy_strides) &&
         foldable(p.extent, f, p.dx, p.dx_strides) && foldable(p.extent, f, p.dresidual, p.dresidual_strides);
}

/// with_groups: whether groups may be folded, as nothing is mapped with what is known of all of them.
template <class D, class P>
Folding folding_of_all(const P& p, bool with_groups) {
  const Folding f = folding_of(p.extent), g = folding_of_groups(p.extent);
  if (f.repeat * f.fold > 1 && all_foldable<D>(p, f)) return f;
  return with_groups && all_foldable<D>(p, g) ? g : Folding{p.extent.channels, 1, 1};
}

/// How many channels begin a run of short planes, 0 where planes are walked one by one.
template <class D, class P>
int64_t run_of_all(const P& p) {
  return all_foldable<D>(p, {p.extent.channels, p.extent.inner, 1}) ? channels_of_run<D>(p.extent) : 0;
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

/// How far ahead a map asks for what it reads in the order of memory: a page.
template <class D>
constexpr int64_t kPageAhead = 4096 / sizeof(typename D::Element);

/// x_away: how many elements away what will be read soon lies. from_cache: comes x.
template <class D, class P>
void normalize(const P& p, Writing writing, bool in_runs, const Coefficients<typename D::Compute>& coefficients, Range outers,
               Range columns, int64_t x_away, bool from_cache) {
  const bool many_planes = p.extent.inner > 1 && outers.last - outers.first > 1;
  const NormalizeParams n{p.x, p.x_strides, p.residual, p.residual_strides, p.mask, p.y, p.y_strides, p.activation,
                          p.activation_number, x_away, many_planes ? p.residual_strides.outer : 0, from_cache};
  const auto map = [&](const auto& normalize) {
    map_elements<D>(normalize, writing, in_runs, p.extent, coefficients, outers, columns);
  };
  if (p.activation == Activation::none && !p.residual)
    map(Normalize<D, Ending::none>{n, p.extent});
  else if (p.activation == Activation::relu && !p.residual)
    map(Normalize<D, Ending::relu>{n, p.extent});
  else if (p.mask && writing != Writing::joined && channels_of_whole_bytes<D>(p.mask, p.extent) == 1)
    map(Normalize<D, Ending::masked>{n, p.extent});
  else if (p.mask)
    map(Normalize<D, Ending::masked, true>{n, p.extent});
  else if (is_curved(p.activation))
    map_elements<Curved<D>>(Normalize<Curved<D>, Ending::general>{n, p.extent}, writing,
                            in_runs, p.extent, coefficients, outers, columns);
  else
    map(Normalize<D, Ending::general>{n, p.extent});
}

template <class D>
struct Forward {
  typedef D Type;
  static constexpr int64_t kInputs = 1;
  const ForwardParams& given;
  const Folding folding;
  const ForwardParams p;  // folded
  const int64_t run, together;
  Workspace<typename D::Compute> work;
  const Writing writing;
  const RunningStep step;

  Forward(const ForwardParams& params, const Executor& executor)
      : given(params), folding(folding_of_all<D>(params, !params.running.renorm.mean)), p(folded_map(params, folding)),
        run(run_of_all<D>(p)), together(channels_of_whole_bytes<D>(p.mask, p.extent)),
        work(p.workspace, p.extent, folding, kColumnBlock<D>),
        writing(p.x == p.y ? Writing::cached : way_of_writing<D>(p.extent, p.y, p.y_strides, true, executor)),
        step(step_of<typename D::Compute>(p.running)) {
    if (!p.statistics) count_batch<typename D::Compute>(p.running, step);
    clear_spare_bytes<D>(p.mask, p.extent);
  }
  bool map_reads_more() const { return p.residual; }
  void prepare(Range) const {}
  void reduce(int64_t group, int64_t slice, Range columns, int64_t next) const {
    const Part part(work, group, slice);
    double *mean = work.first + part.at, *m2 = work.second + part.at;
    if (p.extent.inner == 1) return row_moments<D>(p, part.outers, part.units, columns, mean, m2);
    const double* likely = group > 0 ? mean - p.extent.channels : nullptr;  // of the group before
    const double count = slice_count(p.extent, work.cut, part.outers.count, slice);
    plane_moments<D>(p, work.cut, part.outers, part.units, count, columns, next, run > 0, likely, mean, m2);
  }
  void finish(Range walked) const {
    finish_moments(given, work, walked);
    if (!p.correction) set_affines(given, work, walked);
  }
  void conclude(Range channels) const {
    enter_statistics(given, work, step, channels);
    if (!p.correction) return;
    for (int64_t begin = 0; begin < given.extent.groups * work.channels; begin += work.channels)
      set_affines(given, work, {begin + channels.first, begin + channels.last});
  }
  void map(Range outers, Range columns, int64_t next) const {
    const bool from_last_cache = p.extent.inner == 1 && kRegistersOfLine > 1;
    const int64_t x_away = from_last_cache ? kPageAhead<D> : next * p.x_strides.channel;
    normalize<D>(p, writing, run > 0, work.coefficients, outers, columns, x_away, true);
  }
};

template <class D>
struct Backward {
  typedef D Type;
  static constexpr int64_t kInputs = 2, together = 1;
  const BackwardParams& given;
  const Folding folding;
  const BackwardParams p;  // folded
  const int64_t run;
  Workspace<typename D::Compute> work;
  const Writing writing;

  Backward(const BackwardParams& params, const Executor& executor)
      : given(params), folding(folding_of_all<D>(params, true)), p(folded_all(params, folding)), run(run_of_all<D>(p)),
        work(p.workspace, p.extent, folding, kColumnBlock<D>), writing(way_of_both(executor)) {}

  Writing way_of_both(const Executor& executor) const {
    const auto way = [&](const void* out, const Strides& s) {
      return out ? way_of_writing<D>(p.extent, out, s, p.training, executor, !p.dx || !p.dresidual) : Writing::streamed;
    };
    const Writing dx = way(p.dx, p.dx_strides), dresidual = way(p.dresidual, p.dresidual_strides);
    const Writing both = dx < dresidual ? dx : dresidual;
    return both == Writing::joined && !lines_alike() ? Writing::cached : both;
  }
  /// Whether the two outputs, if there are two, begin at the same place of a line.
  bool lines_alike() const {
    constexpr int64_t kLine = 64 / sizeof(typename D::Element);
    const auto begin = [](const void* out) { return reinterpret_cast<uintptr_t>(out) % 64; };
    return !p.dx || !p.dresidual || (begin(p.dx) == begin(p.dresidual) &&
                                     (p.dx_strides.outer - p.dresidual_strides.outer) % kLine == 0);
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
  bool map_reads_more() const { return false; }
  /// Whether what is mapped comes from a cache: x and dy of large planes fill the nearer ones before they are.
  bool from_cache() const { return p.extent.inner == 1 || writing != Writing::streamed; }
  void prepare(Range walked) const { prepare_gradients(given, work, walked); }
  void reduce(int64_t group, int64_t slice, Range columns, int64_t next) const {
    if (p.activation == Activation::none)
      reduce<D, Ending::none>(group, slice, columns, next);
    else if (p.mask)
      reduce<D, Ending::masked>(group, slice, columns, next);
    else if (p.activation == Activation::relu && !p.residual)
      reduce<D, Ending::relu>(group, slice, columns, next);
    else if (is_curved(p.activation))
      reduce<Curved<D>, Ending::general>(group, slice, columns, next);
    else
      reduce<D, Ending::general>(group, slice, columns, next);
  }
  template <class E, Ending kEnding>
  void reduce(int64_t group, int64_t slice, Range columns, int64_t next) const {
    const Part part(work, group, slice);
    const auto row = [&](int k) { return work.coefficients.row(k) + group * p.extent.channels; };
    const Forwarded<E> forwarded{row(0), row(4), row(5), p.extent.inner == 1 && writing == Writing::streamed};
    double *dz = work.first + part.at, *dz_deviation = work.second + part.at;
    if (p.extent.inner == 1)
      return row_gradients<E, kEnding>(p, part.outers, part.units, columns, forwarded, dz, dz_deviation);
    plane_gradients<E, kEnding>(p, work.cut, part.outers, part.units, columns, next, run > 0, forwarded, dz, dz_deviation);
  }
  void finish(Range walked) const { finish_gradients(given, work, walked); }
  void conclude(Range channels) const { add_groups(given, work, channels); }
  void map_curved_gradient(Range outers, Range columns, int64_t x_away, int64_t dy_away) const {
    if constexpr (kKeepsGradient<Curved<D>>) {
      if (!p.dx) return;
      BackwardParams kept = p;
      kept.dy = p.dresidual ? p.dresidual : p.dx;
      kept.dy_strides = p.dresidual ? p.dresidual_strides : p.dx_strides;
      map_elements<D>(NormalizeGradient<D, Ending::none, true>{kept, x_away, 0, from_cache()},
                      p.dresidual ? writing : Writing::cached, run > 0, p.extent, work.coefficients, outers, columns);
    } else {
      map_elements<Curved<D>>(NormalizeGradient<Curved<D>, Ending::general>{p, x_away, dy_away, from_cache()}, writing,
                              run > 0, p.extent, work.coefficients, outers, columns);
    }
  }
  void map(Range outers, Range columns, int64_t next) const {
    if (!p.dx && !p.dresidual) return;
    const int64_t x_away = next * p.x_strides.channel, dy_away = next * p.dy_strides.channel;
    const auto map = [&](const auto& gradient) {
      map_elements<D>(gradient, writing, run > 0, p.extent, work.coefficients, outers, columns);
    };
    if (p.activation == Activation::none && !p.dresidual)
      map(NormalizeGradient<D, Ending::none>{p, x_away, dy_away, from_cache()});
    else if (p.mask && p.dx && p.dresidual)
      map(NormalizeGradient<D, Ending::masked, false, false>{p, x_away, dy_away, from_cache()});
    else if (p.mask)
      map_elements<D, false>(NormalizeGradient<D, Ending::masked>{p, x_away, dy_away, from_cache()}, p.extent,
                             work.coefficients, outers, columns);
    else if (p.activation == Activation::relu && !p.residual && !p.dresidual)
      map(NormalizeGradient<D, Ending::relu>{p, x_away, dy_away, from_cache()});
    else if (is_curved(p.activation))
      map_curved_gradient(outers, columns, x_away, dy_away);
    else
      map_elements<D, false>(NormalizeGradient<D, Ending::general>{p, x_away, dy_away, from_cache()}, p.extent,
                             work.coefficients, outers, columns);
  }
};

template <class D>
struct Inference {
  typedef D Type;
  static constexpr int64_t kInputs = 1;
  const Folding folding;
  const InferenceParams p;  // folded
  const int64_t together;
  Workspace<typename D::Compute> work;
  const Writing writing;
  const int64_t run;

  Inference(const InferenceParams& params, const Executor& executor)
      : folding(folding_of_all<D>(params, false)), p(folded_map(params, folding)),
        together(channels_of_whole_bytes<D>(p.mask, p.extent)), work(p.workspace, p.extent, folding, kColumnBlock<D>),
        writing(p.x == p.y ? Writing::cached : way_of_writing<D>(p.extent, p.y, p.y_strides, false, executor)),
        run(worth_runs() ? run_of_all<D>(p) : 0) {
    prepare_inference(params, work);
    clear_spare_bytes<D>(p.mask, p.extent);
  }
  /// Of half types the parts of lines would be most of what is mapped.
  bool worth_runs() const { return kNarrowing<D> > 1 && writing == Writing::joined && p.extent.inner <= kSoonEnding; }
  bool map_reads_more() const { return p.residual; }
  void prepare(Range) const {}
  void reduce(int64_t, int64_t, Range, int64_t) const {}
  void finish(Range) const {}
  void conclude(Range) const {}
  void map(Range outers, Range columns, int64_t) const {
    const int64_t x_away = run > 0 ? p.x_strides.outer : kPageAhead<D>;
    normalize<D>(p, writing, run > 0, work.coefficients, outers, columns, x_away, false);
  }
};
