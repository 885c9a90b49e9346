"""A training step of a network (forward, loss, backward, SGD) for each provider, its verification and its memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bn

from .fused import UNFUSED
from .memory import Memory, memory_of
from .providers import COMPILED, OURS, TORCH

OURS_COMPILED = "torch_bn, torch.compile"
EAGER = (TORCH, UNFUSED, OURS)
BY_COMPILER = (COMPILED, OURS_COMPILED)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# The norm of a tensor's error over the norm of the tensor, in float32 against nn.BatchNorm2d in float64: several times
# what nn.BatchNorm2d itself reaches (3e-5, 3e-2, 1e-5). Gradients differ so much because rounding puts some elements on
# the other side of a ReLU's kink. It tells a network that is wired wrongly; how exact a layer is, the tests tell.
TOLERANCE = {"output": 2e-4, "gradient": 0.1, "buffer": 1e-4}

Results = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Batch:
    """What the step is made on."""

    images: Tensor
    labels: Tensor

    @classmethod
    def random(cls, size: int, side: int, layout: str, classes: int) -> "Batch":
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(size, 3, side, side, generator=generator).contiguous(memory_format=LAYOUTS[layout])
        return cls(images, torch.randint(classes, (size,), generator=generator))

    def double(self) -> "Batch":
        return Batch(self.images.double(), self.labels)


def network(make: Callable[[], nn.Module], provider: str, layout: str) -> nn.Module:
    """The network in training mode with the provider's layers, the same parameters for all."""
    torch.manual_seed(0)
    net = make()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):  # not 1 and 0, with which a layer that forgets them is right
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    net = net.to(memory_format=LAYOUTS[layout]).train()  # type: ignore[call-overload]
    if provider in (UNFUSED, OURS, OURS_COMPILED):
        # fused: plain operations in their place would be measured as if they were the kernels.
        torch_bn.convert(net, fused=True)
    if provider in (OURS, OURS_COMPILED):
        torch_bn.fuse(net)
    return net  # type: ignore[no-any-return]


class Step:
    """A call is one step on the batch, the gradients of the step before dropped first."""

    def __init__(self, net: nn.Module, batch: Batch, compiled: bool = False) -> None:
        self.net = net
        self._call = torch.compile(net, dynamic=False) if compiled else net
        self._batch = batch
        self._optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        self._optimizer.step()

    def results(self) -> Results:
        """What a step shows: the output, all gradients, and the buffers after it."""
        self._optimizer.zero_grad(set_to_none=True)
        output = self._call(self._batch.images)
        F.cross_entropy(output, self._batch.labels).backward()
        self._optimizer.step()
        gradients = {("gradient", name): _gradient(parameter) for name, parameter in self.net.named_parameters()}
        buffers = {("buffer", name): buffer for name, buffer in self.net.named_buffers()}
        return {("output", ""): output.detach(), **gradients, **buffers}

    def memory(self) -> Memory:
        """The most that a step has alive at once, and what its forward keeps for the backward: both besides parameters,
        momentum, buffers and images, and without the gradients of the step before."""
        self()
        self._optimizer.zero_grad(set_to_none=True)
        kept = memory_of(self._loss).kept
        return Memory(memory_of(self).peak, kept)

    def _loss(self) -> Tensor:
        return F.cross_entropy(self._call(self._batch.images), self._batch.labels)


def expected_results(make: Callable[[], nn.Module], layout: str, batch: Batch) -> Results:
    """What nn.BatchNorm2d gives in float64."""
    return Step(network(make, TORCH, layout).double(), batch.double()).results()


def check(name: str, found: Mapping[tuple[str, str], Tensor], expected: Mapping[tuple[str, str], Tensor]) -> None:
    """Raises: ValueError that names the first result off by more than TOLERANCE."""
    if found.keys() != expected.keys():
        raise ValueError(f"{name}: results must be those of torch.nn, got {sorted(found.keys() ^ expected.keys())}")
    for key, wanted in expected.items():
        error = float((found[key].double() - wanted).norm() / wanted.double().norm())
        if not error <= TOLERANCE[key[0]]:  # NB: not >, so that NaN fails
            what = " ".join(key).strip()
            raise ValueError(f"{name}: {what} must be within {TOLERANCE[key[0]]:g} of torch.nn, got {error:.1e}")


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
