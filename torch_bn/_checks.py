"""What every argument of a batch normalization must be: the checks of the path without kernels and of fake tensors."""

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Activation = str | tuple[str, float] | None
"""What users give: a name, or one with its number."""
NUMBERS = {"leaky_relu": 0.01, "elu": 1.0}  # of the activations that have one, where none is given
ACTIVATIONS = ("relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "hardswish")
_BY_NAME = {name: (name, NUMBERS.get(name, 0.0)) for name in ACTIVATIONS}
_NAMES = ", ".join(repr(name) for name in ACTIVATIONS[:-1]) + f" or {ACTIVATIONS[-1]!r}"


class Renorm(NamedTuple):
    """Batch Renormalization: its averages and how they correct a batch. See :func:`torch_bn.functional.batch_norm`."""

    mean: Tensor
    stddev: Tensor
    mean_weight: Tensor
    stddev_weight: Tensor
    momentum: float = 0.01
    rmin: float | None = None
    rmax: float | None = None
    dmax: float | None = None

    def cloned(self) -> "Renorm":
        """With averages of its own."""
        return self._replace(
            mean=self.mean.clone(),
            stddev=self.stddev.clone(),
            mean_weight=self.mean_weight.clone(),
            stddev_weight=self.stddev_weight.clone(),
        )


def check(
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
    strict: bool = True,
    renorm: Renorm | None = None,
    statistics: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> int:
    """Raises for bad arguments of :func:`torch_bn.reference.batch_norm`, otherwise returns the axis counted from 0.

    The compiled operator makes the same checks, in this order and with these texts. Types and texts are torch's own
    (F.batch_norm of torch 2.13) where they do not start with "batch_norm:". Dtypes go by their C++ names. NaN is not a
    positive eps. "buffer" stands for running_mean and running_var, "parameter" for weight and bias::

        ValueError           batch_norm: input must have at least 1 dimension, got 0
        ValueError           batch_norm: axis must be in [-4, 3] for an input of rank 4, got 4
        ValueError           batch_norm: groups divide the examples of dimension 0, so axis must be another, got 0
        ValueError           batch_norm: groups must be in [1, 8], the number of examples, got 9
        ValueError           Expected more than 1 value per channel when training, got input size torch.Size([1, 3])
        ValueError           batch_norm eps must be positive during training, but got 0.0
        ValueError           batch_norm eps must be non-negative, but got -1.0
        RuntimeError         running_mean must be defined in evaluation mode              (then running_var)
        RuntimeError         running_mean should contain 4 elements not 3                 (then running_var)
        RuntimeError         weight should contain 4 elements not 3                       (then bias)
        ValueError           running_mean and running_var must either both be None or neither be None
        ValueError           batch_norm: momentum=None averages over all batches and needs num_batches_tracked, got None
        NotImplementedError  "batch_norm" not implemented for 'Long'
        TypeError            batch_norm: weight must be Float, Double, Half or BFloat16, got Long
        RuntimeError         batch_norm: input is on cpu but weight is on meta
        TypeError            batch_norm: num_batches_tracked must be Long, got Float
        ValueError           batch_norm: num_batches_tracked must have 1 element, got 2
        RuntimeError         The function 'batch_norm' is not differentiable with respect to argument 'running_mean'.
                             This input cannot have requires_grad True.                   (while gradients are recorded)

        ValueError           batch_norm: renorm_mean must have 4 elements, got 3          (then the other averages)
        ValueError           batch_norm: renorm_momentum must not be 0, which lets nothing in, got 0.0
        ValueError           batch_norm: statistics must be contiguous Double of [2, 4], got Float of [2, 4]
        ValueError           batch_norm: residual must have the input's shape [2, 4], got [2, 3]
        TypeError            batch_norm: residual must be Float, Double, Half or BFloat16, got Long
        RuntimeError         batch_norm: input is on cpu but residual is on meta
        ValueError           batch_norm: activation must be None, 'relu', 'leaky_relu', 'elu', 'silu', 'gelu',
                             'gelu_tanh' or 'hardswish', got 'tanh'

    The three about single values and eps are made only when `strict`, and with several groups the first of them ends in
    " in 4 groups". The order is: running_mean is checked for presence, then length; running_var the same; weight's,
    then bias's length. The next three rows of one tensor each (dtype, device) go through weight, bias, running_mean,
    running_var and num_batches_tracked, dtype before device for each. momentum=None is an error only where it would
    be used: in training with running statistics. Only here, as only this path differentiates forward::

        RuntimeError         batch_norm is not differentiable wrt running_mean and running_var, they cannot have forward
                             grad defined
    """
    rank = input.dim()
    if rank < 1:
        raise ValueError("batch_norm: input must have at least 1 dimension, got 0")
    if not -rank <= axis < rank:
        raise ValueError(f"batch_norm: axis must be in [{-rank}, {rank - 1}] for an input of rank {rank}, got {axis}")
    axis %= rank
    if groups != 1:
        if axis == 0:
            raise ValueError("batch_norm: groups divide the examples of dimension 0, so axis must be another, got 0")
        examples = max(1, input.size(0))
        if not 1 <= groups <= examples:
            raise ValueError(f"batch_norm: groups must be in [1, {examples}], the number of examples, got {groups}")
    if strict:
        _check_strictly(input, training, eps, axis, groups)

    channels = input.size(axis)
    buffers = {"running_mean": running_mean, "running_var": running_var}
    parameters = {"weight": weight, "bias": bias}
    for name, tensor in (buffers | parameters).items():
        if tensor is None:
            if name in buffers and not training:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("batch_norm: momentum=None averages over all batches and needs num_batches_tracked, got None")

    if input.dtype not in FLOATS:
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{_name(input.dtype)}'")
    for name, tensor in (parameters | buffers | {"num_batches_tracked": num_batches_tracked}).items():
        if tensor is None:
            continue
        if name == "num_batches_tracked":
            if tensor.dtype != torch.int64:
                raise TypeError(f"batch_norm: num_batches_tracked must be Long, got {_name(tensor.dtype)}")
        elif tensor.dtype not in FLOATS:
            raise TypeError(f"batch_norm: {name} must be Float, Double, Half or BFloat16, got {_name(tensor.dtype)}")
        if tensor.device != input.device:
            raise RuntimeError(f"batch_norm: input is on {input.device} but {name} is on {tensor.device}")
    if num_batches_tracked is not None and num_batches_tracked.numel() != 1:
        raise ValueError(f"batch_norm: num_batches_tracked must have 1 element, got {num_batches_tracked.numel()}")
    for name, tensor in buffers.items():
        if tensor is None:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'batch_norm' is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )
        if _carries_tangent(tensor):
            raise RuntimeError(
                "batch_norm is not differentiable wrt running_mean and running_var, "
                "they cannot have forward grad defined"
            )
    if renorm is not None:
        _check_renorm(renorm, input, channels)
    if statistics is not None:
        sound = statistics.dtype == torch.float64 and tuple(statistics.shape) == (2, channels)
        if not (sound and statistics.is_contiguous()):
            raise ValueError(
                f"batch_norm: statistics must be contiguous Double of [2, {channels}], "
                f"got {_name(statistics.dtype)} of {list(statistics.shape)}"
            )
    if residual is not None:
        check_residual(residual, input)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"batch_norm: activation must be None, {_NAMES}, got '{activation}'")
    return axis


def activation_and_number(activation: object) -> tuple[str | None, float]:
    """An activation as the operators take it. Raises ValueError for what is none::

        batch_norm: activation must be None, 'relu', ... or 'hardswish', or a pair of a name and a number, got ReLU()
        batch_norm: activation must be 'leaky_relu' or 'elu' to have a number, got ('silu', 2.0)
        batch_norm: the number of an activation must be finite, got ('elu', nan)

    The operators check the name alone.
    """
    if activation is None:
        return None, 0.0
    if isinstance(activation, str) and activation in _BY_NAME:
        return _BY_NAME[activation]
    if not (isinstance(activation, tuple) and len(activation) == 2 and activation[0] in ACTIVATIONS):
        raise ValueError(
            f"batch_norm: activation must be None, {_NAMES}, or a pair of a name and a number, got {activation!r}"
        )
    name, number = activation
    if name not in NUMBERS:
        raise ValueError(f"batch_norm: activation must be 'leaky_relu' or 'elu' to have a number, got {activation!r}")
    if not (isinstance(number, (float, Real)) and math.isfinite(number)):
        raise ValueError(f"batch_norm: the number of an activation must be finite, got {activation!r}")
    return name, float(number)


def check_residual(residual: Tensor, input: Tensor) -> None:
    if residual.shape != input.shape:
        raise ValueError(
            f"batch_norm: residual must have the input's shape {list(input.shape)}, got {list(residual.shape)}"
        )
    if residual.dtype not in FLOATS:
        raise TypeError(f"batch_norm: residual must be Float, Double, Half or BFloat16, got {_name(residual.dtype)}")
    if residual.device != input.device:
        raise RuntimeError(f"batch_norm: input is on {input.device} but residual is on {residual.device}")


def _check_strictly(input: Tensor, training: bool, eps: float, axis: int, groups: int) -> None:
    """What torch refuses and TensorFlow does not."""
    if training:
        values = values_per_channel(input, axis)
        least = values if groups == 1 or values == 0 else input.size(0) // groups * (values // input.size(0))
        if least == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {input.size()}"
                + (f" in {groups} groups" if groups > 1 else "")
            )
        if not eps > 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {float(eps)}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {float(eps)}")


def _check_renorm(renorm: Renorm, input: Tensor, channels: int) -> None:
    for name in ("mean", "stddev", "mean_weight", "stddev_weight"):
        tensor: Tensor = getattr(renorm, name)
        count = 1 if name.endswith("weight") else channels
        if tensor.numel() != count:
            elements = "element" if count == 1 else "elements"
            raise ValueError(f"batch_norm: renorm_{name} must have {count} {elements}, got {tensor.numel()}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"batch_norm: renorm_{name} must be Float, Double, Half or BFloat16, got {_name(tensor.dtype)}"
            )
        if tensor.device != input.device:
            raise RuntimeError(f"batch_norm: input is on {input.device} but renorm_{name} is on {tensor.device}")
    if renorm.momentum == 0:
        raise ValueError("batch_norm: renorm_momentum must not be 0, which lets nothing in, got 0.0")


def values_per_channel(input: Tensor, axis: int) -> int:
    count = 1
    for other, size in enumerate(input.shape):
        if other != axis:
            count *= size
    return count


def _carries_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _name(dtype: torch.dtype) -> str:
    """The dtype's name in C++, as torch's own errors have it: 'Long' for torch.int64."""
    return torch.empty(0, dtype=dtype).type().removeprefix("torch.").removesuffix("Tensor")
