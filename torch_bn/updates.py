"""When a batch enters the running statistics: at once, when the user says so, or never, when checkpointing repeats
it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._checks import Renorm

Run = Callable[[Tensor | None, Renorm | None], Tensor]
"""A forward in training. Given room for the batch's statistics, it writes them there and changes no running ones."""


class Update(NamedTuple):
    """One batch, ready to enter the running statistics."""

    enter: Callable[..., None]  # of the operators or of the plain path
    statistics: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    renorm: Renorm | None

    def apply(self) -> None:
        self.enter(*self[1:])


class DeferredUpdates:
    """The updates of the forwards inside a :func:`deferred_updates` block, oldest first."""

    def __init__(self) -> None:
        self._updates: list[Update] = []

    def __len__(self) -> int:
        """How many updates wait."""
        return len(self._updates)

    def apply(self) -> None:
        """Runs the updates that wait, once each, in the order of their forwards."""
        updates, self._updates = self._updates, []
        for update in updates:
            update.apply()

    def discard(self) -> None:
        """Forgets the updates that wait."""
        self._updates = []

    def _append(self, update: Update) -> None:
        self._updates.append(update)


class _Collectors(threading.local):
    """The blocks that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[DeferredUpdates] = []


_collectors = _Collectors()


@contextmanager
def deferred_updates() -> Iterator[DeferredUpdates]:
    """Collects the updates of running statistics in place of running them: TensorFlow's UPDATE_OPS.

    Every layer of torch_bn that trains inside the block, in this thread, leaves its running statistics, averages of
    renorm and counter as they are; outputs and gradients are those of the same forward outside. What is collected can
    be run or dropped, during the block or after it::

        with torch_bn.deferred_updates() as updates:
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        if step_was_taken: updates.apply()
        else: updates.discard()

    Blocks may be nested; the innermost collects. In a graph of torch.compile updates happen on the way all the same.

    Returns:
        A :class:`DeferredUpdates` with apply(), discard() and len().
    """
    collector = DeferredUpdates()
    push(collector)
    try:
        yield collector
    finally:
        remove(collector)


def push(collector: DeferredUpdates) -> None:
    """From now on this one collects."""
    _collectors.stack.append(collector)


def remove(collector: DeferredUpdates) -> None:
    _collectors.stack.remove(collector)


def collector() -> DeferredUpdates | None:
    """Where updates go now, if not into the running statistics."""
    stack = _collectors.stack
    return stack[-1] if stack else None


def recomputes() -> bool:
    """Whether a backward runs: a forward inside it is activation checkpointing, whose batch has been counted."""
    return torch._C._current_graph_task_id() != -1


def interfere(renorm: Renorm | None = None) -> bool:
    """Whether a layer may not simply update its running statistics on the way now. Compiled graphs do not recompute
    updates."""
    if torch.compiler.is_compiling():
        return False
    return recomputes() or watch(renorm)


def watch(renorm: Renorm | None) -> bool:
    """Whether an update must be seen here: to be collected, or, with renorm, to be found again."""
    return collector() is not None or (renorm is not None and _may_be_checkpointed())


class Pass(NamedTuple):
    """What renorm must know to repeat a forward: the batch, and the averages as they were."""

    statistics: Tensor
    renorm: Renorm

    def distance(self, statistics: Tensor) -> float:
        return float((self.statistics - statistics).abs().nan_to_num(0).sum())


_LONGEST_HISTORY = 512
_history: Any = WeakTensorKeyDictionary()
"""The last passes that may be repeated, deque[Pass], by the `mean` of their Renorm."""


def forward(
    run: Run, room: Callable[[], Tensor], renorm: Renorm | None, update: Callable[[Tensor], Update]
) -> Tensor:
    """Runs a forward in training whose update may not simply happen on the way. `room` makes a float64 [2, C] for the
    batch's statistics."""
    if recomputes():
        return run(room(), None) if renorm is None else _forward_again(run, room, renorm)
    collected = collector()
    remembered = renorm is not None and _may_be_checkpointed()
    statistics = room()
    averages = renorm.cloned() if renorm is not None and remembered else None
    y = run(statistics, renorm)
    if renorm is not None and averages is not None:
        _history.setdefault(renorm.mean, deque(maxlen=_LONGEST_HISTORY)).append(Pass(statistics, averages))
    if collected is None:
        update(statistics).apply()
    else:
        collected._append(update(statistics))
    return y


def _forward_again(run: Run, room: Callable[[], Tensor], renorm: Renorm) -> Tensor:
    """The forward of a batch whose update has moved the averages since: with the averages of the first time, which are
    found by the batch's statistics. Of equal batches it is the last."""
    statistics = room()
    with torch.no_grad():
        run(statistics, renorm)
    passes = _history.get(renorm.mean, ())
    first = min(reversed(passes), key=lambda earlier: earlier.distance(statistics), default=None)
    return run(room(), renorm if first is None else first.renorm)


def _may_be_checkpointed() -> bool:
    """Whether this forward may be run again: torch.utils.checkpoint records no gradients or packs saved tensors."""
    return not torch.is_grad_enabled() or _packs_saved_tensors()


def _packs_saved_tensors() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def repeats() -> bool:
    """Whether this forward repeats another one or may be repeated itself, so that its input must stay."""
    return recomputes() or _packs_saved_tensors()
