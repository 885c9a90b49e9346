// From the threads' results to those of a tile: over the lanes of a warp, the warps of a block, the blocks of a tile.
// All of them are pairs of sums, added up in a fixed order, in double.
#pragma once
#include "../math/moments.h"
#include "walk.cuh"

namespace torch_bn::cuda {

/// Forward, deviations from a pivot and their squares; backward, dz and dz * (x - center).
struct Sums {
  double first, second;
};

__device__ inline Sums joined(const Sums& a, const Sums& b) { return {a.first + b.first, a.second + b.second}; }
__device__ inline Sums flipped(const Sums& s, int flip) {
  return {__shfl_xor_sync(~0u, s.first, flip), __shfl_xor_sync(~0u, s.second, flip)};
}

template <class T>
__device__ bool is_finite(T x) { return x - x == T(0); }

/// The channel of its tile that a thread below Plan::width answers for.
__device__ inline int64_t own_channel(const Plan& plan, int tile) { return int64_t(tile) * plan.width + threadIdx.x; }

/// Over all threads of a block: to the first `width` threads the sums of one channel each, in the order of channels.
template <class K>
__device__ Sums block_total(const Plan& plan, Sums (&own)[K::kChannels]) {
  __shared__ Sums by_warp[kWarps][K::kPlanes ? 1 : kMaxWidth];
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  for (int flip = K::kPlanes ? 1 : plan.columns; flip < kWarp; flip *= 2)
    for (Sums& s : own) s = joined(s, flipped(s, flip));
  if (lane < (K::kPlanes ? 1 : plan.columns))
    for (int i = 0; i < K::kChannels; ++i) by_warp[warp][lane * K::kChannels + i] = own[i];
  __syncthreads();
  Sums total{};
  if (thread < plan.width) {
    const int warps = K::kPlanes ? plan.lanes / kWarp : kWarps, first = K::kPlanes ? thread * warps : 0;
    for (int i = 0; i < warps; ++i) total = joined(total, by_warp[first + i][K::kPlanes ? 0 : thread]);
  }
  return total;
}

/// Keeps what a block has found of the channel of each of its first threads, and tells the last block of a tile that it
/// has them all.
__device__ inline bool completes_tile(const Plan& plan, const Part& part, const double2& found, double2* partials,
                                      unsigned* tickets) {
  __shared__ bool last;
  if (int(threadIdx.x) < plan.width)
    partials[plan.partial(part.group, part.split, own_channel(plan, part.tile))] = found;
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
/// threads as there are to spare join one total. A Total is made from the first of the partial results; add(found, count)
/// takes one of so many samples.
template <class K, class Total, class F>
__device__ void for_each_total(const Plan& plan, int tile, const double2* partials, const F& f) {
  constexpr int kAtOnce = 8;  // reads in flight
  const int items = int(plan.groups) * plan.width;
  int lanes = 1;
  while (lanes < kWarp && lanes < plan.splits && items * lanes * 2 <= kThreads) lanes *= 2;
  const int lane = int(threadIdx.x) % lanes;
  for (int first = 0; first < items; first += kThreads / lanes) {
    const int item = first + int(threadIdx.x) / lanes;
    const int64_t group = item < items ? item / plan.width : 0;
    const int64_t channel = int64_t(tile) * plan.width + item % plan.width;
    const auto found = [&](int split) { return partials[plan.partial(group, split, channel)]; };
    Total total(found(0));
    for (int split = lane; split < plan.splits; split += kAtOnce * lanes) {
      double2 some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (split + i * lanes < plan.splits) some[i] = found(split + i * lanes);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (split + i * lanes < plan.splits)
          total.add(some[i], double(plan.units(group, split + i * lanes) * K::kSamples));
    }
    for (int flip = 1; flip < lanes; flip *= 2) total.sums = joined(total.sums, flipped(total.sums, flip));
    if (lane == 0 && item < items && channel < plan.channels) f(group, channel, total);
  }
}

}  // namespace torch_bn::cuda
