// The kernels of one instruction set: every pass is reduce, finish, map, and `run` decides in which order the pieces of
// a pass go to the threads.

constexpr int kCoefficientRows = 6;
constexpr int64_t kSerialElements = 1 << 15;   // less is not worth waking a thread
constexpr int64_t kCacheBytes = 3 << 18;       // of one block of channels, to stay in a core's own cache
constexpr int64_t kLineChannels = 16;          // a block of channels of rows fills whole cache lines

/// Where a pass keeps what its steps hand to each other. T is the type of the per-channel parameters.
template <class T>
struct Workspace {
  double *first, *second;  // [slices, groups, channels], the partial results
  Coefficients<T> coefficients;

  Workspace(void* memory, const Extent& e) {
    const int64_t length = e.groups * e.channels, parts = partition_of(e).slices * length;
    first = static_cast<double*>(memory);
    second = first + parts;
    coefficients = {reinterpret_cast<T*>(second + parts), length};
  }
};

int64_t workspace_bytes(DType dtype, const Extent& e) {
  const int64_t length = e.groups * e.channels, compute = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return 2 * partition_of(e).slices * length * int64_t(sizeof(double)) + kCoefficientRows * length * compute;
}

/// The steps of a pass, each over some channels; `self` is the pass.
struct Steps {
  const void* self;
  int64_t bytes_per_element;  // read by the reduction
  void (*prepare)(const void* self, Range channels);
  void (*reduce)(const void* self, int64_t group, int64_t slice, Range channels);
  void (*finish)(const void* self, Range channels);
  void (*map)(const void* self, Range outers, Range channels);
};

template <class Pass>
Steps steps_of(const Pass& pass) {
  return {&pass, Pass::kBytesPerElement,
          [](const void* self, Range channels) { static_cast<const Pass*>(self)->prepare(channels); },
          [](const void* self, int64_t group, int64_t slice, Range channels) {
            static_cast<const Pass*>(self)->reduce(group, slice, channels);
          },
          [](const void* self, Range channels) { static_cast<const Pass*>(self)->finish(channels); },
          [](const void* self, Range outers, Range channels) { static_cast<const Pass*>(self)->map(outers, channels); }};
}

/// Moments from slices to coefficients, with the running statistics.
template <class T>
void finish_moments(const ForwardParams& p, const Workspace<T>& work, double momentum, Range channels) {
  const Extent& e = p.extent;
  const Partition cut = partition_of(e);
  for (int64_t c = channels.first; c < channels.last; ++c) {
    const auto moments_of = [&](int64_t group) {
      Moments total{0, 0, 0};
      for (int64_t slice = 0; slice < cut.slices; ++slice) {
        const int64_t at = (slice * e.groups + group) * e.channels + c;
        total = merge(total, {slice_count(e, cut, group, slice), work.first[at], work.second[at]});
      }
      return total;
    };
    finish_forward<T>(p, c, momentum, moments_of, [&](int64_t group, const Affine<T>& affine) {
      const int64_t at = group * e.channels + c;
      work.coefficients.row(0)[at] = affine.center;
      work.coefficients.row(1)[at] = affine.scale;
      work.coefficients.row(2)[at] = affine.shift;
    });
  }
}

/// What the backward pass must know of the forward's map.
template <class T>
void prepare_gradients(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  const Extent& e = p.extent;
  for (int64_t group = 0; group < e.groups; ++group)
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const int64_t at = group * e.channels + c;
      const Affine<T> affine =
          normalizing_affine<T>(p.mean[at], p.invstd[at], parameter<T>(p.weight, c, 1), parameter<T>(p.bias, c, 0));
      work.coefficients.row(0)[at] = affine.center;
      work.coefficients.row(4)[at] = affine.scale;
      work.coefficients.row(5)[at] = affine.shift;
    }
}

template <class T>
void finish_gradients(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  const Extent& e = p.extent;
  const Partition cut = partition_of(e);
  for (int64_t c = channels.first; c < channels.last; ++c) {
    const auto sums_of = [&](int64_t group) {
      GradientSums total{double(GroupOuters::of(e, group).count * e.inner), 0, 0};
      for (int64_t slice = 0; slice < cut.slices; ++slice) {
        const int64_t at = (slice * e.groups + group) * e.channels + c;
        total.dz += work.first[at];
        total.dz_deviation += work.second[at];
      }
      return total;
    };
    finish_backward<T>(p, c, sums_of, [&](int64_t group, const GradientAffine<T>& affine) {
      const int64_t at = group * e.channels + c;
      work.coefficients.row(1)[at] = affine.slope;
      work.coefficients.row(2)[at] = affine.bend;
      work.coefficients.row(3)[at] = affine.shift;
    });
  }
}

template <class T>
void prepare_inference(const InferenceParams& p, const Workspace<T>& work) {
  for (int64_t c = 0; c < p.extent.channels; ++c) {
    const double invstd = inverse_deviation(parameter<T>(p.running_var, c, 1), p.eps);
    const Affine<T> affine = normalizing_affine<T>(parameter<T>(p.running_mean, c, 0), invstd,
                                                   parameter<T>(p.weight, c, 1), parameter<T>(p.bias, c, 0));
    work.coefficients.row(0)[c] = affine.center;
    work.coefficients.row(1)[c] = affine.scale;
    work.coefficients.row(2)[c] = affine.shift;
  }
}

/// The part of one slice: its units, and where its partial results stand.
struct Part {
  GroupOuters outers;
  Range units;
  int64_t at;

  Part(const Extent& e, const Partition& cut, int64_t group, int64_t slice)
      : outers(GroupOuters::of(e, group)), units(slice_of(outers.count * cut.parts, slice, cut.slices)),
        at((slice * e.groups + group) * e.channels) {}
};

template <class D>
struct Forward {
  using Element = typename D::Element;
  static constexpr int64_t kBytesPerElement = sizeof(Element);
  const ForwardParams& p;
  Workspace<typename D::Compute> work;
  double momentum;

  Forward(const ForwardParams& params) : p(params), work(p.workspace, p.extent), momentum(p.momentum) {
    const int64_t batches = p.num_batches_tracked ? ++*p.num_batches_tracked : 1;
    if (p.cumulative) momentum = 1 / double(batches);
  }
  void prepare(Range) const {}
  void reduce(int64_t group, int64_t slice, Range channels) const {
    const Partition cut = partition_of(p.extent);
    const Part part(p.extent, cut, group, slice);
    double *mean = work.first + part.at, *m2 = work.second + part.at;
    if (p.extent.inner == 1) return row_moments<D>(p, part.outers, part.units, channels, mean, m2);
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const auto* plane = static_cast<const Element*>(p.x) + c * p.x_strides.channel;
      const Moments m = plane_moments<D>(p, cut, part.outers, part.units, plane);
      mean[c] = m.mean;
      m2[c] = m.m2;
    }
  }
  void finish(Range channels) const { finish_moments(p, work, momentum, channels); }
  void map(Range outers, Range channels) const {
    map_elements<D, Normalize<D, ForwardParams>>(p, work.coefficients, outers, channels);
  }
};

template <class D>
struct Backward {
  static constexpr int64_t kBytesPerElement = 2 * sizeof(typename D::Element);
  const BackwardParams& p;
  Workspace<typename D::Compute> work;

  Backward(const BackwardParams& params) : p(params), work(p.workspace, p.extent) {}
  void prepare(Range channels) const { prepare_gradients(p, work, channels); }
  void reduce(int64_t group, int64_t slice, Range channels) const {
    const Partition cut = partition_of(p.extent);
    const Part part(p.extent, cut, group, slice);
    const auto row = [&](int k) { return work.coefficients.row(k) + group * p.extent.channels; };
    const Forwarded<D> forwarded{row(0), row(4), row(5)};
    double *dz = work.first + part.at, *dz_deviation = work.second + part.at;
    for (int64_t c = channels.first; c < channels.last; ++c) dz[c] = dz_deviation[c] = 0;
    if (p.extent.inner == 1)
      return row_gradients<D>(p, part.outers, part.units, channels, forwarded, dz, dz_deviation);
    for (int64_t c = channels.first; c < channels.last; ++c)
      plane_gradients<D>(p, cut, part.outers, part.units, c, forwarded, dz + c, dz_deviation + c);
  }
  void finish(Range channels) const { finish_gradients(p, work, channels); }
  void map(Range outers, Range channels) const {
    if (p.dx || p.dresidual) map_elements<D, NormalizeGradient<D>>(p, work.coefficients, outers, channels);
  }
};

template <class D>
struct Inference {
  static constexpr int64_t kBytesPerElement = 0;
  const InferenceParams& p;
  Workspace<typename D::Compute> work;

  Inference(const InferenceParams& params) : p(params), work(p.workspace, p.extent) { prepare_inference(p, work); }
  void prepare(Range) const {}
  void reduce(int64_t, int64_t, Range) const {}
  void finish(Range) const {}
  void map(Range outers, Range channels) const {
    map_elements<D, Normalize<D, InferenceParams>>(p, work.coefficients, outers, channels);
  }
};

/// The last map over everything: whole outers at a time, or single planes where those are few.
void run_map(const Steps& steps, const Extent& e, const Executor& executor) {
  const int64_t per_outer = e.channels * e.inner;
  if (e.outer >= 4 * executor.threads || e.inner == 1)
    return parallel_for(executor, e.outer, ceil_div(kSerialElements, per_outer),
                        [&](int64_t first, int64_t last) { steps.map(steps.self, {first, last}, {0, e.channels}); });
  parallel_for(executor, e.outer * e.channels, ceil_div(kSerialElements, e.inner), [&](int64_t first, int64_t last) {
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t outer = plane / e.channels, channel = plane % e.channels;
      steps.map(steps.self, {outer, outer + 1}, {channel, channel + 1});
    }
  });
}

/// Block of channels by block of channels, so that the map finds in the cache what the reduction has read.
void run_blocks(const Steps& steps, const Extent& e, const Executor& executor, int64_t block, int64_t grain) {
  const int64_t slices = partition_of(e).slices;
  parallel_for(executor, ceil_div(e.channels, block), grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Range channels{i * block, least(e.channels, (i + 1) * block)};
      steps.prepare(steps.self, channels);
      for (int64_t group = 0; group < e.groups; ++group)
        for (int64_t slice = 0; slice < slices; ++slice) steps.reduce(steps.self, group, slice, channels);
      steps.finish(steps.self, channels);
      steps.map(steps.self, {0, e.outer}, channels);
    }
  });
}

/// Each step over everything, one after another.
void run_steps(const Steps& steps, const Extent& e, const Executor& executor) {
  const int64_t slices = partition_of(e).slices, parts = e.groups * slices;
  const int64_t block = e.inner > 1 ? 1 : kChannelBlock, blocks = ceil_div(e.channels, block);
  const int64_t elements = e.outer * e.inner * least(block, e.channels) / parts;
  steps.prepare(steps.self, {0, e.channels});
  parallel_for(executor, parts * blocks, ceil_div(kSerialElements, elements + 1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t part = i / blocks, begin = i % blocks * block;
      steps.reduce(steps.self, part / slices, part % slices, {begin, least(e.channels, begin + block)});
    }
  });
  parallel_for(executor, e.channels, ceil_div(1 << 10, parts),
               [&](int64_t first, int64_t last) { steps.finish(steps.self, {first, last}); });
  run_map(steps, e, executor);
}

/// Chooses between the two: blocks where they fit a core's cache and are enough for all threads.
void run(const Steps& steps, const Extent& e, const Executor& executor) {
  const int64_t per_channel = e.outer * e.inner;
  const bool small = per_channel * e.channels <= kSerialElements;
  if (small) return run_blocks(steps, e, executor, e.channels, 1);
  const int64_t fitting = kCacheBytes / (per_channel * steps.bytes_per_element);
  const int64_t block = e.inner > 1 ? 1 : least(kChannelBlock, fitting / kLineChannels * kLineChannels);
  if (block > 0 && ceil_div(e.channels, block) >= 2 * executor.threads)
    return run_blocks(steps, e, executor, block, ceil_div(kSerialElements, per_channel * block));
  run_steps(steps, e, executor);
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
  with_dtype(p.dtype, [&](auto d) {
    const Forward<decltype(d)> pass(p);
    run(steps_of(pass), p.extent, executor);
  });
}

void backward(const BackwardParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) {
    const Backward<decltype(d)> pass(p);
    run(steps_of(pass), p.extent, executor);
  });
}

void inference(const InferenceParams& p, const Executor& executor) {
  with_dtype(p.dtype, [&](auto d) {
    const Inference<decltype(d)> pass(p);
    run_map(steps_of(pass), p.extent, executor);
  });
}
