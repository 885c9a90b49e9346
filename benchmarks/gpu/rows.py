"""One row for each thing that was measured on a GPU; benchmarks/rows.py writes and reads the file."""

from dataclasses import asdict, dataclass
from typing import Any

from ..cases import Case, dtype_name, shape_name
from .timer import Timing


@dataclass(frozen=True)
class Place:
    """What all rows of a run have in common."""

    machine: str
    commit: str
    date: str
    torch: str


@dataclass(frozen=True)
class Measurement:
    """A number is None where it was not measured; `error` says what failed and is empty otherwise.

    name is the kind of layer, the fact or the model. bytes is what two passes of ours move (`traffic.py`), for all
    providers alike, and GB_per_s is counted from it. versus_torch is the median of `torch.nn` over this median.
    """

    stage: str
    name: str
    direction: str
    provider: str
    dtype: str
    layout: str
    shape: str
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    samples: int
    bytes: int
    GB_per_s: float | None
    of_copy: float | None
    versus_torch: float | None
    peak_MB: float | None
    timing: str
    note: str
    error: str
    machine: str
    commit: str
    date: str
    torch: str


def row(
    place: Place, stage: str, name: str, case: Case | None = None, timing: Timing | None = None, **measured: Any
) -> Measurement:
    """A row with what is given and nothing else. `measured` has further columns by name."""
    values: dict[str, Any] = dict.fromkeys(
        ("median_us", "p20_us", "p80_us", "GB_per_s", "of_copy", "versus_torch", "peak_MB")
    )
    values |= dict.fromkeys(("direction", "provider", "dtype", "layout", "shape", "timing", "note", "error"), "")
    values |= {"samples": 0, "bytes": 0, **asdict(place)}
    if case is not None:
        values |= {"dtype": dtype_name(case.dtype), "layout": case.layout, "shape": shape_name(case.shape)}
    if timing is not None:
        values |= {"median_us": timing.median, "p20_us": timing.p20, "p80_us": timing.p80, "samples": timing.samples}
        values |= {"timing": timing.how, "note": timing.note}
    values |= measured
    if values["bytes"] and values["median_us"]:
        values["GB_per_s"] = values["bytes"] / values["median_us"] / 1e3
    return Measurement(stage=stage, name=name, **values)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
