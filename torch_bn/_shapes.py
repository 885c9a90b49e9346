"""Axes, groups and adjustments, brought to what the operator takes: one channel axis and one value per channel."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Axes = int | tuple[int, ...]


def check_axes(axis: object) -> Axes:
    """An int for one axis, a tuple for several; a list of one axis is that axis."""
    try:
        return operator.index(axis)  # type: ignore[arg-type]
    except TypeError:
        pass
    if not isinstance(axis, list | tuple):
        raise TypeError(f"batch_norm: axis must be an int, or a list or tuple of ints, got {axis!r}")
    if not axis:
        raise IndexError("batch_norm: axis must name at least one axis, got an empty list")
    try:
        axes = tuple(operator.index(one) for one in axis)
    except TypeError:
        raise TypeError(f"batch_norm: axis must be an int, or a list or tuple of ints, got {axis!r}") from None
    return axes[0] if len(axes) == 1 else axes


def resolved(axes: Axes, input: Tensor) -> Axes:
    """Axes counted from 0, in the order of the input; raises as the operator does for a single one."""
    rank = input.dim()
    if rank < 1:
        raise ValueError("batch_norm: input must have at least 1 dimension, got 0")
    for axis in (axes,) if isinstance(axes, int) else axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"batch_norm: axis must be in [{-rank}, {rank - 1}] for an input of rank {rank}, got {axis}"
            )
    if isinstance(axes, int):
        return axes % rank
    positive = sorted(axis % rank for axis in axes)
    if len(set(positive)) < len(positive):
        raise ValueError(f"batch_norm: axis must not name an axis twice, got {list(axes)}")
    return tuple(positive)


def parameter_shape(axes: Axes, input: Tensor) -> tuple[int, ...]:
    """That of a layer's variables: (C,) for one axis, else the input's with 1 on the other axes."""
    if isinstance(axes, int):
        return (input.size(axes),)
    return tuple(size if axis in axes else 1 for axis, size in enumerate(input.shape))


def broadcast_shape(axes: Axes, input: Tensor) -> tuple[int, ...]:
    """The input's shape with 1 on all axes but those of the channels."""
    chosen = {axes % input.dim()} if isinstance(axes, int) else set(axes)
    return tuple(size if axis in chosen else 1 for axis, size in enumerate(input.shape))


def gathered(input: Tensor, axes: Axes) -> tuple[Tensor, int]:
    """The input with its channel axes as one, and which one."""
    if isinstance(axes, int):
        return input, axes
    first = axes[0]
    target = tuple(range(first, first + len(axes)))
    return input.movedim(axes, target).flatten(first, target[-1]), first


def scattered(y: Tensor, input: Tensor, axes: Axes) -> Tensor:
    """The inverse of :func:`gathered`, contiguous as y is."""
    if isinstance(axes, int):
        return y
    first = axes[0]
    target = tuple(range(first, first + len(axes)))
    unflattened: Tensor = y.unflatten(first, [input.size(axis) for axis in axes])  # type: ignore[no-untyped-call]
    return unflattened.movedim(target, axes).contiguous()


def groups_of(input: Tensor, axes: Axes, virtual_batch_size: int | None) -> int:
    """How many ghost batches there are: as few as make none larger than virtual_batch_size."""
    if virtual_batch_size is None:
        return 1
    chosen = resolved(axes, input)
    if chosen == 0 or (not isinstance(chosen, int) and 0 in chosen):
        raise ValueError(
            "batch_norm: virtual_batch_size divides the examples of dimension 0, so axis must not include 0, "
            f"got {chosen if isinstance(chosen, int) else list(chosen)}"
        )
    return max(1, -(-input.size(0) // virtual_batch_size))


class Adjustment(NamedTuple):
    """a and b in the compute type: [C] each if per_channel, else what broadcasts against the input."""

    scale: Tensor
    bias: Tensor
    per_channel: bool

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(z * a + b) * weight + bias as z * weight + bias."""
        scale, shift = self.scale, self.bias
        if weight is not None:
            flat = weight.reshape(-1).to(scale.dtype)
            scale, shift = scale * flat, shift * flat
        return scale, shift if bias is None else shift + bias.reshape(-1).to(shift.dtype)

    def applied(self, z: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Axes) -> Tensor:
        shape = broadcast_shape(axes, z)
        y = z * self.scale + self.bias
        if weight is not None:
            y = y * weight.to(y.dtype).reshape(shape)
        return y if bias is None else y + bias.to(y.dtype).reshape(shape)


def adjustment_of(
    adjustment: Callable[[torch.Size], Any] | None, input: Tensor, axes: Axes
) -> Adjustment | None:
    """Asks for a and b and finds out how they apply."""
    if adjustment is None:
        return None
    axes = resolved(axes, input)
    result = adjustment(input.shape)
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise TypeError(f"batch_norm: adjustment must return a pair (scale, bias), got {type(result).__name__}")
    if len(result) != 2:
        raise ValueError(f"batch_norm: adjustment must return a pair (scale, bias), got {len(result)} values")
    if any(value is None for value in result):
        raise ValueError("batch_norm: adjustment must return a pair (scale, bias) without None, got None in it")
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    scale, bias = (torch.as_tensor(value).to(device=input.device, dtype=dtype) for value in result)
    wanted = broadcast_shape(axes, input)
    channels = torch.Size(wanted).numel()
    flat = [_per_channel(value, wanted, channels) for value in (scale, bias)]
    if flat[0] is not None and flat[1] is not None:
        return Adjustment(flat[0], flat[1], True)
    # A vector of the channels' length is per channel even beside one that is not.
    whole = [value if one is None else one.reshape(wanted) for one, value in zip(flat, (scale, bias), strict=True)]
    for value in whole:
        try:
            broadcast = torch.broadcast_shapes(value.shape, input.shape)  # type: ignore[no-untyped-call]
            sound = broadcast == input.shape
        except RuntimeError:
            sound = False
        if not sound:
            raise ValueError(
                f"batch_norm: adjustment must return values that broadcast to the input's shape {list(input.shape)}, "
                f"got {list(value.shape)}"
            )
    return Adjustment(whole[0], whole[1], False)


def _per_channel(value: Tensor, wanted: tuple[int, ...], channels: int) -> Tensor | None:
    """The value as [C], if it is the same for all that has one channel."""
    if value.numel() == 1 and value.dim() <= len(wanted):
        return value.reshape(1).expand(channels)
    if value.dim() == 1 and value.numel() == channels:
        return value
    padded = (1,) * (len(wanted) - value.dim()) + tuple(value.shape)
    return value.reshape(-1) if padded == wanted else None
