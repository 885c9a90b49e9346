// How a tensor is cut: into tiles of adjacent channels, groups, and splits of what is left. One block takes one split
// of one group of one tile, and its threads stand in `columns` side by side with `lanes` threads each.
#pragma once
#include "launch.h"

namespace torch_bn::cuda {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kMaxWidth = 64;  // channels of a tile
constexpr int kMapRounds = 4;  // a map has so many times the blocks of a reduction, since nobody joins their results

/// A tensor that a kernel reads or writes.
struct Operand {
  const void* data;  // or null
  Strides strides;
};

constexpr int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

/// The widest vectors, in bytes, that lie aligned in all operands and end where channels (of rows) or planes end.
template <int kOperands>
int vector_bytes(DType dtype, const Extent& e, const Operand (&operands)[kOperands]) {
  const bool planes = e.inner > 1;
  const int size = size_of(dtype);
  for (int bytes = 16; bytes > size && bytes >= 8; bytes /= 2) {
    const int64_t n = bytes / size;
    bool fits = (planes ? e.inner : e.channels) % n == 0;
    for (const Operand& o : operands)
      if (o.data)
        fits = fits && reinterpret_cast<uintptr_t>(o.data) % unsigned(bytes) == 0 && o.strides.outer % n == 0 &&
               (!planes || o.strides.channel % n == 0);
    if (fits) return bytes;
  }
  return size;
}

/// What the shape alone allows.
inline int vector_bytes(DType dtype, const Extent& e) {
  const Operand none[] = {{nullptr, {}}};
  return vector_bytes(dtype, e, none);
}

/// A unit is what one thread reads at a time from one tensor: a vector of a plane, or a vector of channels of a row.
struct Plan {
  int64_t channels, groups;
  int64_t inner;                      // units of a plane; 1 for rows
  int64_t period, examples, surplus;  // outers of an example; examples of a group; groups that have one more
  int64_t step_inner, step_place, step_outer, skip;  // how a thread moves by one step, see Walk
  int64_t split_units;                // of a split, at most
  int columns, lanes, width;          // side by side; threads that share one; channels of a tile
  int tiles, splits;

  int64_t blocks() const { return tiles * splits * groups; }
  __host__ __device__ int64_t units(int64_t group) const { return (examples + (group < surplus)) * period * inner; }
  /// Units of a split.
  __host__ __device__ int64_t units(int64_t group, int split) const {
    const int64_t left = units(group) - split * split_units;
    return left < 0 ? 0 : left < split_units ? left : split_units;
  }
  /// Where the partial result of a channel stands.
  __host__ __device__ int64_t partial(int64_t group, int split, int64_t channel) const {
    return ((group * splits + split) * tiles) * width + channel;
  }
};

constexpr int power_of_two_above(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

constexpr int64_t quotient_above(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMostRounds = 4;

/// Into how many each of so many parts is cut, for blocks that run so many at once: in the fewest rounds of which the last
/// is nearly full too.
constexpr int64_t cuts(int64_t parts, int64_t blocks) {
  for (int64_t rounds = 1; rounds < kMostRounds; ++rounds)
    if (const int64_t each = rounds * blocks / parts; 10 * each * parts >= 9 * rounds * blocks) return each;
  return kMostRounds * blocks / parts;
}

/// For vectors of so many bytes, on a device that runs so many blocks at once.
inline Plan plan_for(DType dtype, const Extent& e, int bytes, int blocks) {
  constexpr int kLine = 128;             // bytes that rows of a tile fill
  constexpr int kLeastUnits = 8;         // of a thread, for which it is worth its start
  const bool planes = e.inner > 1;
  const int vector = bytes / size_of(dtype);
  Plan p{};
  p.channels = e.channels;
  p.groups = e.groups;
  p.inner = planes ? e.inner / vector : 1;
  p.period = e.groups == 1 ? e.outer : e.outer_per_example;  // without groups all is one example
  const int64_t examples = e.outer / p.period;
  p.examples = examples / e.groups;
  p.surplus = examples % e.groups;
  const int64_t units = p.units(0);
  if (planes) {
    p.lanes = power_of_two_above(quotient_above(units, kLeastUnits), kThreads);
    p.lanes = p.lanes < kWarp ? kWarp : p.lanes;
    // As few blocks as keep the device busy: each costs as much as the reading of several units.
    while (p.lanes > kWarp && 10 * e.channels * e.groups * (p.lanes / 2) >= 9 * int64_t(blocks) * kThreads) p.lanes /= 2;
    p.columns = p.width = kThreads / p.lanes;
  } else {
    p.columns = power_of_two_above(e.channels / vector, kLine / bytes < kWarp ? kLine / bytes : kWarp);
    p.width = p.columns * vector;
    p.lanes = kThreads / p.columns;
  }
  p.tiles = int(quotient_above(e.channels, p.width));
  const int64_t steps = quotient_above(units, p.lanes), share = cuts(p.tiles * e.groups, blocks);
  const int64_t most = quotient_above(steps, kLeastUnits);
  p.splits = int(share < 1 ? 1 : share < most ? share : most);
  const int64_t split_steps = quotient_above(steps, p.splits);
  p.split_units = split_steps * p.lanes;
  p.splits = int(quotient_above(steps, split_steps));
  const int64_t rows = p.lanes / p.inner;
  p.step_inner = p.lanes % p.inner;
  p.step_place = rows % p.period;
  p.step_outer = rows / p.period * p.period * p.groups + p.step_place;
  p.skip = (p.groups - 1) * p.period;
  return p;
}

/// The workspace: what the blocks hand to the last one of a tile, and it to the map.
struct Scratch {
  double2* partials;  // by Plan::partial
  double2* totals;    // [groups, channels]
  void* coefficients; // [groups, channels] of Affine or GradientAffine

  Scratch(void* workspace, const Extent& e, int blocks)
      : partials(static_cast<double2*>(workspace)), totals(partials + partials_of(e, blocks)),
        coefficients(totals + e.groups * e.channels) {}

  /// Whatever the plan: its tiles make no more blocks than all rounds take, or have one for each group.
  static int64_t partials_of(const Extent& e, int blocks) {
    return kMaxWidth * kMostRounds * int64_t(blocks) + e.groups * (e.channels + kMaxWidth);
  }
  static int64_t bytes(DType dtype, const Extent& e, int blocks) {
    const int64_t coefficient = dtype == DType::f64 ? 8 : 4;
    return partials_of(e, blocks) * int64_t(sizeof(double2)) +
           e.groups * e.channels * (int64_t(sizeof(double2)) + 4 * coefficient);
  }
};

/// Whether a launch waits for the one before it as a whole, or its blocks do so themselves with await_launch().
enum class Order { whole, overlapping };

inline Order after_reduction(const Device& device) { return device.overlaps ? Order::overlapping : Order::whole; }

/// NB: the number of blocks counts in 32 bits, as the grid's first dimension does.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, Order order, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = order == Order::overlapping;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/// In a launch that an overlapping one may follow: its blocks may start where this one's have ended.
__device__ inline void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// In an overlapping launch, before anything that the one before it reads or writes.
__device__ inline void await_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

}  // namespace torch_bn::cuda
