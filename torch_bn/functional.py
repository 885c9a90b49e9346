"""Batch normalization as a function: its defaults, and the choice between the kernels and plain torch operations."""

from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _operators, reference


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    fused: bool | None = None,
) -> Tensor:
    """Normalises each channel of a batch: :func:`torch.nn.functional.batch_norm` on compiled kernels.

    y = (x - mean) / sqrt(var + eps) * weight + bias. In training mean and var are those of the batch, var the biased
    one, and the running statistics move towards them: running = (1 - momentum) * running + momentum * batch, with the
    unbiased var. Otherwise mean and var are the running ones.

    Args:
        input: [N, C, ...], float32, float64, float16 or bfloat16, any rank from 1 and any strides. float64 is computed
            in float64; the others accumulate in float32 or better and round once, at the end.
        running_mean, running_var: C values each, of any of these dtypes; both or neither. Training updates them in
            place (an empty batch leaves them alone); evaluation needs them.
        weight, bias: C values each, of any of these dtypes. None: ones, zeros.
        training: normalise with the statistics of the batch. Default: False, as torch has it.
        momentum: weight of the batch in the running statistics; any number, usually in [0, 1]. Default: 0.1. None, the
            average over all batches, needs a counter: only the modules have one.
        eps: added to var; positive in training, else not negative. Default: 1e-5.
        axis: which axis holds the channels, in [-input.dim(), input.dim() - 1]. Default: 1.
        fused: None takes the compiled kernels where they can serve and plain torch operations where not (no kernels
            loaded, another device, torch.func transforms, forward-mode differentiation, torch.jit.trace). True takes
            the kernels or raises. False takes plain torch operations. Default: None.

    Returns:
        y, with the input's shape and dtype, contiguous or channels_last as the input is; differentiable any number of
        times with respect to input, weight and bias.

    Raises:
        ValueError: one value per channel in training, eps or axis out of range, one running statistic without the
            other, momentum=None.
        RuntimeError: a tensor of the wrong length or on another device, evaluation without running statistics,
            fused=True where the kernels cannot serve.
        TypeError, NotImplementedError: dtypes other than the four, `training` not a bool, `fused` not one
            of its three values.
        Nothing is changed then. The exact texts: :func:`torch_bn.reference.check`.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            *(input, running_mean, running_var, weight, bias, training, momentum, eps),
            axis=axis,
            fused=fused,
        )
    _check_types(input, running_mean, running_var, weight, bias, training, momentum, eps, axis, fused)
    return _batch_norm(input, weight, bias, running_mean, running_var, None, training, momentum, eps, axis, fused)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    axis: int,
    fused: bool | None,
) -> Tensor:
    """The operator's arguments and `fused`: what the modules call, once per layer and step, so it must cost little."""
    if has_torch_function_variadic(input, weight, bias, running_mean, running_var, num_batches_tracked):
        return handle_torch_function(
            _batch_norm,
            (input, weight, bias, running_mean, running_var, num_batches_tracked),
            *(input, weight, bias, running_mean, running_var, num_batches_tracked),
            *(training, momentum, eps, axis, fused),
        )
    if fused is not False:
        obstacle = _obstacle(input)
        if obstacle is None:
            return _operators.batch_norm(  # type: ignore[no-any-return]
                input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis
            )
        if fused:
            raise RuntimeError(f"batch_norm: fused=True needs the compiled kernels, but {obstacle}")
    return reference.batch_norm(
        input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis
    )


def _check_types(
    input: object,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    training: object,
    momentum: object,
    eps: object,
    axis: object,
    fused: object,
) -> None:
    """Raises TypeError for what the operator and the plain operations would each refuse in words of their own."""
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm: input must be a Tensor, got {type(input).__name__}")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"batch_norm: {name} must be a Tensor or None, got {type(tensor).__name__}")
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm: training must be a bool, got {type(training).__name__}")
    if not isinstance(momentum, float) and momentum is not None and not isinstance(momentum, Real):
        raise TypeError(f"batch_norm: momentum must be a number or None, got {type(momentum).__name__}")
    if not isinstance(eps, float) and not isinstance(eps, Real):  # isinstance of an abstract class costs a lot
        raise TypeError(f"batch_norm: eps must be a number, got {type(eps).__name__}")
    if not isinstance(axis, int) and not isinstance(axis, SupportsIndex):
        raise TypeError(f"batch_norm: axis must be an int, got {type(axis).__name__}")
    _check_fused(fused)


def _check_fused(fused: object) -> None:
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"batch_norm: fused must be None, True or False, got {fused!r}")


def _obstacle(input: Tensor) -> str | None:
    """Why the compiled kernels cannot serve this input now; None when they can."""
    if _operators.batch_norm is None:
        return f"{_operators.unavailable_reason()}; torch_bn.load() compiles them"
    if not (input.is_cpu or input.is_meta):
        return f"they run on the cpu and the input is on {input.device}"
    if torch._C._are_functorch_transforms_active():
        return "they do not serve inside torch.func transforms"
    if forward_ad._current_level >= 0:
        return "they have no forward-mode derivative"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace does not record them"
    return None
