"""Times contenders side by side: one process, rounds in an order drawn anew, in which each runs behind itself.

A contender owns several sets of tensors and takes them in turn, and what it made from a set stays alive until that set
is used again, as activations do in training. With enough sets, a tensor has left the cache when its turn comes.
"""

import gc
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

SHORTEST_SAMPLE = 100_000  # nanoseconds: a sample repeats a faster call, so that reading the clock does not count
LEAST_WARM_UP = 3


@dataclass(frozen=True)
class Contender:
    """`run(prepare(tensors))` does the work; only `run` is timed. What `prepare` returns is used once."""

    name: str
    prepare: Callable[[Any], Any]
    run: Callable[[Any], Any]
    sets: Sequence[Any]


@dataclass(frozen=True)
class Quantiles:
    """Of the samples of one contender, in milliseconds for each call."""

    median: float
    p20: float
    p80: float
    rounds: int


def rotation(tensor_bytes: int, cache_bytes: int) -> int:
    """How many sets a contender needs so that tensors of its own of the size of a cache pass by before one set is used
    again: behind itself it finds nothing there."""
    return 1 + -(-cache_bytes // tensor_bytes)


def measure(contenders: Sequence[Contender], seconds: float, least_rounds: int) -> dict[str, Quantiles]:
    """Times every contender for `seconds` in all, at least `least_rounds` rounds, and returns quantiles by name."""
    return {name: quantiles(times) for name, times in sample(contenders, seconds, least_rounds).items()}


def sample(contenders: Sequence[Contender], seconds: float, least_rounds: int) -> dict[str, list[float]]:
    """As `measure`, but returns the samples: nanoseconds for each call.

    The garbage collector rests meanwhile. A sample consists of as many calls for every contender alike as the fastest
    needs to fill SHORTEST_SAMPLE.
    """
    lanes = [_Lane(contender) for contender in contenders]
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # Until every set has been used, results still go to memory that was never touched.
        rounds = max(LEAST_WARM_UP, *(len(contender.sets) for contender in contenders))
        warm_up = [min(lane.sample(1) for lane in lanes) for _ in range(rounds)]
        calls = max(1, round(SHORTEST_SAMPLE / min(warm_up)))
        for lane in lanes:
            lane.refill(calls)
        end = perf_counter() + seconds
        for done in count():
            if done >= least_rounds and perf_counter() >= end:
                break
            order.shuffle(lanes)
            for lane in lanes:
                lane.sample(calls)  # the cache is left as this contender leaves it, not another
                samples[lane.name].append(lane.sample(calls) / calls)
    finally:
        if collecting:
            gc.enable()
    return samples


def quantiles(nanoseconds: Sequence[float]) -> Quantiles:
    p20, median, p80 = np.quantile(nanoseconds, (0.2, 0.5, 0.8)) / 1e6
    return Quantiles(float(median), float(p20), float(p80), len(nanoseconds))


class _Lane:
    """The sets of one contender, oldest first, each with what is prepared from it and what the last sample made."""

    def __init__(self, contender: Contender) -> None:
        self.name = contender.name
        self._contender = contender
        self._queue: deque[tuple[Any, list[Any], list[Any]]] = deque((tensors, [], []) for tensors in contender.sets)
        self.refill(1)

    def refill(self, calls: int) -> None:
        self._queue = deque((tensors, self._prepared(tensors, calls), made) for tensors, _, made in self._queue)

    def sample(self, calls: int) -> int:
        """Nanoseconds of `calls` runs on the set that has rested longest."""
        tensors, prepared, made = self._queue.popleft()
        made.clear()
        run = self._contender.run
        start = perf_counter_ns()
        for item in prepared:
            made.append(run(item))
        elapsed = perf_counter_ns() - start
        self._queue.append((tensors, self._prepared(tensors, calls), made))
        return elapsed

    def _prepared(self, tensors: Any, calls: int) -> list[Any]:
        return [self._contender.prepare(tensors) for _ in range(calls)]
