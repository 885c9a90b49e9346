"""Who is measured: torch's layer, the same compiled by torch, ours, and a copy as the yardstick."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torch_bn

from .cases import Case, Tensors
from .harness import Contender

TORCH = "torch.nn"
COMPILED = "torch.compile"
OURS = "torch_bn"
REFERENCE = "torch_bn[reference]"
COPY = "clone"
NAMES = (TORCH, COMPILED, OURS, REFERENCE, COPY)
DEFAULT = (TORCH, COMPILED, OURS, COPY)
QUICK = (TORCH, OURS, COPY)

RANK_TO_CLASS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


@dataclass(frozen=True)
class Provider:
    """A layer under the name that its rows carry. `make` builds it for a case, `wrap` gives what is called."""

    name: str
    make: Callable[[Case], nn.Module]
    wrap: Callable[[nn.Module], Any] = lambda layer: layer

    def layer(self, case: Case) -> "Layer":
        """The layer in the state that the case gives to all of them."""
        module = self.make(case)
        module.load_state_dict(case.state())
        return Layer(module, self.wrap(module))


@dataclass(frozen=True)
class Layer:
    """A module and what is called for it: itself, or its compiled form."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]

    def gradients(self, y: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
        """The gradients of x, weight and bias."""
        return torch.autograd.grad(y, (tensors.x, *self.module.parameters()), tensors.dy)

    def contender(self, name: str, direction: str, sets: Sequence[Tensors]) -> Contender:
        """The layer doing one direction, its mode set for it."""
        self.module.train(direction != "inference")
        match direction:
            case "forward" | "inference":
                return Contender(name, lambda tensors: tensors.x, self.call, sets)
            case "backward":
                return Contender(
                    name, lambda tensors: (self.call(tensors.x), tensors), lambda made: self.gradients(*made), sets
                )
            case "forward+backward":
                return Contender(name, lambda t: t, lambda t: self.gradients(self.call(t.x), t), sets)
        raise ValueError(f"direction must be one that is measured, got {direction!r}")


def copy_contender(sets: Sequence[Tensors]) -> Contender:
    """`x.clone()`, which allocates its result as a batch norm does."""
    return Contender(COPY, lambda tensors: tensors.x.detach(), torch.clone, sets)


def find(names: Sequence[str]) -> list[Provider]:
    """The layers among `names` that can run here. Prints why one of them cannot, or runs otherwise than asked."""
    finders = {TORCH: _torch, COMPILED: _compiled, OURS: _ours, REFERENCE: _reference}
    found = [finders[name]() for name in names if name != COPY]
    return list({provider.name: provider for provider in found if provider is not None}.values())


def _maker(namespace: Any, **options: Any) -> Callable[[Case], nn.Module]:
    def make(case: Case) -> nn.Module:
        layer_class: type[nn.Module] = getattr(namespace, RANK_TO_CLASS[len(case.shape)])
        return layer_class(case.channels, dtype=case.parameters, **options)

    return make


def _torch() -> Provider:
    return Provider(TORCH, _maker(nn))


def _ours() -> Provider:
    facts = torch_bn.build_info()
    if facts["cpu_table"] is None:
        print(f"torch_bn runs without its kernels: {facts['reason']}")
        return _reference()
    return Provider(f"torch_bn[{facts['cpu_table']}]", _maker(torch_bn))


def _reference() -> Provider:
    return Provider(REFERENCE, _maker(torch_bn, fused=False))


def _compiled() -> Provider | None:
    try:
        torch.compile(torch.neg)(torch.zeros(8))
    except Exception as error:  # whatever the compiler, its headers or its cache lack
        print(f"{COMPILED} is left out: {str(error).splitlines()[0]}")
        return None
    return Provider(COMPILED, _maker(nn), wrap=_compile)


def _compile(layer: nn.Module) -> Any:
    torch._dynamo.reset()  # else the shapes of earlier cases make it compile for sizes unknown, which is slower
    return torch.compile(layer)
