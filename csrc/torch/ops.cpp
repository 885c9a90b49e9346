// The operators: their schemas, and one function per operator, for every device, that checks, allocates, fills the
// struct and calls the device's kernels. autograd.cpp makes them differentiable, torch_bn/_fake.py gives their shapes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <fstream>
#include <limits>

#include "../kernels.h"
#include "autograd.h"
#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace torch_bn {

const Backend* cuda_backend = nullptr;

namespace {

/// NB: not sysconf, which in a virtual machine may count the caches of a whole server.
int64_t last_level_cache() {
  int64_t kibibytes = 32 << 10;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
  return kibibytes << 10;
}

Executor host_threads() {
  const auto parallel_for = [](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    if (count <= grain) return body(context, 0, count);
    at::parallel_for(0, count, grain, [=](int64_t first, int64_t last) { body(context, first, last); });
  };
  static const int64_t cache_bytes = last_level_cache();
  return {parallel_for, at::in_parallel_region() ? 1 : at::get_num_threads(), cache_bytes};
}

const Backend cpu_backend{
    [](DType dtype, const Extent& extent, c10::Device) { return cpu::selected().workspace(dtype, extent); },
    [](DType dtype, const Extent& extent) { return MaskShape{cpu::selected().mask_bytes(dtype, extent), 1}; },
    [](const ForwardParams& p, c10::Device) { cpu::selected().forward(p, host_threads()); },
    [](const InferenceParams& p, c10::Device) { cpu::selected().inference(p, host_threads()); },
    [](const BackwardParams& p, c10::Device) { cpu::selected().backward(p, host_threads()); },
    [](const UpdateParams& p, c10::Device) { cpu::selected().update(p); },
    0,
};

const Backend& backend_of(c10::Device device) { return device.is_cuda() ? *cuda_backend : cpu_backend; }

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    default: return DType::f16;
  }
}

/// Scratch for one call; small ones of the host need no allocation.
class Workspace {
 public:
  Workspace(int64_t bytes, const at::Tensor& input) {
    if (bytes > int64_t(sizeof small_) || !input.is_cpu()) large_ = make_empty({bytes}, input, at::kByte);
  }
  void* data() { return large_.defined() ? large_.mutable_data_ptr() : small_; }

 private:
  alignas(64) char small_[8192];
  at::Tensor large_;
};

/// NB: Tensor::to() goes through the dispatcher even when there is nothing to do.
at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

/// A per-channel argument in the type that the kernels take: the tensor itself, or a copy.
class Parameter {
 public:
  Parameter(const OptionalTensor& tensor, at::ScalarType type) {
    if (tensor) values_ = as_type(*tensor, type).contiguous();
  }
  const void* data() const { return values_.defined() ? values_.const_data_ptr() : nullptr; }

 private:
  at::Tensor values_;
};

/// A running statistic in that type; write_back() takes the values of a copy to where they belong.
class Buffer {
 public:
  Buffer(const OptionalTensor& tensor, at::ScalarType type) {
    if (!tensor) return;
    buffer_ = *tensor;
    values_ = as_type(buffer_, type).contiguous();
  }
  void* data() { return values_.defined() ? values_.mutable_data_ptr() : nullptr; }
  void write_back() {
    if (!values_.defined()) return;
    if (!values_.is_same(buffer_)) buffer_.copy_(values_.view(buffer_.sizes()));
    else if (!buffer_.is_inference()) buffer_.unsafeGetTensorImpl()->bump_version();
  }

 private:
  at::Tensor buffer_, values_;
};

at::ScalarType parameter_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// The residual, laid out for the kernels, or none.
class Residual {
 public:
  Residual(const OptionalTensor& tensor, const Layout& layout, at::ScalarType type, int64_t neighbours) {
    if (!tensor) return;
    values_ = as_type(*tensor, type);
    strides = layout.fit(values_, neighbours);
  }
  const void* data() const { return values_.defined() ? values_.const_data_ptr() : nullptr; }
  Strides strides = {};

 private:
  at::Tensor values_;
};

/// Running of the kernels, with the copies that some buffers need.
class RunningBuffers {
 public:
  RunningBuffers(const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& num_batches_tracked,
                 const RenormTensors& renorm, at::ScalarType type)
      : mean_(mean, type), var_(var, type), counter_(num_batches_tracked, at::kLong), renorm_mean_(renorm.mean, type),
        renorm_stddev_(renorm.stddev, type), renorm_mean_weight_(renorm.mean_weight, type),
        renorm_stddev_weight_(renorm.stddev_weight, type) {}

  Running running(std::optional<double> momentum, double renorm_momentum, std::optional<double> rmin = {},
                  std::optional<double> rmax = {}, std::optional<double> dmax = {}) {
    constexpr double kNoBound = std::numeric_limits<double>::infinity();
    return {.mean = mean_.data(),
            .var = var_.data(),
            .num_batches_tracked = static_cast<int64_t*>(counter_.data()),
            .momentum = momentum.value_or(0),
            .cumulative = !momentum,
            .renorm = {.mean = renorm_mean_.data(),
                       .stddev = renorm_stddev_.data(),
                       .mean_weight = renorm_mean_weight_.data(),
                       .stddev_weight = renorm_stddev_weight_.data(),
                       .momentum = renorm_momentum,
                       .rmin = rmin.value_or(-kNoBound),
                       .rmax = rmax.value_or(kNoBound),
                       .dmax = dmax.value_or(kNoBound)}};
  }
  void write_back() {
    for (Buffer* buffer : {&mean_, &var_, &counter_, &renorm_mean_, &renorm_stddev_, &renorm_mean_weight_,
                           &renorm_stddev_weight_})
      buffer->write_back();
  }

 private:
  Buffer mean_, var_, counter_, renorm_mean_, renorm_stddev_, renorm_mean_weight_, renorm_stddev_weight_;
};

/// Where y goes: into a new tensor, or over the input.
class Output {
 public:
  Output(bool inplace, const at::Tensor& input, const Layout& layout) {
    if (inplace) over_ = input;
    if (!inplace || !layout.strides(input)) values_ = layout.empty(input);
    at::Tensor& target = values_.defined() ? values_ : over_;
    data = target.mutable_data_ptr();
    strides = *layout.strides(target);
  }
  /// After the kernel: the new tensor, undefined if there is none.
  at::Tensor finished() {
    if (!over_.defined()) return values_;
    if (values_.defined()) over_.copy_(values_);
    else if (!over_.is_inference()) over_.unsafeGetTensorImpl()->bump_version();
    return {};
  }
  void* data;
  Strides strides;

 private:
  at::Tensor values_, over_;
};

/// For what relu lets through behind a residual, if it is to be kept.
class Mask {
 public:
  Mask(bool keep, Activation activation, const OptionalTensor& residual, const Extent& extent, const at::Tensor& input) {
    if (!keep || !residual || activation != Activation::relu || input.numel() == 0) return;
    const MaskShape shape = backend_of(input.device()).mask(dtype_of(input), extent);
    if (shape.bytes == 0) return;
    tensor = make_empty({shape.bytes}, input, at::kByte);
    neighbours = shape.neighbours;
  }
  uint8_t* data() { return tensor.defined() ? tensor.mutable_data_ptr<uint8_t>() : nullptr; }
  at::Tensor tensor;
  int64_t neighbours = 1;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, int64_t axis, int64_t groups, bool unbiased, bool strict,
    const OptionalTensor& renorm_mean, const OptionalTensor& renorm_stddev, const OptionalTensor& renorm_mean_weight,
    const OptionalTensor& renorm_stddev_weight, double renorm_momentum, std::optional<double> rmin,
    std::optional<double> rmax, std::optional<double> dmax, const OptionalTensor& statistics,
    const OptionalTensor& residual, std::optional<std::string_view> activation, double activation_number, bool keep_mask,
    const OptionalTensor& out) {
  const RenormTensors renorm{renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight};
  const TrainingArguments more{groups, renorm, renorm_momentum, statistics};
  axis = check({input, weight, bias, running_mean, running_var, num_batches_tracked, true, momentum, eps, axis, strict,
                residual},
               &more);
  check_out(out, input);
  const Activation act = activation_of(activation);
  const Layout layout(input, axis, groups);
  const Extent& extent = layout.extent();
  const int64_t channels = extent.channels;
  // A forward inside backward is activation checkpointing: its batch has entered the running statistics already.
  const bool repeated = !statistics && inside_backward();
  TORCH_CHECK(!repeated || !renorm_mean,
              "batch_norm: in a graph of torch.compile a forward with renorm cannot be repeated by torch.utils.checkpoint, "
              "because its averages have moved on since; use one of the two for such layers");
  const OptionalTensor apart = repeated ? make_empty({2, channels}, input, at::kDouble) : statistics;
  at::Tensor saved = make_empty({2 * groups + (renorm_mean ? 2 : 0), channels}, input, at::kDouble);
  if (input.numel() == 0) {
    if (!apart && num_batches_tracked) num_batches_tracked->add_(1);
    return {out ? at::Tensor() : layout.empty(input), saved.zero_(), at::Tensor()};
  }
  Output output(out.has_value(), input, layout);
  Mask mask(keep_mask, act, residual, extent, input);
  at::Tensor x = input;
  const Strides x_strides = layout.fit(x, mask.neighbours);
  const auto type = parameter_type(input);
  const Parameter gamma(weight, type), beta(bias, type);
  const Residual added(residual, layout, input.scalar_type(), mask.neighbours);
  RunningBuffers buffers(running_mean, running_var, num_batches_tracked, renorm, type);
  const c10::Device device = input.device();
  const Backend& backend = backend_of(device);
  const DType dtype = dtype_of(input);
  Workspace workspace(backend.workspace(dtype, extent, device), input);
  double* const rows = saved.mutable_data_ptr<double>();
  backend.forward({.dtype = dtype,
                   .extent = extent,
                   .activation = act,
                   .activation_number = activation_number,
                   .x = x.const_data_ptr(),
                   .x_strides = x_strides,
                   .residual = added.data(),
                   .residual_strides = added.strides,
                   .mask = mask.data(),
                   .y = output.data,
                   .y_strides = output.strides,
                   .weight = gamma.data(),
                   .bias = beta.data(),
                   .eps = eps,
                   .mean = rows,
                   .invstd = rows + groups * channels,
                   .correction = renorm_mean ? rows + 2 * groups * channels : nullptr,
                   .running = buffers.running(momentum, renorm_momentum, rmin, rmax, dmax),
                   .unbiased = unbiased,
                   .statistics = apart ? apart->mutable_data_ptr<double>() : nullptr,
                   .workspace = workspace.data()},
                  device);
  if (!apart) buffers.write_back();
  return {output.finished(), saved, mask.tensor};
}

void update_statistics(const at::Tensor& statistics, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                       std::optional<double> momentum, double eps, const OptionalTensor& renorm_mean,
                       const OptionalTensor& renorm_stddev, const OptionalTensor& renorm_mean_weight,
                       const OptionalTensor& renorm_stddev_weight, double renorm_momentum) {
  const RenormTensors renorm{renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight};
  check_update(statistics, running_mean, running_var, num_batches_tracked, momentum, renorm, renorm_momentum);
  const auto type = running_mean && running_mean->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  RunningBuffers buffers(running_mean, running_var, num_batches_tracked, renorm, type);
  const c10::Device device = statistics.device();
  backend_of(device).update({.dtype = type == at::kDouble ? DType::f64 : DType::f32,
                             .channels = statistics.size(1),
                             .statistics = statistics.const_data_ptr<double>(),
                             .eps = eps,
                             .running = buffers.running(momentum, renorm_momentum)},
                            device);
  buffers.write_back();
}

std::tuple<at::Tensor, at::Tensor> inference(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps, int64_t axis,
                     bool strict, const OptionalTensor& residual, std::optional<std::string_view> activation,
                     double activation_number, bool keep_mask, const OptionalTensor& out) {
  axis = check({input, weight, bias, running_mean, running_var, {}, false, 0.0, eps, axis, strict, residual});
  check_out(out, input);
  const Activation act = activation_of(activation);
  const Layout layout(input, axis);
  const Extent& extent = layout.extent();
  if (input.numel() == 0) return {out ? at::Tensor() : layout.empty(input), at::Tensor()};
  Output output(out.has_value(), input, layout);
  Mask mask(keep_mask, act, residual, extent, input);
  at::Tensor x = input;
  const Strides x_strides = layout.fit(x, mask.neighbours);
  const auto type = parameter_type(input);
  const Parameter gamma(weight, type), beta(bias, type), mean(running_mean, type), var(running_var, type);
  const Residual added(residual, layout, input.scalar_type(), mask.neighbours);
  const c10::Device device = input.device();
  const Backend& backend = backend_of(device);
  const DType dtype = dtype_of(input);
  Workspace workspace(backend.workspace(dtype, extent, device), input);
  backend.inference({.dtype = dtype,
                     .extent = extent,
                     .activation = act,
                     .activation_number = activation_number,
                     .x = x.const_data_ptr(),
                     .x_strides = x_strides,
                     .residual = added.data(),
                     .residual_strides = added.strides,
                     .mask = mask.data(),
                     .y = output.data,
                     .y_strides = output.strides,
                     .weight = gamma.data(),
                     .bias = beta.data(),
                     .eps = eps,
                     .running_mean = mean.data(),
                     .running_var = var.data(),
                     .workspace = workspace.data()},
                    device);
  return {output.finished(), mask.tensor};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& saved,
    bool training, double /*eps*/, int64_t axis, int64_t groups, bool needs_input_grad, const OptionalTensor& bias,
    const OptionalTensor& residual, std::optional<std::string_view> activation, bool needs_residual_grad,
    double activation_number, const OptionalTensor& mask) {
  axis = check_backward(grad_output, input, weight, saved, axis, groups, bias, residual);
  const Activation act = activation_of(activation);
  const Layout layout(input, axis, groups);
  const Extent& extent = layout.extent();
  const Backend& backend = backend_of(input.device());
  const MaskShape shape = mask ? backend.mask(dtype_of(input), extent) : MaskShape{0, 1};
  check_mask(mask, input, shape.bytes);
  const int64_t channels = extent.channels;
  const auto type = parameter_type(input);
  at::Tensor grad_input = needs_input_grad ? layout.empty(input) : at::Tensor();
  at::Tensor grad_residual = needs_residual_grad ? layout.empty(input) : at::Tensor();
  at::Tensor grad_weight = make_empty({channels}, input, type), grad_bias = make_empty({channels}, input, type);
  if (input.numel() == 0) return {grad_input, grad_weight.zero_(), grad_bias.zero_(), grad_residual};
  at::Tensor x = input, dy = as_type(grad_output, input.scalar_type());
  const Strides x_strides = layout.fit(x, shape.neighbours), dy_strides = layout.fit(dy, shape.neighbours);
  const Parameter gamma(weight, type), beta(bias, type);
  const Residual added(residual, layout, input.scalar_type(), shape.neighbours);
  const c10::Device device = input.device();
  const DType dtype = dtype_of(input);
  Workspace workspace(backend.workspace(dtype, extent, device), input);
  const double* const rows = saved.const_data_ptr<double>();
  backend.backward({.dtype = dtype,
                    .extent = extent,
                    .activation = act,
                    .activation_number = activation_number,
                    .training = training,
                    .dy = dy.const_data_ptr(),
                    .dy_strides = dy_strides,
                    .x = x.const_data_ptr(),
                    .x_strides = x_strides,
                    .residual = added.data(),
                    .residual_strides = added.strides,
                    .mask = mask ? mask->const_data_ptr<uint8_t>() : nullptr,
                    .weight = gamma.data(),
                    .bias = beta.data(),
                    .mean = rows,
                    .invstd = rows + groups * channels,
                    .correction = saved.size(0) > 2 * groups ? rows + 2 * groups * channels : nullptr,
                    .dx = needs_input_grad ? grad_input.mutable_data_ptr() : nullptr,
                    .dx_strides = needs_input_grad ? *layout.strides(grad_input) : Strides{},
                    .dresidual = needs_residual_grad ? grad_residual.mutable_data_ptr() : nullptr,
                    .dresidual_strides = needs_residual_grad ? *layout.strides(grad_residual) : Strides{},
                    .dweight = grad_weight.mutable_data_ptr(),
                    .dbias = grad_bias.mutable_data_ptr(),
                    .workspace = workspace.data()},
                   device);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace

TORCH_LIBRARY(torch_bn, m) {
  // What users call: training normalises with the statistics of the batch and moves the running ones, else the running
  // ones are used. momentum None averages over all batches. Differentiable any number of times.
  // groups: example i is normalised with the others of group i % groups. unbiased: of the variance that enters
  // running_var. strict: refuse what torch refuses, one value per channel and eps that is not positive. renorm_*: the
  // averages of Batch Renormalization, which then corrects what training normalises, within the bounds. statistics:
  // float64 [2, C]; it receives what would have entered the running statistics, which then stay. residual: of the
  // input's shape, added before the activation; kActivationNames has those. activation_number: the slope of leaky_relu,
  // the alpha of elu.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, int axis, int groups=1, "
      "bool unbiased=True, bool strict=True, Tensor(d!)? renorm_mean=None, Tensor(e!)? renorm_stddev=None, "
      "Tensor(f!)? renorm_mean_weight=None, Tensor(g!)? renorm_stddev_weight=None, float renorm_momentum=0.01, "
      "float? rmin=None, float? rmax=None, float? dmax=None, Tensor(h!)? statistics=None, Tensor? residual=None, "
      "str? activation=None, float activation_number=0.0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // The two directions of that, below autograd. saved: float64 [2 * groups, C], the means and then the inverse
  // deviations of the groups; with renorm two rows more, the corrections r and d. keep_mask: with a residual and relu,
  // return uint8 [n] of what relu lets through, for backward in place of bias and residual; it is None where that takes the
  // residual. out: None, or the input itself, which y then overwrites; output is None.
  m.def(
      "_batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, int axis, int groups, "
      "bool unbiased, bool strict, Tensor(d!)? renorm_mean, Tensor(e!)? renorm_stddev, "
      "Tensor(f!)? renorm_mean_weight, Tensor(g!)? renorm_stddev_weight, float renorm_momentum, float? rmin, "
      "float? rmax, float? dmax, Tensor(h!)? statistics, Tensor? residual, str? activation, "
      "float activation_number=0.0, bool keep_mask=False, Tensor(i!)? out=None) -> "
      "(Tensor output, Tensor saved, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "float eps, int axis, bool strict, Tensor? residual, str? activation, float activation_number=0.0, "
      "bool keep_mask=False, Tensor(a!)? out=None) -> (Tensor output, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // training: saved depends on input. grad_weight and grad_bias: [C] in float32, in float64 for such an input.
  // A gradient that is not needed is None. bias and residual count with an activation.
  m.def(
      "_batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor saved, bool training, float eps, "
      "int axis, int groups, bool needs_input_grad, Tensor? bias=None, Tensor? residual=None, str? activation=None, "
      "bool needs_residual_grad=False, float activation_number=0.0, Tensor? mask=None) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      {at::Tag::pt2_compliant_tag});
  // Enters what batch_norm has written to `statistics` into the running ones.
  m.def(
      "update_statistics(Tensor statistics, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, Tensor(d!)? renorm_mean=None, "
      "Tensor(e!)? renorm_stddev=None, Tensor(f!)? renorm_mean_weight=None, Tensor(g!)? renorm_stddev_weight=None, "
      "float renorm_momentum=0.01) -> ()",
      {at::Tag::pt2_compliant_tag});
}

void register_operators(torch::Library& library) {
  library.impl("_batch_norm_forward", &forward);
  library.impl("_batch_norm_inference", &inference);
  library.impl("_batch_norm_backward", &backward);
  library.impl("update_statistics", &update_statistics);
}

TORCH_LIBRARY_IMPL(torch_bn, CPU, library) { register_operators(library); }

}  // namespace torch_bn
