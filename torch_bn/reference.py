"""Batch normalization in plain torch operations: the oracle of the tests and the path that needs no compiled code.

Derivatives of any order, torch.func transforms and forward-mode differentiation come with the operations. Written from
the paper (Ioffe and Szegedy, 2015, arXiv:1502.03167, algorithms 1 and 2), not from the kernels, so that an error in one
is not repeated in the other.
"""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
) -> Tensor:
    """Normalises each channel of the input; the compiled operator's arguments, meaning, checks and errors.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the batch's mean and biased variance when `training`,
    else the running ones.

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

    Returns:
        y, with the input's shape and dtype, contiguous or channels_last as the input suggests.

    Raises:
        See :func:`check`; no argument is changed then.
    """
    axis = check(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, axis)
    shape = [1] * input.dim()
    shape[axis] = input.size(axis)
    x = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    if training:
        mean, var = _moments(x, axis)
        _track(running_mean, running_var, num_batches_tracked, momentum, mean, var, _values_per_channel(input, axis))
    else:
        assert running_mean is not None and running_var is not None  # check() has seen to it
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale.reshape(-1) * weight.to(x.dtype).reshape(-1)
    # NB: the difference comes first; x * scale - mean * scale loses all digits where |mean| >> std.
    y = (x - mean.reshape(shape)) * scale.reshape(shape)
    if bias is not None:
        y = y + bias.to(x.dtype).reshape(shape)
    return _laid_out_like(y.to(input.dtype), input)


def _moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The mean and biased variance of each channel, [C] each; 0 and 1 where there is nothing to average."""
    if x.numel() == 0:
        return x.new_zeros(x.size(axis)), x.new_ones(x.size(axis))
    others = [other for other in range(x.dim()) if other != axis]
    var, mean = torch.var_mean(x, others, correction=0)
    return mean, var


def _track(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    var: Tensor,
    count: int,
) -> None:
    """Moves the running statistics towards a batch of `count` values per channel, and counts the batch."""
    # A buffer must not collect derivatives, of either mode. Everything is computed before the first write: where writes
    # are refused (torch.vmap refuses them to a tensor that it does not map) nothing has changed.
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        writes: list[tuple[Tensor, Tensor]] = []
        new_weight: float | Tensor | None = momentum
        if num_batches_tracked is not None:
            batches = num_batches_tracked + 1
            writes.append((num_batches_tracked, batches))
            if momentum is None:
                new_weight = 1 / batches.to(mean.dtype).reshape(())
        if running_mean is not None and running_var is not None and count > 0:
            assert new_weight is not None  # check() has seen to it
            for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                old = running.to(new.dtype)
                writes.append((running, old * (1 - new_weight) + new.reshape(old.shape) * new_weight))
        for buffer, value in reversed(writes):
            buffer.copy_(value)


def _laid_out_like(y: Tensor, input: Tensor) -> Tensor:
    """y as torch's own normalizations return it: channels_last as the input is, which the operations have kept, or
    contiguous, where they have kept other permutations as well."""
    if torch._C._get_tracing_state() is not None:
        return y  # sizes are tensors there
    return y.contiguous() if suggest_memory_format(input) == torch.contiguous_format else y


def _values_per_channel(input: Tensor, axis: int) -> int:
    count = 1
    for other, size in enumerate(input.shape):
        if other != axis:
            count *= size
    return count


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
) -> int:
    """Raises for bad arguments of :func:`batch_norm`, otherwise returns the axis counted from 0.

    The compiled operator makes the same checks, in this order and with these texts. Types and texts are torch's own
    (F.batch_norm of torch 2.13) where they do not start with "batch_norm:". Dtypes go by their C++ names. NaN is not a
    positive eps. "buffer" stands for running_mean and running_var, "parameter" for weight and bias::

        ValueError           batch_norm: input must have at least 1 dimension, got 0
        ValueError           batch_norm: axis must be in [-4, 3] for an input of rank 4, got 4
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

    The order is: running_mean is checked for presence, then length; running_var the same; weight's, then bias's length.
    The next three rows of one tensor each (dtype, device) go through weight, bias, running_mean, running_var and
    num_batches_tracked, dtype before device for each. momentum=None is an error only where it would be used: in
    training with running statistics. Only here, as only this path differentiates forward::

        RuntimeError         batch_norm is not differentiable wrt running_mean and running_var, they cannot have forward
                             grad defined
    """
    rank = input.dim()
    if rank < 1:
        raise ValueError("batch_norm: input must have at least 1 dimension, got 0")
    if not -rank <= axis < rank:
        raise ValueError(f"batch_norm: axis must be in [{-rank}, {rank - 1}] for an input of rank {rank}, got {axis}")
    axis %= rank
    if training and _values_per_channel(input, axis) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {float(eps)}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {float(eps)}")

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
    return axis


def _carries_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _name(dtype: torch.dtype) -> str:
    """The dtype's name in C++, as torch's own errors have it: 'Long' for torch.int64."""
    return torch.empty(0, dtype=dtype).type().removeprefix("torch.").removesuffix("Tensor")
