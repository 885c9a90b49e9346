"""What the operators return, in shapes, dtypes and strides alone: for meta tensors, torch.compile and torch.export."""

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ._checks import Renorm, check


def _register(name: str, fake: Any) -> None:
    torch.library.register_fake(f"torch_bn::{name}", fake)


def _output(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _mask(input: Tensor, axis: int, groups: int, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """What relu lets through, of [outer, channels, inner] in the order of memory: a bit for each element, as
    csrc/cpu/mask.inl has it, and on CUDA devices a byte for as many as are read at once."""
    if residual is None or activation != "relu" or input.numel() == 0:
        return None
    channels = input.size(axis)
    order = [*reversed(range(input.dim()))]  # from the innermost
    if suggest_memory_format(input) != torch.contiguous_format:
        order.insert(0, order.pop(-2))
    alone = channels == 1 and groups == 1
    inner = 1
    for dim in order[: None if alone else order.index(axis)]:
        inner *= input.size(dim)
    if input.device.type == "cuda":
        run, neighbours = channels if inner == 1 else inner, 16 // input.element_size()
        while run % neighbours != 0:
            neighbours //= 2
        narrow = neighbours * input.element_size() < 8
        return input.new_empty((input.numel() // (1 if narrow else neighbours),), dtype=torch.uint8)
    if channels * inner % 8 != 0 and inner <= 16:
        return None
    outer = input.numel() // (channels * inner)
    short = inner <= 8 * 64 // input.element_size()
    plane = inner if short else (inner + 7) // 8 * 8
    spare = 3
    return input.new_empty((outer * ((channels * plane + 7) // 8) + spare,), dtype=torch.uint8)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    axis: int,
    groups: int,
    unbiased: bool,
    strict: bool,
    renorm_mean: Tensor | None,
    renorm_stddev: Tensor | None,
    renorm_mean_weight: Tensor | None,
    renorm_stddev_weight: Tensor | None,
    renorm_momentum: float,
    rmin: float | None,
    rmax: float | None,
    dmax: float | None,
    statistics: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    activation_number: float = 0.0,
    keep_mask: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    averages = (renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight)
    renorm = None if renorm_mean is None else Renorm(*averages, renorm_momentum)  # type: ignore[arg-type]
    axis = check(
        input, weight, bias, running_mean, running_var, num_batches_tracked, True, momentum, eps, axis, groups, strict,
        renorm, statistics, residual, activation,
    )  # fmt: skip
    rows = 2 * groups + (2 if renorm else 0)
    saved = input.new_empty((rows, input.size(axis)), dtype=torch.float64)
    output = _output(input) if out is None else None
    return output, saved, _mask(input, axis, groups, residual, activation) if keep_mask else None


def _inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    axis: int,
    strict: bool,
    residual: Tensor | None,
    activation: str | None,
    activation_number: float = 0.0,
    keep_mask: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    axis = check(
        input, weight, bias, running_mean, running_var, None, False, None, eps, axis, 1, strict, None, None,
        residual, activation,
    )  # fmt: skip
    output = _output(input) if out is None else None
    return output, _mask(input, axis, 1, residual, activation) if keep_mask else None


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    eps: float,
    axis: int,
    groups: int,
    needs_input_grad: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    needs_residual_grad: bool = False,
    activation_number: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    grad_input = _output(input) if needs_input_grad else None
    grad_residual = _output(input) if needs_residual_grad else None
    grad_weight = input.new_empty((input.size(axis),), dtype=dtype)
    return grad_input, grad_weight, torch.empty_like(grad_weight), grad_residual


def _update(*arguments: Any, **more: Any) -> None:
    """Returns nothing."""


_register("_batch_norm_forward", _forward)
_register("_batch_norm_inference", _inference)
_register("_batch_norm_backward", _backward)
_register("update_statistics", _update)
