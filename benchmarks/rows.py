"""One row for each case, direction and provider, and the CSV file they are written to as they come."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from .cases import Case, dtype_name, shape_name
from .harness import Quantiles
from .providers import COPY, OURS, TORCH
from .traffic import copy_bytes, least_bytes

OPERATION = "batch_norm"

RowType = TypeVar("RowType")


@dataclass(frozen=True)
class Setting:
    """What all rows of a run have in common."""

    device: str
    threads: int
    machine: str
    commit: str
    date: str
    torch: str


@dataclass(frozen=True)
class Row:
    """See README.md for the meaning of the columns. A number is None where it was not measured; `error` says why a
    provider was not timed and is empty otherwise."""

    op: str
    direction: str
    provider: str
    device: str
    dtype: str
    layout: str
    shape: str
    threads: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    bytes: int
    GB_per_s: float | None
    of_copy: float | None
    versus_torch: float | None
    machine: str
    commit: str
    group: str
    parameters: str
    cache: str
    rounds: int
    date: str
    torch: str
    error: str

    @property
    def case(self) -> tuple[str, ...]:
        """Equal for the rows that were measured against each other, apart from the direction."""
        return self.op, self.group, self.dtype, self.parameters, self.layout, self.shape

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)


def timed_rows(case: Case, direction: str, times: dict[str, Quantiles], setting: Setting) -> list[Row]:
    """The rows of the contenders of one direction, compared with each other."""
    rates = {name: _bytes(case, direction, name) / time.median / 1e6 for name, time in times.items()}
    return [
        _row(
            case, direction, name, setting,
            median_ms=time.median, p20_ms=time.p20, p80_ms=time.p80, rounds=time.rounds,
            GB_per_s=rates[name],
            of_copy=rates[name] / rates[COPY] if COPY in rates else None,
            versus_torch=times[TORCH].median / time.median if TORCH in times else None,
        )
        for name, time in times.items()
    ]  # fmt: skip


def failed_row(case: Case, direction: str, provider: str, error: str, setting: Setting) -> Row:
    return _row(case, direction, provider, setting, error=error)


def _bytes(case: Case, direction: str, provider: str) -> int:
    return copy_bytes(case) if provider == COPY else least_bytes(case, direction)


def _row(case: Case, direction: str, provider: str, setting: Setting, **measured: Any) -> Row:
    nothing = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "GB_per_s", "of_copy", "versus_torch"))
    values: dict[str, Any] = {**nothing, "rounds": 0, "error": "", **asdict(setting), **measured}
    return Row(
        op=OPERATION, direction=direction, provider=provider, dtype=dtype_name(case.dtype), layout=case.layout,
        shape=shape_name(case.shape), group=case.group, parameters=dtype_name(case.parameters),
        cache="warm" if case.warm else "cold", bytes=_bytes(case, direction, provider), **values,
    )  # fmt: skip


class RowFile(Generic[RowType]):
    """A CSV file of rows, which may be any dataclass of numbers and texts; each is on the disk once `write` returns."""

    def __init__(self, path: Path, row_type: type[RowType] = Row) -> None:  # type: ignore[assignment]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(field.name for field in fields(row_type))
        self._file.flush()

    def write(self, rows: Iterable[RowType]) -> None:
        for row in rows:
            self._writer.writerow(map(_text, asdict(row).values()))
        self._file.flush()

    def __enter__(self) -> "RowFile[RowType]":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_rows(path: Path, row_type: type[RowType] = Row) -> list[RowType]:  # type: ignore[assignment]
    """The rows of a file that RowFile wrote."""
    columns = fields(row_type)
    with path.open(newline="") as file:
        return [row_type(**{f.name: _value(f.type, line[f.name]) for f in columns}) for line in csv.DictReader(file)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(kind: Any, text: str) -> Any:
    if kind == float | None:
        return float(text) if text else None
    return kind(text)
