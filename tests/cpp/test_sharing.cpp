// Pieces of work shared by threads of unequal speed: each is done once, whoever takes it.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "../../csrc/cpu/includes.h"
#define BN_VECTOR_BYTES 16
#define BN_FUSED_MULTIPLY_ADD 0

namespace torch_bn::testing {
#include "../../csrc/cpu/vector.inl"
#include "../../csrc/cpu/registers.inl"
#include "../../csrc/cpu/loops.inl"
#include "../../csrc/cpu/sharing.inl"

constexpr int kThreads = 5;

using Body = void (*)(void*, int64_t, int64_t);

void on_threads(int64_t n, int64_t, Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back([=] { body(context, i, i + 1); });
  for (auto& thread : threads) thread.join();
}

/// What a thread does that has all to itself, as in a parallel region of others.
void on_one(int64_t n, int64_t, Body body, void* context) { body(context, 0, n); }

/// The other threads come when there is nothing left to do.
void on_first(int64_t, int64_t, Body body, void* context) { body(context, 0, 1); }

int failures = 0;
void check(bool holds, const char* what, int64_t count, bool from_end) {
  if (holds) return;
  std::printf("%s: %lld pieces, from the %s\n", what, (long long)count, from_end ? "end" : "beginning");
  ++failures;
}

void test(const Executor& executor, int64_t count, int64_t grain, bool from_end) {
  std::vector<std::atomic<int>> done(count);
  std::atomic<int> outside{0}, promised{0};
  share_pieces(executor, count, grain, from_end, [&](int64_t piece, bool more) {
    if (piece < 0 || piece >= count) return void(++outside);
    promised += more && (from_end || piece + 1 >= count);
    ++done[piece];
    for (int64_t i = 0; i < piece % 7; ++i) std::this_thread::yield();
  });
  check(outside == 0, "outside", count, from_end);
  check(promised == 0, "a piece that cannot come next", count, from_end);
  for (const auto& times : done) check(times == 1, "not done once", count, from_end);
}

void test_order(bool from_end) {
  constexpr int64_t kCount = 7;
  std::vector<int64_t> order;
  share_pieces({on_one, 1, 0}, kCount, 1, from_end, [&](int64_t piece, bool) { order.push_back(piece); });
  for (int64_t i = 0; i < kCount; ++i) check(order[i] == (from_end ? kCount - 1 - i : i), "out of order", kCount, from_end);
}

}  // namespace torch_bn::testing

int main() {
  using namespace torch_bn::testing;
  for (const bool from_end : {false, true}) {
    test_order(from_end);
    for (const auto parallel_for : {on_threads, on_one, on_first})
      for (const int64_t count : {0, 1, 2, 4, 5, 6, 31, 1009})
        for (const int64_t grain : {1, 3, 2000})
          for (int again = 0; again < 5; ++again) test({parallel_for, kThreads, 0}, count, grain, from_end);
  }
  if (failures == 0) std::puts("ok");
  return failures != 0;
}
