// Derivatives: what is saved, and which operator runs backward. No checks, no allocation, no formula but the one whose
// derivative gives the second and all higher derivatives, written in differentiable torch operations.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/var_mean.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "autograd.h"

namespace torch_bn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using Forward = Two(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, const OptionalTensor&, std::optional<double>, double, int64_t, int64_t, bool,
                    bool, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    double, std::optional<double>, std::optional<double>, std::optional<double>, const OptionalTensor&);
using Inference = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, double, int64_t, bool);
using Backward = Three(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, bool, double, int64_t,
                       int64_t, bool);

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

/// What BatchNorm and BatchNormBackward keep beside tensors.
struct Constants {
  bool training;
  double eps;
  int64_t axis, groups;
  bool flag;  // of BatchNorm: has a bias; of BatchNormBackward: needs the input's gradient

  c10::IValue pack() const { return c10::ivalue::Tuple::create(training, eps, axis, groups, flag); }
  static Constants unpack(const c10::IValue& packed) {
    const auto tuple = packed.toTuple();
    const auto& v = tuple->elements();
    return {v[0].toBool(), v[1].toDouble(), v[2].toInt(), v[3].toInt(), v[4].toBool()};
  }
};

/// The gradients as differentiable operations on (grad_output, input, weight): what the kernels compute, so that
/// autograd finds its derivatives. In training the statistics depend on the input and are computed anew. r and d of
/// renorm are constants.
class DifferentiableGradients {
 public:
  DifferentiableGradients(const Tensor& input, const Tensor& weight, const Tensor& saved, const Constants& call)
      : call_(call), saved_(saved), input_type_(input.scalar_type()),
        type_(input_type_ == at::kDouble ? at::kDouble : at::kFloat), axis_(call.axis < 0 ? call.axis + input.dim() : call.axis),
        shape_(input.dim(), 1) {
    shape_[axis_] = input.size(axis_);
    for (int64_t i = 0; i < input.dim(); ++i)
      if (i != axis_) others_.push_back(i);
    if (saved.size(0) > 2 * call.groups) r_ = row(2 * call.groups), d_ = row(2 * call.groups + 1);
    factor_ = weight.defined() ? weight.to(type_).view(shape_) : Tensor();
    if (r_.defined()) factor_ = factor_.defined() ? factor_ * r_ : r_;
  }

  variable_list operator()(const Tensor& grad_output, const Tensor& input) const {
    if (call_.groups == 1) return of_group(grad_output, input, 0);
    // Example i is the i / groups-th of group i % groups.
    const int64_t examples = input.size(0);
    std::vector<int64_t> places(examples);
    std::vector<Tensor> dx;
    Tensor dweight, dbias;
    int64_t before = 0;
    for (int64_t group = 0; group < call_.groups; ++group) {
      const auto part = [&](const Tensor& t) { return t.slice(0, group, examples, call_.groups); };
      const variable_list found = of_group(part(grad_output), part(input), group);
      dx.push_back(found[0]);
      dweight = dweight.defined() ? dweight + found[1] : found[1];
      dbias = dbias.defined() ? dbias + found[2] : found[2];
      for (int64_t i = group; i < examples; i += call_.groups) places[i] = before++;
    }
    const Tensor order = at::empty({examples}, input.options().dtype(at::kLong).memory_format(std::nullopt));
    for (int64_t i = 0; i < examples; ++i) order[i].fill_(places[i]);
    return {at::cat(dx, 0).index_select(0, order), dweight, dbias};
  }

 private:
  Tensor row(int64_t i) const { return saved_.select(0, i).to(type_).view(shape_); }

  variable_list of_group(const Tensor& grad_output, const Tensor& input, int64_t group) const {
    const Tensor x = input.to(type_), dy = grad_output.to(type_);
    Tensor deviation, scale;
    if (call_.training) {
      const auto [var, center] = at::var_mean(x, others_, /*correction=*/0, /*keepdim=*/true);
      deviation = x - center;
      scale = at::rsqrt(var + call_.eps);
    } else {
      deviation = (x.to(at::kDouble) - saved_.select(0, group).view(shape_)).to(type_);
      scale = row(call_.groups + group);
    }
    const Tensor xhat = deviation * scale, dxhat = factor_.defined() ? dy * factor_ : dy;
    Tensor dx = dxhat * scale;
    if (call_.training) dx = scale * (dxhat - dxhat.mean(others_, true) - xhat * (dxhat * xhat).mean(others_, true));
    const Tensor z = r_.defined() ? xhat * r_ + d_ : xhat;
    return {dx.to(input_type_), (dy * z).sum(others_), dy.sum(others_)};
  }

  const Constants& call_;
  const Tensor& saved_;
  at::ScalarType input_type_, type_;
  int64_t axis_;
  std::vector<int64_t> shape_, others_;
  Tensor r_, d_, factor_;
};

/// _batch_norm_backward as a differentiable function.
class BatchNormBackward : public torch::autograd::Function<BatchNormBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const OptionalTensor& weight, const Tensor& saved, const Constants& call) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({grad_output, input, plain(weight), saved});
    ctx->saved_data["call"] = call.pack();
    ctx->set_materialize_grads(false);
    const auto [dx, dweight, dbias] = backward_op().call(grad_output, input, weight, saved, call.training, call.eps,
                                                         call.axis, call.groups, call.flag);
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool create_graph = at::GradMode::is_enabled();
    const auto saved = ctx->get_saved_variables();
    at::AutoGradMode record(true);
    // Without a graph to extend, the operations below are recorded on copies, and their graph ends there.
    const auto start = [&](const Tensor& t) {
      return !t.defined() || create_graph ? t : t.detach().requires_grad_(t.requires_grad());
    };
    const Tensor dy = start(saved[0]), x = start(saved[1]), weight = start(saved[2]);
    const Constants call = Constants::unpack(ctx->saved_data["call"]);
    variable_list gradients = DifferentiableGradients(x, weight, saved[3], call)(dy, x);
    if (!call.flag) gradients[0] = Tensor();
    variable_list outputs, output_grads, inputs, result(5);
    std::vector<size_t> places;
    for (size_t i = 0; i < gradients.size(); ++i)
      if (gradients[i].defined() && gradients[i].requires_grad() && grads[i].defined()) {
        outputs.push_back(gradients[i]);
        output_grads.push_back(grads[i]);
      }
    for (const auto& [place, t] : {std::pair<size_t, const Tensor*>{0, &dy}, {1, &x}, {2, &weight}})
      if (t->defined() && t->requires_grad()) {
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

Three backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& saved,
               bool training, double eps, int64_t axis, int64_t groups, bool needs_input_grad) {
  if (at::GradMode::is_enabled() && (grad_output.requires_grad() || input.requires_grad() || needs_grad(weight))) {
    const auto result = BatchNormBackward::apply(grad_output, input, weight, saved,
                                                 Constants{training, eps, axis, groups, needs_input_grad});
    return {result[0], result[1], result[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_op().call(grad_output, input, weight, saved, training, eps, axis, groups, needs_input_grad);
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

  Two forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) const {
    return forward_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, axis,
                             groups, unbiased, strict, renorm_mean, renorm_stddev, renorm_mean_weight,
                             renorm_stddev_weight, renorm_momentum, rmin, rmax, dmax, statistics);
  }
  Tensor inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) const {
    return inference_op().call(input, weight, bias, running_mean, running_var, eps, axis, strict);
  }
  /// Below autograd, and where nothing needs a gradient.
  Tensor without_gradient(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) const {
    return training ? std::get<0>(forward(input, weight, bias)) : inference(input, weight, bias);
  }
};

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Call& call) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor output, saved;
    if (call.training) {
      std::tie(output, saved) = call.forward(input, weight, bias);
    } else {
      // The buffers may change before backward (another forward, a broadcast by DDP): it gets copies.
      output = call.inference(input, weight, bias);
      const Tensor mean = call.running_mean->to(at::kDouble).view(-1), var = call.running_var->to(at::kDouble).view(-1);
      saved = at::stack({mean, at::rsqrt(var + call.eps)});
    }
    ctx->save_for_backward({input, plain(weight), saved});
    ctx->saved_data["call"] =
        Constants{call.training, call.eps, call.axis, call.training ? call.groups : 1, bias.has_value()}.pack();
    const auto usual = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (bias && (bias->dim() != 1 || bias->scalar_type() != usual))
      ctx->saved_data["bias"] = c10::ivalue::Tuple::create(bias->scalar_type(), bias->sizes().vec());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& weight = saved[1];
    const Constants call = Constants::unpack(ctx->saved_data["call"]);
    const bool needs_input_grad = ctx->needs_input_grad(0);
    const auto [dx, dweight, dbias] = torch_bn::backward(grads[0], saved[0], optional(weight), saved[2], call.training,
                                                         call.eps, call.axis, call.groups, needs_input_grad);
    variable_list result(4);
    if (needs_input_grad) result[0] = dx;
    if (weight.defined()) result[1] = like(dweight, weight.scalar_type(), weight.sizes());
    if (call.flag) result[2] = dbias;
    if (ctx->saved_data.size() > 1) {
      const auto kind = ctx->saved_data["bias"].toTuple();
      result[2] = like(dbias, kind->elements()[0].toScalarType(), kind->elements()[1].toIntVector());
    }
    return result;
  }

 private:
  static Tensor like(const Tensor& gradient, at::ScalarType type, at::IntArrayRef sizes) {
    const Tensor cast = gradient.scalar_type() == type ? gradient : gradient.to(type);
    return sizes.size() == 1 ? cast : cast.view(sizes);
  }
};

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  int64_t axis, int64_t groups, bool unbiased, bool strict, const OptionalTensor& renorm_mean,
                  const OptionalTensor& renorm_stddev, const OptionalTensor& renorm_mean_weight,
                  const OptionalTensor& renorm_stddev_weight, double renorm_momentum, std::optional<double> rmin,
                  std::optional<double> rmax, std::optional<double> dmax, const OptionalTensor& statistics) {
  const Call call{running_mean, running_var, num_batches_tracked, training, momentum, eps, axis, groups, unbiased,
                  strict, renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight, renorm_momentum, rmin,
                  rmax, dmax, statistics};
  if (at::GradMode::is_enabled() && (input.requires_grad() || needs_grad(weight) || needs_grad(bias)))
    return BatchNorm::apply(input, weight, bias, call);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call.without_gradient(input, weight, bias);
}

}  // namespace

bool inside_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

TORCH_LIBRARY_IMPL(torch_bn, Autograd, m) {
  m.impl("batch_norm", &batch_norm);
  m.impl("_batch_norm_backward", &backward);
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeExplicitAutograd, m) { m.impl("batch_norm", &batch_norm); }

}  // namespace torch_bn
