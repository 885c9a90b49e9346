"""y in the place of the input, which backward finds again from y.

Source: Rota Bulò, Porzi and Kontschieder, In-Place Activated BatchNorm, 2018, arXiv:1712.02616.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_RECORDED = "inplace=True where gradients are recorded"


def records(*tensors: Tensor | None) -> bool:
    """Whether a call with these leaves something for a backward."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    activation_number: float,
) -> None:
    """Raises where gradients are recorded and y does not tell what the input was, or autograd needs it as it is.

    All texts begin with "batch_norm: inplace=True where gradients are recorded"::

        ValueError    ... needs an activation that can be inverted, None or 'leaky_relu' with a positive
                          slope, got 'relu'
        ValueError    ... takes no residual
        TypeError     ... needs an input of Float or Double, as half types round away what the input was, got BFloat16
        ValueError    ... needs a weight without zeros
        RuntimeError  ... may not overwrite a leaf that requires a gradient, nor a view
    """
    if not records(input, weight, bias, residual):
        return
    if activation is not None and not (activation == "leaky_relu" and activation_number > 0):
        got = repr(activation) if activation != "leaky_relu" else f"'leaky_relu' with {activation_number}"
        raise ValueError(
            f"batch_norm: {_RECORDED} needs an activation that can be inverted, None or 'leaky_relu' with a positive "
            f"slope, got {got}"
        )
    if residual is not None:
        raise ValueError(f"batch_norm: {_RECORDED} takes no residual")
    if input.dtype in (torch.float16, torch.bfloat16):
        name = "Half" if input.dtype == torch.float16 else "BFloat16"
        raise TypeError(
            f"batch_norm: {_RECORDED} needs an input of Float or Double, as half types round away what the input was, "
            f"got {name}"
        )
    if weight is not None and not weight.is_meta and bool((weight == 0).any()):
        raise ValueError(f"batch_norm: {_RECORDED} needs a weight without zeros")
    if input._is_view() or (input.is_leaf and input.requires_grad):
        raise RuntimeError(
            f"batch_norm: {_RECORDED} may not overwrite a leaf that requires a gradient, nor a view"
        )


class Call(NamedTuple):
    """What has no derivative, in the order of the operator's arguments."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    axis: int
    groups: int
    unbiased: bool
    strict: bool
    renorm: tuple[Any, ...]
    statistics: Tensor | None
    residual: Tensor | None
    activation: str | None
    activation_number: float

    def overwrite(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """Puts y into `input`. Returns what the forward has found of the batch; None outside training."""
        ops = torch.ops.torch_bn
        ending = (self.residual, self.activation, self.activation_number, False, input)
        plain = (input, weight, bias, self.running_mean, self.running_var)
        if not self.training:
            ops._batch_norm_inference.default(*plain, self.eps, self.axis, self.strict, *ending)
            return None
        return ops._batch_norm_forward.default(  # type: ignore[no-any-return]
            *(*plain, self.num_batches_tracked, self.momentum, self.eps, self.axis),
            *(self.groups, self.unbiased, self.strict, *self.renorm, self.statistics, *ending),
        )[1]


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any) -> Tensor:
    """The operator torch_bn::batch_norm on its arguments, which returns the input, overwritten. After :func:`check`."""
    call = Call._make((*arguments[:10], arguments[10:-4], *arguments[-4:]))
    if records(input, weight, bias):
        return _Inverted.apply(input, weight, bias, call)  # type: ignore[no-any-return, no-untyped-call]
    with torch.no_grad():
        call.overwrite(input, weight, bias)
    return input


class _Inverted(torch.autograd.Function):
    """Keeps y, and in backward finds the input again: y = activation((x_hat * r + d) * weight + bias)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> Tensor:
        saved = call.overwrite(input, weight, bias)
        if saved is None:
            assert call.running_mean is not None and call.running_var is not None  # the operator has seen to it
            mean, var = call.running_mean.double().view(-1), call.running_var.double().view(-1)
            saved = torch.stack([mean, torch.rsqrt(var + call.eps)])
        ctx.mark_dirty(input)
        ctx.save_for_backward(input, weight, bias, saved)
        ctx.groups = call.groups if call.training else 1
        ctx.constants = (call.training, call.eps, call.axis, ctx.groups)
        ctx.activation = (call.activation, call.activation_number)
        return input

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, saved = ctx.saved_tensors
        groups, axis = ctx.groups, ctx.constants[2] % y.dim()
        deviation = _deviation(_inverse(y, *ctx.activation), weight, bias, saved, axis, groups)
        centred = saved.clone()
        centred[:groups] = 0
        name, number = ctx.activation
        dx, dweight, dbias, _ = torch.ops.torch_bn._batch_norm_backward.default(
            *(grad_output, deviation, weight, centred, *ctx.constants, ctx.needs_input_grad[0]),
            *((bias, None, name, False, number) if name else ()),
        )
        dweight, dbias = (
            None if parameter is None else gradient.to(parameter.dtype).view(parameter.shape)
            for gradient, parameter in ((dweight, weight), (dbias, bias))
        )
        return dx, dweight, dbias, None


def _inverse(y: Tensor, activation: str | None, number: float) -> Tensor:
    return F.leaky_relu(y, 1 / number) if activation else y


def _deviation(z: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor, axis: int, groups: int) -> Tensor:
    """x - mean of z = ((x - mean) * invstd * r + d) * weight + bias; its digits are not lost in those of the mean."""
    invstd, correction = saved[groups : 2 * groups], saved[2 * groups :]
    r, d = correction if len(correction) else (1.0, 0.0)
    gamma: Any = 1.0 if weight is None else weight.double().view(-1)
    beta: Any = 0.0 if bias is None else bias.double().view(-1)
    scale = 1 / (gamma * r * invstd)
    shift = -(beta / gamma + d) / (r * invstd)

    def spread(values: Tensor) -> Tensor:
        """From [groups, C] to what broadcasts against z: example i is of group i % groups."""
        shape = [1] * z.dim()
        shape[axis] = z.size(axis)
        if groups > 1:
            shape[0] = z.size(0)
            values = values[torch.arange(z.size(0), device=z.device) % groups]
        return values.view(shape).to(z.dtype)

    return torch.addcmul(spread(shift), z, spread(scale))
