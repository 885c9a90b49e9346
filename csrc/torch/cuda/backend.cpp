// CUDA's Backend: current stream, device, tickets and errors around the launchers of csrc/cuda.
#include "../backend.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "../../cuda/launch.h"

namespace torch_bn {
namespace {

constexpr int64_t kLeastTickets = 4096;

void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch that was refused leaves its error behind for whoever asks next
  TORCH_CHECK(false, "batch_norm: CUDA refuses the kernels of its ", op, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, c10::Device device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device.index()), "device");
  return value;
}

/// But for the tickets, which belong to a stream.
const cuda::Device& facts_of(c10::Device device) {
  static std::array<std::optional<cuda::Device>, C10_COMPILE_TIME_MAX_GPUS> known;
  static std::array<std::once_flag, C10_COMPILE_TIME_MAX_GPUS> asked;
  auto& facts = known.at(device.index());
  std::call_once(asked.at(device.index()), [&] {
    facts = cuda::Device{.blocks = attribute(cudaDevAttrMultiProcessorCount, device) * cuda::kResident,
                         .tickets = nullptr,
                         .overlaps = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9};
  });
  return *facts;
}

at::Tensor zeros(int64_t count, c10::Device device) { return at::zeros({count}, at::device(device).dtype(at::kInt)); }

/// What launches on one stream share.
/// NB: a graph may be replayed beside other work of the stream that it was captured on, so it gets tickets of its own.
at::Tensor tickets_for(int64_t channels, const c10::cuda::CUDAStream& stream) {
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
    return zeros(channels, stream.device());
  static std::mutex mutex;
  static auto& kept = *new std::map<std::pair<c10::DeviceIndex, cudaStream_t>, at::Tensor>;  // outlives the allocator
  const std::lock_guard lock(mutex);
  at::Tensor& tickets = kept[{stream.device_index(), stream.stream()}];
  if (!tickets.defined() || tickets.numel() < channels)
    tickets = zeros(std::max(channels, kLeastTickets), stream.device());
  return tickets;
}

template <class Params>
void run(cudaError_t (*launcher)(const Params&, const cuda::Device&, cudaStream_t), const Params& p, int64_t tickets,
         c10::Device device, const char* op) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor zeros = tickets > 0 ? tickets_for(tickets, stream) : at::Tensor();
  cuda::Device facts = facts_of(device);
  if (zeros.defined()) facts.tickets = reinterpret_cast<unsigned*>(zeros.mutable_data_ptr<int>());
  check(launcher(p, facts, stream), op);
}

const Backend backend{
    [](DType dtype, const Extent& e, c10::Device device) { return cuda::workspace(dtype, e, facts_of(device).blocks); },
    [](DType dtype, const Extent& e) {
      const int64_t neighbours = cuda::mask_neighbours(dtype, e);
      return MaskShape{e.outer * e.channels * e.inner / neighbours, neighbours};
    },
    [](const ForwardParams& p, c10::Device device) { run(cuda::forward, p, p.extent.channels, device, "forward"); },
    [](const InferenceParams& p, c10::Device device) { run(cuda::inference, p, 0, device, "inference"); },
    [](const BackwardParams& p, c10::Device device) { run(cuda::backward, p, p.extent.channels, device, "backward"); },
    [](const UpdateParams& p, c10::Device device) {
      const c10::cuda::CUDAGuard guard(device);
      check(cuda::update(p, c10::cuda::getCurrentCUDAStream()), "update of statistics");
    },
    CUDART_VERSION,
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_bn, CUDA, library) {
  cuda_backend = &backend;
  register_operators(library);
}

}  // namespace torch_bn
