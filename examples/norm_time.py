"""How long a model spends in its normalization layers, clocked where they run, in the midst of training.

Hooks read the clock right before and after each layer's forward, and right before and after the one node that is its
backward in the autograd graph. So the layers see the same caches and the same memory as in training without clocks,
and nothing else runs between two readings. The hooks themselves cost time: do not clock whole epochs meanwhile.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass
class NormSeconds:
    """Seconds inside the normalization layers, summed over layers and steps."""

    forward: float = 0.0
    backward: float = 0.0


@contextmanager
def norm_seconds(model: nn.Module) -> Iterator[NormSeconds]:
    """Clocks the batch normalization layers of ``model`` (nn.BatchNorm2d and its subclasses) within the block.

    Raises:    RuntimeError, in the forward, if the backward of a layer is a chain of nodes: those of plain torch
               operations, which cannot be told from their neighbours.
    """
    spent = NormSeconds()
    handles = []
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            handles += _clock(layer, spent)
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _clock(layer: nn.Module, spent: NormSeconds) -> list:
    started = 0.0

    def start(*_: object) -> None:
        nonlocal started
        started = _now()

    def stop_forward(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        spent.forward += _now() - started
        node = output.grad_fn
        if node is None:  # evaluation
            return
        if node.next_functions[0][0] is not inputs[0].grad_fn:
            raise RuntimeError(f"the backward of {layer} is a chain of operations, got {node.name()} last")
        node.register_prehook(start)
        node.register_hook(stop_backward)

    def stop_backward(*_: object) -> None:
        spent.backward += _now() - started

    return [layer.register_forward_pre_hook(start), layer.register_forward_hook(stop_forward)]


def _now() -> float:
    if torch.cuda.is_initialized():  # kernels run behind the clock
        torch.cuda.synchronize()
    return time.perf_counter()
