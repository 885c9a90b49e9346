"""Who is measured on a GPU, and the calls of each for one direction: batch norm and what follows it in the network."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bn

from ..cases import Case
from .network import ADD_RELU, PLAIN
from .timer import Call, Timer, sets_for

EAGER, NATIVE, COMPILED, OURS, COPY = "torch.nn", "torch.nn[cudnn off]", "torch.compile", "torch_bn", "copy_"
DIRECTIONS = ("forward", "backward", "inference")


@dataclass(frozen=True)
class Inputs:
    """One set of tensors, the same for all contenders, which only read them."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


def make_inputs(timer: Timer, case: Case, kind: str) -> list[Inputs]:
    """As many sets as a rotation takes, of normal values: x has a mean of half a deviation."""
    generator = torch.Generator(timer.device).manual_seed(0)
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def normal(mean: float, requires_grad: bool) -> Tensor:
        tensor = torch.empty(case.shape, dtype=case.dtype, device=timer.device, memory_format=layout)
        return tensor.normal_(mean, 1.0, generator=generator).requires_grad_(requires_grad)

    return [
        Inputs(normal(0.5, True), normal(0.0, False), normal(0.0, True) if kind == ADD_RELU else None)
        for _ in range(sets_for(2 * case.tensor_bytes, timer.rotation_bytes))
    ]


class Sequence2d(nn.Module):
    """A layer and what follows it, as torchvision writes it: both steps in place."""

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.relu = kind != PLAIN

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.relu else y


class Fused2d(nn.Module):
    """Our layer, which does all of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.layer(x) if residual is None else self.layer(x, residual=residual)


def fuses(kind: str) -> bool:
    """Whether our layer can do this kind in one."""
    takes = inspect.signature(torch_bn.BatchNorm2d).parameters
    given = inspect.signature(torch_bn.BatchNorm2d.forward).parameters
    return kind == PLAIN or ("activation" in takes and (kind != ADD_RELU or "residual" in given))


@dataclass(frozen=True)
class Contender:
    """A module and what is called for it: itself, or it in another form."""

    module: nn.Module
    call: Callable[..., Tensor]

    def calls(self, direction: str, sets: Sequence[Inputs]) -> list[Call]:
        """One for each set. That of `backward` is the backward alone: its forward is made here."""
        self.module.train(direction != "inference")
        if direction == "backward":
            return [self._backward(inputs) for inputs in sets]
        return [partial(self._forward, direction == "forward", inputs.arguments) for inputs in sets]

    def _forward(self, training: bool, arguments: tuple[Tensor, ...]) -> Tensor:
        with torch.set_grad_enabled(training):
            return self.call(*arguments)

    def _backward(self, inputs: Inputs) -> Call:
        y = self.call(*inputs.arguments)
        leaves = (*inputs.arguments, *self.module.parameters())
        return partial(torch.autograd.grad, y, leaves, inputs.dy, retain_graph=True)


def eager(case: Case, kind: str, device: torch.device) -> Contender:
    module = Sequence2d(_in_state(nn.BatchNorm2d(case.channels), case, device), kind)
    return Contender(module, module)


def native(case: Case, kind: str, device: torch.device) -> Contender:
    """Without cuDNN; the backward is that of the forward, whatever is enabled then."""
    module = eager(case, kind, device).module

    def call(*arguments: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return module(*arguments)  # type: ignore[no-any-return]

    return Contender(module, call)


def compiled(case: Case, kind: str, device: torch.device) -> Contender:
    torch._dynamo.reset()  # after a few shapes it would run eagerly without a word
    module = eager(case, kind, device).module
    return Contender(module, torch.compile(module, dynamic=False, fullgraph=True))


def ours(case: Case, kind: str, device: torch.device, **options: Any) -> Contender:
    if kind == PLAIN:
        module: nn.Module = Sequence2d(_ours(case, device, **options), PLAIN)
    else:
        module = Fused2d(_ours(case, device, activation="relu", **options))
    return Contender(module, module)


def copies(sets: Sequence[Inputs]) -> list[Call]:
    """`copy_` between tensors that are there already."""
    sources = [inputs.x.detach() for inputs in sets]
    return [partial(torch.empty_like(source).copy_, source) for source in sources]


def _ours(case: Case, device: torch.device, **options: Any) -> nn.Module:
    # fused: plain operations in their place would be measured as if they were the kernels.
    return _in_state(torch_bn.BatchNorm2d(case.channels, **{"fused": True, **options}), case, device)


def _in_state(layer: nn.Module, case: Case, device: torch.device) -> nn.Module:
    layer.load_state_dict(case.state())
    return layer.to(device)
