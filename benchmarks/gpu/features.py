"""What renorm and ghost batches cost on a GPU: our layer with them beside the plain one, and in plain operations."""

from collections.abc import Iterator
from time import monotonic
from typing import Any

import torch

from ..cases import Case
from .contenders import Contender, make_inputs, ours
from .layers import rows_of, timed
from .network import PLAIN
from .plan import Run, case_end
from .rows import Measurement, first_line

FEATURES = "features"
RENORM: dict[str, Any] = {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}}
GHOST: dict[str, Any] = {"virtual_batch_size": 32}
BASE, COMPOSITE = "plain", "renorm in plain operations"
OPTIONS: dict[str, dict[str, Any]] = {
    BASE: {},
    "renorm": RENORM,
    "ghost": GHOST,
    "renorm+ghost": RENORM | GHOST,
    # Without ghost batches, whose plain operations wait for the device and could not be captured.
    COMPOSITE: RENORM | {"fused": False},
}
MEASURED = ("forward", "backward")
BATCH = 128
SHAPES = [(64, 56), (256, 56), (128, 28), (512, 28), (1024, 14), (2048, 7)]  # channels and side


def cases(batch: int = BATCH) -> list[Case]:
    return [Case("ResNet-50", (batch, c, s, s), torch.bfloat16, "channels_last") for c, s in SHAPES]


def stage(run: Run, chosen: list[Case] | None = None) -> Iterator[list[Measurement]]:
    chosen = [case for case in chosen or cases() if run.wants(f"{FEATURES} {case.name}")]
    for index, case in enumerate(chosen):
        if run.seconds_left <= 0:
            print(f"features: out of time, {len(chosen) - index} of {len(chosen)} cases are left out", flush=True)
            return
        end = case_end(monotonic(), run.end, len(chosen) - index)
        sets = make_inputs(run.timer, case, PLAIN)
        layers: dict[str, Contender] = {}
        errors: dict[str, str] = {}
        for name, options in OPTIONS.items():
            try:
                layers[name] = ours(case, PLAIN, run.timer.device, **options)
            except Exception as error:  # a result of the benchmark, not its end
                errors[name] = first_line(error)
        for number, direction in enumerate(MEASURED):
            share = case_end(monotonic(), end, len(MEASURED) - number)
            times, failed = timed(run, layers, direction, sets, share, errors, copy=False)
            yield rows_of(run, PLAIN, case, direction, times, failed, FEATURES)
            run.timer.free()
