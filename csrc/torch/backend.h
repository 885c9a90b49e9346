// What a device brings to the operators of ops.cpp: how it runs what they have prepared.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../kernels.h"

namespace torch_bn {

/// Of what a forward keeps of relu behind a residual: no bytes where backward reads the residual again. With a mask all
/// operands must let so many neighbours be read at once.
struct MaskShape {
  int64_t bytes, neighbours;
};

/// Each function works on the given device, in the order of its current stream, and throws if it cannot.
struct Backend {
  int64_t (*workspace)(DType, const Extent&, c10::Device);
  MaskShape (*mask)(DType, const Extent&);
  void (*forward)(const ForwardParams&, c10::Device);
  void (*inference)(const InferenceParams&, c10::Device);
  void (*backward)(const BackwardParams&, c10::Device);
  void (*update)(const UpdateParams&, c10::Device);
  int cuda;  // the version of CUDA that it was built with, 13000 for 13.0; 0 for the host
};

/// That of CUDA devices, null where the extension was built without.
extern const Backend* cuda_backend;

/// Registers the operators for the dispatch key of `library`.
void register_operators(torch::Library& library);

}  // namespace torch_bn
