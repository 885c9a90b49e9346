"""The rows as a Markdown page: targets, facts and tables."""

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from . import features
from .contenders import COMPILED, COPY, DIRECTIONS, EAGER, NATIVE, OURS
from .correctness import CORRECTNESS
from .facts import BANDWIDTH, FACTS
from .layers import HOST_NAME, LAYERS
from .network import NetworkMean
from .rows import Measurement
from .summary import GROUPS, Results
from .targets import DEVICE, TARGETS
from .timer import STREAM
from .training import TRAINING


def page(rows: Sequence[Measurement]) -> str:
    first, results = rows[0], Results(rows)
    sections = {
        "Targets": f"They are meant for an {DEVICE}; a mean that lacks a layer is not measured.\n\n{targets(results)}",
        "Correctness": correctness(rows),
        "ResNet-50's 53 batch norms": (
            "How many times faster ours is than each, geometric means over the layers, and our share of the bandwidth "
            "of `copy_`\non tensors of the same size, from the bytes that two passes move.\n\n" + network(results)
        ),
        "Every layer": "Microseconds; our share of the copy bandwidth in brackets.\n\n" + layers(rows),
        "The host's time for one call": host(rows),
        "Renorm and ghost batches": "The time with the option over that of the plain layer, and the worst shape.\n\n"
        + options(results),
        "Training": training(rows),
        "Facts": facts(rows),
    }
    failures = list(dict.fromkeys(row.error for row in rows if row.error))
    if failures:
        sections["Failures"] = "\n".join(f"- {failure}" for failure in failures)
    head = f"# torch_bn on CUDA\n\n{first.machine}, torch {first.torch}, commit {first.commit}, {first.date}."
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]) + "\n"


def targets(results: Results) -> str:
    table = [_heading("target", "must", "aim", "measured", "verdict")]
    for target in TARGETS:
        found = target.value(results)
        numbers = ("-" if number is None else target.text(number) for number in (target.must, target.aim, found))
        table.append(_cells(target.name, *numbers, target.verdict(found)))
    return "\n".join(table)


def correctness(rows: Sequence[Measurement]) -> str:
    checked = [row for row in rows if row.stage == CORRECTNESS]
    failed = [f"- {row.name} {row.dtype} {row.layout} {row.shape}: {row.error}" for row in checked if row.error]
    return "\n".join([f"{len(checked)} configurations checked against float64, {len(failed)} failed.", *failed])


def network(results: Results) -> str:
    others = (EAGER, NATIVE, COMPILED)
    table = [_heading("layers", "batch", "dtype", "layout", "direction", *others, "of copy")]
    found = [row for row in results.rows if row.stage == LAYERS and row.name != HOST_NAME]
    settings = dict.fromkeys((int(row.shape.split("x")[0]), row.dtype, row.layout) for row in found)
    for setting in settings:
        for group in GROUPS:
            for direction in DIRECTIONS:
                speeds = [results.speed(group, other, *setting, direction) for other in others]
                share = results.of_copy(group, *setting, direction)
                if share.covered:
                    cells = [*(_mean(speed, "{:.2f}x") for speed in speeds), _mean(share, "{:.0%}")]
                    table.append(_cells(group, *map(str, setting), direction, *cells))
    return "\n".join(table) if len(table) > 1 else "Not measured."


def layers(rows: Sequence[Measurement]) -> str:
    providers = (OURS, EAGER, NATIVE, COMPILED, COPY)
    found: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for row in rows:
        if row.stage == LAYERS and row.name != HOST_NAME:
            key = (row.name, row.dtype, row.layout, row.shape, row.direction)
            found.setdefault(key, {})[row.provider] = row
    table = [_heading("layer", "dtype", "layout", "shape", "direction", *providers)]
    table += [_cells(*key, *(_microseconds(by.get(name)) for name in providers)) for key, by in found.items()]
    return "\n".join(table) if found else "Not measured."


def host(rows: Sequence[Measurement]) -> str:
    table = [_heading("dtype", "layout", "shape", "layer", "microseconds")]
    timed = [row for row in rows if row.name == HOST_NAME and row.median_us]
    table += [_cells(row.dtype, row.layout, row.shape, row.provider, f"{row.median_us:.1f}") for row in timed]
    return "\n".join(table) if timed else "Not measured."


def options(results: Results) -> str:
    names = [name for name in features.OPTIONS if name != features.BASE]
    table = [_heading("direction", *names)]
    for direction in features.MEASURED:
        ratios = [results.feature(name, direction) for name in names]
        if any(ratios):
            table.append(_cells(direction, *(f"{geometric_mean(r):.2f} ({max(r):.2f})" if r else "-" for r in ratios)))
    return "\n".join(table) if len(table) > 1 else "Not measured."


def training(rows: Sequence[Measurement]) -> str:
    table = [_heading("model", "images", "layers", "ms for a step", "images/s", "times eager", "peak MB", "note")]
    for row in rows:
        if row.stage == TRAINING:
            batch, us = int(row.shape.split("x")[0]), row.median_us
            numbers = (us and us / 1e3, us and batch / us * 1e6, row.versus_torch, row.peak_MB)
            forms = ("{:.2f}", "{:.0f}", "{:.3f}", "{:.0f}")
            cells = [form.format(number) if number else "-" for form, number in zip(forms, numbers, strict=True)]
            table.append(_cells(row.name, row.shape, row.provider, *cells, row.error or row.note))
    return "\n".join(table) if len(table) > 1 else "Not measured."


def facts(rows: Sequence[Measurement]) -> str:
    lines = []
    for row in rows:
        if row.stage == FACTS and row.name == BANDWIDTH:
            rate = f"{row.GB_per_s:.0f} GB/s" if row.GB_per_s else row.error
            lines.append(f"- {BANDWIDTH}, {row.shape}: {rate}")
        elif row.stage == FACTS:
            what = " ".join(text for text in (row.name, row.provider, row.direction, row.dtype, row.layout) if text)
            lines.append(f"- {what}: {row.error or row.note}")
    return "\n".join(lines)


def line(row: Measurement) -> str:
    """A row while the benchmark runs."""
    what = (row.stage, row.name, row.dtype, row.layout, row.shape, row.direction, row.provider)
    found = [f"{row.median_us:.2f} us"] if row.median_us else []
    found += [f"{row.GB_per_s:.0f} GB/s"] if row.GB_per_s else []
    found += [f"{row.versus_torch:.2f}x"] if row.versus_torch else []
    found += [text for text in (row.note, f"FAILED: {row.error}" if row.error else "") if text]
    return f"{' '.join(text for text in what if text)}: {', '.join(found)}"


def _microseconds(row: Measurement | None) -> str:
    if row is None or row.median_us is None:
        return "-" if row is None else "FAILED"
    share = f" ({row.of_copy:.0%})" if row.of_copy and row.provider == OURS else ""
    return f"{row.median_us:.1f}{share}" + " uncaptured" * (row.timing == STREAM)


def _mean(mean: NetworkMean, form: str) -> str:
    if mean.value is None:
        return "-"
    missing = "" if mean.covered == mean.total else f" ({mean.covered} of {mean.total})"
    return form.format(mean.value) + missing


def _heading(*names: str) -> str:
    return _cells(*names) + "\n" + "|---" * len(names) + "|"


def _cells(*texts: str) -> str:
    return f"| {' | '.join(escaped(texts))} |"


def escaped(texts: Iterable[str]) -> list[str]:
    return [text.replace("|", "\\|") for text in texts]
