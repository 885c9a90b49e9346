// Training forward in two launches: moments, which the last block of a tile turns into coefficients and running
// statistics; then the map.
#include "../math/channel.h"
#include "normalize.cuh"
#include "reduce.cuh"

namespace torch_bn::cuda {
namespace {

constexpr int kChain = 64;  // units of a thread that are summed in its compute type

template <class T>
__device__ bool is_finite(T x) { return x - x == T(0); }

template <class K>
struct Sample {
  static constexpr int kUnroll = K::kUnroll;
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
  __device__ void join_flipped(int flip) {
    const double others = flipped(count, flip), total = count + others, weight = total > 0 ? others / total : 0;
    for (int c = 0; c < K::kChannels; ++c)
      torch_bn::join(mean[c], m2[c], count, flipped(mean[c], flip), flipped(m2[c], flip), weight);
    count = total;
  }
  __device__ Moments of(int c) const { return {count, mean[c], m2[c]}; }
};

/// A chain starts from the mean of those before it, the first one from that of its first few samples. Either is near
/// enough: rounding grows by no more than the ratio of the chain's length to the number of those samples.
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
    if (moments.count == 0) {
      // NB: around one of the samples, so that the mean of equal ones is their value to the bit.
      Sample<K> first;
      first.load(p, walk);
      for (int c = 0; c < K::kChannels; ++c) chains[c].start_from(first.x.elements()[c]);
      Walk<K> ahead = walk;
      const T samples = T(read_batches(ahead, 1, first, p, add) * K::kSamples);
      for (Chain<T>& chain : chains) chain.start_from(chain.pivot + chain.sum / samples);
    } else {
      for (int c = 0; c < K::kChannels; ++c) chains[c].start_from(T(moments.mean[c]));
    }
    const int units = read_batches(walk, kChain, Sample<K>{}, p, add);
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

/// By the last block of a tile: from the partial moments to what is saved, the running statistics and the coefficients.
template <class K>
__device__ void finish(const Plan& plan, const ForwardParams& p, const Scratch& scratch, int tile) {
  using T = typename K::Compute;
  __shared__ double gamma[kMaxWidth], beta[kMaxWidth];
  const bool unbiased = p.unbiased && !p.running.renorm.mean;
  for_each_total<K, Moments>(plan, tile, scratch.partials, [&](int64_t group, int64_t channel, const Moments& m) {
    const int64_t at = group * plan.channels + channel;
    const double variance = biased_variance(m);
    p.mean[at] = m.mean;
    p.invstd[at] = inverse_deviation(variance, p.eps);
    scratch.totals[at] = {m.mean, unbiased ? variance * bessel(m.count) : variance};
  });
  __syncthreads();
  const int64_t channel = own_channel(plan, tile);
  if (int(threadIdx.x) < plan.width && channel < plan.channels) {
    double mean = 0, variance = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      const double2 of_group = scratch.totals[group * plan.channels + channel];
      mean += of_group.x;
      variance += of_group.y;
    }
    const Weights weights = finish_forward<T>(p, channel, step_of<T>(p.running), mean / double(plan.groups),
                                              variance / double(plan.groups));
    gamma[threadIdx.x] = weights.gamma;
    beta[threadIdx.x] = weights.beta;
  }
  __syncthreads();
  for (int item = int(threadIdx.x); item < plan.groups * plan.width; item += kThreads) {
    const int slot = item % plan.width;
    const int64_t group = item / plan.width, of_tile = int64_t(tile) * plan.width + slot;
    const int64_t at = group * plan.channels + of_tile;
    if (of_tile < plan.channels)
      static_cast<Affine<T>*>(scratch.coefficients)[at] =
          normalizing_affine<T>(p.mean[at], p.invstd[at], gamma[slot], beta[slot]);
  }
}

template <class K>
__global__ void __launch_bounds__(kThreads, kResident)
    moments_kernel(const __grid_constant__ Plan plan, const __grid_constant__ ForwardParams p,
                   const __grid_constant__ Scratch scratch, unsigned* tickets) {
  const Part part(plan, false);
  const Moments total = block_total<K>(plan, thread_moments(p, part, Walk<K>(plan, part)));
  if (completes_tile(plan, part, total, scratch.partials, tickets)) finish<K>(plan, p, scratch, part.tile);
}

/// NB: the counter and the weights of the averages, which belong to all channels, may change only when the last tile
/// has read them.
template <class K>
__global__ void __launch_bounds__(kThreads, kResident)
    normalize_kernel(const __grid_constant__ Plan plan, const __grid_constant__ ForwardParams p,
                     const __grid_constant__ Scratch scratch) {
  using T = typename K::Compute;
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
  const Plan plan = plan_for(p.dtype, p.extent, bytes, device.blocks);
  const Scratch scratch(p.workspace, p.extent, device.blocks);
  return with_kind(p.dtype, p.extent.inner > 1, bytes, [&](auto kind) {
    using K = decltype(kind);
    const cudaError_t error = launch(moments_kernel<K>, plan.blocks(), stream, plan, p, scratch, device.tickets);
    return error ? error : launch(normalize_kernel<K>, plan.blocks(), stream, plan, p, scratch);
  });
}

}  // namespace torch_bn::cuda
