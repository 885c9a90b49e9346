// The CUDA execution model on the host, so that a kernel's logic can be tested where there is no GPU:
//   g++ -std=c++20 -include cuda_emulation.h -x c++ -c kernels.cu
// A block is an OS thread, so thread-local storage can stand in for shared memory; its threads are fibers. Exactly one
// fiber runs at a time, and it gives way only in the functions below, to a fiber drawn from a seeded generator: a run
// is reproducible, and a deadlock is seen as what it is (nobody can run) instead of waited for. README.md says what
// this can and cannot show.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#if !defined(__clang__)
// GCC sees a residual that is not read where there is none, but with sanitizers not that it is not used there either.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define CUDA_EMULATION 1
#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)

extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;

namespace emulation {

using Where = std::source_location;  // as a default argument: the kernel's line, for the messages
using Lanes = std::array<uint64_t, 32>;

/// How the next launches run. A test runs each case under several seeds.
struct Settings {
  unsigned seed = 0;
  unsigned resident_blocks = 8;  // that run side by side; a cooperative grid must fit
};
extern Settings settings;

[[noreturn]] void fail(const char* message, Where where);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

void meet_block(Where where);
void meet_cluster(Where where);
const Lanes& meet_lanes(unsigned mask, uint64_t value, bool orders_memory, Where where);
uint64_t read_lane(const Lanes& lanes, unsigned lane);  // apart, so that the race detector does not see it
unsigned lane();

void give_way(bool idle);            // others may run here; idle: this thread waits for them
void release_fenced(void* address);  // called before, and
void observe(const void* address);   // after a relaxed atomic: what a fence orders goes by way of it
void fence();

void* dynamic_shared_memory();
unsigned cluster_rank();
unsigned cluster_size();
void* map_to_rank(const void* address, unsigned rank, Where where);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a warp exchanges at most 8 bytes per lane");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Where where) {
  const Lanes& lanes = meet_lanes(mask, to_bits(value), false, where);
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane that its mask does not name", where);
  return from_bits<T>(read_lane(lanes, source));
}

template <typename T, typename Combine>
T reduce(unsigned mask, T value, Combine combine, Where where) {
  const Lanes& lanes = meet_lanes(mask, to_bits(value), false, where);
  const int first = std::countr_zero(mask);
  T total = from_bits<T>(read_lane(lanes, first));
  for (int i = first + 1; i < 32; ++i)
    if (mask >> i & 1) total = combine(total, from_bits<T>(read_lane(lanes, i)));
  return total;
}

/// One relaxed read-modify-write: indivisible because no other fiber runs in between.
template <typename T, typename Next>
T update(T* address, Next next) {
  give_way(false);
  release_fenced(address);
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, next(old), __ATOMIC_RELAXED);
  observe(address);
  return old;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
#define cudaLaunchKernelEx emulation::launch_kernel  // the toolkit's own drops the types of the arguments

// Words that CUDA C++ lacks, and that a kernel would have to write in PTX.

inline unsigned load_acquire(const unsigned* address) {
  give_way(true);
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

inline unsigned add_release(unsigned* address, unsigned value) {
  give_way(false);
  return __atomic_fetch_add(address, value, __ATOMIC_RELEASE);
}

inline void cluster_sync(Where where = Where::current()) { meet_cluster(where); }

template <typename T>
T* cluster_shared(T* address, unsigned rank, Where where = Where::current()) {
  return static_cast<T*>(map_to_rank(address, rank, where));
}

template <typename T>
T* dynamic_shared() { return static_cast<T*>(dynamic_shared_memory()); }

}  // namespace emulation

// The vocabulary of kernels. What is missing here does not compile: add it when a kernel needs it.

inline void __syncthreads(emulation::Where where = emulation::Where::current()) { emulation::meet_block(where); }
inline void __syncwarp(unsigned mask = ~0u, emulation::Where where = emulation::Where::current()) {
  emulation::meet_lanes(mask, 0, true, where);
}
inline void __threadfence() { emulation::fence(); }
inline void __nanosleep(unsigned) { emulation::give_way(true); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulation::Where where = emulation::Where::current()) {
  return emulation::shuffle(mask, value, (emulation::lane() & ~(width - 1u)) | (source & (width - 1u)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  emulation::Where where = emulation::Where::current()) {
  const unsigned lane = emulation::lane(), source = lane ^ flip;
  return emulation::shuffle(mask, value, source / width > lane / width ? lane : source, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulation::Where where = emulation::Where::current()) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, lane % width + delta < unsigned(width) ? lane + delta : lane, where);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, emulation::Where where = emulation::Where::current()) {
  return emulation::reduce(mask, unsigned(vote) << emulation::lane(), std::bit_or<>(), where);
}
inline bool __any_sync(unsigned mask, bool vote, emulation::Where where = emulation::Where::current()) {
  return emulation::reduce(mask, vote, std::logical_or<>(), where);
}
inline bool __all_sync(unsigned mask, bool vote, emulation::Where where = emulation::Where::current()) {
  return emulation::reduce(mask, vote, std::logical_and<>(), where);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, emulation::Where where = emulation::Where::current()) {
  return emulation::reduce(mask, value, std::plus<>(), where);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emulation::Where where = emulation::Where::current()) {
  return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return std::max(a, b); }, where);
}

// No floating-point atomics: their order is not fixed, so torch_bn does not use them.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emulation::update(address, [=](unsigned old) { return old + value; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulation::update(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return emulation::update(address, [=](unsigned) { return value; });
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value) {
  return emulation::update(address, [=](unsigned old) { return old == expected ? value : old; });
}

template <typename T>
T __ldg(const T* address) { return *address; }
template <typename T>
T __ldcg(const T* address) { return *address; }
template <typename T>
T __ldcs(const T* address) { return *address; }
template <typename T>
void __stcs(T* address, T value) { *address = value; }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float normcdff(float x) { return float(std::erfc(-double(x) / std::sqrt(2.0)) / 2); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
