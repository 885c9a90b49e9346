// What the CUDA backend offers: launchers of kernels on a stream. They allocate nothing, wait for nothing and may be
// captured in a CUDA graph; the results of one device are equal to the bit from run to run.
#pragma once
#include <cuda_runtime.h>

#include "../kernels.h"

namespace torch_bn::cuda {

/// The device as a launch must know it.
struct Device {
  int blocks;         // of kThreads threads that it runs at once; decides how a reduction is cut
  unsigned* tickets;  // zeros, one for each channel of the extent; left as zeros for the next launch. Launches that may
                      // run at once must not share them
  bool overlaps;      // a launch may begin before the one that it waits for has ended: compute capability 9.0
};

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks that a multiprocessor must have registers for

/// Bytes that the params' workspace must have.
int64_t workspace(DType, const Extent&, int blocks);

/// A mask has a byte for so many neighbours, as many as a thread reads at a time. With one all operands must lie so that
/// it can, which is the caller's to see to.
int mask_neighbours(DType, const Extent&);

cudaError_t forward(const ForwardParams&, const Device&, cudaStream_t);
cudaError_t inference(const InferenceParams&, const Device&, cudaStream_t);
cudaError_t backward(const BackwardParams&, const Device&, cudaStream_t);
cudaError_t update(const UpdateParams&, cudaStream_t);

}  // namespace torch_bn::cuda
