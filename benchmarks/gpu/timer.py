"""How a GPU is timed. The stages know only the protocol, so that they run without one in tests."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter_ns
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], object]

GRAPH, STREAM, HOST = "graph", "stream", "host"  # how a row was timed
LEAST_CALLS = 8
LEAST_SETS = 2
LEAST_ROUNDS, MOST_ROUNDS = 5, 15
WARM_UPS = 2
HOST_SAMPLES, HOST_BURST = 50, 20  # far fewer calls than the queue of a GPU holds, so that none waits for a place


@dataclass(frozen=True)
class Recording:
    """Calls that can be made again and again; `note` says why they are not a graph."""

    replay: Callable[[], object]
    calls: int
    how: str
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """Microseconds for one call."""

    median: float
    p20: float
    p80: float
    samples: int
    how: str
    note: str = ""


class Timer(Protocol):
    """What a device must be able to do for the stages."""

    device: torch.device
    rotation_bytes: int
    """So many bytes pass by before a tensor is used again, and no cache still has it."""

    def record(self, calls: Sequence[Call], repeat: int) -> Recording:
        """All calls in turn, `repeat` times. What one returns stays alive until all others have been made once."""

    def mark(self) -> Any:
        """A point in the device's queue."""

    def microseconds(self, start: Any, end: Any) -> float:
        """Between two marks that the device has passed."""

    def synchronize(self) -> None: ...

    def free(self) -> None:
        """Gives back memory that no tensor uses any more."""

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int: ...


class CudaTimer:
    """All work goes through one stream of its own. Autograd runs a backward on the stream of its forward, so anything
    run elsewhere could not be captured here."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.rotation_bytes = max(4 * torch.cuda.get_device_properties(self.device).L2_cache_size, 256 << 20)
        self._stream = torch.cuda.Stream(self.device)

    @contextmanager
    def running(self) -> Iterator["CudaTimer"]:
        with torch.cuda.stream(self._stream):
            yield self
            torch.cuda.synchronize()

    def record(self, calls: Sequence[Call], repeat: int) -> Recording:
        all_calls = in_turn(calls, repeat)
        # Whatever happens once, such as loading kernels, tuning and allocating workspaces, cannot be captured.
        for _ in range(WARM_UPS):
            for call in calls:
                call()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                all_calls()
        except Exception as error:  # then the times have the host's gaps between launches in them, and the row says so
            torch.cuda.set_stream(self._stream)  # what a failing end of the capture leaves undone
            reason = str(error).strip().splitlines() or [type(error).__name__]
            all_calls()
            self.synchronize()
            return Recording(all_calls, len(calls) * repeat, STREAM, f"not captured: {reason[0]}")
        return Recording(graph.replay, len(calls) * repeat, GRAPH)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return 1e3 * start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())


def in_turn(calls: Sequence[Call], repeat: int) -> Call:
    """All calls, `repeat` times. If what they return were dropped at once, each would write where the last one did, in
    a cache perhaps."""

    def all_calls() -> None:
        kept: deque[object] = deque(maxlen=len(calls))
        for call in list(calls) * repeat:
            kept.append(call())

    return all_calls


def sets_for(set_bytes: int, rotation_bytes: int) -> int:
    """How many sets of tensors make up a rotation."""
    return max(LEAST_SETS, -(-rotation_bytes // set_bytes))


def measure(
    timer: Timer, contenders: Mapping[str, Sequence[Call]], end: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times the contenders side by side until `end`, at least LEAST_ROUNDS and at most MOST_ROUNDS rounds.

    Args:    contenders: by name, one call for each set of tensors.
    Returns: the times and the errors, by name.
    """
    recordings: dict[str, Recording] = {}
    errors: dict[str, str] = {}
    for name, calls in contenders.items():
        try:
            recordings[name] = timer.record(calls, -(-LEAST_CALLS // len(calls)))
        except Exception as error:  # whatever a contender lacks is a result, not the end of the benchmark
            errors[name] = str(error).strip() or type(error).__name__
    samples: dict[str, list[float]] = {name: [] for name in recordings}
    order = list(recordings)
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and monotonic() >= end:
            break
        random.Random(done).shuffle(order)
        marks = {}
        for name in order:
            recording = recordings[name]
            recording.replay()  # the device is busy when the next arrives, its caches as this contender leaves them
            start = timer.mark()
            recording.replay()
            marks[name] = start, timer.mark()
        timer.synchronize()
        for name, (start, stop) in marks.items():
            samples[name].append(timer.microseconds(start, stop) / recordings[name].calls)
    times = {name: timing(samples[name], found.how, found.note) for name, found in recordings.items()}
    return times, errors


def host_time(timer: Timer, call: Call) -> Timing:
    """The host's time for one call: until it returns, not until the device is done."""
    for _ in range(HOST_BURST):
        call()
    samples = []
    for _ in range(HOST_SAMPLES):
        timer.synchronize()
        start = perf_counter_ns()
        for _ in range(HOST_BURST):
            call()
        samples.append((perf_counter_ns() - start) / HOST_BURST / 1e3)
    return timing(samples, HOST)


def timing(microseconds: Sequence[float], how: str, note: str = "") -> Timing:
    p20, median, p80 = np.quantile(microseconds, (0.2, 0.5, 0.8))
    return Timing(float(median), float(p20), float(p80), len(microseconds), how, note)
