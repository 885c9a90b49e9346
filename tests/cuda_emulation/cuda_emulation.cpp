// The scheduler behind cuda_emulation.h. Never compiled with -fsanitize=thread: the race detector must see what the
// kernel orders (barriers, fences, atomics), not what this file does in order to run one fiber at a time.
#include "cuda_emulation.h"

#include <link.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/tsan_interface.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <semaphore>
#include <span>
#include <string>
#include <thread>
#include <vector>

// Present only in a program built with that sanitizer.
#pragma weak __sanitizer_start_switch_fiber
#pragma weak __sanitizer_finish_switch_fiber
#pragma weak __asan_poison_memory_region
#pragma weak __asan_unpoison_memory_region
#pragma weak __tsan_create_fiber
#pragma weak __tsan_get_current_fiber
#pragma weak __tsan_switch_to_fiber
#pragma weak __tsan_acquire
#pragma weak __tsan_release

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace emulation {

Settings settings;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kDefaultSharedBytes = 48 << 10, kSharedBytes = 227 << 10;  // without and with the opt-in, on sm_90
constexpr unsigned kMaxPolls = 200'000;

/// For the race detector: who acquires a clock comes after all who released it.
void acquire(const void* clock) { if (__tsan_acquire) __tsan_acquire(const_cast<void*>(clock)); }
void release(const void* clock) { if (__tsan_release) __tsan_release(const_cast<void*>(clock)); }

/// A stack and the place to continue on it.
struct Context {
  void* registers[5];
  ucontext_t start;  // of a fiber that has not run yet
  bool started = true;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void *asan_fake_stack = nullptr, *tsan_fiber = nullptr;
};

/// Not swapcontext: that makes a system call, and AddressSanitizer forgets a stack's red zones in it.
[[gnu::noinline, gnu::no_sanitize("address")]] void switch_context(Context& from, Context& to) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack_bottom, to.stack_size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
  if (__builtin_setjmp(from.registers) == 0) {
    if (to.started) __builtin_longjmp(to.registers, 1);
    to.started = true;
    setcontext(&to.start);
  }
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
}

/// One thread of a kernel.
struct Fiber : Context {
  struct Block& block;
  const unsigned rank;  // in the block
  std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
  bool done = false;
  const char* waits_in = nullptr;
  Where where;
  bool fenced = false;             // since its last barrier: its atomics release what it knows
  const void* observed = nullptr;  // the last atomic it read: its next fence acquires what was released there

  Fiber(Block& block, unsigned rank);
  ~Fiber();
};

/// Threads that wait for one another. Clocks and lanes are doubled because the first to leave a round may already
/// have arrived for the next while the last still reads; nobody can be two rounds ahead.
struct Meeting {
  unsigned expected = 0, round = 0;
  std::vector<Fiber*> waiting;
  char clock[2] = {};
  Lanes lanes[2] = {};

  /// Waits for the others; returns the index of the round's lanes.
  unsigned join(Fiber& fiber, const char* name, bool orders_memory, Where where);
};

struct Cluster {
  std::vector<struct Block*> blocks;  // by rank
  Meeting barrier;
};

struct Block {
  struct Grid& grid;
  Cluster& cluster;
  const unsigned cluster_rank;
  const dim3 index;
  std::deque<Fiber> fibers;
  std::vector<Fiber*> runnable;
  unsigned live;
  Meeting barrier;
  std::vector<std::map<unsigned, Meeting>> warps;  // by mask
  std::span<std::byte> static_shared;              // empty until the block runs
  std::byte* dynamic_shared;
  Context scheduler;
  std::binary_semaphore turn{0};

  Block(Grid& grid, Cluster& cluster, dim3 index);
  ~Block() { ::operator delete(dynamic_shared, std::align_val_t(128)); }
  void run();
};

struct Grid {
  const cudaLaunchConfig_t& config;
  const std::function<void()>& thread;
  std::minstd_rand random{settings.seed + 1};
  std::deque<Cluster> clusters{};  // resident ones,
  std::deque<Block> blocks{};      // and their blocks
  unsigned polls = 0;              // in a row, while nothing else happened
  std::binary_semaphore host{0};

  void run_wave();
  void hand_over(Block& from);
  [[noreturn]] void give_up(const char* message);
};

constinit thread_local Fiber* current = nullptr;  // lies among the kernel's shared variables: set after their poisoning
std::vector<void*> spare_tsan_fibers;             // creating one takes most of a millisecond

unsigned volume(dim3 size) { return size.x * size.y * size.z; }
uint3 coordinates(unsigned rank, dim3 size) {
  return {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
}

/// The thread-local variables of this executable, of the calling thread: the kernels' static shared memory.
std::span<std::byte> static_shared_memory() {
  std::span<std::byte> segment;
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* result) {
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_TLS)
        *static_cast<std::span<std::byte>*>(result) = {static_cast<std::byte*>(info->dlpi_tls_data),
                                                       info->dlpi_phdr[i].p_memsz};
    return 1;  // the first object is the executable
  }, &segment);
  const auto inside = reinterpret_cast<std::byte*>(&threadIdx);
  if (inside < segment.data() || inside >= segment.data() + segment.size())
    fail("kernels must be linked into an executable", Where::current());
  return segment;
}

void suspend() { switch_context(*current, current->block.scheduler); }

unsigned Meeting::join(Fiber& fiber, const char* name, bool orders_memory, Where where) {
  if (!waiting.empty() && waiting[0]->where.line() != where.line())
    fail(("divergence: other threads wait at line " + std::to_string(waiting[0]->where.line())).c_str(), where);
  const unsigned parity = round & 1;
  if (orders_memory) release(&clock[parity]);
  fiber.waits_in = name;
  fiber.where = where;
  waiting.reserve(expected);
  waiting.push_back(&fiber);
  if (waiting.size() < expected) {
    suspend();
  } else {
    for (Fiber* other : waiting) {
      other->waits_in = nullptr;
      if (other != &fiber) other->block.runnable.push_back(other);
    }
    waiting.clear();
    ++round;
    fiber.block.grid.polls = 0;
  }
  if (orders_memory) acquire(&clock[parity]);
  return parity;
}

void run_fiber() {
  Fiber& fiber = *current;
  Block& block = fiber.block;
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.stack_bottom, &block.scheduler.stack_size);
  acquire(&block);  // its shared memory has been poisoned
  block.grid.thread();
  release(&block.grid);
  fiber.done = true;
  --block.live;
  block.grid.polls = 0;
  suspend();
}

Fiber::Fiber(Block& block, unsigned rank) : block(block), rank(rank) {
  started = false;
  getcontext(&start);
  stack_bottom = start.uc_stack.ss_sp = stack.get();
  stack_size = start.uc_stack.ss_size = kStackBytes;
  makecontext(&start, run_fiber, 0);
  if (!__tsan_create_fiber) return;
  if (spare_tsan_fibers.empty()) spare_tsan_fibers.push_back(__tsan_create_fiber(0));
  tsan_fiber = spare_tsan_fibers.back();
  spare_tsan_fibers.pop_back();
}

Fiber::~Fiber() {
  if (tsan_fiber) spare_tsan_fibers.push_back(tsan_fiber);
}

Block::Block(Grid& grid, Cluster& cluster, dim3 index)
    : grid(grid), cluster(cluster), cluster_rank(cluster.blocks.size()), index(index),
      live(volume(grid.config.blockDim)), warps((live + 31) / 32) {
  barrier.expected = live;
  cluster.blocks.push_back(this);
  cluster.barrier.expected += live;
  runnable.reserve(live);  // vectors must not grow in a fiber: the race detector would see that
  for (unsigned rank = 0; rank < live; ++rank) runnable.push_back(&fibers.emplace_back(*this, rank));
  // Exactly as large as asked for, so that AddressSanitizer sees its end; NaN until somebody writes it.
  dynamic_shared = static_cast<std::byte*>(::operator new(grid.config.dynamicSmemBytes, std::align_val_t(128)));
  std::memset(dynamic_shared, 0xff, grid.config.dynamicSmemBytes);
}

/// The block's OS thread.
void Block::run() {
  turn.acquire();
  const std::span<std::byte> shared = static_shared_memory();
  std::memset(shared.data(), 0xff, shared.size());
  static_shared = shared;
  blockIdx = {index.x, index.y, index.z};
  blockDim = grid.config.blockDim;
  gridDim = grid.config.gridDim;
  release(this);
  if (__tsan_get_current_fiber) scheduler.tsan_fiber = __tsan_get_current_fiber();
  while (live > 0) {
    if (runnable.empty() || grid.random() % 64 == 0) grid.hand_over(*this);
    std::swap(runnable[grid.random() % runnable.size()], runnable.back());
    current = runnable.back();
    runnable.pop_back();
    threadIdx = coordinates(current->rank, blockDim);
    switch_context(scheduler, *current);
  }
  // Its shared memory ends here, though a neighbour in the cluster may still hold its address.
  if (__asan_poison_memory_region) __asan_poison_memory_region(shared.data(), shared.size());
  if (__asan_poison_memory_region) __asan_poison_memory_region(dynamic_shared, grid.config.dynamicSmemBytes);
  grid.hand_over(*this);  // returns when all resident blocks have finished
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(shared.data(), shared.size());
}

void Grid::hand_over(Block& from) {
  std::vector<Block*> ready;
  for (Block& block : blocks)
    if (!block.runnable.empty()) ready.push_back(&block);
  if (ready.empty()) {
    for (const Block& block : blocks)
      if (block.live > 0) give_up("deadlock: no thread can run");
    host.release();
  } else {
    Block* to = ready[random() % ready.size()];
    if (to == &from) return;
    to->turn.release();
  }
  from.turn.acquire();
}

void Grid::give_up(const char* message) {
  std::map<std::string, unsigned> threads;
  for (const Block& block : blocks)
    for (const Fiber& fiber : block.fibers) {
      std::string state = "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ") ";
      if (fiber.done) state += "left the kernel";
      else if (!fiber.waits_in) state += "can run";
      else state += std::string("wait in ") + fiber.waits_in + " at line " + std::to_string(fiber.where.line());
      ++threads[state];
    }
  std::fprintf(stderr, "cuda emulation, seed %u: %s\n", settings.seed, message);
  for (const auto& [state, count] : threads) std::fprintf(stderr, "  %4u threads of %s\n", count, state.c_str());
  std::abort();
}

/// Runs the resident blocks side by side until all have finished.
void Grid::run_wave() {
  std::vector<std::thread> threads;
  for (Block& block : blocks) threads.emplace_back(&Block::run, &block);
  blocks[random() % blocks.size()].turn.release();
  host.acquire();
  for (Block& block : blocks) block.turn.release();
  for (std::thread& thread : threads) thread.join();
  acquire(this);
  blocks.clear();
  clusters.clear();
}

/// What a kernel may ask for as dynamic shared memory.
int& shared_limit(const void* kernel) {
  static std::map<const void*, int> limits;
  return limits.try_emplace(kernel, kDefaultSharedBytes).first->second;
}

}  // namespace

void fail(const char* message, Where where) {
  std::fprintf(stderr, "%s:%u: cuda emulation, seed %u, block (%u, %u), thread (%u, %u): %s\n", where.file_name(),
               where.line(), settings.seed, blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y, message);
  std::abort();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  Grid grid{config, thread};
  const dim3 size = config.gridDim;
  dim3 cluster(1, 1, 1);
  unsigned resident_blocks = 1 + grid.random() % settings.resident_blocks;  // unspecified, unless cooperative
  for (const cudaLaunchAttribute& attribute : std::span(config.attrs, config.numAttrs)) {
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) {
      resident_blocks = settings.resident_blocks;
      if (volume(size) > resident_blocks) return cudaErrorCooperativeLaunchTooLarge;
    }
  }
  const unsigned threads = volume(config.blockDim), cluster_blocks = volume(cluster);
  if (threads == 0 || threads > 1024 || volume(size) == 0 || size.y > 65535 || size.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > size_t(shared_limit(kernel))) return cudaErrorInvalidValue;
  if (cluster_blocks == 0 || cluster_blocks > 8 || size.x % cluster.x || size.y % cluster.y || size.z % cluster.z)
    return cudaErrorInvalidClusterSize;

  const dim3 clusters(size.x / cluster.x, size.y / cluster.y, size.z / cluster.z);
  std::vector<unsigned> order(volume(clusters));  // unspecified, too
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), grid.random);
  for (unsigned id : order) {
    if (!grid.blocks.empty() && grid.blocks.size() + cluster_blocks > resident_blocks) grid.run_wave();
    const uint3 at = coordinates(id, clusters);
    grid.clusters.emplace_back();
    for (unsigned rank = 0; rank < cluster_blocks; ++rank) {
      const uint3 offset = coordinates(rank, cluster);
      const dim3 index(at.x * cluster.x + offset.x, at.y * cluster.y + offset.y, at.z * cluster.z + offset.z);
      grid.blocks.emplace_back(grid, grid.clusters.back(), index);
    }
  }
  grid.run_wave();
  return cudaSuccess;
}

void meet_block(Where where) {
  current->block.barrier.join(*current, "__syncthreads", true, where);
  current->fenced = false;
}

void meet_cluster(Where where) {
  current->block.cluster.barrier.join(*current, "cluster_sync", true, where);
  current->fenced = false;
}

const Lanes& meet_lanes(unsigned mask, uint64_t value, bool orders_memory, Where where) {
  if (!(mask >> lane() & 1)) fail("a lane calls a warp function with a mask that does not name it", where);
  Meeting& meeting = current->block.warps[current->rank / 32][mask];
  meeting.expected = std::popcount(mask);
  meeting.lanes[meeting.round & 1][lane()] = value;
  return meeting.lanes[meeting.join(*current, "a warp function", orders_memory, where)];
}

uint64_t read_lane(const Lanes& lanes, unsigned lane) { return lanes[lane]; }
unsigned lane() { return current->rank % 32; }

void give_way(bool idle) {
  Grid& grid = current->block.grid;
  grid.polls = idle ? grid.polls + 1 : 0;
  if (grid.polls > kMaxPolls) grid.give_up("livelock: threads poll, and nobody changes what they poll");
  current->block.runnable.push_back(current);
  suspend();
}

void release_fenced(void* address) { if (current->fenced) release(address); }
void observe(const void* address) { current->observed = address; }
void fence() {
  if (current->observed) acquire(current->observed);
  current->fenced = true;
}

void* dynamic_shared_memory() { return current->block.dynamic_shared; }
unsigned cluster_rank() { return current->block.cluster_rank; }
unsigned cluster_size() { return current->block.cluster.blocks.size(); }

void* map_to_rank(const void* address, unsigned rank, Where where) {
  const Block& self = current->block;
  if (rank >= cluster_size()) fail("no such rank in the cluster", where);
  const Block& other = *self.cluster.blocks[rank];
  if (other.static_shared.empty())
    fail("shared memory of a block that may not have started: cluster_sync first", where);
  if (other.live == 0) fail("shared memory of a block that has left the kernel: cluster_sync before leaving", where);
  const auto byte = static_cast<const std::byte*>(address);
  const bool dynamic = byte >= self.dynamic_shared && byte < self.dynamic_shared + self.grid.config.dynamicSmemBytes;
  return dynamic ? other.dynamic_shared + (byte - self.dynamic_shared)
                 : other.static_shared.data() + (byte - self.static_shared.data());
}

}  // namespace emulation

extern "C" cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > emulation::kSharedBytes)
    return cudaErrorInvalidValue;
  emulation::shared_limit(kernel) = value;
  return cudaSuccess;
}
