"""The command line of the benchmarks: chooses what is measured, and says what came of it."""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from . import machine
from .cases import all_cases, quick_cases
from .gate import slower_than_torch
from .providers import COPY, DEFAULT, NAMES, QUICK, find
from .report import line, summary, write
from .rows import Row, RowFile, Setting, read_rows
from .run import Effort, measure_cases

DEVICE = "cpu"
SAVED = f"{DEVICE}.csv"
BUSY = 0.5  # processes besides this one, which has only just started
FULL_EFFORT = Effort(seconds=510.0, least_rounds=9, least_seconds=1.0)
QUICK_EFFORT = Effort(seconds=4.0, least_rounds=5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a provider failed its verification, or --require-not-slower found a slower row; else 0."""
    options = _options(arguments)
    rows = read_rows(options.output / SAVED) if options.render else _measure(options)
    if not rows:
        print("Nothing was measured: none of the providers can run here.", file=sys.stderr)
        return 1
    print(f"\nTimes torch's speed, and share of the copy bandwidth; geometric means\n\n{summary(rows)}")
    if options.output:
        write(rows, options.output)
        print(f"\nWritten to {options.output}")
    failures = list(dict.fromkeys(row.error for row in rows if row.error))
    slower = slower_than_torch(rows) if options.require_not_slower else []
    for complaint in (*(f"FAILED: {failure}" for failure in failures), *slower):
        print(complaint, file=sys.stderr)
    return int(bool(failures) or any(found.beyond_noise for found in slower))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Verifies and times batch norms.")
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke of seconds on small tensors")
    add("--only", type=_pattern, metavar="REGEX", help="the cases in whose name it is found, such as 'tiny float32'")
    add("--providers", nargs="+", choices=NAMES, help=f"default: {' '.join(DEFAULT)}; {' '.join(QUICK)} if --quick")
    add("--threads", type=int, default=machine.cores(), help="of every provider; default: all cores, here %(default)s")
    add("--seconds", type=float, help=f"for all cases, compilation included; default: {FULL_EFFORT.seconds:.0f}")
    add("--output", type=Path, help=f"folder; default: {machine.RESULTS}/TABLE for a full run, nothing for a part")
    add("--render", action="store_true", help="measure nothing, write tables and picture again from the saved rows")
    add("--require-not-slower", action="store_true", help="fail if torch_bn is slower than torch in a training row")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    # The rows of a part must not take the place of a full run's by accident.
    if options.output is None and not (options.quick or options.only or options.providers):
        options.output = machine.cpu_results()
    if options.render and not (options.output and (options.output / SAVED).is_file()):
        parser.error(f"--render needs the rows of an earlier run, {SAVED} in the folder of --output, {options.output}")
    options.cases = [
        case for case in (quick_cases() if options.quick else all_cases())
        if options.only is None or options.only.search(case.name)
    ]  # fmt: skip
    if not options.cases:
        parser.error(f"--only must match a case such as {all_cases()[0].name!r}, got {options.only.pattern!r}")
    return options


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None


def _measure(options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(options.threads)
    machine.keep_memory()
    if machine.load() > BUSY:
        print(
            f"The machine was busy in the last minute (load {machine.load():.1f}): what else runs distorts the times."
        )
    setting = Setting(
        DEVICE, options.threads, machine.description(), machine.commit(), date.today().isoformat(), torch.__version__
    )
    names = options.providers or (QUICK if options.quick else DEFAULT)
    effort = QUICK_EFFORT if options.quick else FULL_EFFORT
    if options.seconds is not None:
        effort = replace(effort, seconds=options.seconds)
    measured = measure_cases(options.cases, find(names), COPY in names, effort, setting)
    rows: list[Row] = []
    with RowFile(options.output / SAVED) if options.output else nullcontext() as file:
        for new in measured:
            rows += new
            print(line(new), flush=True)
            if file:
                file.write(new)
    # Saved rows have fewer digits: tables of them are the same whenever they are rendered.
    return read_rows(options.output / SAVED) if file else rows


if __name__ == "__main__":
    sys.exit(main())
