"""Batch normalization in plain torch operations: the oracle of the tests and the path that needs no compiled code.

Derivatives of any order, torch.func transforms and forward-mode differentiation come with the operations. Written from
the paper (Ioffe and Szegedy, 2015, arXiv:1502.03167, algorithms 1 and 2), not from the kernels, so that an error in one
is not repeated in the other.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from ._checks import Renorm, check, values_per_channel


def batch_norm(
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
    groups: int = 1,
    unbiased: bool = True,
    strict: bool = True,
    renorm: Renorm | None = None,
    statistics: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_number: float = 0.0,
) -> Tensor:
    """Normalises each channel of the input; the compiled operator's arguments, meaning, checks and errors.

    y = activation(((x - mean) / sqrt(var + eps) * r + d) * weight + bias + residual), with the batch's mean and biased
    variance when `training`, else the running ones; r = 1 and d = 0 unless there is renorm.

    Args:
        input: float32, float64, float16 or bfloat16, any rank from 1, any strides. float64 is computed in float64, the
            others in float32 with one rounding at the end.
        weight, bias: one value per channel, any of the four dtypes; None means ones, zeros.
        running_mean, running_var: one value per channel, any of the four dtypes; both or neither. Training updates them
            in place, the variance with the unbiased one of the batch; evaluation needs them. An empty batch leaves
            them alone.
        num_batches_tracked: one int64, or None. Training adds one to it, also for an empty batch.
        training: normalise with the statistics of the batch.
        momentum: the new batch's weight in the running statistics, any number; None averages over all batches
            (1 / num_batches_tracked, counted with this one).
        eps: added to the variance; positive in training, else not negative.
        axis: the channel axis, in [-input.dim(), input.dim() - 1].
        groups: in training, example i has the mean and variance of group i % groups. One update enters the mean of the
            groups' means and of their variances; so does one pair of r and d for all groups.
        unbiased: of the variance that enters running_var; without effect on renorm.
        strict: refuse what torch refuses: one value per channel in training, eps that is not positive.
        renorm: the averages of Batch Renormalization, which training uses and updates.
        statistics: float64 [2, C] or None. Receives what would enter the running statistics, which then stay as they
            are: :func:`update_statistics` enters it later.
        residual: of the input's shape, any of the four dtypes, or None.
        activation: "relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh" or "hardswish", or None for none.
        activation_number: the slope of leaky_relu, the alpha of elu; without effect on the others.

    Returns:
        y, with the input's shape and dtype, contiguous or channels_last as the input suggests.

    Raises:
        See :func:`check`; no argument is changed then.
    """
    axis = check(
        input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis, groups,
        strict, renorm, statistics, residual, activation,
    )  # fmt: skip
    shape = [1] * input.dim()
    shape[axis] = input.size(axis)
    x = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    r = d = None
    if training:
        parts = [x] if groups == 1 else [x[group::groups] for group in range(groups)]
        moments = [_moments(part, axis) for part in parts]
        entering = _entering(moments, parts, axis, unbiased and renorm is None)
        if renorm is not None and x.numel() > 0:
            r, d = (_kept(value.to(x.dtype)).reshape(shape) for value in _correction(renorm, *entering, eps))
        if statistics is not None:
            _write([(statistics, torch.stack(entering))])
        else:
            empty = x.numel() == 0
            _enter(
                *(None if empty else entering, eps, running_mean, running_var, num_batches_tracked, momentum),
                None if empty else renorm,
            )
    else:
        assert running_mean is not None and running_var is not None  # check() has seen to it
        parts, moments = [x], [(running_mean.to(x.dtype), running_var.to(x.dtype))]
    results = []
    for part, (mean, var) in zip(parts, moments, strict=True):
        # NB: the difference comes first; x * scale - mean * scale loses all digits where |mean| >> std.
        y = (part - mean.reshape(shape)) * torch.rsqrt(var + eps).reshape(shape)
        if r is not None and d is not None:
            y = y * r + d
        if weight is not None:
            y = y * weight.to(x.dtype).reshape(shape)
        if bias is not None:
            y = y + bias.to(x.dtype).reshape(shape)
        results.append(y)
    y = activated(_interleaved(results), residual, activation, activation_number)
    return _laid_out_like(y.to(input.dtype), input)


def activated(y: Tensor, residual: Tensor | None, activation: str | None, activation_number: float = 0.0) -> Tensor:
    """What comes last: activation(y + residual), in y's dtype."""
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y if activation is None else _ACTIVATIONS[activation](y, activation_number)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: torch.relu(z),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, _: F.hardswish(z),
}


def update_statistics(
    statistics: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    renorm: Renorm | None = None,
) -> None:
    """Enters what :func:`batch_norm` has written to `statistics` into the running ones, as it would have done
    itself."""
    mean, var = statistics
    _enter((mean, var), eps, running_mean, running_var, num_batches_tracked, momentum, renorm)


def _moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The mean and biased variance of each channel, [C] each; 0 and 1 where there is nothing to average."""
    if x.numel() == 0:
        return x.new_zeros(x.size(axis)), x.new_ones(x.size(axis))
    others = [other for other in range(x.dim()) if other != axis]
    if not others:  # NB: to torch, no dimensions are all of them
        return x, x - x
    var, mean = torch.var_mean(x, others, correction=0)
    return mean, var


def _entering(
    moments: list[tuple[Tensor, Tensor]], parts: list[Tensor], axis: int, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """The mean and variance, [C] each, that a batch brings to the running statistics."""
    # A buffer must not collect derivatives, of either mode.
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        variances = []
        for part, (_, var) in zip(parts, moments, strict=True):
            count = values_per_channel(part, axis)
            variances.append(var * (count / max(count - 1, 1)) if unbiased else var)
        mean = torch.stack([mean for mean, _ in moments]).double().mean(0)
        return mean, torch.stack(variances).double().mean(0)


def _correction(renorm: Renorm, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """r and d, [C] each (Ioffe 2017, with TensorFlow's averages: what they lack in weight is made up for by the
    batch)."""
    stddev = torch.sqrt(var + eps)
    mean_reference = renorm.mean.double().reshape(-1) + (1 - renorm.mean_weight.double().reshape(())) * mean
    stddev_reference = renorm.stddev.double().reshape(-1) + (1 - renorm.stddev_weight.double().reshape(())) * stddev
    r, d = stddev / stddev_reference, (mean - mean_reference) / stddev_reference
    if renorm.rmin is not None:
        r = r.clamp(min=renorm.rmin)
    if renorm.rmax is not None:
        r = r.clamp(max=renorm.rmax)
    if renorm.dmax is not None:
        d = d.clamp(min=-renorm.dmax).clamp(max=renorm.dmax)
    return r, d


def _kept(value: Tensor) -> Tensor:
    """The value itself. In a compiled graph backward must get this one: computed again it would come from averages that
    have moved since (https://github.com/pytorch/pytorch/pull/197039; can go with a torch that has it)."""
    return _copy(value) if torch.compiler.is_compiling() else value


@torch.library.custom_op("torch_bn::_copy", mutates_args=())
def _copy(value: Tensor) -> Tensor:
    return value.clone()


@_copy.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


@_copy.register_vmap
def _(info: object, in_dims: tuple[int | None], value: Tensor) -> tuple[Tensor, int | None]:
    return _copy(value), in_dims[0]


def _enter(
    entering: tuple[Tensor, Tensor] | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    renorm: Renorm | None,
) -> None:
    """Moves the running statistics towards a batch's, unless it was empty, and counts the batch."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        writes: list[tuple[Tensor, Tensor]] = []
        new_weight: float | Tensor | None = momentum
        if num_batches_tracked is not None:
            batches = num_batches_tracked + 1
            writes.append((num_batches_tracked, batches))
            if momentum is None:
                new_weight = 1 / batches.double().reshape(())
        if entering is not None:
            mean, var = entering
            if renorm is not None:
                averages = {}
                new = (("mean", mean), ("mean_weight", 1.0), ("stddev", torch.sqrt(var + eps)), ("stddev_weight", 1.0))
                for name, value in new:
                    buffer: Tensor = getattr(renorm, name)
                    averages[name] = _moved(buffer, value, renorm.momentum)
                    writes.append((buffer, averages[name]))
                mean = (averages["mean"] / averages["mean_weight"].reshape(())).reshape(-1)
                var = (averages["stddev"] / averages["stddev_weight"].reshape(())).reshape(-1) ** 2 - eps
            if running_mean is not None and running_var is not None:
                assert new_weight is not None  # check() has seen to it
                writes.append((running_mean, _moved(running_mean, mean, new_weight)))
                writes.append((running_var, _moved(running_var, var, new_weight)))
    _write(writes)


def _moved(buffer: Tensor, value: Tensor | float, weight: float | Tensor) -> Tensor:
    """The average in a buffer after a value has entered, in float64."""
    if isinstance(value, Tensor):
        value = value.reshape(buffer.shape)
    return buffer.double() * (1 - weight) + value * weight


def _write(writes: list[tuple[Tensor, Tensor]]) -> None:
    """Everything was computed before the first write: where writes are refused (torch.vmap refuses them to a tensor
    that it does not map) nothing has changed."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        for buffer, value in reversed(writes):
            # NB: torch 2.13 loses writes to a float64 of no dimensions when it compiles, but not to a view of one.
            (buffer if buffer.dim() else buffer.unsqueeze(0)).copy_(value)


def _interleaved(parts: list[Tensor]) -> Tensor:
    """Example i from part i % len(parts)."""
    if len(parts) == 1:
        return parts[0]
    examples = sum(part.size(0) for part in parts)
    order = torch.cat([torch.arange(group, examples, len(parts)) for group in range(len(parts))]).argsort()
    # NB: index_select returns what is contiguous, so that axis 1 comes last for what is channels_last.
    last = -1 if not parts[0].is_contiguous() and parts[0].dim() > 2 else 1
    return torch.cat(parts).movedim(1, last).index_select(0, order.to(parts[0].device)).movedim(last, 1)


def _laid_out_like(y: Tensor, input: Tensor) -> Tensor:
    """y as torch's own normalizations return it: channels_last as the input is, which the operations have kept, or
    contiguous, where they have kept other permutations as well."""
    if torch._C._get_tracing_state() is not None:
        return y  # sizes are tensors there
    return y.contiguous() if suggest_memory_format(input) == torch.contiguous_format else y
