"""What the machine is, how fast it copies, and which kernels a batch norm launches."""

import subprocess
from collections.abc import Iterator
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import torch_bn

from ..cases import Case
from .contenders import EAGER, OURS, eager, make_inputs, ours
from .network import PLAIN
from .plan import Run
from .rows import Measurement, first_line, row
from .timer import Call, measure, sets_for

FACTS, BANDWIDTH = "facts", "copy bandwidth"
MEGABYTES = (8, 32, 128, 512, 2048)
PROFILED = (32, 64, 56, 56)
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
ASKED = ("driver_version", *CLOCKS, "power.limit", "temperature.gpu")
SAID = ("version", "extension", "cuda", "compiler")  # by torch_bn of itself


def stage(
    run: Run, megabytes: tuple[int, ...] = MEGABYTES, profiled: tuple[int, ...] = PROFILED
) -> Iterator[list[Measurement]]:
    facts = software() | properties(run.timer.device)
    yield [row(run.place, FACTS, name, note=value) for name, value in facts.items() if run.wants(name)]
    for size in megabytes:
        if run.wants(BANDWIDTH):
            yield [_bandwidth(run, size)]
    # After work, because an idle GPU lowers its clocks.
    yield [row(run.place, FACTS, name, note=value) for name, value in nvidia_smi().items() if run.wants(name)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in ("contiguous", "channels_last"):
            case = Case("facts", profiled, dtype, layout)
            if run.wants(f"kernels {case.name}"):
                yield _kernels(run, case)


def software() -> dict[str, str]:
    info = torch_bn.build_info()
    return {
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "torch_bn": ", ".join(f"{key} {info[key]}" for key in SAID if key in info),
    }


def properties(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "GPU": found.name,
        "compute capability": f"{found.major}.{found.minor}",
        "multiprocessors": str(found.multi_processor_count),
        "memory": f"{found.total_memory / 1e9:.1f} GB",
        "L2": f"{found.L2_cache_size / (1 << 20):.0f} MiB",
    }


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = answer.stdout.strip().split(", ")
    return dict(zip(ASKED, values, strict=True)) if answer.returncode == 0 and len(values) == len(ASKED) else {}


def _bandwidth(run: Run, megabytes: int) -> Measurement:
    size = megabytes * 1_000_000
    shape = f"{megabytes} MB"
    try:
        # Random bytes: some memory moves zeros faster.
        sources = [
            torch.randint(256, (size,), dtype=torch.uint8, device=run.timer.device)
            for _ in range(sets_for(2 * size, run.timer.rotation_bytes))
        ]
        calls: list[Call] = [partial(torch.empty_like(source).copy_, source) for source in sources]
        times, errors = measure(run.timer, {"copy_": calls}, run.end)
    except Exception as error:
        times, errors = {}, {"copy_": first_line(error)}
    finally:
        run.timer.free()
    timing = times.get("copy_")
    return row(
        run.place, FACTS, BANDWIDTH, timing=timing, provider="copy_", shape=shape, bytes=2 * size,
        error=errors.get("copy_", ""),
    )  # fmt: skip


def backend(case: Case, device: torch.device) -> str:
    """Which implementation torch's layer takes in training."""
    x = torch.empty(case.shape, dtype=case.dtype, device=device)
    x = x.contiguous(memory_format=torch.channels_last if case.layout == "channels_last" else torch.contiguous_format)
    ones = torch.ones(case.channels, device=device)
    return str(torch._C._select_batch_norm_backend(x, ones, ones, ones, ones, True, 1e-5).name)


def _kernels(run: Run, case: Case) -> list[Measurement]:
    rows = []
    for name, make in {EAGER: eager, OURS: ours}.items():
        for direction in ("forward", "backward"):
            note = error = ""
            try:
                sets = make_inputs(run.timer, case, PLAIN)[:1]
                (call,) = make(case, PLAIN, run.timer.device).calls(direction, sets)
                note = launches(run, call)
                if name == EAGER:
                    note = f"backend {backend(case, run.timer.device)}; {note}"
            except Exception as failure:
                error = first_line(failure)
            rows.append(
                row(run.place, FACTS, "kernels", case, direction=direction, provider=name, note=note, error=error)
            )
    return rows


def launches(run: Run, call: Call) -> str:
    """How many kernels, copies and fills a call launches, and their names."""
    call()
    run.timer.synchronize()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (run.timer.device.type == "cuda")]
    with profile(activities=activities) as profiler:
        call()
        run.timer.synchronize()
    found = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    names = "; ".join(f"{event.count} x {event.key[:120]}" for event in found)
    return f"{sum(event.count for event in found)} launches: {names}" if found else "the profiler saw no launches"
