"""What renorm and ghost batches cost: the layer with them beside the plain one, and beside renorm in plain torch.

`python -m benchmarks.features` verifies, times and writes features.csv and .md; --seconds N for all cases.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from time import monotonic
from typing import Any

import torch
from torch import nn

import torch_bn

from . import machine, study
from .cases import DIRECTIONS, Case, Tensors, all_cases
from .harness import measure, rotation
from .providers import Layer
from .report import line
from .rows import Row, Setting, timed_rows
from .verification import GRADIENTS, TOLERANCE, relative_error

PLAIN, COMPOSITE = "torch_bn", "composite renorm"
FEW, MANY = 2, 8  # ghost batches
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}},
    f"{FEW} ghosts": {"ghosts": FEW},
    f"{MANY} ghosts": {"ghosts": MANY},
    f"renorm+{MANY} ghosts": {"renorm": True, "ghosts": MANY},
    COMPOSITE: {"renorm": True, "fused": False},
}
MEASURED = DIRECTIONS[:2]
SECONDS = 300.0
LEAST_ROUNDS = 9


@dataclass(frozen=True)
class Variant:
    """A layer of ours with options, and how it is built for a case."""

    name: str
    options: dict[str, Any]

    def module(self, case: Case, dtype: torch.dtype, **more: Any) -> nn.Module:
        options = {**self.options, **more}
        ghosts = options.pop("ghosts", None)
        size = None if ghosts is None else -(-case.shape[0] // ghosts)
        layer = torch_bn.BatchNorm2d(case.channels, dtype=dtype, virtual_batch_size=size, **options)
        layer.load_state_dict(case.state())
        return layer

    def verified(self, case: Case, tensors: Tensors) -> Layer:
        """The layer, after two steps that agree with the same options in plain torch operations on float64."""
        exact = self.module(case, torch.float64, fused=False)
        layer = Layer(module := self.module(case, case.parameters), module)
        for _ in range(2):
            x = tensors.x.detach().double().requires_grad_()
            wanted = exact(x)
            wanted_gradients = torch.autograd.grad(wanted, (x, *exact.parameters()), tensors.dy.double())
            y = module(tensors.x)
            found = (y.detach(), *layer.gradients(y, tensors), *(module.state_dict()[name] for name in _STATISTICS))
            expected = (wanted.detach(), *wanted_gradients, *(exact.state_dict()[name] for name in _STATISTICS))
            for name, actual, right in zip(("y", *GRADIENTS, *_STATISTICS), found, expected, strict=True):
                error = relative_error(actual, right)
                if not error <= TOLERANCE[case.dtype]:
                    raise ValueError(f"{self.name} on {case.name}: {name} is off float64 by {error:.1e}")
        return layer


_STATISTICS = ("running_mean", "running_var")
VARIANTS = [Variant(name, options) for name, options in OPTIONS.items()]


def cases() -> list[Case]:
    """The layers of ResNet-50, all with tensors above 1 MiB, in every dtype and layout."""
    return [case for case in all_cases() if case.group == "ResNet-50"]


def measure_case(case: Case, seconds: float, setting: Setting) -> list[Row]:
    end = monotonic() + seconds
    tensors = case.tensors()
    layers = {variant.name: variant.verified(case, tensors) for variant in VARIANTS}
    depth = rotation(case.tensor_bytes, machine.last_level_cache())
    sets = {name: [tensors.clone() for _ in range(depth)] for name in layers}
    rows: list[Row] = []
    for index, direction in enumerate(MEASURED):
        ours = {name: layer.contender(name, direction, sets[name]) for name, layer in layers.items()}
        slow = [ours.pop(COMPOSITE)]  # a call of which is as long as twenty of the others
        times = measure(slow, 0.0, least_rounds=LEAST_ROUNDS)
        times |= measure(list(ours.values()), (end - monotonic()) / (len(MEASURED) - index), least_rounds=LEAST_ROUNDS)
        rows += timed_rows(case, direction, {name: times[name] for name in layers}, setting)
        print(line(rows[-len(times) :]), flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Times of the plain layer: geometric means over the shapes, and the worst shape."""
    plain = {(row.case, row.direction): row for row in rows if row.provider == PLAIN}
    ratios: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        usual = plain[row.case, row.direction].median_ms
        if row.median_ms and usual:
            ratios[row.dtype, row.layout, row.provider, row.direction].append(row.median_ms / usual)
    names = [variant.name for variant in VARIANTS if variant.name != PLAIN]
    lines = ["| dtype | layout | direction | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for dtype, layout in dict.fromkeys((row.dtype, row.layout) for row in rows):
        for direction in MEASURED:
            cells = [_cell(ratios[dtype, layout, name, direction], geometric_mean, max) for name in names]
            lines.append(f"| {dtype} | {layout} | {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(ratios: Sequence[float], *summaries: Callable[[Sequence[float]], float]) -> str:
    mean, worst = (summary(ratios) for summary in summaries)
    return f"{mean:.2f} ({worst:.2f})"


def page(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"""# What renorm and ghost batches cost

{first.machine}, {first.threads} threads, torch {first.torch}, commit {first.commit}, {first.date}.

The time of a layer with the option over that of the plain layer, measured side by side on ResNet-50's shapes, all of
more than 1 MiB, whose batch is 8 to 32: geometric mean over the shapes, and the worst shape in brackets.
`{COMPOSITE}` is the same layer in plain torch operations (`fused=False`).

{table(rows)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = study.parser("features", __doc__, SECONDS).parse_args(arguments)
    return study.run(options, cases(), measure_case, table, page)


if __name__ == "__main__":
    sys.exit(main())
