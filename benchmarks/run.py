"""Takes the cases one by one: verifies every provider, times them side by side, and yields their rows."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch

from .cases import DIRECTIONS, Case, Tensors
from .harness import quantiles, rotation, sample
from .machine import last_level_cache
from .providers import COPY, Layer, Provider, copy_contender
from .rows import Row, Setting, failed_row, timed_rows
from .verification import check, reference_results

# Where in memory a contender's tensors happen to lie makes some of them a few percent faster, for as long as they live.
PLACEMENTS = 3


@dataclass(frozen=True)
class Effort:
    """For a whole run: the seconds it may take; of a measurement: the rounds and seconds even if that takes longer."""

    seconds: float
    least_rounds: int
    least_seconds: float = 0.0


def measure_cases(
    cases: Sequence[Case], providers: Sequence[Provider], copy: bool, effort: Effort, setting: Setting
) -> Iterator[list[Row]]:
    """Yields the rows of one case and direction at a time.

    The time that is left is shared evenly by the cases that are left; compilation and verification count.
    """
    end = monotonic() + effort.seconds
    for index, case in enumerate(cases):
        now = monotonic()
        share = replace(effort, seconds=(end - now) / (len(cases) - index))
        yield from _measure_case(case, providers, copy, share, setting)


def _measure_case(
    case: Case, providers: Sequence[Provider], copy: bool, effort: Effort, setting: Setting
) -> Iterator[list[Row]]:
    end = monotonic() + effort.seconds
    tensors = case.tensors()
    layers, errors = _verify(case, providers, tensors)
    for name, error in errors.items():
        for direction in DIRECTIONS:
            yield [failed_row(case, direction, name, f"{name} on {case.name}: {error}", setting)]
    names = [*layers, *[COPY] * copy]
    if not names:
        return
    depth = 1 if case.warm else rotation(case.tensor_bytes, last_level_cache())
    samples: dict[str, dict[str, list[float]]] = {direction: defaultdict(list) for direction in DIRECTIONS}
    for placement in range(PLACEMENTS):
        # New tensors before the old ones go, or they would lie in the same pages.
        sets = {name: [tensors.clone() for _ in range(depth)] for name in names}
        for index, direction in enumerate(DIRECTIONS):
            contenders = [layer.contender(name, direction, sets[name]) for name, layer in layers.items()]
            if copy:
                contenders.append(copy_contender(sets[COPY]))
            left = (PLACEMENTS - placement) * len(DIRECTIONS) - index
            with torch.set_grad_enabled(direction != "inference"):
                seconds = max((end - monotonic()) / left, effort.least_seconds / PLACEMENTS)
                times = sample(contenders, seconds, -(-effort.least_rounds // PLACEMENTS))
            for name, values in times.items():
                samples[direction][name] += values
    for direction, times in samples.items():
        yield timed_rows(case, direction, {name: quantiles(values) for name, values in times.items()}, setting)


def _verify(case: Case, providers: Sequence[Provider], tensors: Tensors) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that are right on these tensors, and what is wrong with the others."""
    layers, errors = {}, {}
    expected = reference_results(case, tensors)
    for provider in providers:
        try:
            layer = provider.layer(case)
            check(layer, case, tensors, expected)
            layers[provider.name] = layer
        except Exception as error:  # whatever goes wrong in a provider is a result of the benchmark, not its end
            errors[provider.name] = str(error)
    return layers, errors
