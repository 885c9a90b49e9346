// What the emulation must do by itself: warps, blocks, clusters and grids that work, and stopping a kernel that a
// device would hang or garble.
#include <sys/wait.h>
#include <unistd.h>

#include <cassert>
#include <cstdio>
#include <cstdlib>

#include "cuda_emulation.h"

namespace {

constexpr unsigned kSharedInts = 32;  // of dynamic shared memory

cudaLaunchConfig_t config_of(dim3 grid, dim3 block, size_t shared_bytes, cudaLaunchAttribute& attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute, config.numAttrs = 1;
  return config;
}

/// In clusters of so many blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t run(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config = config_of(grid, block, kSharedInts * sizeof(int), attribute);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/// All blocks at once.
cudaError_t run_together(void (*kernel)(unsigned*), unsigned blocks, size_t shared_bytes, unsigned* argument) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  const cudaLaunchConfig_t config = config_of(blocks, 32, shared_bytes, attribute);
  return cudaLaunchKernelEx(&config, kernel, argument);
}

__global__ void warp_functions() {
  const unsigned lane = threadIdx.x % 32, half = lane < 16 ? 0xffffu : 0xffff0000u;
  assert(__shfl_xor_sync(~0u, lane, 5) == (lane ^ 5));
  assert(__shfl_down_sync(~0u, double(lane), 3, 8) == (lane % 8 < 5 ? lane + 3 : lane));
  assert(__bfloat162float(__shfl_sync(half, __float2bfloat16(lane), 2, 16)) == (lane < 16 ? 2 : 18));
  assert(__ballot_sync(~0u, lane % 2) == 0xaaaaaaaau);
  assert(__any_sync(half, lane == 3) == (lane < 16) && __all_sync(half, lane < 16) == (lane < 16));
  assert(__reduce_add_sync(~0u, lane) == 496 && __reduce_max_sync(half, lane) == (lane < 16 ? 15 : 31));
}

__global__ void warp_exchanges_through_shared_memory(bool synchronized) {
  __shared__ unsigned slots[32];
  slots[threadIdx.x] = threadIdx.x;
  if (synchronized) __syncwarp();
  assert(slots[(threadIdx.x + 1) % 32] == (threadIdx.x + 1) % 32);
}

/// words: the ticket, and how many blocks the last one has seen.
__global__ void last_block_resets_ticket(unsigned* words) {
  __shared__ bool last;
  if (threadIdx.x == 0) last = atomicInc(words, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (threadIdx.x == 1) atomicAdd(words + 1, 1);
  if (last && threadIdx.x == 2) assert(atomicCAS(words, 0, 7) == 0 && atomicExch(words, 0) == 7);
}

/// Every block adds 1 and waits for all; three times.
__global__ void grid_barriers(unsigned* counters) {
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) {
      emulation::add_release(counters + 3, 1);
      emulation::add_release(counters + round, 1);
      while (emulation::load_acquire(counters + round) < gridDim.x) __nanosleep(20);
    }
    __syncthreads();
    assert(emulation::load_acquire(counters + 3) >= (round + 1) * gridDim.x);
  }
}

/// Reads what its neighbour in a cluster of two has in either kind of shared memory.
__global__ void neighbours(unsigned*) {
  __shared__ int value;
  int* const values = emulation::dynamic_shared<int>();
  values[threadIdx.x] = int(blockIdx.x * 100 + threadIdx.x);
  if (threadIdx.x == 0) value = int(blockIdx.x);
  emulation::cluster_sync();
  const unsigned other = emulation::cluster_rank() ^ 1;
  assert(emulation::cluster_size() == 2 && other == (blockIdx.x + 1) % 2);
  assert(*emulation::cluster_shared(&value, other) == int(blockIdx.x ^ 1));
  assert(emulation::cluster_shared(values, other)[threadIdx.x] == int((blockIdx.x ^ 1) * 100 + threadIdx.x));
  emulation::cluster_sync();
}

__global__ void lane_never_arrives() { if (threadIdx.x != 7) __shfl_xor_sync(~0u, 1, 1); }
__global__ void lane_is_not_named() { if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1, 16); }
__global__ void masks_disagree() { __syncwarp(threadIdx.x < 16 ? ~0u : 0xffff0000u); }
__global__ void barriers_diverge() {
  if (threadIdx.x < 16) __syncthreads();
  else
    __syncthreads();
}
__global__ void polls_forever(unsigned* flag) { while (emulation::load_acquire(flag) == 0) __nanosleep(20); }

__global__ void keeps_address_of_neighbour() {
  __shared__ int value;
  value = 1;
  int* other = emulation::cluster_shared(&value, emulation::cluster_rank() ^ 1);
  emulation::cluster_sync();
  if (emulation::cluster_rank() == 0) for (int i = 0; i < 1000; ++i) __nanosleep(20);
  if (emulation::cluster_rank() == 0) value = *other;
}

__global__ void shared_index_past_its_end(unsigned index) {
  __shared__ int values[8];
  values[index] = 1;
  assert(values[index] == 1);
}

__global__ void dynamic_shared_past_its_end() { emulation::dynamic_shared<int>()[kSharedInts] = 1; }
__global__ void reads_neighbour_at_once() {
  __shared__ int value;
  value = *emulation::cluster_shared(&value, emulation::cluster_rank() ^ 1);
}

int failed = 0;

void expect(bool ok, const char* what) {
  if (!ok) std::printf("failed: %s, seed %u\n", what, emulation::settings.seed), ++failed;
}

/// The body, in a process of its own, must abort.
void expect_abort(const char* name, void (*body)()) {
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr)) std::exit(2);
    body();
    std::_Exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (status == 0) std::printf("not noticed: %s\n", name), ++failed;
}

}  // namespace

int main() {
  for (emulation::settings.seed = 0; emulation::settings.seed < 20; ++emulation::settings.seed) {
    expect(run(warp_functions, 1, 64, 1) == cudaSuccess, "warp functions");
    expect(run(warp_exchanges_through_shared_memory, 2, 32, 1, true) == cudaSuccess, "__syncwarp");
    unsigned words[2] = {};
    expect(run(last_block_resets_ticket, 20, 64, 1, words) == cudaSuccess && words[0] == 0 && words[1] == 20, "ticket");
    unsigned counters[4] = {};
    expect(run_together(grid_barriers, 8, 0, counters) == cudaSuccess && counters[3] == 3 * 8, "grid barriers");
    expect(run(neighbours, 6, 32, 2, nullptr) == cudaSuccess, "clusters");
  }
  expect(run(warp_functions, 3, 32, 2) == cudaErrorInvalidClusterSize, "3 blocks in clusters of 2");
  expect(run_together(grid_barriers, 9, 0, nullptr) == cudaErrorCooperativeLaunchTooLarge, "9 blocks at once of 8");
  expect(run_together(neighbours, 2, 50'000, nullptr) == cudaErrorInvalidValue, "much shared memory without asking");
  expect_abort("__syncwarp", [] { run(warp_exchanges_through_shared_memory, 1, 32, 1, false); });
  expect_abort("lane never arrives", [] { run(lane_never_arrives, 1, 32, 1); });
  expect_abort("lane is not named", [] { run(lane_is_not_named, 1, 32, 1); });
  expect_abort("masks disagree", [] { run(masks_disagree, 1, 32, 1); });
  expect_abort("barriers diverge", [] { run(barriers_diverge, 1, 32, 1); });
  expect_abort("polls forever", [] { unsigned flag = 0; run(polls_forever, 1, 32, 1, &flag); });
  expect_abort("neighbour left", [] { run(keeps_address_of_neighbour, 2, 1, 2); });
  expect_abort("neighbour not there yet", [] { run(reads_neighbour_at_once, 2, 1, 2); });
  expect_abort("shared index", [] { run(shared_index_past_its_end, 1, 1, 1, 8u); });
  expect_abort("dynamic shared", [] { run(dynamic_shared_past_its_end, 1, 1, 1); });
  std::printf("emulation: %d failed\n", failed);
  return failed != 0;
}
