"""Verifies the CUDA kernels, then times them, in one command of ten minutes: `python -m benchmarks.cuda`.

Every row is on the disk once it is measured, and the page follows each stage: what a time limit cuts off is only the
rest. Needs a GPU, and torch_bn built for it.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from time import monotonic

import torch

import torch_bn

from . import machine
from .gpu import correctness, facts, features, layers, training
from .gpu.page import line, page, targets
from .gpu.plan import SHARES, STAGES, Run, stage_end
from .gpu.rows import Measurement, Place, first_line, row
from .gpu.summary import Results
from .gpu.timer import CudaTimer, Timer
from .rows import RowFile, read_rows

SECONDS = 540.0
SAVED = "cuda.csv"
RUNNERS = {
    "facts": facts.stage,
    "correctness": correctness.stage,
    "layers": layers.stage,
    "features": features.stage,
    "training": training.stage,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if there is nothing to measure on, if a result is wrong, or if something failed; else 0."""
    begin = monotonic()
    options = _options(arguments)
    obstacle = missing()
    if obstacle:
        print(obstacle, file=sys.stderr)
        return 1
    timer = CudaTimer()
    place = Place(torch.cuda.get_device_name(), machine.commit(), date.today().isoformat(), torch.__version__)
    with timer.running():
        rows = measure(timer, place, options, begin + options.seconds)
    if not rows:
        print("Nothing was measured: no case's name contains a match.", file=sys.stderr)
        return 1
    print(f"\n{targets(Results(rows))}")
    if options.output:
        print(f"\nWritten to {options.output}")
    failures = list(dict.fromkeys(found.error for found in rows if found.error))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return int(bool(failures))


def missing() -> str | None:
    """Why nothing can be measured here, in one sentence."""
    if not torch.cuda.is_available():
        return "benchmarks.cuda needs a GPU, and torch sees none."
    try:
        torch_bn.BatchNorm2d(8, fused=True).cuda()(torch.randn(4, 8, 3, 3, device="cuda"))
    except Exception as error:
        return f"benchmarks.cuda needs torch_bn's CUDA kernels, and they do not run: {first_line(error)}."
    return None


def measure(timer: Timer, place: Place, options: argparse.Namespace, end: float) -> list[Measurement]:
    """Takes the stages one by one. A wrong result ends it: what is wrong is not worth timing."""
    rows: list[Measurement] = []
    saved = options.output / SAVED if options.output else None
    with RowFile(saved, Measurement) if saved else nullcontext() as file:
        for index, stage in enumerate(options.stages):
            run = Run(timer, place, stage_end(monotonic(), end, options.stages[index:]), options.only)
            for new in _rows(stage, run):
                rows += new
                print("\n".join(map(line, new)), flush=True)
                if file:
                    file.write(new)
            if saved and rows:
                # Saved rows have fewer digits: the page is the same whenever it is made from them.
                saved.with_suffix(".md").write_text(page(read_rows(saved, Measurement)))
            if stage == "correctness" and any(found.error for found in rows if found.stage == stage):
                print("Results are wrong, so nothing is timed.", file=sys.stderr)
                break
    return rows


def _rows(stage: str, run: Run) -> Iterator[list[Measurement]]:
    """The rows of a stage; where it breaks off, a row that says so is its last."""
    try:
        for new in RUNNERS[stage](run):
            if new:
                yield new
    except Exception as error:
        traceback.print_exc()
        yield [row(run.place, stage, "the stage itself", error=f"{stage}: {first_line(error)}")]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description="Verifies and times CUDA kernels.")
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help="for all stages; default: %(default).0f")
    add("--only", type=_pattern, metavar="REGEX", help="the cases in whose name it is found, such as 'BN.ReLU.*32x64'")
    add("--stages", type=_stages, default=STAGES, metavar="NAMES", help=f"default: {','.join(SHARES)}")
    add("--output", type=Path, help=f"folder; default: {machine.RESULTS} for a full run, nothing is written for a part")
    options = parser.parse_args(arguments)
    # The rows of a part must not take the place of a full run's by accident.
    if options.output is None and options.only is None and options.stages == STAGES:
        options.output = machine.REPOSITORY / machine.RESULTS
    return options


def _stages(text: str) -> tuple[str, ...]:
    """In the order in which they run, whatever the order of the names."""
    names = text.split(",")
    unknown = sorted(set(names) - set(STAGES))
    if unknown:
        raise argparse.ArgumentTypeError(f"must be among {','.join(STAGES)}, got {','.join(unknown)!r}")
    return tuple(stage for stage in STAGES if stage in names)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
