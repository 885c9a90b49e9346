// Which elements a thread visits.
#pragma once
#include "plan.h"
#include "vector.cuh"

namespace torch_bn::cuda {

/// NB: a division of 64 bits takes as long as a read.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(unsigned(a) / unsigned(b)) : a / b;
}

/// What a block is for, counted from either end of the grid: the map goes from the end, which the reduction has left in
/// the cache.
struct Part {
  int tile, split;
  int64_t group;
  __device__ Part(const Plan& plan, bool from_end) {
    const unsigned block = from_end ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    tile = int(block % unsigned(plan.tiles));
    split = int(block / unsigned(plan.tiles) % unsigned(plan.splits));
    group = block / unsigned(plan.tiles) / unsigned(plan.splits);
  }
};

/// Where a thread stands in its column, and where that lies.
template <class K>
struct Walk {
  const Plan& plan;
  int64_t channel;          // the first of the thread
  int64_t unit, end;        // of the group, in the thread's column
  int64_t outer, place, i;  // of the tensor; within the period; of the plane

  __device__ Walk(const Plan& plan, const Part& part) : plan(plan) {
    const int thread = int(threadIdx.x), column = K::kPlanes ? thread / plan.lanes : thread % plan.columns;
    channel = (int64_t(part.tile) * plan.columns + column) * K::kChannels;
    const int64_t first = part.split * plan.split_units;
    end = channel < plan.channels ? first + plan.units(part.group, part.split) : 0;
    go_to(part.group, first + (K::kPlanes ? thread % plan.lanes : thread / plan.columns));
  }

  __device__ void go_to(int64_t group, int64_t to) {
    unit = to;
    const int64_t row = K::kPlanes ? quotient(unit, plan.inner) : unit;
    i = unit - row * plan.inner;
    const int64_t example = plan.groups == 1 ? 0 : quotient(row, plan.period);
    place = row - example * plan.period;
    outer = (example * plan.groups + group) * plan.period + place;
  }

  __device__ bool inside() const { return unit < end; }
  /// Whether so many units are left.
  __device__ bool has(int units) const { return unit + (units - 1) * plan.lanes < end; }

  __device__ void advance() {
    unit += plan.lanes;
    int64_t carry = 0;
    if constexpr (K::kPlanes) {
      i += plan.step_inner;
      carry = i >= plan.inner;
      i -= carry ? plan.inner : 0;
    }
    place += plan.step_place + carry;
    outer += plan.step_outer + carry;
    if (place >= plan.period) {
      place -= plan.period;
      outer += plan.skip;
    }
  }

  /// The element of a tensor where the thread stands.
  __device__ int64_t offset(const Strides& s) const {
    if constexpr (K::kPlanes) return outer * s.outer + channel * s.channel + i * K::kVector;
    return outer * s.outer + channel;
  }
  /// Which of all units it is, in the order of memory: that of a mask's bytes.
  __device__ int64_t position() const {
    const int64_t plane = outer * plan.channels + channel;
    return K::kPlanes ? plane * plan.inner + i : plane / K::kVector;
  }
  template <class Element>
  __device__ Element* at(Element* data, const Strides& s) const { return data + offset(s); }
  __device__ typename K::Vector load(const void* data, const Strides& s) const {
    return K::Vector::load(at(static_cast<const typename K::D::Element*>(data), s));
  }
  __device__ void store(void* data, const Strides& s, const typename K::Vector& vector) const {
    vector.store(at(static_cast<typename K::D::Element*>(data), s));
  }
};

/// Reads and writes at every place of the walk: the reads of a batch are all on their way before the first is needed.
template <class K, class At, class P, class... Coefficients>
__device__ void map_batches(Walk<K> walk, const At&, const P& p, const Coefficients&... coefficients) {
  while (walk.has(At::kUnroll)) {
    At batch[At::kUnroll];
    Walk<K> ahead = walk;
#pragma unroll
    for (int u = 0; u < At::kUnroll; ++u, ahead.advance()) batch[u].load(p, ahead);
#pragma unroll
    for (int u = 0; u < At::kUnroll; ++u, walk.advance()) batch[u].store(p, walk, coefficients...);
  }
  for (; walk.inside(); walk.advance()) {
    At one;
    one.load(p, walk);
    one.store(p, walk, coefficients...);
  }
}

/// The same for what only reads: add(at) for up to `most` units, or a few more to fill a batch. Returns for how many.
/// NB: a thread of a reduction may have a batch or two in all, so the last one must be read at once like the others.
template <class K, class At, class P, class F>
__device__ int read_batches(Walk<K>& walk, int most, const At&, const P& p, const F& add) {
  int units = 0;
  while (walk.inside() && units < most) {
    At batch[At::kUnroll];
    int read = At::kUnroll;
    if (walk.has(At::kUnroll)) {
#pragma unroll
      for (int u = 0; u < At::kUnroll; ++u, walk.advance()) batch[u].load(p, walk);
#pragma unroll
      for (int u = 0; u < At::kUnroll; ++u) add(batch[u]);
    } else {
      read = 0;
#pragma unroll
      for (int u = 0; u < At::kUnroll - 1; ++u)
        if (walk.inside()) batch[u].load(p, walk), walk.advance(), ++read;
#pragma unroll
      for (int u = 0; u < At::kUnroll - 1; ++u)
        if (u < read) add(batch[u]);
    }
    units += read;
  }
  return units;
}

}  // namespace torch_bn::cuda
