"""Geometric means over the shapes of a group, in one dtype and layout."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import geometric_mean
from typing import NamedTuple

from .rows import Row


class Series(NamedTuple):
    """The rows that are averaged: one group of layers in one dtype and layout."""

    group: str
    dtype: str
    parameters: str
    layout: str


@dataclass(frozen=True)
class Mean:
    """Geometric means; None where nothing was measured that they could be taken of.

    versus_torch is how many times faster than torch's layer; of_copy the share of the bandwidth of a copy, only over
    tensors that come from memory, because what a cached copy costs is mostly the call.
    """

    versus_torch: float | None
    of_copy: float | None


NOTHING = Mean(None, None)


def series(row: Row) -> Series:
    return Series(row.group, row.dtype, row.parameters, row.layout)


def means(rows: Iterable[Row]) -> dict[tuple[Series, str, str], Mean]:
    """By series, direction and provider."""
    collected: dict[tuple[Series, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if not row.error:
            collected[series(row), row.direction, row.provider].append(row)
    return {
        key: Mean(
            _mean(row.versus_torch for row in members), _mean(row.of_copy for row in members if row.cache == "cold")
        )
        for key, members in collected.items()
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return geometric_mean(known) if known else None
