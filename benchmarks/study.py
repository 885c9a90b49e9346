"""A measurement beside the main one, as a command: `python -m benchmarks.NAME` writes NAME.csv and .md."""

import argparse
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from time import monotonic
from typing import TypeVar

import torch

from . import machine
from .rows import Row, RowFile, Setting, read_rows

Subject = TypeVar("Subject")
RowType = TypeVar("RowType")


def parser(name: str, about: str | None, seconds: float) -> argparse.ArgumentParser:
    """What every study can be told; one with more to tell adds it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--seconds", type=float, default=seconds, help="for all cases; default: %(default)s")
    parser.add_argument("--output", type=Path, default=machine.cpu_results(), help="folder")
    parser.set_defaults(name=name)
    return parser


def run(
    options: argparse.Namespace,
    subjects: Sequence[Subject],
    measure: Callable[[Subject, float, Setting], list[RowType]],
    table: Callable[[Sequence[RowType]], str],
    page: Callable[[Sequence[RowType]], str],
    row_type: type[RowType] = Row,  # type: ignore[assignment]
) -> int:
    """Measures one subject after another, each in its share of the time, and writes rows as they come."""
    torch.set_num_threads(machine.cores())
    machine.keep_memory()
    setting = Setting(
        "cpu", machine.cores(), machine.description(), machine.commit(), date.today().isoformat(), torch.__version__
    )
    path = options.output / f"{options.name}.csv"
    end = monotonic() + options.seconds
    with RowFile(path, row_type) as file:
        for index, subject in enumerate(subjects):
            file.write(measure(subject, (end - monotonic()) / (len(subjects) - index), setting))
    rows = read_rows(path, row_type)
    path.with_suffix(".md").write_text(page(rows))
    print(f"\n{table(rows)}\n\nWritten to {options.output}")
    return 0
