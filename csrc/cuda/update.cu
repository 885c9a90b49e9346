// A batch's statistics, kept by the forward pass, enter the running ones.
#include "../math/channel.h"
#include "plan.h"

namespace torch_bn::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kResident) update_kernel(UpdateParams p) {
  const RunningStep step = step_of<T>(p.running);
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += kThreads)
    update_running<T>(p.running, step, channel, p.statistics[channel], p.statistics[p.channels + channel], p.eps);
  __syncthreads();  // all have read what count_batch changes
  if (threadIdx.x == 0) count_batch<T>(p.running, step);
}

}  // namespace

/// NB: one block, since what belongs to all channels may change only when all have read it.
cudaError_t update(const UpdateParams& p, cudaStream_t stream) {
  return launch(p.dtype == DType::f64 ? update_kernel<double> : update_kernel<float>, 1, Order::whole, stream, p);
}

int64_t workspace(DType dtype, const Extent& e, int blocks) { return Scratch::bytes(dtype, e, blocks); }

int mask_neighbours(DType dtype, const Extent& e) { return vector_bytes(dtype, e) / size_of(dtype); }

}  // namespace torch_bn::cuda
