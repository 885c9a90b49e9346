// What is tested, and on what: a backend, and the description of a case.
#pragma once
#include <functional>

#include "buffers.h"

namespace torch_bn::testing {

/// Two ways for a backend to run the same kernel, of which no bit of a result may depend: other numbers of threads, or
/// another order of events.
enum class Run { first, second };

/// What is tested.
struct Backend {
  std::string name;
  std::function<int64_t(DType, const Extent&)> workspace, mask_bytes;
  std::function<void(const ForwardParams&, Run)> forward;
  std::function<void(const InferenceParams&, Run)> inference;
  std::function<void(const BackwardParams&, Run)> backward;
  std::function<void(const UpdateParams&)> update;
};

/// Scratch of the size that the backend asks for. NB: one for each launch, so that none finds what the last one left.
struct Workspace {
  Bytes bytes;
  Workspace(const Backend& backend, DType dtype, const Extent& e) {
    const int64_t count = backend.workspace(dtype, e);
    bytes = make_bytes(count);
    std::memset(bytes.get(), 0xff, count);
  }
  void* data() const { return bytes.get(); }
};

struct Case {
  DType dtype;
  Extent extent;
  Activation activation;
  bool residual, affine, padded;  // padded: x and dy are cut out of larger tensors
  bool expanded;                  // dy repeats one plane or row
  bool renorm, unbiased;
  double mean, deviation;
  double number = 0;              // of the activation
  bool apart = false;             // planes of x and dy have an element between them
  bool cumulative = false;        // the running statistics are plain averages
  bool stateless = false;         // there are none
  bool partly = false;            // backward is also asked for some of its results only
  bool masked = false;            // backward gets a mask in place of residual and bias, where the backend makes one
  unsigned shifted = 0;           // bit by bit: x, residual, y, dy, dx, dresidual begin `shift` elements past an
  int64_t shift = 1;              // aligned place
};

inline std::string describe(const Backend& backend, const Case& c, const std::string& what) {
  const Extent& e = c.extent;
  std::string text = backend.name + " " + name_of(c.dtype) + " [" + std::to_string(e.outer) + ", " +
                     std::to_string(e.channels) + ", " + std::to_string(e.inner) + "] per example " +
                     std::to_string(e.outer_per_example) + " groups " + std::to_string(e.groups);
  const auto add = [&](bool is, const char* word) { text += is ? std::string(" ") + word : ""; };
  text += " activation " + std::to_string(int(c.activation)) + " of " + std::to_string(c.number);
  add(c.residual, "residual"), add(c.affine, "affine");
  add(c.padded, "padded"), add(c.apart, "apart"), add(c.expanded, "expanded"), add(c.renorm, "renorm");
  add(c.masked, "masked"), add(c.unbiased, "unbiased"), add(c.cumulative, "cumulative"), add(c.stateless, "stateless");
  if (c.shifted) text += " shifted " + std::to_string(c.shifted) + " by " + std::to_string(c.shift);
  return text + " mean " + std::to_string(c.mean) + ": " + what;
}

/// NB: a tensor with a single outer element has no step there, which says nothing about the sizes.
inline Strides dense(const Extent& e, int64_t pad, int64_t apart = 0) {
  return {e.outer == 1 ? 0 : e.channels * (e.inner + apart) + pad, e.inner + apart};
}

inline int64_t offset(const Strides& s, int64_t o, int64_t c, int64_t i) { return o * s.outer + c * s.channel + i; }

inline int64_t span(const Extent& e, const Strides& s) {
  return offset(s, e.outer - 1, e.channels - 1, e.inner - 1) + 1;
}

/// Everything a layer remembers, as drawn; each launch that changes it gets one of its own.
struct State {
  const Case& c;
  Buffer mean, var, renorm_mean, renorm_stddev, mean_weight, stddev_weight;
  std::unique_ptr<int64_t> batches = std::make_unique<int64_t>(3);
  static constexpr double kMomentum = 0.3, kRenormMomentum = 0.2, kWeights[] = {0.4f, 0.5f};

  Running running() {
    Running running{.momentum = kMomentum, .cumulative = c.cumulative, .renorm = {}};
    if (c.renorm)
      running.renorm = {.mean = renorm_mean.data(), .stddev = renorm_stddev.data(), .mean_weight = mean_weight.data(),
                        .stddev_weight = stddev_weight.data(), .momentum = kRenormMomentum, .rmin = 0.8, .rmax = 1.1,
                        .dmax = 0.4};
    if (!c.stateless)
      running.mean = mean.data(), running.var = var.data(), running.num_batches_tracked = batches.get();
    return running;
  }
  bool same_bits_as(const State& o) const {
    return same_bits(mean, o.mean) && same_bits(var, o.var) && same_bits(renorm_mean, o.renorm_mean) &&
           same_bits(renorm_stddev, o.renorm_stddev) && same_bits(mean_weight, o.mean_weight) &&
           same_bits(stddev_weight, o.stddev_weight) && *batches == *o.batches;
  }
};

}  // namespace torch_bn::testing
