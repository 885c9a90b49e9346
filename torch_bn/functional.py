"""Batch normalization as a function: its defaults, and the choice between the kernels and plain torch operations."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _inplace, _operators, _shapes, reference, updates
from ._checks import Activation, Renorm, activation_and_number, check, check_residual
from .schedules import check_clipping, clipping_at


class RenormState(NamedTuple):
    """The averages of Batch Renormalization, zeros at first. Training updates them in place."""

    mean: Tensor
    """C values: the average of the batches' means."""
    stddev: Tensor
    """C values: the average of the batches' deviations, sqrt(var + eps)."""
    mean_weight: Tensor
    """One value: how much has entered `mean`, in [0, 1]."""
    stddev_weight: Tensor
    """One value: how much has entered `stddev`, in [0, 1]."""


class Extras(NamedTuple):
    """What only some layers have in training."""

    groups: int = 1
    unbiased: bool = True
    strict: bool = True
    renorm: Renorm | None = None
    frozen: bool = False
    """Statistics of the batch are used and the running ones stay."""
    inplace: bool = False


class Ending(NamedTuple):
    """What comes after the normalisation: activation(y + residual)."""

    residual: Tensor | None = None
    activation: str | None = None
    activation_number: float = 0.0


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
    axis: int | Sequence[int] = 1,
    renorm: RenormState | None = None,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_momentum: float = 0.01,
    virtual_batch_size: int | None = None,
    adjustment: Callable[[torch.Size], Any] | None = None,
    activation: Activation = None,
    residual: Tensor | None = None,
    inplace: bool = False,
    fused: bool | None = None,
) -> Tensor:
    """Normalises each channel of a batch: :func:`torch.nn.functional.batch_norm` on compiled kernels, and more.

    y = (x - mean) / sqrt(var + eps) * weight + bias. In training mean and var are those of the batch, var the biased
    one, and the running statistics move towards them: running = (1 - momentum) * running + momentum * batch, with the
    unbiased var. Otherwise mean and var are the running ones.

    In training, x_hat = (x - mean) / sqrt(var + eps) may pass through more: y = ((x_hat * r + d) * a + b) * weight +
    bias with r and d of `renorm` and a and b of `adjustment`. At the end, always: activation(y + residual).

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
        axis: which axis holds the channels, in [-input.dim(), input.dim() - 1]. Several axes: every combination of
            their indices is a channel, in the order of the axes in the input. Default: 1.
        renorm: averages for Batch Renormalization: r = stddev / average, d = (mean - average mean) / average stddev,
            constants for derivatives, with averages as they were before the batch and completed by it where they lack
            weight, so that the first step is plain batch normalization. The running statistics then follow these
            averages, with the biased var. Default: None.
        renorm_clipping: bounds, any of the keys rmax, rmin, dmax: r in [rmin, rmax], d in [-dmax, dmax]. Numbers or
            tensors of one element; None or a missing key: no bound. Default: None.
        renorm_momentum: weight of the batch in the averages of renorm; not 0. Default: 0.01.
        virtual_batch_size: ghost batches: training normalises example i with the others of group i % G, where
            G = ceil(N / virtual_batch_size), so group sizes differ by one at most. One update enters the mean over the
            groups; r and d are shared. Default: None, one group.
        adjustment: called in training with the input's size; returns (a, b), tensors, arrays or numbers: C values,
            one per channel, or what broadcasts against the input. Gradients flow into both. Default: None.
        activation: applied in the same pass: "relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh" (GELU with the
            approximation by tanh) or "hardswish", or a pair such as ("leaky_relu", 0.2) with the slope of leaky_relu or
            the alpha of elu, any finite number; by default 0.01 and 1. Values and derivatives are those of
            torch.nn.functional. The derivative is found again from the input, so that the output need not be kept.
            Default: None, none.
        residual: added before the activation in the same pass; of the input's shape and any of the four dtypes, in
            whose precision its gradient comes. Default: None.
        inplace: let y take the place of the input, which must not be used any more: one tensor less in memory. Where
            gradients are recorded the input is found again from y, for a derivative of first order: with activation
            None or leaky_relu of a positive slope, an input in float32 or float64 that is neither a leaf nor a view, no
            residual, and a weight without zeros (a look at it makes a GPU's queue wait), rounded by |bias / weight|
            times as much. Without effect on plain torch operations, in graphs of torch.compile, for several axes and
            with an adjustment. Default: False.
        fused: None takes the compiled kernels where they can serve and plain torch operations where not (no kernels
            loaded, another device, torch.func transforms, forward-mode differentiation, torch.jit.trace). True takes
            the kernels or raises. False takes plain torch operations. Default: None.

    Returns:
        y, with the input's shape and dtype, contiguous or channels_last as the input is; differentiable any number of
        times with respect to input, weight, bias and residual.

    Raises:
        ValueError: one value per channel (of a group) in training, eps or axis out of range, one running statistic
            without the other, momentum=None, virtual_batch_size not positive or with axis 0, unknown keys in
            renorm_clipping, an adjustment that does not broadcast, a residual of another shape, an unknown activation,
            inplace=True where the input cannot be found again.
        RuntimeError: a tensor of the wrong length or on another device, evaluation without running statistics,
            fused=True where the kernels cannot serve.
        TypeError, NotImplementedError: dtypes other than the four, arguments of another type.
        Nothing is changed then. The exact texts: :func:`torch_bn.reference.check`.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167. Renorm: Ioffe, 2017, arXiv:1702.03275, with the
        averages of TensorFlow 1. Ghost batches: Hoffer, Hubara and Soudry, 2017, arXiv:1705.08741, with TensorFlow's
        groups and its single update.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual),
            *(input, running_mean, running_var, weight, bias, training, momentum, eps),
            axis=axis,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            activation=activation,
            residual=residual,
            inplace=inplace,
            fused=fused,
        )
    axes = _shapes.check_axes(axis)
    _check_types(input, running_mean, running_var, weight, bias, training, momentum, eps, fused)
    check_inplace(inplace)
    check_virtual_batch_size(virtual_batch_size)
    check_renorm(renorm, renorm_clipping, renorm_momentum)
    name, number = activation_and_number(activation)
    check_residual_type(residual)
    ending = None if residual is None and name is None else Ending(residual, name, number)
    plain = renorm is None and virtual_batch_size is None and adjustment is None and not inplace
    if isinstance(axes, int) and (plain or not (training or inplace)):
        return _batch_norm(
            *(input, weight, bias, running_mean, running_var, None, training, momentum, eps, axes, fused, None, ending)
        )
    bounds = clipping_at(renorm_clipping, 0)
    extras = Extras(
        groups=_shapes.groups_of(input, axes, virtual_batch_size) if training else 1,
        renorm=Renorm(*renorm, renorm_momentum, *bounds) if renorm is not None else None,
        inplace=inplace,
    )
    return _batch_norm_with(
        *(input, weight, bias, running_mean, running_var, None, training, momentum, eps, axes, fused, extras),
        _shapes.adjustment_of(adjustment, input, axes) if training else None,
        ending,
    )


def _batch_norm_with(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    axes: int | tuple[int, ...],
    fused: bool | None,
    extras: Extras,
    adjusted: _shapes.Adjustment | None,
    ending: Ending | None = None,
) -> Tensor:
    """The same with everything that TensorFlow's layer has, brought to the form that :func:`_batch_norm` takes."""
    if not training:
        extras, adjusted = Extras(strict=extras.strict, inplace=extras.inplace), None
    if isinstance(axes, int) and adjusted is None:
        return _batch_norm(
            *(input, weight, bias, running_mean, running_var, num_batches_tracked),
            *(training, momentum, eps, axes, fused, extras),
            ending,
        )
    extras = extras._replace(inplace=False)
    axes = _shapes.resolved(axes, input)
    x, axis = _shapes.gathered(input, axes)
    ending = ending or Ending()
    added = None
    if ending.residual is not None:
        check_residual(ending.residual, input)
        added = _shapes.gathered(ending.residual, axes)[0]
    if adjusted is not None:  # then the operator does not see weight and bias as they are
        check(
            *(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis),
            *(extras.groups, extras.strict, extras.renorm, None, added, ending.activation),
        )
        if adjusted.per_channel:
            weight, bias = adjusted.merged(weight, bias)
    general = adjusted is not None and not adjusted.per_channel
    if general and input.dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # rounded once, after the adjustment
    y = _batch_norm(
        *(x, None if general else weight, None if general else bias, running_mean, running_var, num_batches_tracked),
        *(training, momentum, eps, axis, fused, extras),
        None if general else ending._replace(residual=added),
    )
    y = _shapes.scattered(y, input, axes)
    if adjusted is None or not general:
        return y
    return reference.activated(adjusted.applied(y, weight, bias, axes), *ending).to(input.dtype)


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
    extras: Extras | None = None,
    ending: Ending | None = None,
) -> Tensor:
    """The operator's arguments and `fused`: what the modules call, once per layer and step, so it must cost little."""
    renorm = None if extras is None else extras.renorm
    dynamo = torch.compiler.is_dynamo_compiling()
    if fused is not False and _operators.batch_norm is not None and not dynamo and not updates.watch(renorm):
        output = _operators.direct(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis, extras,
            ending,
        )  # fmt: skip
        if output is not None:
            return output  # type: ignore[no-any-return]
    residual = None if ending is None else ending.residual
    if has_torch_function_variadic(input, weight, bias, running_mean, running_var, num_batches_tracked, residual):
        return handle_torch_function(
            _batch_norm,
            (input, weight, bias, running_mean, running_var, num_batches_tracked, residual),
            *(input, weight, bias, running_mean, running_var, num_batches_tracked),
            *(training, momentum, eps, axis, fused, extras),
            ending,
        )
    plain = (input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis)
    return _dispatched(plain, fused, extras, ending)


_Maybe = Tensor | None
_Plain = tuple[Tensor, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, bool, float | None, float, int]
"""The first arguments of _batch_norm, up to axis."""


def _dispatched(plain: _Plain, fused: bool | None, extras: Extras | None, ending: Ending | None) -> Tensor:
    """By the operator of torch.ops or plain torch operations. NB: apart, as a function with closures starts slowly."""
    input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis = plain
    obstacle = "" if fused is False else _obstacle(input)
    if fused and obstacle is not None:
        raise RuntimeError(f"batch_norm: fused=True needs the compiled kernels, but {obstacle}")
    if extras is None and ending is None and not (training and updates.interfere()):
        return (reference.batch_norm if obstacle is not None else _operators.batch_norm)(*plain)
    extras, ending = extras or Extras(), ending or Ending()
    inplace = extras.inplace and not torch.compiler.is_compiling()
    if inplace:
        _inplace.check(input, weight, bias, *ending)
        inplace = not updates.repeats()

    def run(statistics: Tensor | None, renorm: Renorm | None) -> Tensor:
        if obstacle is not None:
            return reference.batch_norm(*plain, *extras[:3], renorm, statistics, *ending)
        more = (*extras[:3], *(renorm or _NO_RENORM), statistics, *ending)
        return (_inplace.batch_norm if inplace else _operators.batch_norm)(*plain, *more)

    stateless = running_mean is None and num_batches_tracked is None and extras.renorm is None
    if not training or stateless or not (extras.frozen or updates.interfere(extras.renorm)):
        return run(None, extras.renorm)

    def room() -> Tensor:
        channels = input.size(_shapes.resolved(axis, input))  # type: ignore[arg-type]
        return torch.empty((2, channels), dtype=torch.float64, device=input.device)

    if extras.frozen:
        return run(room(), extras.renorm)

    def update(statistics: Tensor) -> updates.Update:
        enter = reference.update_statistics if obstacle is not None else _operators.update_statistics
        if input.numel() == 0:  # is only counted
            return updates.Update(enter, statistics, None, None, num_batches_tracked, momentum, eps, None)
        return updates.Update(
            enter, statistics, running_mean, running_var, num_batches_tracked, momentum, eps, extras.renorm
        )

    return updates.forward(run, room, extras.renorm, update)


_NO_RENORM = (None, None, None, None, 0.01, None, None, None)


def check_residual_type(residual: object) -> None:
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"batch_norm: residual must be a Tensor or None, got {type(residual).__name__}")


def check_inplace(inplace: object) -> None:
    if not isinstance(inplace, bool):
        raise TypeError(f"batch_norm: inplace must be a bool, got {inplace!r}")


def check_virtual_batch_size(size: object) -> None:
    if size is None:
        return
    if not isinstance(size, SupportsIndex):
        raise TypeError(f"batch_norm: virtual_batch_size must be a positive int or None, got {size!r}")
    if size.__index__() < 1:
        raise ValueError(f"batch_norm: virtual_batch_size must be a positive int or None, got {size!r}")


def check_renorm(renorm: object, clipping: object, momentum: object) -> None:
    """Raises for averages that are none; clipping and momentum count only with renorm."""
    if renorm is None:
        return
    if not isinstance(renorm, RenormState):
        raise TypeError(f"batch_norm: renorm must be a RenormState or None, got {type(renorm).__name__}")
    check_clipping(clipping)
    check_renorm_momentum(momentum)


def check_renorm_momentum(momentum: object) -> None:
    if not isinstance(momentum, float) and not isinstance(momentum, Real):
        raise TypeError(f"batch_norm: renorm_momentum must be a number, got {type(momentum).__name__}")


def _check_types(
    input: object,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    training: object,
    momentum: object,
    eps: object,
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
    _check_fused(fused)


def _check_fused(fused: object) -> None:
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"batch_norm: fused must be None, True or False, got {fused!r}")


def _obstacle(input: Tensor) -> str | None:
    """Why the compiled kernels cannot serve this input now; None when they can."""
    if _operators.batch_norm is None:
        return f"{_operators.unavailable_reason()}; torch_bn.load() compiles them"
    if not (input.is_cpu or input.is_meta or (input.is_cuda and _operators.has_cuda)):
        where = "the cpu and CUDA devices" if _operators.has_cuda else "the cpu"
        return f"they run on {where} and the input is on {input.device}"
    if torch._C._are_functorch_transforms_active():
        return "they do not serve inside torch.func transforms"
    if forward_ad._current_level >= 0:
        return "they have no forward-mode derivative"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace does not record them"
    return None
