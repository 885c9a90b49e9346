"""What fusing saves: a layer with what follows it in networks, ours in one pass beside torch's operations.

`python -m benchmarks.fused` verifies, times and writes fused.csv and .md; --seconds N for all cases.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean
from time import monotonic

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bn

from . import machine, study
from .cases import TRAINING, Case, Tensors, all_cases
from .harness import Contender, measure, rotation
from .providers import COPY, OURS, TORCH, copy_contender
from .report import line
from .rows import Row, Setting, timed_rows
from .traffic import PASSES
from .verification import TOLERANCE, relative_error

UNFUSED = "torch_bn, unfused"
SECONDS = 360.0
LEAST_ROUNDS = 7
NEAR = 0.05  # of the kink: more than a half type rounds by
SHAPES = {(64, 56), (256, 56), (128, 28), (512, 28), (1024, 14), (2048, 7)}  # channels and side


@dataclass(frozen=True)
class Kind:
    """What follows the layer."""

    activation: str
    after: Callable[[Tensor], Tensor]  # torch's
    adds: bool = False

    def passes(self, direction: str) -> int:
        """Tensors of the size of the input: the least that must be read and written. A bit for each element says where
        ReLU let the gradient of a sum through."""
        return PASSES[direction] + (len(direction.split("+")) if self.adds else 0)


relu = partial(F.relu, inplace=True)
KINDS = {
    "BN+ReLU": Kind("relu", relu),
    "BN+add+ReLU": Kind("relu", relu, adds=True),
    "BN+SiLU": Kind("silu", F.silu),
    "BN+GELU": Kind("gelu", F.gelu),
}


@dataclass(frozen=True)
class Inputs:
    """Those of the layer, and the residual if there is one."""

    tensors: Tensors
    residual: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (self.tensors.x,) if self.residual is None else (self.tensors.x, self.residual)

    def clone(self) -> "Inputs":
        residual = None if self.residual is None else self.residual.detach().clone().requires_grad_()
        return Inputs(self.tensors.clone(), residual)


def make_inputs(case: Case, kind: str) -> Inputs:
    return Inputs(case.tensors(), case.tensors(seed=7).dy.requires_grad_() if KINDS[kind].adds else None)


@dataclass(frozen=True)
class End:
    """A layer and what is called for it and what follows."""

    module: nn.Module
    call: Callable[..., Tensor]

    def gradients(self, y: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (*inputs.arguments, *self.module.parameters()), inputs.tensors.dy)

    def contender(self, name: str, direction: str, sets: Sequence[Inputs]) -> Contender:
        if direction == "forward":
            return Contender(name, lambda inputs: inputs, lambda inputs: self.call(*inputs.arguments), sets)
        if direction == "backward":
            prepare = lambda inputs: (self.call(*inputs.arguments), inputs)  # noqa: E731
            return Contender(name, prepare, lambda made: self.gradients(*made), sets)
        return Contender(name, lambda i: i, lambda i: self.gradients(self.call(*i.arguments), i), sets)


def in_steps(module: nn.Module, kind: str) -> End:
    """As torchvision's blocks do it: the sum and the ReLU in place."""

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = module(x)
        if residual is not None:
            y += residual
        return KINDS[kind].after(y)

    return End(module, call)


def contenders(case: Case, kind: str, dtype: torch.dtype | None = None) -> dict[str, End]:
    def loaded(module: nn.Module) -> nn.Module:
        module.load_state_dict(case.state())
        return module

    kept = dtype or case.parameters
    fused = loaded(torch_bn.BatchNorm2d(case.channels, dtype=kept, activation=KINDS[kind].activation, fused=True))
    return {
        TORCH: in_steps(loaded(nn.BatchNorm2d(case.channels, dtype=kept)), kind),
        UNFUSED: in_steps(loaded(torch_bn.BatchNorm2d(case.channels, dtype=kept, fused=True)), kind),
        OURS: End(fused, fused),
    }


def verify(case: Case, kind: str, ends: dict[str, End], inputs: Inputs) -> None:
    """Outputs and gradients of all against torch's operations in float64; no gradient comes in where rounding decides
    on which side of ReLU's kink an element lies."""
    exact = contenders(case, kind, torch.float64)[TORCH].module
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs.arguments]
    before = exact(wide[0]) + (wide[1] if inputs.residual is not None else 0)
    dy = inputs.tensors.dy.masked_fill(before.detach().abs() < NEAR, 0)
    wanted = KINDS[kind].after(before.clone())
    expected = (wanted.detach(), *torch.autograd.grad(wanted, (*wide, *exact.parameters()), dy.double()))
    given = Inputs(replace(inputs.tensors, dy=dy), inputs.residual)
    for name, end in ends.items():
        y = end.call(*given.arguments)
        found = (y.detach(), *end.gradients(y, given))
        for place, (actual, right) in enumerate(zip(found, expected, strict=True)):
            error = relative_error(actual, right)
            if not error <= TOLERANCE[case.dtype]:
                raise ValueError(f"{name} on {case.name}: result {place} is off float64 by {error:.1e}")


def cases() -> list[Case]:
    return [case for case in all_cases() if case.group == "ResNet-50" and case.shape[1:3] in SHAPES]


def measure_case(subject: tuple[Case, str], seconds: float, setting: Setting) -> list[Row]:
    case, kind = subject
    end = monotonic() + seconds
    inputs = make_inputs(case, kind)
    ends = contenders(case, kind)
    verify(case, kind, ends, inputs)
    depth = rotation(case.tensor_bytes, machine.last_level_cache())
    sets = {name: [inputs.clone() for _ in range(depth)] for name in (*ends, COPY)}
    rows: list[Row] = []
    for index, direction in enumerate(TRAINING):
        chosen = [layer.contender(name, direction, sets[name]) for name, layer in ends.items()]
        chosen.append(copy_contender([one.tensors for one in sets[COPY]]))
        times = measure(chosen, (end - monotonic()) / (len(TRAINING) - index), least_rounds=LEAST_ROUNDS)
        rows += [of_kind(row, kind) for row in timed_rows(case, direction, times, setting)]
        print(kind, line(rows[-len(times) :]), flush=True)
    return rows


def of_kind(row: Row, kind: str) -> Row:
    """The row of a batch norm as that of one with what follows it, by the bytes that this needs."""
    if row.provider == COPY or not row.GB_per_s:
        return replace(row, op=kind)
    factor = KINDS[kind].passes(row.direction) / PASSES[row.direction]
    of_copy = row.of_copy and row.of_copy * factor
    return replace(row, op=kind, bytes=round(row.bytes * factor), GB_per_s=row.GB_per_s * factor, of_copy=of_copy)


def table(rows: Sequence[Row]) -> str:
    """Times torch's speed, geometric means over the shapes, the worst shape in brackets; and the share of a copy's."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.provider in (UNFUSED, OURS) and row.versus_torch and row.of_copy:
            found[row.op, row.dtype, row.layout, row.provider, row.direction].append(row)
    lines = ["| layers | dtype | layout | by | " + " | ".join(TRAINING) + " |", "|---" * (4 + len(TRAINING)) + "|"]
    for key in dict.fromkeys(key[:4] for key in found):
        cells = []
        for direction in TRAINING:
            speeds = [row.versus_torch or 0 for row in found[(*key, direction)]]
            shares = [row.of_copy or 0 for row in found[(*key, direction)]]
            cells.append(f"{geometric_mean(speeds):.2f}x ({min(speeds):.2f}), {geometric_mean(shares):.0%}")
        lines.append("| " + " | ".join((*key, *cells)) + " |")
    return "\n".join(lines)


def page(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"""# What fusing saves

{first.machine}, {first.threads} threads, torch {first.torch}, commit {first.commit}, {first.date}.

Times the speed of `nn.BatchNorm2d`, `+=` and `F.relu(..., inplace=True)`, `F.silu` or `F.gelu`, measured side by side
on ResNet-50's shapes: geometric mean over the shapes, the worst shape in brackets, and the share of the speed of a copy
on the least bytes. `{UNFUSED}` is our layer with torch's operations behind it; `{OURS}` does all in one pass.

{table(rows)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = [(case, kind) for kind in KINDS for case in cases()]
    options = study.parser("fused", __doc__, SECONDS).parse_args(arguments)
    return study.run(options, chosen, measure_case, table, page)


if __name__ == "__main__":
    sys.exit(main())
