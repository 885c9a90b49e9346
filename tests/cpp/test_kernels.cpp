// The CPU kernels with no Python and no torch: every table that this CPU can run, against the oracle of oracle.h.
//   g++ -std=c++20 -O1 -g -fsanitize=address,undefined -Wno-psabi tests/cpp/test_kernels.cpp csrc/cpu/*.cpp && ./a.out
#include <thread>

#include "oracle.h"
#include "special_values.h"

using namespace torch_bn;
using namespace torch_bn::testing;

namespace {

/// With a cache too small for any output.
const Executor serial{
    .parallel_for = [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t),
                       void* context) { body(context, 0, n); },
    .threads = 1,
    .cache_bytes = 0};

/// Ranges of the least size the grain allows, on three threads, the last range first; with a cache that holds all.
const Executor threaded{
    .parallel_for =
        [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
          std::vector<std::thread> threads;
          const int64_t step = std::max(grain, (n + 2) / 3);
          for (int64_t begin = (n - 1) / step * step; begin >= 0; begin -= step)
            threads.emplace_back([=] { body(context, begin, std::min(n, begin + step)); });
          for (auto& t : threads) t.join();
        },
    .threads = 3,
    .cache_bytes = int64_t(1) << 60};

const Executor& executor(Run run) { return run == Run::first ? serial : threaded; }

Backend table(const Kernels& k) {
  return {.name = k.name,
          .workspace = k.workspace,
          .mask_bytes = k.mask_bytes,
          .forward = [&k](const ForwardParams& p, Run run) { k.forward(p, executor(run)); },
          .inference = [&k](const InferenceParams& p, Run run) { k.inference(p, executor(run)); },
          .backward = [&k](const BackwardParams& p, Run run) { k.backward(p, executor(run)); },
          .update = k.update};
}

constexpr int64_t kLanes = 16;
const std::vector<Extent> extents = {
    {3, 5, 77}, {2, 3, 2}, {7, 1, 2}, {101, 17, 1}, {2, 1, 1}, {2, 3, 1025}, {1, 2, 5000}, {5, kLanes + 1, kLanes - 1},
    {33, 4 * kLanes + 3, 1}, {300, 3 * kLanes, 1}, {9, 300, 4}, {2, 600, 1}, {6, 3, 49, 1, 2}, {7, 5, 9, 1, 3},
    {60, 19, 1, 10, 3}, {520, 5, 1, 1, 2}, {3, 2, 40000}, {1100, 2, 64}, {8, 2, 5000, 1, 4}, {1536, 3, 1, 48, 1},
    {70, 400, 1}, {45, 1100, 1}, {13, 2048, 1}, {21, 2100, 1}, {9000, 64, 1}, {2560, 12, 1, 512, 2}, {1344, 40, 1, 64, 5},
    {70, 6, 8}, {6, 11, 16, 1, 2}, {3, 23, 49}, {2, 9, 196}, {4, 3, 33, 1, 2},
    {6, 64, 49}, {19, 75, 49, 1, 4}, {8, 33, 64}, {37, 5, 63}, {5, 37, 17}, {6, 24, 196}, {4, 7, 256},
    {8, 16, 127, 2, 2}, {1, 700, 49},
    {2, 5, 272}, {3, 3, 136}, {16, 40, 49, 1, 4}, {24, 10, 63, 1, 3}, {6, 20, 196, 1, 3}};
const std::vector<Extent> far_extents = {{40, 7, 1}, {300, 37, 1}, {640, 6, 1}, {48, 6, 3}, {5, 6, 50}, {2, 6, 5000}, {5, 48, 49}};

/// What goes past the caches when large: whole lines, lines that planes join in, and two outputs in turn.
const std::vector<Extent> written_by_lines = {{40, 544, 1}, {90, 32, 1},     {3, 4, 1040},      {2, 6, 5000},  {5, 9, 196},
                                              {4, 8, 144},  {2, 9, 49},      {3, 7, 33},        {2, 3, 1025},  {24, 24, 196},
                                              {6, 24, 49},  {7, 5, 32, 1, 2}, {8, 6, 50, 2, 2}, {1, 9, 196},
                                              {8, 24, 49, 1, 2}, {6, 9, 196, 1, 3}, {5, 4, 352}, {9, 3, 160, 3, 2}};
constexpr unsigned kY = 1 << 2, kDx = 1 << 4, kDresidual = 1 << 5;

void check_written_by_lines(const Backend& backend) {
  unsigned seed = 1;
  for (const Extent& e : written_by_lines)
    for (DType d : {DType::f32, DType::bf16})
      for (unsigned shifted : {0u, kY | kDx | kDresidual, kDx, kDresidual})
        for (int64_t shift : {3, 16})
          for (int variant = 0; variant < 5; ++variant) {
            if (shifted == 0 && shift != 3) continue;
            const bool residual = variant % 2, curved = variant > 2;
            run_case(backend, {.dtype = d, .extent = e,
                               .activation = curved ? Activation::silu : variant ? Activation::relu : Activation::none,
                               .residual = residual, .affine = true, .padded = false, .expanded = false,
                               .renorm = false, .unbiased = true, .mean = 1, .deviation = 1,
                               .partly = true, .masked = variant == 1, .shifted = shifted, .shift = shift},
                     seed++);
          }
}

}  // namespace

int main() {
  for (const Kernels* const* kernels = cpu::supported(); *kernels; ++kernels) {
    const Backend backend = table(**kernels);
    unsigned seed = 1;
    for (const Extent& e : extents)
      for (DType d : {DType::f32, DType::f64, DType::bf16, DType::f16})
        for (int variant = 0; variant < 6; ++variant) {
          const int64_t elements = e.outer * e.channels * e.inner;
          if (elements > 50000 && variant % 2 && variant < 5) continue;
          if (elements > 300000 && d != DType::f32) continue;
          const double mean = variant == 0 ? 0 : variant == 1 ? 10 : d == DType::f32 || d == DType::f64 ? 1e4 : 3;
          const bool masked = variant == 5;
          const Curve& curve = variant == 3 || variant == 4
                                   ? curves()[seed % curves().size()]
                                   : curve_of(variant == 1 || masked ? Activation::relu : Activation::none, 0);
          run_case(backend, {.dtype = d, .extent = e, .activation = curve.activation, .residual = variant / 2 == 1 || masked,
                             .affine = variant != 0, .padded = variant == 1 || variant == 2, .expanded = variant == 3,
                             .renorm = variant == 1 || variant == 3, .unbiased = variant < 2, .mean = mean,
                             .deviation = 1.0, .number = curve.number, .masked = masked},
                   seed++);
        }
    check_written_by_lines(backend);
    check_conversions(backend);
    check_relu(backend);
    check_activations(backend, 20011);
    check_far_values(backend, far_extents);
  }
  const bool forced = !cpu::force("no such table") && cpu::force("baseline");
  check(forced && !std::strcmp(cpu::selected().name, "baseline"), "force");
  return report();
}
