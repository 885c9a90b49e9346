// Backward in two launches: the two sums over dz, which the last block of a tile turns into coefficients and the
// gradients of weight and bias; then the map to dx.
#include "../math/channel.h"
#include "normalize.cuh"
#include "reduce.cuh"

namespace torch_bn::cuda {
namespace {

constexpr int kChain = 64;  // units of a thread that are summed in its compute type

/// What makes dz of dy: nothing; the derivative of an activation, found again; a mask of what relu let through.
enum class Ending { none, general, masked };

/// The forward's map, of the channels of one tile: first those that come first in their columns, then the second ones,
/// because what the threads of a warp read at a time should lie side by side.
template <class K>
__device__ void prepare(const Plan& plan, const BackwardParams& p, const Part& part,
                        Affine<typename K::Compute> (&affines)[kMaxWidth]) {
  using T = typename K::Compute;
  const int64_t channel = own_channel(plan, part.tile);
  if (int(threadIdx.x) < plan.width && channel < plan.channels) {
    const Weights weights = corrected_weights<T>(p, channel, kept_correction(p, channel));
    const int64_t at = part.group * plan.channels + channel;
    const int thread = int(threadIdx.x);
    affines[thread % K::kChannels * plan.columns + thread / K::kChannels] =
        normalizing_affine<T>(p.mean[at], p.invstd[at], weights.gamma, weights.beta);
  }
  __syncthreads();
}

/// Those of the channels of one thread.
template <class K>
struct Forwarded {
  const Affine<typename K::Compute>* first;
  int columns;

  __device__ Forwarded(const Plan& plan, const Affine<typename K::Compute> (&affines)[kMaxWidth])
      : first(affines + (K::kPlanes ? int(threadIdx.x) / plan.lanes : int(threadIdx.x) % plan.columns)),
        columns(plan.columns) {}
  __device__ const Affine<typename K::Compute>& operator[](int c) const { return first[c * columns]; }
};

/// What a thread reads at one place, and dz of it.
template <class K, Ending kEnding>
struct Upstream {
  static constexpr int kUnroll = kEnding != Ending::general ? K::kUnroll : kIsCurved<K> ? K::kUnroll / 4 : K::kUnroll / 2;
  using T = typename K::Compute;
  typename K::Vector x, dy, residual;
  unsigned passed;  // bit by bit

  __device__ void load(const BackwardParams& p, const Walk<K>& walk) {
    x = walk.load(p.x, p.x_strides);
    dy = walk.load(p.dy, p.dy_strides);
    if constexpr (kEnding == Ending::masked) passed = p.mask[walk.position()];
    if constexpr (kEnding == Ending::general)
      if (p.residual) residual = walk.load(p.residual, p.residual_strides);
  }
  /// Calls f(e, channel, deviation, dz) for each element. centered: what has the centers of the thread's channels;
  /// forwarded: there in a general ending.
  template <class Centered, class F>
  __device__ void for_each(const BackwardParams& p, const Centered& centered, const Forwarded<K>& forwarded,
                           const F& f) const {
    const auto from = x.elements(), gradient = dy.elements();
#pragma unroll
    for (int e = 0; e < K::kVector; ++e) {
      const int c = K::kPlanes ? 0 : e;
      const T deviation = from[e] - centered[c].center;
      if constexpr (kEnding == Ending::none) {
        f(e, c, deviation, gradient[e]);
      } else if constexpr (kEnding == Ending::masked) {
        f(e, c, deviation, passed >> e & 1 ? gradient[e] : T(0));
      } else {
        T z = normalized<typename K::D>(deviation, forwarded[c]);
        if (p.residual) z += residual.elements()[e];
        if constexpr (kIsCurved<K>) f(e, c, deviation, curved_gradient(p, z, gradient[e]));
        else f(e, c, deviation, relu_gradient(z, gradient[e]));
      }
    }
  }
  __device__ void store(const BackwardParams& p, const Walk<K>& walk, const Forwarded<K>& forwarded,
                        const GradientAffine<T> (&gradients)[K::kChannels]) const {
    typename K::Vector::Elements dx, dresidual;
    for_each(p, gradients, forwarded, [&](int e, int c, T deviation, T dz) {
      dx.set(e, fma(dz, gradients[c].slope, fma(deviation, gradients[c].bend, gradients[c].shift)));
      dresidual.set(e, dz);
    });
    if (p.dx) walk.store(p.dx, p.dx_strides, dx.packed());
    if (p.dresidual) walk.store(p.dresidual, p.dresidual_strides, dresidual.packed());
  }
};

/// sums: of the channels of the thread, out.
template <class K, Ending kEnding>
__device__ void thread_sums(const BackwardParams& p, Walk<K> walk, const Forwarded<K>& forwarded,
                            Sums (&sums)[K::kChannels]) {
  using T = typename K::Compute;
  while (walk.inside()) {
    T dz_sum[K::kChannels] = {}, deviation_sum[K::kChannels] = {};
    read_batches(walk, kChain, Upstream<K, kEnding>{}, p, [&](const Upstream<K, kEnding>& at) {
      at.for_each(p, forwarded, forwarded, [&](int, int c, T deviation, T dz) {
        dz_sum[c] += dz;
        deviation_sum[c] = fma(dz, deviation, deviation_sum[c]);
      });
    });
    for (int c = 0; c < K::kChannels; ++c)
      sums[c] = joined(sums[c], {double(dz_sum[c]), double(deviation_sum[c])});
  }
}

struct SumsTotal {
  Sums sums{};
  __device__ explicit SumsTotal(const double2&) {}
  __device__ void add(const double2& found, double) { sums = joined(sums, {found.x, found.y}); }
};

/// By the last block of a tile.
template <class K>
__device__ void finish(const Plan& plan, const BackwardParams& p, const Scratch& scratch, int tile) {
  using T = typename K::Compute;
  const auto set_gradients = [&](int64_t channel, double dgamma, double dbeta) {
    if (p.dweight) static_cast<T*>(p.dweight)[channel] = T(dgamma);
    if (p.dbias) static_cast<T*>(p.dbias)[channel] = T(dbeta);
  };
  for_each_total<K, SumsTotal>(plan, tile, scratch.partials, [&](int64_t group, int64_t channel, const auto& total) {
    const int64_t at = group * plan.channels + channel;
    const double count = double(plan.units(group) * K::kSamples);
    const GroupGradient<T> gradient =
        finish_backward<T>(p.training, p.mean[at], p.invstd[at], parameter<T>(p.weight, channel, 1),
                           kept_correction(p, channel), {count, total.sums.first, total.sums.second});
    static_cast<GradientAffine<T>*>(scratch.coefficients)[at] = gradient.affine;
    if (plan.groups == 1)
      set_gradients(channel, gradient.dgamma, gradient.dbeta);
    else
      scratch.totals[at] = {gradient.dgamma, gradient.dbeta};
  });
  if (plan.groups == 1) return;
  __syncthreads();
  const int64_t channel = own_channel(plan, tile);
  if (int(threadIdx.x) >= plan.width || channel >= plan.channels) return;
  double dgamma = 0, dbeta = 0;
  for (int64_t group = 0; group < plan.groups; ++group) {
    const double2 of_group = scratch.totals[group * plan.channels + channel];
    dgamma += of_group.x;
    dbeta += of_group.y;
  }
  set_gradients(channel, dgamma, dbeta);
}

template <class K, Ending kEnding>
__global__ void __launch_bounds__(kThreads, kResident)
    sums_kernel(const __grid_constant__ Plan plan, const __grid_constant__ BackwardParams p,
                const __grid_constant__ Scratch scratch, unsigned* tickets) {
  __shared__ Affine<typename K::Compute> affines[kMaxWidth];
  allow_next_launch();
  const Part part(plan, false);
  const Walk<K> walk(plan, part);
  prepare<K>(plan, p, part, affines);
  Sums sums[K::kChannels] = {};
  thread_sums<K, kEnding>(p, walk, Forwarded<K>(plan, affines), sums);
  const Sums total = block_total<K>(plan, sums);
  if (completes_tile(plan, part, {total.first, total.second}, scratch.partials, tickets))
    finish<K>(plan, p, scratch, part.tile);
}

template <class K, Ending kEnding>
__global__ void __launch_bounds__(kThreads, kResident)
    gradient_kernel(const __grid_constant__ Plan plan, const __grid_constant__ BackwardParams p,
                    const __grid_constant__ Scratch scratch) {
  using T = typename K::Compute;
  __shared__ Affine<T> affines[kMaxWidth];
  const Part part(plan, true);
  const Walk<K> walk(plan, part);
  if constexpr (kEnding == Ending::general) prepare<K>(plan, p, part, affines);
  await_launch();
  if (!walk.inside()) return;
  const auto coefficients =
      static_cast<const GradientAffine<T>*>(scratch.coefficients) + part.group * plan.channels + walk.channel;
  GradientAffine<T> gradients[K::kChannels];
  for (int i = 0; i < K::kChannels; ++i) gradients[i] = coefficients[i];
  map_batches(walk, Upstream<K, kEnding>{}, p, Forwarded<K>(plan, affines), gradients);
}

}  // namespace

cudaError_t backward(const BackwardParams& p, const Device& device, cudaStream_t stream) {
  const Operand operands[] = {{p.x, p.x_strides},
                              {p.dy, p.dy_strides},
                              {p.residual, p.residual_strides},
                              {p.dx, p.dx_strides},
                              {p.dresidual, p.dresidual_strides}};
  const int bytes = vector_bytes(p.dtype, p.extent, operands);
  if (p.mask && bytes != vector_bytes(p.dtype, p.extent)) return cudaErrorMisalignedAddress;
  const Plan reduction = plan_for(p.dtype, p.extent, bytes, device.blocks);
  const Plan map = plan_for(p.dtype, p.extent, bytes, kMapRounds * device.blocks);
  const Scratch scratch(p.workspace, p.extent, device.blocks);
  const auto run = [&](auto sums, auto gradient) {
    const cudaError_t error =
        launch(sums, reduction.blocks(), Order::whole, stream, reduction, p, scratch, device.tickets);
    if (error || (!p.dx && !p.dresidual)) return error;
    return launch(gradient, map.blocks(), after_reduction(device), stream, map, p, scratch);
  };
  return with_kind(p.dtype, p.extent.inner > 1, bytes, [&](auto kind) {
    using K = decltype(kind);
    constexpr Ending none = Ending::none, general = Ending::general, masked = Ending::masked;
    if (p.activation == Activation::none) return run(sums_kernel<K, none>, gradient_kernel<K, none>);
    if (p.mask) return run(sums_kernel<K, masked>, gradient_kernel<K, masked>);
    if (is_curved(p.activation)) return run(sums_kernel<Curved<K>, general>, gradient_kernel<Curved<K>, general>);
    return run(sums_kernel<K, general>, gradient_kernel<K, general>);
  });
}

}  // namespace torch_bn::cuda
