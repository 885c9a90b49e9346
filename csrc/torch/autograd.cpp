// Derivatives: what is saved, and which operator runs backward. No checks, no allocation, no formula but the one whose
// derivative gives the second and all higher derivatives, written in differentiable torch operations.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/var_mean.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace torch_bn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using Forward = Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, const OptionalTensor&, std::optional<double>, double, int64_t);
using Inference = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, double, int64_t);
using Backward = Three(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool, double,
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

/// The gradients as differentiable operations on (grad_output, input, weight): what the kernels compute, so that
/// autograd finds its derivatives. In training mean and invstd depend on the input and are computed anew.
variable_list differentiable_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                       const Tensor& mean, const Tensor& invstd, bool training, double eps,
                                       int64_t axis) {
  const auto type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = input.to(type), dy = grad_output.to(type);
  std::vector<int64_t> shape(input.dim(), 1), others;
  axis = axis < 0 ? axis + input.dim() : axis;
  shape[axis] = input.size(axis);
  for (int64_t i = 0; i < input.dim(); ++i)
    if (i != axis) others.push_back(i);
  Tensor deviation, scale;
  if (training) {
    const auto [var, center] = at::var_mean(x, others, /*correction=*/0, /*keepdim=*/true);
    deviation = x - center;
    scale = at::rsqrt(var + eps);
  } else {
    deviation = (x.to(at::kDouble) - mean.view(shape)).to(type);
    scale = invstd.view(shape).to(type);
  }
  const Tensor xhat = deviation * scale, dxhat = weight.defined() ? dy * weight.to(type).view(shape) : dy;
  Tensor dx = dxhat * scale;
  if (training) dx = scale * (dxhat - dxhat.mean(others, true) - xhat * (dxhat * xhat).mean(others, true));
  return {dx.to(input.scalar_type()), (dy * xhat).sum(others), dy.sum(others)};
}

/// _batch_norm_backward as a differentiable function.
class BatchNormBackward : public torch::autograd::Function<BatchNormBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const OptionalTensor& weight, const Tensor& mean, const Tensor& invstd, bool training,
                               double eps, int64_t axis, bool needs_input_grad) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({grad_output, input, plain(weight), mean, invstd});
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["needs_input_grad"] = needs_input_grad;
    ctx->set_materialize_grads(false);
    const auto [dx, dweight, dbias] =
        backward_op().call(grad_output, input, weight, mean, invstd, training, eps, axis, needs_input_grad);
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
    variable_list gradients = differentiable_gradients(dy, x, weight, saved[3], saved[4],
                                                       ctx->saved_data["training"].toBool(),
                                                       ctx->saved_data["eps"].toDouble(), ctx->saved_data["axis"].toInt());
    if (!ctx->saved_data["needs_input_grad"].toBool()) gradients[0] = Tensor();
    variable_list outputs, output_grads, inputs, result(9);
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

Three backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& mean,
               const Tensor& invstd, bool training, double eps, int64_t axis, bool needs_input_grad) {
  if (at::GradMode::is_enabled() && (grad_output.requires_grad() || input.requires_grad() || needs_grad(weight))) {
    const auto result =
        BatchNormBackward::apply(grad_output, input, weight, mean, invstd, training, eps, axis, needs_input_grad);
    return {result[0], result[1], result[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_op().call(grad_output, input, weight, mean, invstd, training, eps, axis, needs_input_grad);
}

/// The arguments that have no derivative. As one, they cost autograd one.
struct Constants {
  const OptionalTensor &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  int64_t axis;
};

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Constants& call) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor output, mean, invstd;
    if (call.training) {
      std::tie(output, mean, invstd) =
          forward_op().call(input, weight, bias, call.running_mean, call.running_var, call.num_batches_tracked,
                            call.momentum, call.eps, call.axis);
    } else {
      // The buffers may change before backward (another forward, a broadcast by DDP): it gets copies.
      output = inference_op().call(input, weight, bias, call.running_mean, call.running_var, call.eps, call.axis);
      mean = call.running_mean->to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
      invstd = at::rsqrt(call.running_var->to(at::kDouble) + call.eps);
    }
    ctx->save_for_backward({input, plain(weight), mean, invstd});
    ctx->saved_data["call"] = c10::ivalue::Tuple::create(call.training, call.eps, call.axis, bias.has_value());
    const auto usual = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (bias && (bias->dim() != 1 || bias->scalar_type() != usual))
      ctx->saved_data["bias"] = c10::ivalue::Tuple::create(bias->scalar_type(), bias->sizes().vec());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& weight = saved[1];
    const auto call = ctx->saved_data["call"].toTuple();
    const auto& values = call->elements();
    const bool training = values[0].toBool(), has_bias = values[3].toBool();
    const double eps = values[1].toDouble();
    const int64_t axis = values[2].toInt();
    const bool needs_input_grad = ctx->needs_input_grad(0);
    const auto [dx, dweight, dbias] = torch_bn::backward(grads[0], saved[0], optional(weight), saved[2], saved[3],
                                                         training, eps, axis, needs_input_grad);
    variable_list result(4);
    if (needs_input_grad) result[0] = dx;
    if (weight.defined()) result[1] = like(dweight, weight.scalar_type(), weight.sizes());
    if (has_bias) result[2] = dbias;
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

/// Below autograd, and where nothing needs a gradient.
Tensor without_gradient(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                        double eps, int64_t axis) {
  if (training)
    return std::get<0>(forward_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                         eps, axis));
  return inference_op().call(input, weight, bias, running_mean, running_var, eps, axis);
}

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  int64_t axis) {
  if (at::GradMode::is_enabled() && (input.requires_grad() || needs_grad(weight) || needs_grad(bias)))
    return BatchNorm::apply(
        input, weight, bias,
        Constants{running_mean, running_var, num_batches_tracked, training, momentum, eps, axis});
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return without_gradient(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                          axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_bn, Autograd, m) {
  m.impl("batch_norm", &batch_norm);
  m.impl("_batch_norm_backward", &backward);
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeExplicitAutograd, m) { m.impl("batch_norm", &without_gradient); }

}  // namespace torch_bn
