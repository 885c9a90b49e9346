"""Finds the training rows in which torch_bn took longer than torch's own layer, and which of them are beyond noise."""

from collections.abc import Sequence
from math import hypot, sqrt
from typing import NamedTuple

from .cases import TRAINING
from .providers import TORCH
from .rows import Row

# For normal samples: the distance from p20 to p80 in standard deviations, and the standard error of a median of n
# samples in standard deviations over the root of n.
SPREAD = 1.683
MEDIAN_ERROR = 1.2533
ERRORS_BEYOND_NOISE = 3.0


class Slower(NamedTuple):
    row: Row
    beyond_noise: bool

    def __str__(self) -> str:
        row, verdict = self.row, "slower" if self.beyond_noise else "within noise"
        return (
            f"{verdict}: {row.provider} {row.direction} {row.group} {row.dtype}/{row.parameters} {row.layout} "
            f"{row.shape}: {row.median_ms:.4g} ms, {row.versus_torch:.3f} of torch's speed"
        )


def slower_than_torch(rows: Sequence[Row]) -> list[Slower]:
    """Every training row of torch_bn with a median above torch's.

    It is beyond noise if the two medians differ by more than three standard errors of their difference, which p20, p80
    and the number of rounds give. Rounds that disturb each other make the true error larger, never smaller.
    """
    torch_rows = {(row.case, row.direction): row for row in rows if row.provider == TORCH}
    found = []
    for row in rows:
        other = torch_rows.get((row.case, row.direction))
        if row.ours and row.direction in TRAINING and row.median_ms and other and other.median_ms:
            difference = row.median_ms - other.median_ms
            if difference > 0:
                noise = ERRORS_BEYOND_NOISE * hypot(_median_error(row), _median_error(other))
                found.append(Slower(row, difference > noise))
    return found


def _median_error(row: Row) -> float:
    """The standard error of the median, in milliseconds."""
    if row.p20_ms is None or row.p80_ms is None:
        return 0.0
    return MEDIAN_ERROR * (row.p80_ms - row.p20_ms) / SPREAD / sqrt(row.rounds)
