"""What the CUDA kernels are meant to reach on an H200, and whether the rows show it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import features
from .contenders import COMPILED, EAGER, OURS
from .summary import Results, whole_mean
from .training import OURS_COMPILED

DEVICE = "NVIDIA H200"
NOT_MEASURED = "not measured"
HALF, SINGLE = ("bfloat16", "channels_last"), ("float32", "contiguous")


@dataclass(frozen=True)
class Target:
    """`must` is asked for, `aim` hoped for. Smaller is better where the aim is smaller."""

    name: str
    must: float
    aim: float
    unit: str
    value: Callable[[Results], float | None]

    def verdict(self, found: float | None) -> str:
        if found is None:
            return NOT_MEASURED
        sign = -1 if self.aim < self.must else 1
        if sign * found < sign * self.must:
            return "not met"
        return "met, and the aim" if sign * found >= sign * self.aim else "met"

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{self.unit}"


def _speed(group: str, other: str, form: tuple[str, str], direction: str, results: Results) -> float | None:
    return results.speed(group, other, 128, *form, direction).whole


def _cost(name: str, direction: str, results: Results) -> float | None:
    return whole_mean(results.feature(name, direction), len(features.SHAPES))


def _layers(name: str, group: str, other: str, form: tuple[str, str], **numbers: tuple[float, float]) -> list[Target]:
    return [
        Target(f"{name}, {direction}", must, aim, "x", partial(_speed, group, other, form, direction))
        for direction, (must, aim) in numbers.items()
    ]


TARGETS = [
    *_layers("53 layers with their ReLU and addition, bfloat16 channels_last, batch 128: times eager",
             "as in the network", EAGER, HALF, forward=(2.0, 3.0), backward=(1.6, 2.4)),
    *_layers("the same: times torch.compile", "as in the network", COMPILED, HALF,
             forward=(1.15, 1.45), backward=(1.3, 1.9)),
    *_layers("53 layers as BN alone, bfloat16 channels_last, batch 128: times eager", "BN alone", EAGER, HALF,
             forward=(1.5, 2.3), backward=(1.3, 2.0)),
    *_layers("53 layers as BN alone, float32 contiguous, batch 128: times eager", "BN alone", EAGER, SINGLE,
             forward=(1.5, 2.5), backward=(1.5, 2.3)),
    *[Target(f"share of the copy bandwidth, tensors of 100 MB and more, {direction}", 0.85, 0.92, "%",
             lambda results, direction=direction: results.of_copy_when_large(direction))
      for direction in ("forward", "backward")],
    *[Target(f"{name} over plain, {direction}", must, aim, "x", partial(_cost, name, direction))
      for name, must, aim in (("renorm", 1.05, 1.01), ("ghost", 1.10, 1.00)) for direction in features.MEASURED],
    Target("ResNet-50, mixed precision, step with batch 256: times eager", 1.12, 1.20, "x",
           lambda results: results.step_speed(EAGER, OURS, 256)),
    Target("the same, both compiled", 1.03, 1.08, "x",
           lambda results: results.step_speed(COMPILED, OURS_COMPILED, 256)),
    Target("the host's time for one forward call", 12.0, 8.0, " us", Results.host_us),
]  # fmt: skip
