// Derivatives: what is saved, and which operator runs backward. No checks, no allocation, no formula but the one whose
// derivative gives the second and all higher derivatives, written in differentiable torch operations.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/var_mean.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "activations.h"
#include "autograd.h"
#include "constants.h"

namespace torch_bn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Name = std::optional<std::string_view>;  // of an activation
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using Forward = Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, const OptionalTensor&, std::optional<double>, double, int64_t, int64_t, bool,
                    bool, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    double, std::optional<double>, std::optional<double>, std::optional<double>, const OptionalTensor&,
                    const OptionalTensor&, Name, double, bool, const OptionalTensor&);
using Inference = Two(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, double, int64_t, bool, const OptionalTensor&, Name, double, bool,
                      const OptionalTensor&);
using Backward = Four(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, bool, double, int64_t,
                      int64_t, bool, const OptionalTensor&, const OptionalTensor&, Name, bool, double,
                      const OptionalTensor&);

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
const auto& forward_op() {
  static const auto op = find<Forward>("torch_bn::_batch_norm_forward");
  return op;
}
const auto& inference_op() {
  static const auto op = find<Inference>("torch_bn::_batch_norm_inference");
  return op;
}
const auto& backward_op() {
  static const auto op = find<Backward>("torch_bn::_batch_norm_backward");
  return op;
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor plain(const OptionalTensor& t) { return t.value_or(Tensor()); }
bool needs_grad(const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); }

bool is_channels_last(const Tensor& t) { return t.suggest_memory_format() != at::MemoryFormat::Contiguous; }

/// The input as the mask describes it. NB: hooks on saved tensors may bring it back in another order.
Tensor in_order(const Tensor& input, const Constants& call) {
  if (!call.masked || is_channels_last(input) == call.channels_last) return input;
  if (!call.channels_last) return input.contiguous();
  return input.contiguous(input.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
}

/// What the activation's derivative needs: nothing without one. stopped: where relu lets nothing through, in place of
/// the others.
struct Shifts {
  Tensor bias, residual, stopped;
};

/// From a mask, which only the kernels can read.
Tensor stopped_by_relu(const Tensor& input, const Tensor& saved, const Tensor& mask, const Constants& call) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor ones = at::ones({1}, input.options().memory_format(std::nullopt));
  const auto gradients = backward_op().call(
      ones.expand(input.sizes()), in_order(input, call), {}, saved, call.training, call.eps, call.axis, call.groups,
      /*needs_input_grad=*/false, {}, {}, name_of(call.activation), /*needs_residual_grad=*/true, call.number, mask);
  return std::get<3>(gradients) == 0;
}

/// The gradients of input, weight, bias and residual as differentiable operations on (grad_output, input, weight): what
/// the kernels compute, so that autograd finds its derivatives. In training the statistics depend on the input and are
/// computed anew. r and d of renorm are constants.
class DifferentiableGradients {
 public:
  DifferentiableGradients(const Tensor& input, const Tensor& weight, const Tensor& saved, const Shifts& shifts,
                          const Constants& call)
      : call_(call), saved_(saved), residual_(shifts.residual), stopped_(shifts.stopped), input_type_(input.scalar_type()),
        type_(input_type_ == at::kDouble ? at::kDouble : at::kFloat), axis_(call.axis < 0 ? call.axis + input.dim() : call.axis),
        shape_(input.dim(), 1) {
    shape_[axis_] = input.size(axis_);
    for (int64_t i = 0; i < input.dim(); ++i)
      if (i != axis_) others_.push_back(i);
    if (saved.size(0) > 2 * call.groups) r_ = row(2 * call.groups), d_ = row(2 * call.groups + 1);
    factor_ = weight.defined() ? weight.to(type_).view(shape_) : Tensor();
    if (r_.defined()) factor_ = factor_.defined() ? factor_ * r_ : r_;
    if (!call.activated() || stopped_.defined()) return;
    if (shifts.bias.defined()) shift_ = in_z(shifts.bias).to(type_).view(shape_);
    if (!d_.defined()) return;
    const Tensor moved = weight.defined() ? d_ * in_z(weight).to(type_).view(shape_) : d_;
    shift_ = shift_.defined() ? shift_ + moved : moved;
  }

  variable_list operator()(const Tensor& grad_output, const Tensor& input) const {
    if (call_.groups == 1) return of_group(grad_output, input, residual_, stopped_, 0);
    // Example i is the i / groups-th of group i % groups.
    const int64_t examples = input.size(0);
    std::vector<int64_t> places(examples);
    std::vector<Tensor> dx, dresidual;
    Tensor dweight, dbias;
    int64_t before = 0;
    for (int64_t group = 0; group < call_.groups; ++group) {
      const auto part = [&](const Tensor& t) { return t.defined() ? t.slice(0, group, examples, call_.groups) : t; };
      const variable_list found = of_group(part(grad_output), part(input), part(residual_), part(stopped_), group);
      dx.push_back(found[0]);
      dresidual.push_back(found[3]);
      dweight = dweight.defined() ? dweight + found[1] : found[1];
      dbias = dbias.defined() ? dbias + found[2] : found[2];
      for (int64_t i = group; i < examples; i += call_.groups) places[i] = before++;
    }
    const Tensor order = at::empty({examples}, input.options().dtype(at::kLong).memory_format(std::nullopt));
    for (int64_t i = 0; i < examples; ++i) order[i].fill_(places[i]);
    const auto whole = [&](const std::vector<Tensor>& parts) { return at::cat(parts, 0).index_select(0, order); };
    return {whole(dx), dweight, dbias, whole(dresidual)};
  }

 private:
  /// What z is made of: a constant for relu, whose derivative depends on no more than the sign.
  Tensor in_z(const Tensor& t) const { return call_.curved() ? t : t.detach(); }

  Tensor through_activation(const Tensor& dy, const Tensor& z) const {
    switch (call_.activation) {
      case Activation::none: break;
      case Activation::relu: return dy.masked_fill(z <= 0, 0);
      case Activation::leaky_relu: return at::leaky_relu_backward(dy, z, call_.number, /*self_is_result=*/false);
      case Activation::elu: return at::elu_backward(dy, call_.number, 1, 1, /*is_result=*/false, z);
      case Activation::silu: {  // NB: at::silu_backward has no derivative
        const Tensor s = at::sigmoid(z);
        return dy * (s * (z * (1 - s) + 1));
      }
      case Activation::gelu: return at::gelu_backward(dy, z, "none");
      case Activation::gelu_tanh: return at::gelu_backward(dy, z, "tanh");
      case Activation::hardswish: return at::hardswish_backward(dy, z);
    }
    return dy;
  }

  Tensor row(int64_t i) const { return saved_.select(0, i).to(type_).view(shape_); }

  variable_list of_group(const Tensor& grad_output, const Tensor& input, const Tensor& residual, const Tensor& stopped,
                         int64_t group) const {
    const Tensor x = input.to(type_);
    Tensor dy = grad_output.to(type_), deviation, scale;
    if (call_.training) {
      const auto [var, center] = at::var_mean(x, others_, /*correction=*/0, /*keepdim=*/true);
      deviation = x - center;
      scale = at::rsqrt(var + call_.eps);
    } else {
      deviation = (x.to(at::kDouble) - saved_.select(0, group).view(shape_)).to(type_);
      scale = row(call_.groups + group);
    }
    const Tensor xhat = deviation * scale;
    if (stopped.defined()) {
      dy = dy.masked_fill(stopped, 0);
    } else if (call_.activated()) {
      Tensor z = in_z(xhat);
      if (factor_.defined()) z = z * in_z(factor_);
      if (shift_.defined()) z = z + shift_;
      if (residual.defined()) z = z + in_z(residual).to(type_);
      dy = through_activation(dy, z);
    }
    const Tensor dxhat = factor_.defined() ? dy * factor_ : dy;
    Tensor dx = dxhat * scale;
    if (call_.training) dx = scale * (dxhat - dxhat.mean(others_, true) - xhat * (dxhat * xhat).mean(others_, true));
    const Tensor corrected = r_.defined() ? xhat * r_ + d_ : xhat;
    return {dx.to(input_type_), (dy * corrected).sum(others_), dy.sum(others_), dy.to(input_type_)};
  }

  const Constants& call_;
  const Tensor& saved_;
  const Tensor &residual_, &stopped_;
  at::ScalarType input_type_, type_;
  int64_t axis_;
  std::vector<int64_t> shape_, others_;
  Tensor r_, d_, factor_, shift_;
};

/// _batch_norm_backward as a differentiable function.
class BatchNormBackward : public torch::autograd::Function<BatchNormBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const OptionalTensor& weight, const Tensor& saved, const OptionalTensor& bias,
                               const OptionalTensor& residual, const OptionalTensor& mask, const Constants& call) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({grad_output, input, plain(weight), saved, plain(bias), plain(residual), plain(mask)});
    ctx->saved_data["call"] = call.pack();
    ctx->set_materialize_grads(false);
    const auto [dx, dweight, dbias, dresidual] =
        backward_op().call(grad_output, input, weight, saved, call.training, call.eps, call.axis, call.groups,
                           call.first, bias, residual, name_of(call.activation), call.second, call.number, mask);
    // NB: the outputs of a Function must be there.
    const auto there = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, input.options()); };
    return {there(dx), dweight, dbias, there(dresidual)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool create_graph = at::GradMode::is_enabled();
    const auto saved = ctx->get_saved_variables();
    at::AutoGradMode record(true);
    // Where the graph of the operations below starts. Without one to extend it ends there. NB: else it starts at views, as
    // dy may depend on x, and weight too: by way of them autograd::grad would find those parts a second time.
    const auto start = [&](const Tensor& t) {
      if (!t.defined()) return t;
      return create_graph ? t.view_as(t) : t.detach().requires_grad_(t.requires_grad());
    };
    const Tensor dy = start(saved[0]), x = start(saved[1]), weight = start(saved[2]);
    const Constants call = Constants::unpack(ctx->saved_data["call"]);
    Shifts shifts{saved[4], saved[5], {}};
    if (call.curved()) shifts = {start(saved[4]), start(saved[5]), {}};
    if (call.masked) shifts.stopped = stopped_by_relu(saved[1].detach(), saved[3], saved[6], call);
    variable_list gradients = DifferentiableGradients(x, weight, saved[3], shifts, call)(dy, x);
    if (!call.first) gradients[0] = Tensor();
    if (!call.second) gradients[3] = Tensor();
    variable_list outputs, output_grads, inputs, result(8);
    std::vector<size_t> places;
    for (size_t i = 0; i < gradients.size(); ++i)
      if (gradients[i].defined() && gradients[i].requires_grad() && grads[i].defined()) {
        outputs.push_back(gradients[i]);
        output_grads.push_back(grads[i]);
      }
    const std::pair<size_t, const Tensor*> all[] = {
        {0, &dy}, {1, &x}, {2, &weight}, {4, &shifts.bias}, {5, &shifts.residual}};
    for (const auto& [place, t] : all)
      if (t->defined() && t->requires_grad() && (place < 4 || call.curved())) {
        inputs.push_back(*t);
        places.push_back(place);
      }
    if (outputs.empty() || inputs.empty()) return result;
    const variable_list found = torch::autograd::grad(outputs, inputs, output_grads, /*retain_graph=*/create_graph,
                                                      create_graph, /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = found[i];
    return result;
  }
};

Four backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& saved,
              bool training, double eps, int64_t axis, int64_t groups, bool needs_input_grad,
              const OptionalTensor& bias, const OptionalTensor& residual, Name activation, bool needs_residual_grad,
              double activation_number, const OptionalTensor& mask) {
  const bool gradient = grad_output.requires_grad() || input.requires_grad() || needs_grad(weight) || needs_grad(bias) ||
                        needs_grad(residual);
  if (at::GradMode::is_enabled() && gradient) {
    const Constants call{training, eps, axis, groups, activation_of(activation), activation_number, needs_input_grad,
                         needs_residual_grad, mask.has_value(), is_channels_last(input)};
    const auto result = BatchNormBackward::apply(grad_output, input, weight, saved, bias, residual, mask, call);
    return {result[0], result[1], result[2], result[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_op().call(grad_output, input, weight, saved, training, eps, axis, groups, needs_input_grad, bias,
                            residual, activation, needs_residual_grad, activation_number, mask);
}

/// The arguments of batch_norm that have no derivative. As one, they cost autograd one.
struct Call {
  const OptionalTensor &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  int64_t axis, groups;
  bool unbiased, strict;
  const OptionalTensor &renorm_mean, &renorm_stddev, &renorm_mean_weight, &renorm_stddev_weight;
  double renorm_momentum;
  std::optional<double> rmin, rmax, dmax;
  const OptionalTensor& statistics;
  Name activation;
  double activation_number;

  Three forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& residual, bool keep_mask) const {
    return forward_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, axis,
                             groups, unbiased, strict, renorm_mean, renorm_stddev, renorm_mean_weight,
                             renorm_stddev_weight, renorm_momentum, rmin, rmax, dmax, statistics, residual,
                             activation, activation_number, keep_mask, /*out=*/{});
  }
  Two inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& residual, bool keep_mask) const {
    return inference_op().call(input, weight, bias, running_mean, running_var, eps, axis, strict, residual, activation,
                               activation_number, keep_mask, /*out=*/{});
  }
  /// Below autograd, and where nothing needs a gradient.
  Tensor without_gradient(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual) const {
    return training ? std::get<0>(forward(input, weight, bias, residual, false))
                    : std::get<0>(inference(input, weight, bias, residual, false));
  }
};

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, const Call& call) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor output, saved, mask;
    if (call.training) {
      std::tie(output, saved, mask) = call.forward(input, weight, bias, residual, true);
    } else {
      // The buffers may change before backward (another forward, a broadcast by DDP): it gets copies.
      std::tie(output, mask) = call.inference(input, weight, bias, residual, true);
      const Tensor mean = call.running_mean->to(at::kDouble).view(-1), var = call.running_var->to(at::kDouble).view(-1);
      saved = at::stack({mean, at::rsqrt(var + call.eps)});
    }
    const Activation activation = activation_of(call.activation);
    if (mask.defined())
      ctx->save_for_backward({input, plain(weight), saved, mask});
    else if (activation != Activation::none)
      ctx->save_for_backward({input, plain(weight), saved, plain(bias), plain(residual)});
    else
      ctx->save_for_backward({input, plain(weight), saved});
    ctx->saved_data["call"] = Constants{call.training, call.eps, call.axis, call.training ? call.groups : 1, activation,
                                        call.activation_number, bias.has_value(), residual.has_value(), mask.defined(),
                                        mask.defined() && is_channels_last(input)}.pack();
    if (residual) ctx->saved_data["residual"] = residual->scalar_type();
    const auto usual = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (bias && (bias->dim() != 1 || bias->scalar_type() != usual))
      ctx->saved_data["bias"] = c10::ivalue::Tuple::create(bias->scalar_type(), bias->sizes().vec());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& weight = saved[1];
    const Constants call = Constants::unpack(ctx->saved_data["call"]);
    const bool has_bias = call.first, has_residual = call.second, shifted = call.activated() && !call.masked;
    const bool needs_input_grad = ctx->needs_input_grad(0);
    // NB: counts the tensors that there are.
    const bool needs_residual_grad = has_residual && ctx->needs_input_grad(1 + weight.defined() + has_bias);
    const auto [dx, dweight, dbias, dresidual] = torch_bn::backward(
        grads[0], in_order(saved[0], call), optional(weight), saved[2], call.training, call.eps, call.axis, call.groups,
        needs_input_grad, shifted ? optional(saved[3]) : std::nullopt, shifted ? optional(saved[4]) : std::nullopt,
        name_of(call.activation), call.activated() && needs_residual_grad, call.number,
        call.masked ? optional(saved[3]) : std::nullopt);
    variable_list result(5);
    if (needs_input_grad) result[0] = dx;
    if (weight.defined()) result[1] = like(dweight, weight.scalar_type(), weight.sizes());
    if (has_bias) result[2] = dbias;
    if (const auto found = ctx->saved_data.find("bias"); found != ctx->saved_data.end()) {
      const auto kind = found->second.toTuple();
      result[2] = like(dbias, kind->elements()[0].toScalarType(), kind->elements()[1].toIntVector());
    }
    if (needs_residual_grad) {  // without an activation dz is dy
      const Tensor& dz = call.activated() ? dresidual : grads[0];
      result[3] = like(dz, ctx->saved_data["residual"].toScalarType(), dz.sizes());
    }
    return result;
  }

 private:
  static Tensor like(const Tensor& gradient, at::ScalarType type, at::IntArrayRef sizes) {
    const Tensor cast = gradient.scalar_type() == type ? gradient : gradient.to(type);
    return sizes == cast.sizes() ? cast : cast.view(sizes);
  }
};

}  // namespace
}  // namespace torch_bn

/// NB: torch's own demangles the name of the node's type at every call.
template <>
torch::autograd::variable_list torch::autograd::CppNode<torch_bn::BatchNorm>::apply(variable_list&& gradients) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!gradients[0].defined()) return variable_list(num_outputs());
  variable_list all = torch_bn::BatchNorm::backward(&ctx_, gradients), found;
  found.reserve(num_outputs());
  for (size_t i = 0; i < all.size(); ++i)
    if (is_variable_input_[i]) found.push_back(std::move(all[i]));
  return found;
}

namespace torch_bn {

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  int64_t axis, int64_t groups, bool unbiased, bool strict, const OptionalTensor& renorm_mean,
                  const OptionalTensor& renorm_stddev, const OptionalTensor& renorm_mean_weight,
                  const OptionalTensor& renorm_stddev_weight, double renorm_momentum, std::optional<double> rmin,
                  std::optional<double> rmax, std::optional<double> dmax, const OptionalTensor& statistics,
                  const OptionalTensor& residual, Name activation, double activation_number) {
  const Call call{running_mean, running_var, num_batches_tracked, training, momentum, eps, axis, groups, unbiased,
                  strict, renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight, renorm_momentum, rmin,
                  rmax, dmax, statistics, activation, activation_number};
  const bool gradient = input.requires_grad() || needs_grad(weight) || needs_grad(bias) || needs_grad(residual);
  if (at::GradMode::is_enabled() && gradient) return BatchNorm::apply(input, weight, bias, residual, call);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call.without_gradient(input, weight, bias, residual);
}

bool inside_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

TORCH_LIBRARY_IMPL(torch_bn, Autograd, m) {
  m.impl("batch_norm", &batch_norm);
  m.impl("_batch_norm_backward", &backward);
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeExplicitAutograd, m) { m.impl("batch_norm", &batch_norm); }

}  // namespace torch_bn
