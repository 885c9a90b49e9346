"""What the tests of the CUDA benchmark share: a timer in place of the GPU's, runs, and rows."""

import re
from pathlib import Path
from time import monotonic, perf_counter_ns

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.gpu import layers
from benchmarks.gpu.contenders import DIRECTIONS
from benchmarks.gpu.network import NETWORK
from benchmarks.gpu.plan import Run
from benchmarks.gpu.rows import Measurement, Place, row
from benchmarks.gpu.targets import HALF
from benchmarks.gpu.timer import (
    GRAPH,
    Recording,
    Timing,
    in_turn,
)

REPOSITORY = Path(__file__).resolve().parent.parent
PLACE = Place("a GPU", "abcdef0", "2000-01-31", "2.13.0")
CPU = torch.device("cpu")
SMALL = Case("ResNet-50", (4, 6, 5, 5), torch.float32, "channels_last")



class HostTimer:
    """Keeps the promises of a timer on the CPU, and counts what it is asked for."""

    device = CPU
    rotation_bytes = 1

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, calls, repeat):
        self.recorded += 1
        return Recording(in_turn(calls, repeat), len(calls) * repeat, GRAPH)

    def mark(self):
        return perf_counter_ns()

    def microseconds(self, start, end):
        return (end - start) / 1e3

    def synchronize(self):
        pass

    free = reset_peak = synchronize

    def peak_bytes(self):
        return 7_000_000


def a_run(seconds: float = 0.0, only: str | None = None) -> Run:
    return Run(HostTimer(), PLACE, monotonic() + seconds, re.compile(only) if only else None)


def flat(stage) -> list[Measurement]:
    return [found for rows in stage for found in rows]


def layer_rows(us, batch: int = 128, form: tuple[str, str] = HALF, group=NETWORK, **columns) -> list[Measurement]:
    """A row for every layer of the network and direction; `us` gives the times by provider."""
    return [
        row(
            PLACE, layers.LAYERS, layer.kind,
            Case("ResNet-50", (batch, layer.channels, layer.side, layer.side), getattr(torch, form[0]), form[1]),
            Timing(found, found, found, 15, GRAPH), direction=direction, provider=provider, **columns,
        )
        for layer in group for direction in DIRECTIONS for provider, found in us.items()
    ]  # fmt: skip


def small_model() -> nn.Module:
    """In place of ResNet-50."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
    )
