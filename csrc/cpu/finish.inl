// What happens between the walks over the elements, for many channels at a time: each loop does one thing, so that it runs
// on registers. The formulas are those of math/.

constexpr int64_t kChannels = 64;  // at a time: what belongs to them lies on the stack

/// Calls f(group, channels) for the channels that are walked, those of a group behind those of the one before, kChannels at
/// most at once.
template <class T, class F>
void by_blocks(const Workspace<T>& work, Range walked, const F& f) {
  const int64_t channels = work.channels;
  for (int64_t begin = walked.first, end; begin < walked.last; begin = end) {
    const int64_t group = begin / channels, before = group * channels;
    end = least(least(begin + kChannels, before + channels), walked.last);
    f(group, Range{begin - before, end - before});
  }
}
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

/// Moments of each group from slices and columns, to what is kept for backward; the variance stays in the first column.
template <class T>
void finish_moments(const ForwardParams& p, const Workspace<T>& work, Range walked) {
  double *__restrict means = work.first, *__restrict m2 = work.second;
  const Grouping grouping(p.extent);
  by_blocks(work, walked, [&](int64_t group, Range channels) {
    join_parts(work, group, channels, [=](int64_t n, int64_t into, int64_t from, double before, double count) {
      const double weight = count / (before + count);
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c)
        torch_bn::join(means[into + c], m2[into + c], before, means[from + c], m2[from + c], weight);
    });
    const int64_t n = channels.last - channels.first, repeat = work.folding.repeat;
    const int64_t at = group * p.extent.channels + channels.first, column = work.first_column(group, channels.first);
    double *__restrict mean = p.mean + at, *__restrict invstd = p.invstd + at, variance[kChannels];
    const double count = double(grouping.count(group) * p.extent.inner) / double(repeat), eps = p.eps;
    if (repeat > 1)
      for (int64_t i = 0; i < n; ++i) {
        const Moments m = merge_equal(repeat, count, means + column + i * repeat, m2 + column + i * repeat);
        mean[i] = m.mean;
        variance[i] = biased_variance(m);
      }
    else
      for (int64_t i = 0; i < n; ++i) {
        mean[i] = means[column + i];
        variance[i] = biased_variance({count, mean[i], m2[column + i]});
      }
    for (int64_t i = 0; i < n; ++i) invstd[i] = inverse_deviation(variance[i], eps);
    for (int64_t i = 0; i < n; ++i) m2[column + i * repeat] = variance[i];
  });
}

/// The correction of some channels by the averages as they are.
template <class T>
void find_corrections(const ForwardParams& p, RenormWeights weights, Range channels, const double* __restrict mean,
                      const double* __restrict variance) {
  const Renorm renorm = p.running.renorm;
  const double eps = p.eps;
  double average_mean[kChannels], average_stddev[kChannels];
  read_parameter<T>(renorm.mean, channels, 0, average_mean);
  read_parameter<T>(renorm.stddev, channels, 0, average_stddev);
  double *__restrict r = p.correction + channels.first, *__restrict d = r + p.extent.channels;
  for (int64_t i = 0; i < channels.last - channels.first; ++i) {
    const Correction found =
        renorm_correction(renorm, weights, average_mean[i], average_stddev[i], mean[i], variance[i], eps);
    r[i] = found.r;
    d[i] = found.d;
  }
}

/// update_running of some channels. NB: by value, as what is entered might change them otherwise.
template <class T>
void update_channels(Running running, RunningStep step, Range channels, double* __restrict mean,
                     double* __restrict variance, double eps) {
  const int64_t n = channels.last - channels.first;
  if (running.renorm.mean)
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i)
      enter_averages<T>(running.renorm, step.renorm, channels.first + i, mean[i], variance[i], eps);
  if (running.mean)
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) enter<T>(running.mean, channels.first + i, mean[i], step.momentum);
  if (running.var)
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) enter<T>(running.var, channels.first + i, variance[i], step.momentum);
}

/// Enters the means over all groups into the running statistics, with which renorm finds its correction.
template <class T>
void enter_statistics(const ForwardParams& p, const Workspace<T>& work, const RunningStep& step, Range channels) {
  const Grouping grouping(p.extent);
  const int64_t groups = p.extent.groups, repeat = work.folding.repeat;
  const bool unbiased = p.unbiased && !p.running.renorm.mean;
  by_blocks(channels, [&](Range block) {
    const int64_t n = block.last - block.first;
    double mean[kChannels] = {}, variance[kChannels] = {};
    for (int64_t group = 0; group < groups; ++group) {
      const double factor = unbiased ? bessel(double(grouping.count(group) * p.extent.inner)) : 1;
      const double* group_mean = p.mean + group * p.extent.channels + block.first;
      const double* group_variance = work.second + work.first_column(group, block.first);
      for (int64_t i = 0; i < n; ++i) mean[i] += group_mean[i];
      for (int64_t i = 0; i < n; ++i) variance[i] += group_variance[i * repeat] * factor;
    }
    for (int64_t i = 0; i < n; ++i) mean[i] /= double(groups);
    for (int64_t i = 0; i < n; ++i) variance[i] /= double(groups);
    if (p.running.renorm.mean) find_corrections<T>(p, step.renorm, block, mean, variance);
    if (!p.statistics) return update_channels<T>(p.running, step, block, mean, variance, p.eps);
    __builtin_memcpy(p.statistics + block.first, mean, n * sizeof(double));
    __builtin_memcpy(p.statistics + p.extent.channels + block.first, variance, n * sizeof(double));
  });
}

/// The weights of the map of some channels.
template <class T, class P>
void read_weights(const P& p, Range channels, double* __restrict gamma, double* __restrict beta) {
  read_parameter<T>(p.weight, channels, 1, gamma);
  read_parameter<T>(p.bias, channels, 0, beta);
  if (!p.correction) return;
  const double *r = p.correction + channels.first, *d = r + p.extent.channels;
  for (int64_t i = 0; i < channels.last - channels.first; ++i) {
    const Weights weights = corrected({gamma[i], beta[i]}, {r[i], d[i]});
    gamma[i] = weights.gamma;
    beta[i] = weights.beta;
  }
}

/// The coefficients of the forward's map.
template <class T>
void set_affines(const ForwardParams& p, const Workspace<T>& work, Range walked) {
  by_blocks(work, walked, [&](int64_t group, Range channels) {
    double gamma[kChannels], beta[kChannels];
    read_weights<T>(p, channels, gamma, beta);
    const int64_t at = group * p.extent.channels + channels.first;
    Affines<T>(channels.last - channels.first, p.mean + at, p.invstd + at, gamma, beta).set(work, group, channels);
  });
}

/// What the backward pass must know of the forward's map.
template <class T>
void prepare_gradients(const BackwardParams& p, const Workspace<T>& work, Range walked) {
  by_blocks(work, walked, [&](int64_t group, Range channels) {
    double gamma[kChannels], beta[kChannels];
    read_weights<T>(p, channels, gamma, beta);
    const int64_t at = group * p.extent.channels + channels.first;
    const Affines<T> affines(channels.last - channels.first, p.mean + at, p.invstd + at, gamma, beta);
    work.set(0, group, channels, affines.center);
    if (p.activation == Activation::none) return;
    work.set(4, group, channels, affines.scale);
    work.set(5, group, channels, affines.shift);
  });
}

/// Sums of each group from slices and columns to the coefficients of its map. What it adds to the gradients of bias and
/// weight stays in the first columns.
template <class T>
void finish_gradients(const BackwardParams& p, const Workspace<T>& work, Range walked) {
  double *__restrict sum_dz = work.first, *__restrict sum_dz_deviation = work.second;
  const Grouping grouping(p.extent);
  const int64_t repeat = work.folding.repeat;
  const bool training = p.training;
  by_blocks(work, walked, [&](int64_t group, Range channels) {
    join_parts(work, group, channels, [=](int64_t n, int64_t into, int64_t from, double, double) {
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
        sum_dz[into + c] += sum_dz[from + c];
        sum_dz_deviation[into + c] += sum_dz_deviation[from + c];
      }
    });
    const int64_t n = channels.last - channels.first;
    const int64_t at = group * p.extent.channels + channels.first, column = work.first_column(group, channels.first);
    const double *__restrict mean = p.mean + at, *__restrict invstd = p.invstd + at;
    const double count = double(grouping.count(group) * p.extent.inner);
    double gamma[kChannels], r[kChannels], d[kChannels], dz[kChannels], dz_deviation[kChannels];
    read_parameter<T>(p.weight, channels, 1, gamma);
    read_parameter<double>(p.correction, channels, 1, r);
    read_parameter<double>(p.correction ? p.correction + p.extent.channels : nullptr, channels, 0, d);
    const auto total = [=](const double* __restrict sums, double* __restrict into) {
      if (repeat == 1)
        for (int64_t i = 0; i < n; ++i) into[i] = sums[i];
      else
        for (int64_t i = 0; i < n; ++i) {
          into[i] = 0;
          for (int64_t k = 0; k < repeat; ++k) into[i] += sums[i * repeat + k];
        }
    };
    total(sum_dz + column, dz);
    total(sum_dz_deviation + column, dz_deviation);
    double dgamma[kChannels], dbeta[kChannels];
    T slope[kChannels], bend[kChannels], shift[kChannels];
    for (int64_t i = 0; i < n; ++i) {
      const GroupGradient<T> g =
          finish_backward<T>(training, mean[i], invstd[i], gamma[i], {r[i], d[i]}, {count, dz[i], dz_deviation[i]});
      dgamma[i] = g.dgamma;
      dbeta[i] = g.dbeta;
      slope[i] = g.affine.slope;
      bend[i] = g.affine.bend;
      shift[i] = g.affine.shift;
    }
    for (int64_t i = 0; i < n; ++i) sum_dz[column + i * repeat] = dbeta[i];
    for (int64_t i = 0; i < n; ++i) sum_dz_deviation[column + i * repeat] = dgamma[i];
    work.set(1, group, channels, slope);
    work.set(2, group, channels, bend);
    work.set(3, group, channels, shift);
  });
}

/// The gradients of weight and bias, of all groups.
template <class T>
void add_groups(const BackwardParams& p, const Workspace<T>& work, Range channels) {
  const int64_t repeat = work.folding.repeat, apart = work.first_column(1, 0);
  const auto add = [&](const double* sums, void* values) {
    if (!values) return;
    for (int64_t c = channels.first; c < channels.last; ++c) {
      double sum = 0;
      for (int64_t group = 0; group < p.extent.groups; ++group) sum += sums[group * apart + c * repeat];
      static_cast<T*>(values)[c] = T(sum);
    }
  };
  add(work.second, p.dweight);
  add(work.first, p.dbias);
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
