// The contract between the operators (torch/) and the backends (cpu/, cuda/): plain structs, no torch.
// All sizes, strides and counts are in elements. Kernels never allocate, check, print or start threads.
#pragma once
#include <cstdint>

namespace torch_bn {

/// Of the elements. Per-channel parameters and running statistics are float, and double for f64.
enum class DType : uint8_t { f32, f64, bf16, f16 };

enum class Activation : uint8_t { none, relu, leaky_relu, elu, silu, gelu, gelu_tanh, hardswish };

/// A tensor seen as [outer, channels, inner] in the order of its memory: (N, C, H*W) for NCHW and (N*H*W, C, 1)
/// for NHWC. Neighbours of the innermost dimension of more than one element are adjacent in every tensor.
/// Example `outer / outer_per_example` belongs to group `example % groups`; each group has statistics of its own.
struct Extent {
  int64_t outer, channels, inner;
  int64_t outer_per_example = 1;
  int64_t groups = 1;
};

/// How far one step along outer and channels moves in one tensor; 0 repeats the same elements.
struct Strides {
  int64_t outer, channel;
};

/// Batch Renormalization: averages of the batches' means and deviations, weighted and not yet divided by their weights,
/// and how they correct a batch. `mean` is null without it.
struct Renorm {
  void *mean = nullptr, *stddev = nullptr;                // [channels], updated
  void *mean_weight = nullptr, *stddev_weight = nullptr;  // [1], updated
  double momentum;                         // weight of the new batch in them, positive
  double rmin, rmax, dmax;                 // r in [rmin, rmax], rmax before rmin; d in [-dmax, dmax]; infinite for no bound
};

/// What training remembers from batch to batch.
struct Running {
  void *mean = nullptr, *var = nullptr;    // [channels] or null, updated
  int64_t* num_batches_tracked = nullptr;  // [1] or null, incremented first
  double momentum;                         // weight of the new batch in mean and var
  bool cumulative;                         // use 1 / num_batches_tracked in place of momentum
  Renorm renorm;
};

/// y = activation(((x - mean) * invstd * r + d) * weight + bias + residual), statistics of the batch; r is 1 and d is 0
/// without renorm.
struct ForwardParams {
  DType dtype;
  Extent extent;
  Activation activation = Activation::none;
  double activation_number = 0;            // the slope of leaky_relu, the alpha of elu
  const void* x;                           // [outer, channels, inner]
  Strides x_strides;
  const void* residual = nullptr;          // [outer, channels, inner] or null
  Strides residual_strides = {};
  uint8_t* mask = nullptr;                 // [mask_bytes()] or null, out: what relu lets through, if there is a residual
  void* y;                                 // [outer, channels, inner], out; may be x, with the same strides
  Strides y_strides;
  const void* weight;                      // [channels] or null for ones
  const void* bias;                        // [channels] or null for zeros
  double eps;
  double* mean;                            // [groups, channels], out
  double* invstd;                          // [groups, channels], out
  double* correction = nullptr;            // [2, channels], r and d, out; null without renorm
  Running running;
  bool unbiased;                           // the variance that enters the running one, without renorm
  double* statistics = nullptr;            // [2, channels] or null: what would enter `running`, which then stays, out
  void* workspace;                         // as many bytes as the backend's workspace() says, aligned to 64
};

/// Enters into `running` what ForwardParams::statistics has kept of a batch.
struct UpdateParams {
  DType dtype;
  int64_t channels;
  const double* statistics;                // [2, channels]
  double eps;
  Running running;
};

/// The same map with given statistics, which are constants.
struct InferenceParams {
  DType dtype;
  Extent extent;                           // groups is 1
  Activation activation = Activation::none;
  double activation_number = 0;            // the slope of leaky_relu, the alpha of elu
  const void* x;                           // [outer, channels, inner]
  Strides x_strides;
  const void* residual = nullptr;          // [outer, channels, inner] or null
  Strides residual_strides = {};
  uint8_t* mask = nullptr;                 // [mask_bytes()] or null, out: what relu lets through, if there is a residual
  void* y;                                 // [outer, channels, inner], out; may be x, with the same strides
  Strides y_strides;
  const void* weight;                      // [channels] or null for ones
  const void* bias;                        // [channels] or null for zeros
  double eps;
  const void* running_mean;                // [channels]
  const void* running_var;                 // [channels]
  void* workspace;                         // as many bytes as the backend's workspace() says, aligned to 64
};

/// Gradients of both; `training` says whether mean and invstd depend on x.
struct BackwardParams {
  DType dtype;
  Extent extent;
  Activation activation = Activation::none;
  double activation_number = 0;            // the slope of leaky_relu, the alpha of elu
  bool training;
  const void* dy;                          // [outer, channels, inner]
  Strides dy_strides;
  const void* x;                           // [outer, channels, inner]
  Strides x_strides;
  const void* residual = nullptr;          // as in the forward, read when there is an activation
  Strides residual_strides = {};
  const uint8_t* mask = nullptr;           // as the forward has left it or null, in place of residual and bias
  const void* weight;                      // [channels] or null for ones
  const void* bias;                        // [channels] or null for zeros, read when there is an activation
  const double* mean;                      // [groups, channels]
  const double* invstd;                    // [groups, channels]
  const double* correction = nullptr;      // [2, channels] or null, constants
  void* dx;                                // [outer, channels, inner] or null, out
  Strides dx_strides = {};
  void* dresidual = nullptr;               // [outer, channels, inner] or null, out
  Strides dresidual_strides = {};
  void* dweight;                           // [channels] or null, out
  void* dbias;                             // [channels] or null, out
  void* workspace;                         // as many bytes as the backend's workspace() says, aligned to 64
};

/// The host's threads.
struct Executor {
  /// Calls body(context, first, last) on disjoint ranges that cover [0, count), each of `grain` or more.
  void (*parallel_for)(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  int threads;          // how many ranges can run at once; chooses the schedule, never the result
  int64_t cache_bytes;  // of the last-level cache; an output too large for it is written past it
};

/// Every kernel compiled for one instruction set. Extents have no zero. The launchers of CUDA are in cuda/launch.h.
struct Kernels {
  const char* name;
  int64_t (*workspace)(DType, const Extent&);
  int64_t (*mask_bytes)(DType, const Extent&);  // 0 where backward reads the residual again
  void (*forward)(const ForwardParams&, const Executor&);
  void (*inference)(const InferenceParams&, const Executor&);
  void (*backward)(const BackwardParams&, const Executor&);
  void (*update)(const UpdateParams&);
};

namespace cpu {

#if defined(__x86_64__)
extern const Kernels avx512, avx2;
#endif
extern const Kernels baseline;

/// The tables that this CPU can run, best first, ended by null.
const Kernels* const* supported();
/// The table in use: the best, or the one that the environment variable TORCH_BN_CPU or force() names.
const Kernels& selected();
/// False, and no change, when this CPU cannot run a table of that name.
bool force(const char* name);

}  // namespace cpu
}  // namespace torch_bn
