"""Layers of both faces, what they hold, and how to compare it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_bn

CHANNELS = 4


def one_thread() -> Iterator[None]:
    """A fixture: threads only wait for each other where tensors are this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchs_face(fused: bool | None, **options: Any) -> nn.Module:
    return torch_bn.BatchNorm2d(CHANNELS, fused=fused, **options)


def tensorflows_face(fused: bool | None, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    for name in ("momentum", "renorm_momentum"):
        if name in options:
            options[name] = 1 - options[name]
    layer = torch_bn.BatchNormalization(1, fused=fused, **options)
    layer.build(torch.empty(1, CHANNELS, 1, 1, dtype=dtype))
    return layer


FACES = {"BatchNorm2d": torchs_face, "BatchNormalization": tensorflows_face}
both_faces = pytest.mark.parametrize("face", FACES.values(), ids=FACES)
Face = Callable[..., nn.Module]


def batch(factor: float = 1.0) -> Tensor:
    return torch.randn(6, CHANNELS, 3, 2) * factor + factor / 2


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything but parameters."""
    return {name: value.clone() for name, value in model.named_buffers()}


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = one.values(), other.values()
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def built(channels: int = 3, **options: Any) -> torch_bn.BatchNormalization:
    """With its variables."""
    layer = torch_bn.BatchNormalization(**options)
    layer.build(torch.empty(2, channels, device="meta"))
    return layer


def trained(layer: nn.Module, shape: tuple[int, ...] = (8, 3, 4, 2), steps: int = 3) -> Any:
    """With no value of its state as it was at first."""
    for step in range(steps):
        layer(torch.randn(shape) * (step + 1) + step)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    return layer
