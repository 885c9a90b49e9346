"""Whole training steps of ResNets on the CPU: torch's layers, ours, ours with what follows them fused, and compiled.

`python -m benchmarks.network` verifies, times and writes network.csv and .md; --seconds N for all networks.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import monotonic
from typing import Any

import torch

from . import fused, study
from .cases import Case, shape_name
from .gpu.plan import Allowance
from .gpu.rows import first_line
from .harness import Contender, Quantiles, measure
from .memory import Memory, memory_of
from .providers import COMPILED, OURS, TORCH
from .resnet import resnet18, resnet50
from .rows import Setting
from .steps import BY_COMPILER, EAGER, LAYOUTS, OURS_COMPILED, Batch, Step, check, expected_results, network

NETWORKS = {"ResNet-18": resnet18, "ResNet-50": resnet50}
BATCH, SIDE, CLASSES = 16, 64, 1000
LAYER_SHAPE = (BATCH, 256, SIDE // 4, SIDE // 4)  # where ResNet-50 is largest behind its stem
SECONDS = 480.0
LEAST_ROUNDS = 5
COMPILE_GUESS = 60.0  # seconds, for ResNet-50 on two cores
AUTO, ALWAYS, NEVER = "auto", "always", "never"
MB = 1e6


@dataclass(frozen=True)
class StepRow:
    """A training step, or the memory of a layer with what follows it. See README.md for the columns; a number is None
    where it was not measured, and `note` says why."""

    network: str
    provider: str
    device: str
    dtype: str
    layout: str
    shape: str
    threads: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    rounds: int
    versus_torch: float | None
    versus_compiled: float | None
    peak_MB: float | None
    kept_MB: float | None
    machine: str
    commit: str
    date: str
    torch: str
    note: str


@dataclass(frozen=True)
class Subject:
    """A network, or one of `fused.KINDS`."""

    name: str
    layout: str


def subjects() -> list[Subject]:
    return [Subject(name, layout) for name in (*fused.KINDS, *NETWORKS) for layout in LAYOUTS]


def measure_subject(compiling: str, subject: Subject, seconds: float, setting: Setting) -> list[StepRow]:
    if subject.name in fused.KINDS:
        rows = layer_rows(subject, setting)
    else:
        rows = step_rows(compiling, subject, seconds, setting)
    print("\n".join(map(_line, rows)), flush=True)
    return rows


def layer_rows(subject: Subject, setting: Setting) -> list[StepRow]:
    """What a layer and what follows it keep for the backward, besides their inputs."""
    case = Case("ResNet-50", LAYER_SHAPE, torch.float32, subject.layout)
    inputs = fused.make_inputs(case, subject.name)
    ends = fused.contenders(case, subject.name)
    fused.verify(case, subject.name, ends, inputs)
    rows = []
    for name, end in ends.items():
        memory = memory_of(partial(_graph, end, inputs))
        rows.append(row_of(subject.name, subject.layout, name, case.shape, setting, kept_MB=memory.kept / MB))
    return rows


def step_rows(compiling: str, subject: Subject, seconds: float, setting: Setting) -> list[StepRow]:
    end = monotonic() + seconds
    batch = Batch.random(BATCH, SIDE, subject.layout, CLASSES)
    steps, notes = verified_steps(compiling, subject, batch, end)
    memories = {name: step.memory() for name, step in steps.items()}
    contenders = [Contender(name, lambda step: step, lambda step: step(), [step]) for name, step in steps.items()]
    times = measure(contenders, end - monotonic(), LEAST_ROUNDS)
    shape = tuple(batch.images.shape)
    row = partial(row_of, subject.name, subject.layout, shape=shape, setting=setting)
    rows = [row(name, **_measured(name, times, memories[name])) for name in steps]
    return rows + [row(name, note=note) for name, note in notes.items()]


def verified_steps(
    compiling: str, subject: Subject, batch: Batch, end: float
) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps that can be timed, all of them right, and why a compiled one is not among them."""
    make = NETWORKS[subject.name]
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    expected = expected_results(make, subject.layout, batch)
    for name in EAGER:
        steps[name] = Step(network(make, name, subject.layout), batch)
        check(_name(subject, name), steps[name].results(), expected)
    if compiling == NEVER:
        return steps, notes
    torch._dynamo.reset()  # else networks of before count towards the limit of what one piece of code is compiled for
    allowance = Allowance(end - monotonic(), COMPILE_GUESS)
    for name in BY_COMPILER:
        if compiling == AUTO and not allowance.may_begin():
            notes[name] = "not compiled: no time left"
            continue
        begin = monotonic()
        try:
            step = Step(network(make, name, subject.layout), batch, compiled=True)
            found = step.results()
        except Exception as error:  # what the compiler cannot do is a result of the benchmark, not its end
            notes[name] = first_line(error).replace("|", "/")
        else:
            check(_name(subject, name), found, expected)
            steps[name] = step
        allowance.spend(monotonic() - begin)
    return steps, notes


def table(rows: Sequence[StepRow]) -> str:
    """Steps: milliseconds, times the speed of torch's layer, eager and compiled, and memory. Then that of layers."""
    lines = [
        f"| network | layout | layers | ms | times `{TORCH}` | times `{COMPILED}` | peak MB | kept MB |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        if row.network in fused.KINDS:
            continue
        speeds = (_cell(row.versus_torch, ".2f", "x"), _cell(row.versus_compiled, ".2f", "x"))
        cells = (_cell(row.median_ms, ".4g"), *speeds, _cell(row.peak_MB, ".4g"), _cell(row.kept_MB, ".4g"))
        first = row.note if row.median_ms is None else cells[0]
        lines.append("| " + " | ".join((row.network, row.layout, row.provider, first, *cells[1:])) + " |")
    lines += ["", "| layers | layout | by | kept MB |", "|---|---|---|---|"]
    for row in rows:
        if row.network in fused.KINDS:
            kept = _cell(row.kept_MB, ".4g")
            lines.append(f"| {row.network} | {row.layout} | {row.provider} | {kept} |")
    return "\n".join(lines)


def page(rows: Sequence[StepRow]) -> str:
    first = rows[0]
    return f"""# Whole training steps on the CPU

{first.machine}, {first.threads} threads, torch {first.torch}, commit {first.commit}, {first.date}.

Forward, loss, backward and a step of SGD with momentum, on {BATCH} float32 images of {SIDE}x{SIDE}, measured side by
side. `{TORCH}` has nn.BatchNorm2d, `{fused.UNFUSED}` is the same network after torch_bn.convert, `{OURS}` after
torch_bn.fuse, too; `{COMPILED}` and `{OURS_COMPILED}` are the first and the last of these compiled. Peak: the most
that a step has allocated at once. Kept: what its forward leaves for the backward. Both come on top of parameters,
momentum and images, and are exact.

The last table has a layer and what follows it alone, on {shape_name(LAYER_SHAPE)}: what it keeps for the backward
besides its inputs. In a network the next convolution keeps the output in any case. Of the residual our fused sum keeps
a bit for each element.

{table(rows)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = study.parser("network", __doc__, SECONDS)
    parser.add_argument(
        "--compile", choices=(AUTO, ALWAYS, NEVER), default=AUTO, help="auto: while a network's time lasts (default)"
    )
    options = parser.parse_args(arguments)
    return study.run(options, subjects(), partial(measure_subject, options.compile), table, page, StepRow)


def _graph(end: fused.End, inputs: fused.Inputs) -> Any:
    """In place of the output, which would be alive whether or not the backward needs it."""
    return end.call(*inputs.arguments).grad_fn


def _measured(name: str, times: dict[str, Quantiles], memory: Memory) -> dict[str, Any]:
    time = times[name]
    return {
        "median_ms": time.median, "p20_ms": time.p20, "p80_ms": time.p80, "rounds": time.rounds,
        "versus_torch": times[TORCH].median / time.median,
        "versus_compiled": times[COMPILED].median / time.median if COMPILED in times else None,
        "peak_MB": memory.peak / MB, "kept_MB": memory.kept / MB,
    }  # fmt: skip


def row_of(
    network: str, layout: str, provider: str, shape: tuple[int, ...], setting: Setting, **measured: Any
) -> StepRow:
    numbers = ("median_ms", "p20_ms", "p80_ms", "versus_torch", "versus_compiled", "peak_MB", "kept_MB")
    values: dict[str, Any] = {**dict.fromkeys(numbers), "rounds": 0, "note": "", **asdict(setting), **measured}
    values |= {"dtype": "float32", "layout": layout, "shape": shape_name(shape)}
    return StepRow(network=network, provider=provider, **values)


def _name(subject: Subject, provider: str) -> str:
    return f"{provider} in {subject.name} {subject.layout}"


def _line(row: StepRow) -> str:
    numbers = {"ms": row.median_ms, "x": row.versus_torch, "MB at most": row.peak_MB, "MB kept": row.kept_MB}
    texts = [f"{number:.4g} {unit}" for unit, number in numbers.items() if number is not None]
    return f"{row.network:<12} {row.layout:<14} {row.provider:<24} " + (row.note or ", ".join(texts))


def _cell(number: float | None, form: str, unit: str = "") -> str:
    return "-" if number is None else f"{number:{form}}{unit}"


if __name__ == "__main__":
    sys.exit(main())
