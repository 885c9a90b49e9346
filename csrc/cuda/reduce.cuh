// From the threads' results to those of a tile: over the lanes of a warp, the warps of a block, the blocks of a tile.
// All in a fixed order, in double.
#pragma once
#include "../math/moments.h"
#include "walk.cuh"

namespace torch_bn::cuda {

/// Of the backward pass: of dz, and of dz * (x - center).
struct Sums {
  double dz, dz_deviation;
};

__device__ inline Moments joined(const Moments& a, const Moments& b) { return merge(a, b); }
__device__ inline Sums joined(const Sums& a, const Sums& b) { return {a.dz + b.dz, a.dz_deviation + b.dz_deviation}; }

__device__ inline double flipped(double value, int flip) { return __shfl_xor_sync(~0u, value, flip); }
__device__ inline Moments flipped(const Moments& m, int flip) {
  return {flipped(m.count, flip), flipped(m.mean, flip), flipped(m.m2, flip)};
}
__device__ inline Sums flipped(const Sums& s, int flip) { return {flipped(s.dz, flip), flipped(s.dz_deviation, flip)}; }

__device__ inline double2 packed(const Moments& m) { return {m.mean, m.m2}; }
__device__ inline double2 packed(const Sums& s) { return {s.dz, s.dz_deviation}; }
__device__ inline void unpack(Moments& m, const double2& from, double count) { m = {count, from.x, from.y}; }
__device__ inline void unpack(Sums& s, const double2& from, double) { s = {from.x, from.y}; }

/// The channel of its tile that a thread below Plan::width answers for.
__device__ inline int64_t own_channel(const Plan& plan, int tile) { return int64_t(tile) * plan.width + threadIdx.x; }

/// Over all threads of a block: to the first `width` threads the result of one channel each, in the order of channels.
/// Own is what a thread has found: join_flipped joins that of another lane, of(i) is that of its i-th channel.
template <class K, class Own>
__device__ auto block_total(const Plan& plan, Own own) {
  using T = decltype(own.of(0));
  __shared__ T by_warp[kWarps][K::kPlanes ? 1 : kMaxWidth];
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  for (int flip = K::kPlanes ? 1 : plan.columns; flip < kWarp; flip *= 2) own.join_flipped(flip);
  if (lane < (K::kPlanes ? 1 : plan.columns))
    for (int i = 0; i < K::kChannels; ++i) by_warp[warp][lane * K::kChannels + i] = own.of(i);
  __syncthreads();
  T total{};
  if (thread < plan.width) {
    const int warps = K::kPlanes ? plan.lanes / kWarp : kWarps, first = K::kPlanes ? thread * warps : 0;
    for (int i = 0; i < warps; ++i) total = joined(total, by_warp[first + i][K::kPlanes ? 0 : thread]);
  }
  return total;
}

/// Keeps a block's result, and tells the last block of a tile that it has them all.
template <class T>
__device__ bool completes_tile(const Plan& plan, const Part& part, const T& total, double2* partials,
                               unsigned* tickets) {
  __shared__ bool last;
  if (int(threadIdx.x) < plan.width)
    partials[plan.partial(part.group, part.split, own_channel(plan, part.tile))] = packed(total);
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned others = unsigned(plan.splits * plan.groups) - 1;
    __threadfence();
    last = atomicInc(tickets + part.tile, others) == others;
    __threadfence();
  }
  __syncthreads();
  return last;
}

/// Calls f(group, channel, total) once for every group and channel of a tile, each by some thread of the block. As many
/// threads as there are to spare join one total.
template <class K, class T, class F>
__device__ void for_each_total(const Plan& plan, int tile, const double2* partials, const F& f) {
  const int items = int(plan.groups) * plan.width;
  int lanes = 1;
  while (lanes < kWarp && lanes < plan.splits && items * lanes * 2 <= kThreads) lanes *= 2;
  const int lane = int(threadIdx.x) % lanes;
  for (int first = 0; first < items; first += kThreads / lanes) {
    const int item = first + int(threadIdx.x) / lanes;
    const int64_t group = item < items ? item / plan.width : 0;
    const int64_t channel = int64_t(tile) * plan.width + item % plan.width;
    T total{};
    for (int split = lane; split < plan.splits; split += lanes) {
      T part;
      unpack(part, partials[plan.partial(group, split, channel)], double(plan.units(group, split) * K::kSamples));
      total = joined(total, part);
    }
    for (int flip = 1; flip < lanes; flip *= 2) total = joined(total, flipped(total, flip));
    if (lane == 0 && item < items && channel < plan.channels) f(group, channel, total);
  }
}

}  // namespace torch_bn::cuda
