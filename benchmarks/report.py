"""Turns rows into what people read: lines while it runs, Markdown tables, JSON and a picture."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TypeVar

from .cases import DIRECTIONS
from .chart import draw
from .means import NOTHING, Mean, means, series
from .providers import COPY, TORCH
from .rows import Row

Item = TypeVar("Item")


def line(rows: Sequence[Row]) -> str:
    """The rows of one case and direction in one line."""
    first = rows[0]
    case = f"{first.group} {first.dtype}/{first.parameters} {first.layout} {first.shape} {first.direction}"
    return f"{case:<78} " + "   ".join(f"{row.provider} {_result(row)}" for row in rows)


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table of the geometric means of every group, dtype and layout."""
    averages = means(rows)
    contenders = [name for name in _unique(row.provider for row in rows) if name not in (TORCH, COPY)]
    table = [_heading("layers", "dtype", "parameters", "layout", "layer", *DIRECTIONS)]
    for group in _unique(map(series, rows)):
        for provider in contenders:
            cells = [_mean_cell(averages.get((group, direction, provider), NOTHING)) for direction in DIRECTIONS]
            table.append(_cells(*group, provider, *cells))
    return "\n".join(table)


def details(rows: Sequence[Row]) -> str:
    """A Markdown table of every shape: torch's time, our time, and how many times faster that is."""
    torch_rows = {(row.case, row.direction): row for row in rows if row.provider == TORCH}
    our_rows = {(row.case, row.direction): row for row in rows if row.ours}
    table = [_heading("layers", "dtype", "parameters", "layout", "shape", *DIRECTIONS)]
    for case in _unique(row.case for row in rows):
        cells = [_pair_cell(torch_rows.get((case, d)), our_rows.get((case, d))) for d in DIRECTIONS]
        table.append(_cells(*case[1:], *cells))
    return "\n".join(table)


def markdown(rows: Sequence[Row]) -> str:
    """The page that goes beside the picture."""
    first = rows[0]
    return f"""# torch_bn against torch

{first.machine}, {first.threads} threads, torch {first.torch}, commit {first.commit}, {first.date}.

![Speed relative to torch's own layer]({first.device}.png)

Times faster than `nn.BatchNorm` in eager mode, and the share of the machine's copy bandwidth on the least bytes.
Geometric means over the shapes of a group.

{summary(rows)}

## Every shape

torch's median in milliseconds, torch_bn's, and the ratio.

{details(rows)}
"""


def as_json(rows: Sequence[Row]) -> str:
    """`columns` and `data`, one line for each row: what pandas.read_json(..., orient="split") reads."""
    data = ",\n".join(json.dumps(astuple(row)) for row in rows)
    return f'{{"columns": {json.dumps([field.name for field in fields(Row)])}, "data": [\n{data}\n]}}\n'


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes the rows as JSON, the tables and the picture, named after the device."""
    stem = folder / rows[0].device
    stem.with_suffix(".json").write_text(as_json(rows))
    stem.with_suffix(".md").write_text(markdown(rows))
    draw(rows, stem.with_suffix(".png"))


def _result(row: Row) -> str:
    if row.error:
        return "FAILED"
    notes = [f"{row.versus_torch:.2f}x"] if row.versus_torch and row.provider not in (TORCH, COPY) else []
    notes += [f"{row.of_copy:.0%} of copy"] if row.of_copy and row.provider != COPY and row.cache == "cold" else []
    return f"{row.median_ms:.4g} ms" + f" ({', '.join(notes)})" * bool(notes)


def _mean_cell(mean: Mean) -> str:
    speed = "-" if mean.versus_torch is None else f"{mean.versus_torch:.2f}x"
    return speed if mean.of_copy is None else f"{speed}, {mean.of_copy:.0%}"


def _pair_cell(theirs: Row | None, ours: Row | None) -> str:
    if ours is None or ours.median_ms is None:
        return "-" if ours is None else "FAILED"
    if theirs is None or theirs.median_ms is None:
        return f"{ours.median_ms:.3g}"
    return f"{theirs.median_ms:.3g} → {ours.median_ms:.3g}, {theirs.median_ms / ours.median_ms:.2f}x"


def _heading(*names: str) -> str:
    return _cells(*names) + "\n" + "|---" * len(names) + "|"


def _cells(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def _unique(items: Iterable[Item]) -> list[Item]:
    return list(dict.fromkeys(items))
