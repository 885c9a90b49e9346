// Training forward in two launches: moments, which the last block of a tile turns into coefficients and running
// statistics; then the map.
#include "../math/channel.h"
#include "normalize.cuh"
#include "reduce.cuh"

namespace torch_bn::cuda {
namespace {

constexpr int kChain = 64;  // units of a thread that are summed in its compute type

template <class K>
struct Sample {
  static constexpr int kUnroll = K::kChannels < 8 ? 2 * K::kUnroll : 4;  // one tensor: more, if registers allow
  typename K::Vector x;
  __device__ void load(const ForwardParams& p, const Walk<K>& walk) { x = walk.load(p.x, p.x_strides); }
};

/// Sums of one channel's deviations from a pivot and of their squares.
template <class T>
struct Chain {
  T pivot = 0, sum = 0, squares = 0;

  __device__ void start_from(T mean) {
    pivot = is_finite(mean) ? mean : T(0);
    sum = squares = 0;
  }
  __device__ void add(T x) {
    const T deviation = x - pivot;
    sum += deviation;
    squares = fma(deviation, deviation, squares);
  }
};

/// Of the channels of one thread, which have seen as many samples each.
template <class K>
struct ThreadMoments {
  double count = 0, mean[K::kChannels] = {}, m2[K::kChannels] = {};

  /// `each` is 1 / the samples of the chain, and `weight` their share in all.
  template <class T>
  __device__ void join(int c, const Chain<T>& chain, double each, double weight) {
    const double more = m2_of_sums(each, double(chain.sum), double(chain.squares));
    torch_bn::join(mean[c], m2[c], count, mean_of_sums(each, double(chain.pivot), double(chain.sum)),
                   more < 0 ? 0 : more, weight);
  }
};

/// Of sets of samples whose moments are known: the sums of their deviations from a pivot and of the squares.
struct MomentsTotal {
  double pivot;
  Sums sums{};

  __device__ explicit MomentsTotal(const double2& near) : pivot(is_finite(near.x) ? near.x : 0) {}
  __device__ void add(const double2& mean_and_m2, double count) {
    const double deviation = mean_and_m2.x - pivot;
    sums = joined(sums, {count * deviation, fma(count * deviation, deviation, mean_and_m2.y)});
  }
  __device__ Moments of(double count) const {
    if (count == 0) return {};
    const double each = 1 / count, m2 = m2_of_sums(each, sums.first, sums.second);
    return {count, mean_of_sums(each, pivot, sums.first), m2 < 0 ? 0 : m2};
  }
};

/// A chain starts from the mean of those before it, and the first, which is short, from one of its samples. Either is
/// near enough: rounding grows by no more than the ratio of the chain's length to the number of those samples.
/// NB: one of the samples, so that the mean of equal ones is their value to the bit.
template <class K>
__device__ ThreadMoments<K> thread_moments(const ForwardParams& p, const Part& part, Walk<K> walk) {
  using T = typename K::Compute;
  ThreadMoments<K> moments;
  while (walk.inside()) {
    Chain<T> chains[K::kChannels];
    const auto add = [&](const Sample<K>& at) {
      const auto x = at.x.elements();
#pragma unroll
      for (int e = 0; e < K::kVector; ++e) chains[K::kPlanes ? 0 : e].add(x[e]);
    };
    int units = 0;
    if (moments.count == 0) {
      bool started = false;
      units = read_batches(walk, 1, Sample<K>{}, p, [&](const Sample<K>& at) {
        if (!started)
          for (int c = 0; c < K::kChannels; ++c) chains[c].start_from(at.x.elements()[c]);
        started = true;
        add(at);
      });
    } else {
      for (int c = 0; c < K::kChannels; ++c) chains[c].start_from(T(moments.mean[c]));
      units = read_batches(walk, kChain, Sample<K>{}, p, add);
    }
    const double samples = double(units * K::kSamples);
    const double each = 1 / samples, weight = samples / (moments.count + samples);
#pragma unroll
    for (int c = 0; c < K::kChannels; ++c) {
      if (sizeof(T) == sizeof(double) || is_finite(chains[c].squares)) {
        moments.join(c, chains[c], each, weight);
        continue;
      }
      // Squares of huge values, or some value is infinite or none.
      Chain<double> exact;
      exact.start_from(chains[c].pivot);
      Walk<K> again = walk;
      again.go_to(part.group, walk.unit - int64_t(units) * walk.plan.lanes);
      for (; again.unit < walk.unit; again.advance()) {
        const auto x = again.load(p.x, p.x_strides).elements();
        for (int e = c; e < K::kVector; e += K::kChannels) exact.add(x[e]);
      }
      moments.join(c, exact, each, weight);
    }
    moments.count += samples;
  }
  return moments;
}

/// Mean and squared deviations of what a block has read of the channel of each of its first threads.
template <class K>
__device__ double2 block_moments(const Plan& plan, const Part& part, const ThreadMoments<K>& own) {
  // The first thread of a column has read something if any has.
  __shared__ double pivots[kMaxWidth];
  const int thread = int(threadIdx.x), column = K::kPlanes ? thread / plan.lanes : thread % plan.columns;
  if (K::kPlanes ? thread % plan.lanes == 0 : thread < plan.columns)
    for (int c = 0; c < K::kChannels; ++c) pivots[column * K::kChannels + c] = own.mean[c];
  __syncthreads();
  Sums sums[K::kChannels];
  for (int c = 0; c < K::kChannels; ++c) {
    MomentsTotal about({pivots[column * K::kChannels + c], 0});
    about.add({own.mean[c], own.m2[c]}, own.count);
    sums[c] = about.sums;
  }
  const Sums total = block_total<K>(plan, sums);
  if (thread >= plan.width) return {};
  MomentsTotal about({pivots[thread], 0});
  about.sums = total;
  const Moments found = about.of(double(plan.units(part.group, part.split) * K::kSamples));
  return {found.mean, found.m2};
}

/// By the last block of a tile: from the partial moments to what is saved, the running statistics and the coefficients.
template <class K>
__device__ void finish(const Plan& plan, const ForwardParams& p, const Scratch& scratch, int tile) {
  using T = typename K::Compute;
  const bool unbiased = p.unbiased && !p.running.renorm.mean;
  const auto weights_of = [&](int64_t channel, double mean, double variance) {
    return finish_forward<T>(p, channel, step_of<T>(p.running), mean, variance);
  };
  const auto set_affine = [&](int64_t at, double mean, double invstd, const Weights& weights) {
    static_cast<Affine<T>*>(scratch.coefficients)[at] =
        normalizing_affine<T>(mean, invstd, weights.gamma, weights.beta);
  };
  for_each_total<K, MomentsTotal>(plan, tile, scratch.partials, [&](int64_t group, int64_t channel, const auto& total) {
    const Moments m = total.of(double(plan.units(group) * K::kSamples));
    const int64_t at = group * plan.channels + channel;
    const double biased = biased_variance(m), invstd = inverse_deviation(biased, p.eps);
    const double variance = unbiased ? biased * bessel(m.count) : biased;
    p.mean[at] = m.mean;
    p.invstd[at] = invstd;
    if (plan.groups == 1)
      set_affine(at, m.mean, invstd, weights_of(channel, m.mean, variance));
    else
      scratch.totals[at] = {m.mean, variance};
  });
  if (plan.groups == 1) return;
  __shared__ Weights weights[kMaxWidth];
  __syncthreads();
  const int64_t channel = own_channel(plan, tile);
  if (int(threadIdx.x) < plan.width && channel < plan.channels) {
    double mean = 0, variance = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      const double2 of_group = scratch.totals[group * plan.channels + channel];
      mean += of_group.x;
      variance += of_group.y;
    }
    weights[threadIdx.x] = weights_of(channel, mean / double(plan.groups), variance / double(plan.groups));
  }
  __syncthreads();
  for (int item = int(threadIdx.x); item < plan.groups * plan.width; item += kThreads) {
    const int slot = item % plan.width;
    const int64_t of_tile = int64_t(tile) * plan.width + slot, at = item / plan.width * plan.channels + of_tile;
    if (of_tile < plan.channels) set_affine(at, p.mean[at], p.invstd[at], weights[slot]);
  }
}

template <class K>
__global__ void __launch_bounds__(kThreads, kResident)
    moments_kernel(const __grid_constant__ Plan plan, const __grid_constant__ ForwardParams p,
                   const __grid_constant__ Scratch scratch, unsigned* tickets) {
  allow_next_launch();
  const Part part(plan, false);
  const double2 found = block_moments<K>(plan, part, thread_moments(p, part, Walk<K>(plan, part)));
  if (completes_tile(plan, part, found, scratch.partials, tickets)) finish<K>(plan, p, scratch, part.tile);
}

/// NB: the counter and the weights of the averages, which belong to all channels, may change only when the last tile
/// has read them.
template <class K>
__global__ void __launch_bounds__(kThreads, kResident)
    normalize_kernel(const __grid_constant__ Plan plan, const __grid_constant__ ForwardParams p,
                     const __grid_constant__ Scratch scratch) {
  using T = typename K::Compute;
  await_launch();
  if (blockIdx.x == 0 && threadIdx.x == 0 && !p.statistics) count_batch<T>(p.running, step_of<T>(p.running));
  const Part part(plan, true);
  const Walk<K> walk(plan, part);
  const auto affine = static_cast<const Affine<T>*>(scratch.coefficients) + part.group * plan.channels + walk.channel;
  normalize<K>(NormalizeParams(p), walk, [=](int i) { return affine[i]; });
}

}  // namespace

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t stream) {
  const Operand operands[] = {{p.x, p.x_strides}, {p.residual, p.residual_strides}, {p.y, p.y_strides}};
  const int bytes = vector_bytes(p.dtype, p.extent, operands);
  if (p.mask && bytes != vector_bytes(p.dtype, p.extent)) return cudaErrorMisalignedAddress;
  const Plan reduction = plan_for(p.dtype, p.extent, bytes, device.blocks);
  const Plan map = plan_for(p.dtype, p.extent, bytes, kMapRounds * device.blocks);
  const Scratch scratch(p.workspace, p.extent, device.blocks);
  return with_kind(p.dtype, p.extent.inner > 1, bytes, [&](auto kind) {
    using K = decltype(kind);
    const cudaError_t error =
        launch(moments_kernel<K>, reduction.blocks(), Order::whole, stream, reduction, p, scratch, device.tickets);
    const auto normalize = is_curved(p.activation) ? normalize_kernel<Curved<K>> : normalize_kernel<K>;
    return error ? error : launch(normalize, map.blocks(), after_reduction(device), stream, map, p, scratch);
  });
}

}  // namespace torch_bn::cuda
