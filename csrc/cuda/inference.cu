// The map with given statistics, in one launch.
#include "../math/channel.h"
#include "normalize.cuh"
#include "reduce.cuh"

namespace torch_bn::cuda {
namespace {

template <class K>
__global__ void __launch_bounds__(kThreads, kResident)
    inference_kernel(const __grid_constant__ Plan plan, const __grid_constant__ InferenceParams p) {
  using T = typename K::Compute;
  __shared__ Affine<T> affines[kMaxWidth];
  const Part part(plan, false);
  const int64_t channel = own_channel(plan, part.tile);
  if (int(threadIdx.x) < plan.width && channel < plan.channels) {
    const double invstd = inverse_deviation(parameter<T>(p.running_var, channel, 1), p.eps);
    affines[threadIdx.x] = normalizing_affine<T>(parameter<T>(p.running_mean, channel, 0), invstd,
                                                 parameter<T>(p.weight, channel, 1), parameter<T>(p.bias, channel, 0));
  }
  __syncthreads();
  const Walk<K> walk(plan, part);
  const int64_t first = walk.channel - int64_t(part.tile) * plan.width;
  normalize<K>(NormalizeParams(p), walk, [&](int i) { return affines[first + i]; });
}

}  // namespace

cudaError_t inference(const InferenceParams& p, const Device& device, cudaStream_t stream) {
  const Operand operands[] = {{p.x, p.x_strides}, {p.residual, p.residual_strides}, {p.y, p.y_strides}};
  const int bytes = vector_bytes(p.dtype, p.extent, operands);
  if (p.mask && bytes != vector_bytes(p.dtype, p.extent)) return cudaErrorMisalignedAddress;
  const Plan plan = plan_for(p.dtype, p.extent, bytes, kMapRounds * device.blocks);
  return with_kind(p.dtype, p.extent.inner > 1, bytes, [&](auto kind) {
    using K = decltype(kind);
    return launch(is_curved(p.activation) ? inference_kernel<Curved<K>> : inference_kernel<K>, plan.blocks(),
                  Order::whole, stream, plan, p);
  });
}

}  // namespace torch_bn::cuda
