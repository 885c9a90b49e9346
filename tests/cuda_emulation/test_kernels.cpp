// The CUDA kernels with no GPU, Python or torch: their launchers under emulation, against the oracle of tests/cpp.
//   test_kernels all|some|quick [seeds]     README.md says how to build it
#include <cstdlib>

#include "../../csrc/cuda/launch.h"
#include "../cpp/oracle.h"
#include "../cpp/special_values.h"
#include "cuda_emulation.h"

using namespace torch_bn;
using namespace torch_bn::testing;

namespace {

/// A device that so many blocks keep busy. The second run is the same launch in another order of events.
Backend emulated(int blocks, unsigned seed) {
  const std::string name = "cuda in " + std::to_string(blocks) + " seed " + std::to_string(seed);
  const auto launch = [=](auto launcher) {
    return [=](const auto& p, Run run) {
      emulation::settings.seed = 2 * seed + (run == Run::second);
      std::vector<unsigned> tickets(p.extent.channels);
      check(launcher(p, cuda::Device{blocks, tickets.data(), true}, nullptr) == cudaSuccess, name + " refuses a launch");
      for (unsigned ticket : tickets)
        if (ticket != 0) check(false, name + " leaves a ticket");
    };
  };
  return {.name = name,
          .workspace = [=](DType d, const Extent& e) { return cuda::workspace(d, e, blocks); },
          .mask_bytes = [](DType d, const Extent& e) {
            return e.outer * e.channels * e.inner / cuda::mask_neighbours(d, e);
          },
          .forward = launch(cuda::forward),
          .inference = launch(cuda::inference),
          .backward = launch(cuda::backward),
          .update = [=](const UpdateParams& p) { check(cuda::update(p, nullptr) == cudaSuccess, name + " update"); }};
}

struct Shape {
  int blocks;
  Extent extent;
};

// Rows and planes whose ends fit no vector, no warp and no tile; groups of unequal size.
const std::vector<Shape> shapes = {
    {3, {300, 1, 1}}, {40, {70, 3, 1}}, {3, {1100, 17, 1}}, {3, {37, 48, 1}}, {40, {1200, 64, 1}}, {3, {129, 72, 1}},
    {40, {600, 100, 1}}, {1, {33, 131, 1}}, {1, {1, 9, 1}}, {3, {6, 5, 2}}, {3, {7, 4, 3}}, {1, {9, 3, 49}},
    {40, {64, 2, 77}}, {3, {5, 9, 196}}, {40, {12, 1, 196}}, {3, {1, 2, 1025}}, {40, {3, 2, 4000}}, {3, {700, 1, 2}},
    {40, {6, 3, 49, 1, 2}}, {3, {7, 5, 9, 1, 3}}, {40, {60, 19, 1, 10, 3}}, {3, {770, 5, 1, 1, 2}},
    {3, {14, 2, 16, 2, 3}}, {40, {700, 8, 1, 7, 40}}, {1, {5, 70, 1, 1, 5}}, {40, {1530, 6, 1, 17, 4}},
    {3, {1, 301, 1}}, {15, {3200, 32, 1, 320, 3}}};  // two groups of the last have nothing for their fifth split

// So that a thread has more to add up than one sum may take.
const std::vector<Shape> long_shapes = {{1, {5000, 8, 1}}, {1, {2, 3, 40000}}};

// One block and several, rows and planes, vectors and single elements, groups.
// NB: in an order that lets the options of make_case meet shapes that they matter for.
const std::vector<Shape> quick_shapes = {{40, {64, 2, 77}}, {3, {5, 8, 196}}, {3, {129, 72, 1}}, {40, {600, 20, 1}},
                                         {3, {90, 17, 1}}, {3, {777, 5, 1, 7, 2}}, {40, {70, 2, 21, 2, 3}},
                                         {3, {1, 301, 1}}};

constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

/// Options follow one another from case to case, so that all meet before long.
Case make_case(const Shape& shape, DType dtype, unsigned number) {
  const auto every = [&](unsigned n, unsigned from) { return number % n == from; };
  const bool half = size_of(dtype) == 2, planes = shape.extent.inner > 1, renorm = every(3, 1);
  const double means[] = {0, 10, half ? 3 : 1e4};
  const unsigned shifted = every(3, 2) ? 1u << number / 3 % 6 : every(8, 7) ? 63u : 0;
  return {.dtype = dtype, .extent = shape.extent, .activation = number % 2 ? Activation::relu : Activation::none,
          .residual = number / 2 % 2 == 1 || shifted == 2 || shifted == 32, .affine = !every(4, 0),
          .padded = every(5, 2), .expanded = every(5, 4), .renorm = renorm, .unbiased = number / 3 % 2 == 0,
          .mean = means[number % 3], .deviation = 1,
          .apart = planes && every(7, 3), .cumulative = every(4, 2), .stateless = every(11, 6),
          .partly = !shifted && every(7, 5), .shifted = shifted, .shift = every(2, 0) ? 1 : half ? 4 : 2};
}

/// The shapes in `dtypes` dtypes each; the first is another one from shape to shape.
void run_shapes(const std::vector<Shape>& shapes, unsigned dtypes, unsigned seed) {
  unsigned number = seed * 7, first = seed;
  for (const Shape& shape : shapes) {
    for (unsigned i = 0; i < dtypes; ++i, ++number) {
      Case c = make_case(shape, kDTypes[(first + i) % 4], number);
      run_case(emulated(shape.blocks, seed), c, number);
      if (number % 3 == 0) {
        Case masked = c;
        masked.activation = Activation::relu, masked.number = 0, masked.residual = masked.masked = true;
        masked.padded = masked.apart = false, masked.shifted = 0;
        run_case(emulated(shape.blocks, seed), masked, number);
      }
      if (number % 4 != 0) continue;
      const Curve& curve = curves()[number / 4 % curves().size()];
      c.activation = curve.activation, c.number = curve.number;
      run_case(emulated(shape.blocks, seed), c, number);
    }
    ++first;
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string set = count > 1 ? arguments[1] : "all";
  const unsigned seeds = count > 2 ? std::atoi(arguments[2]) : 1;
  for (unsigned seed = 0; seed < seeds; ++seed) {
    const Backend few = emulated(3, seed);
    if (set == "quick") run_shapes(quick_shapes, 2, seed);
    else run_shapes(shapes, set == "all" ? 4 : 1, seed);
    check_relu(few);
    check_far_values(few, {{40, 7, 1}, {48, 6, 3}});
    if (set != "all") continue;
    run_shapes(long_shapes, 2, seed);
    check_conversions(few);
    check_activations(few, 2000003);
    check_far_values(few, {{640, 6, 1}, {5, 6, 50}});
  }
  return report();
}
