// What happens between the walks over the elements, for many channels at a time: each loop does one thing, so that it runs
// on registers. The formulas are those of math/.

constexpr int64_t kChannels = 64;  // at a time: what belongs to them lies on the stack

template <class F>
void by_blocks(Range channels, const F& f) {
  for (int64_t begin = channels.first; begin < channels.last; begin += kChannels)
    f(Range{begin, least(begin + kChannels, channels.last)});
}

/// Joins every channel's slices and folded columns to the first of them. Calls join(n, into, from, before, count) for n
/// adjacent columns of `before` and `count` samples each: many channels at a time, as one alone would wait for its own
/// chain of divisions. What is left are the columns of a folded plane.
template <class T, class Join>
void join_parts(const Workspace<T>& work, int64_t group, Range channels, const Join& join) {
  const Folding& f = work.folding;
  if (work.cut.slices * f.fold == 1) return;
  const int64_t begin = work.first_column(group, channels.first), width = channels.last - channels.first;
  double samples = 0;
  for (int64_t slice = 0; slice < work.cut.slices; ++slice) {
    const double count = slice_count(work.extent, work.cut, work.grouping.count(group), slice);
    if (slice > 0 && count > 0)
      for (int64_t i = 0; i < f.fold; ++i) {
        const int64_t into = begin + i * f.channels;
        join(width * f.repeat, into, into + slice * work.coefficients.length, samples, count);
      }
    samples += count;
  }
  for (int64_t i = 1; i < f.fold; ++i) join(width, begin, begin + i * f.channels, double(i) * samples, samples);
}

/// A per-channel argument as the formulas take it.
template <class T>
void read_parameter(const void* values, Range channels, double missing, double* __restrict into) {
  const int64_t n = channels.last - channels.first;
  if (const T* from = static_cast<const T*>(values)) {
    for (int64_t i = 0; i < n; ++i) into[i] = double(from[channels.first + i]);
  } else {
    for (int64_t i = 0; i < n; ++i) into[i] = missing;
  }
}

/// The normalizing_affine of some channels.
template <class T>
struct Affines {
  T center[kChannels], scale[kChannels], shift[kChannels], rest[kChannels];

  Affines(int64_t n, const double* __restrict mean, const double* __restrict invstd, const double* __restrict gamma,
          const double* __restrict beta) {
    for (int64_t i = 0; i < n; ++i) {
      const Affine<T> affine = normalizing_affine<T>(mean[i], invstd[i], gamma[i], beta[i]);
      center[i] = affine.center;
      scale[i] = affine.scale;
      shift[i] = affine.shift;
      rest[i] = affine.scale_rest;
    }
  }
  void set(const Workspace<T>& work, int64_t group, Range channels) const {
    work.set(0, group, channels, center);
    work.set(1, group, channels, scale);
    work.set(2, group, channels, shift);
    work.set(3, group, channels, rest);
  }
};

/// The mean, variance and inverse deviation of some channels of one group, from what join_parts has left.
template <class T>
void finish_group(const ForwardParams& p, const Workspace<T>& work, int64_t group, double samples, Range channels,
                  double* __restrict mean, double* __restrict invstd, double* __restrict variance) {
  const int64_t n = channels.last - channels.first, repeat = work.folding.repeat;
  const int64_t at = work.first_column(group, channels.first);
  const double *__restrict means = work.first + at, *__restrict m2 = work.second + at;
  const double count = samples / double(repeat), eps = p.eps;
  if (repeat > 1)
    for (int64_t i = 0; i < n; ++i) {
      const Moments m = merge_equal(repeat, count, means + i * repeat, m2 + i * repeat);
      mean[i] = m.mean;
      variance[i] = biased_variance(m);
    }
  else
    for (int64_t i = 0; i < n; ++i) {
      mean[i] = means[i];
      variance[i] = biased_variance({count, means[i], m2[i]});
    }
  for (int64_t i = 0; i < n; ++i) invstd[i] = inverse_deviation(variance[i], eps);
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
  const Grouping grouping(p.extent);
  const int64_t groups = p.extent.groups;
  const bool unbiased = p.unbiased && !p.running.renorm.mean;
  by_blocks(channels, [&](Range block) {
    const int64_t n = block.last - block.first;
    double batch_mean[kChannels] = {}, batch_variance[kChannels] = {}, gamma[kChannels], beta[kChannels];
    const auto kept = [&](double* rows, int64_t group) { return rows + group * p.extent.channels + block.first; };
    for (int64_t group = 0; group < groups; ++group) {
      const double samples = double(grouping.count(group) * p.extent.inner), factor = unbiased ? bessel(samples) : 1;
      double variance[kChannels];
      const double* group_mean = kept(p.mean, group);
      finish_group(p, work, group, samples, block, kept(p.mean, group), kept(p.invstd, group), variance);
      for (int64_t i = 0; i < n; ++i) batch_mean[i] += group_mean[i];
      for (int64_t i = 0; i < n; ++i) batch_variance[i] += variance[i] * factor;
    }
    for (int64_t i = 0; i < n; ++i) {
      const Weights weights = finish_forward<T>(p, block.first + i, step, batch_mean[i] / double(groups), batch_variance[i] / double(groups));
      gamma[i] = weights.gamma;
      beta[i] = weights.beta;
    }
    for (int64_t group = 0; group < groups; ++group)
      Affines<T>(n, kept(p.mean, group), kept(p.invstd, group), gamma, beta).set(work, group, block);
  });
}

/// What the backward pass must know of the forward's map.
template <class T>
void prepare_gradients(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  by_blocks(channels, [&](Range block) {
    const int64_t n = block.last - block.first;
    double gamma[kChannels], beta[kChannels];
    for (int64_t i = 0; i < n; ++i) {
      const Weights weights = corrected_weights<T>(p, block.first + i, kept_correction(p, block.first + i));
      gamma[i] = weights.gamma;
      beta[i] = weights.beta;
    }
    for (int64_t group = 0; group < p.extent.groups; ++group) {
      const int64_t at = group * p.extent.channels + block.first;
      const Affines<T> affines(n, p.mean + at, p.invstd + at, gamma, beta);
      work.set(0, group, block, affines.center);
      if (p.activation == Activation::none) continue;
      work.set(4, group, block, affines.scale);
      work.set(5, group, block, affines.shift);
    }
  });
}

/// The coefficients of one group's map, from what join_parts has left. Adds to the gradients of weight and bias.
template <class T>
void finish_group(const BackwardParams& p, const Workspace<T>& work, int64_t group, double count, Range channels,
                  const double* __restrict gamma, const double* __restrict r, const double* __restrict d,
                  double* __restrict dgamma, double* __restrict dbeta) {
  const int64_t n = channels.last - channels.first, repeat = work.folding.repeat;
  const int64_t at = work.first_column(group, channels.first), row = group * p.extent.channels + channels.first;
  const double *__restrict mean = p.mean + row, *__restrict invstd = p.invstd + row;
  double dz[kChannels], dz_deviation[kChannels];
  const auto total = [=](const double* __restrict sums, double* __restrict into) {
    if (repeat == 1)
      for (int64_t i = 0; i < n; ++i) into[i] = sums[i];
    else
      for (int64_t i = 0; i < n; ++i) {
        into[i] = 0;
        for (int64_t k = 0; k < repeat; ++k) into[i] += sums[i * repeat + k];
      }
  };
  total(work.first + at, dz);
  total(work.second + at, dz_deviation);
  T slope[kChannels], bend[kChannels], shift[kChannels];
  const bool training = p.training;
  for (int64_t i = 0; i < n; ++i) {
    const GroupGradient<T> g =
        finish_backward<T>(training, mean[i], invstd[i], gamma[i], {r[i], d[i]}, {count, dz[i], dz_deviation[i]});
    dgamma[i] += g.dgamma;
    dbeta[i] += g.dbeta;
    slope[i] = g.affine.slope;
    bend[i] = g.affine.bend;
    shift[i] = g.affine.shift;
  }
  work.set(1, group, channels, slope);
  work.set(2, group, channels, bend);
  work.set(3, group, channels, shift);
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
  const Grouping grouping(p.extent);
  by_blocks(channels, [&](Range block) {
    const int64_t n = block.last - block.first;
    double gamma[kChannels], r[kChannels], d[kChannels], dgamma[kChannels] = {}, dbeta[kChannels] = {};
    read_parameter<T>(p.weight, block, 1, gamma);
    read_parameter<double>(p.correction, block, 1, r);
    read_parameter<double>(p.correction ? p.correction + p.extent.channels : nullptr, block, 0, d);
    for (int64_t group = 0; group < p.extent.groups; ++group)
      finish_group(p, work, group, double(grouping.count(group) * p.extent.inner), block, gamma, r, d, dgamma, dbeta);
    const auto store = [=](void* values, const double* from) {
      if (T* into = static_cast<T*>(values))
        for (int64_t i = 0; i < n; ++i) into[block.first + i] = T(from[i]);
    };
    store(p.dweight, dgamma);
    store(p.dbias, dbeta);
  });
}

template <class T>
void prepare_inference(const InferenceParams& p, const Workspace<T>& work) {
  by_blocks({0, p.extent.channels}, [&](Range block) {
    const int64_t n = block.last - block.first;
    double mean[kChannels], invstd[kChannels], gamma[kChannels], beta[kChannels];
    read_parameter<T>(p.running_mean, block, 0, mean);
    read_parameter<T>(p.running_var, block, 1, invstd);
    for (int64_t i = 0; i < n; ++i) invstd[i] = inverse_deviation(invstd[i], p.eps);
    read_parameter<T>(p.weight, block, 1, gamma);
    read_parameter<T>(p.bias, block, 0, beta);
    Affines<T>(n, mean, invstd, gamma, beta).set(work, 0, block);
  });
}
