"""ResNet-50's layers, ours beside torch's, and the host's time for one call."""

from collections.abc import Iterator
from time import monotonic

import torch
import torch._functorch.config

from ..cases import Case
from .contenders import (
    COMPILED,
    COPY,
    DIRECTIONS,
    EAGER,
    NATIVE,
    OURS,
    Contender,
    Inputs,
    compiled,
    copies,
    eager,
    fuses,
    make_inputs,
    native,
    ours,
)
from .network import NETWORK, PLAIN, NetworkLayer, without_activation
from .plan import Allowance, Run, case_end
from .rows import Measurement, first_line, row
from .timer import Call, Timing, host_time, measure
from .traffic import copied_bytes, moved_bytes

LAYERS, HOST_NAME = "layers", "host time"
BFLOAT16, FLOAT32 = (torch.bfloat16, "channels_last"), (torch.float32, "contiguous")
# The headline first: what comes last is what a short run leaves out.
BATCHES = [(128, *BFLOAT16), (128, *FLOAT32), (256, *BFLOAT16), (256, *FLOAT32), (32, *BFLOAT16), (32, *FLOAT32)]
COMPILED_BATCH = 128
COMPILE_SHARE, COMPILE_GUESS = 0.35, 8.0  # of the stage; seconds
TINY = (8, 64, 8, 8)


def stage(run: Run, batches: list[tuple[int, torch.dtype, str]] = BATCHES) -> Iterator[list[Measurement]]:
    yield from _host_times(run)
    allowance = Allowance(COMPILE_SHARE * run.seconds_left, COMPILE_GUESS)
    cases = [
        (layer, Case("ResNet-50", (batch, layer.channels, layer.side, layer.side), dtype, layout))
        for batch, dtype, layout in batches
        for layer in measured_layers()
    ]
    cases = [(layer, case) for layer, case in cases if run.wants(f"{layer.kind} {case.name}")]
    # NB: buffers given away by a compiled forward could serve one backward only, and ours are repeated.
    with torch._functorch.config.patch(donated_buffer=False):
        for index, (layer, case) in enumerate(cases):
            if run.seconds_left <= 0:
                print(f"layers: out of time, {len(cases) - index} of {len(cases)} cases are left out", flush=True)
                return
            yield from _measure_case(run, layer, case, case_end(monotonic(), run.end, len(cases) - index), allowance)


def measured_layers() -> list[NetworkLayer]:
    """What ours can do in one as the network has it, then every shape as the batch norm alone."""
    return [layer for layer in NETWORK if layer.kind != PLAIN and fuses(layer.kind)] + without_activation()


def _host_times(run: Run) -> Iterator[list[Measurement]]:
    for dtype, layout in (BFLOAT16, FLOAT32):
        case = Case("tiny", TINY, dtype, layout)
        if not run.wants(f"{HOST_NAME} {case.name}"):
            continue
        sets = make_inputs(run.timer, case, PLAIN)[:1]
        rows = []
        for name, make in {EAGER: eager, OURS: ours}.items():
            (call,) = make(case, PLAIN, run.timer.device).calls("forward", sets)
            timing = host_time(run.timer, call)
            rows.append(row(run.place, LAYERS, HOST_NAME, case, timing, direction="forward", provider=name))
        yield rows


def _measure_case(
    run: Run, layer: NetworkLayer, case: Case, end: float, allowance: Allowance
) -> Iterator[list[Measurement]]:
    sets = make_inputs(run.timer, case, layer.kind)
    contenders: dict[str, Contender] = {}
    errors: dict[str, str] = {}
    for name, make in {OURS: ours, EAGER: eager, NATIVE: native}.items():
        try:
            contenders[name] = make(case, layer.kind, run.timer.device)
        except Exception as error:  # a result of the benchmark, not its end
            errors[name] = first_line(error)
    if case.shape[0] == COMPILED_BATCH and allowance.may_begin():
        begin = monotonic()
        try:
            contenders[COMPILED] = _compiled_now(case, layer.kind, sets[:1], run.timer.device)
        except Exception as error:
            errors[COMPILED] = first_line(error)
        run.timer.synchronize()
        allowance.spend(monotonic() - begin)
        end += monotonic() - begin  # the cases after this one pay, not its rounds
    for index, direction in enumerate(DIRECTIONS):
        share = case_end(monotonic(), end, len(DIRECTIONS) - index)
        yield rows_of(run, layer.kind, case, direction, *timed(run, contenders, direction, sets, share, errors))
        run.timer.free()


def _compiled_now(case: Case, kind: str, sets: list[Inputs], device: torch.device) -> Contender:
    """Compiled for every direction, so that it is not compiled while others wait to be timed."""
    contender = compiled(case, kind, device)
    for direction in DIRECTIONS:
        for call in contender.calls(direction, sets):
            call()
    return contender


def timed(
    run: Run,
    contenders: dict[str, Contender],
    direction: str,
    sets: list[Inputs],
    end: float,
    errors: dict[str, str],
    copy: bool = True,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The times of the contenders and of a copy in one direction, and the errors, with those from before."""
    calls: dict[str, list[Call]] = {}
    found = dict(errors)
    for name, contender in contenders.items():
        try:
            calls[name] = contender.calls(direction, sets)
        except Exception as error:
            found[name] = first_line(error)
    if copy:
        calls[COPY] = copies(sets)
    times, failed = measure(run.timer, calls, end)
    return times, found | failed


def rows_of(
    run: Run,
    kind: str,
    case: Case,
    direction: str,
    times: dict[str, Timing],
    errors: dict[str, str],
    stage: str = LAYERS,
) -> list[Measurement]:
    """The rows of one direction, compared with each other."""
    bytes_of = {name: copied_bytes(case) if name == COPY else moved_bytes(kind, direction, case) for name in times}
    rates = {name: bytes_of[name] / timing.median for name, timing in times.items()}
    rows = [
        row(
            run.place, stage, kind, case, timing, direction=direction, provider=name, bytes=bytes_of[name],
            of_copy=rates[name] / rates[COPY] if COPY in rates else None,
            versus_torch=times[EAGER].median / timing.median if EAGER in times else None,
        )
        for name, timing in times.items()
    ]  # fmt: skip
    return rows + [
        row(run.place, stage, kind, case, direction=direction, provider=name, error=error)
        for name, error in errors.items()
    ]
