"""What layers in place save in a network of convolutions, batch normalizations and leaky ReLUs.

`python -m benchmarks.inplace` verifies, times and writes inplace.csv and .md; --seconds N for both layouts.
"""

import sys
from collections.abc import Iterator, Sequence
from time import monotonic

import torch
from torch import nn

import torch_bn

from . import study
from .harness import Contender, measure
from .memory import memory_of
from .network import BATCH, CLASSES, LEAST_ROUNDS, MB, SIDE, StepRow, row_of
from .providers import OURS, TORCH
from .resnet import convolution
from .rows import Setting
from .steps import LAYOUTS, Batch, Step, check, expected_results, network

IN_PLACE = "torch_bn, in place"
SECONDS = 60.0
TRAINING, EVALUATION = "Darknet-19, training", "Darknet-19, evaluation"
WIDTHS = (32, "pool", 64, "pool", 128, 64, 128, "pool", 256, 128, 256, "pool", 512, 256, 512, 256, 512)


def darknet() -> nn.Sequential:
    """Darknet-19 (Redmon and Farhadi 2016, arXiv:1612.08242, table 6) but for its last stage, which such small images
    do not reach: 3x3 convolutions that widen, 1x1 ones that narrow."""

    def steps() -> Iterator[nn.Module]:
        inputs = 3
        for width in WIDTHS:
            if isinstance(width, str):
                yield nn.MaxPool2d(2)
                continue
            side = 3 if width > inputs else 1
            step = convolution(inputs, width, side, padding=side // 2)
            yield nn.Sequential(step, nn.BatchNorm2d(width), nn.LeakyReLU(0.1, inplace=True))
            inputs = width
        yield from (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))

    return nn.Sequential(*steps())


def with_layers_of(provider: str, layout: str) -> nn.Module:
    net = network(darknet, OURS if provider == IN_PLACE else provider, layout)
    for layer in net.modules():
        if isinstance(layer, torch_bn.BatchNorm2d):
            layer.inplace = provider == IN_PLACE
    return net


def measure_layout(layout: str, seconds: float, setting: Setting) -> list[StepRow]:
    end = monotonic() + seconds
    batch = Batch.random(BATCH, SIDE, layout, CLASSES)
    expected = expected_results(darknet, layout, batch)
    steps = {name: Step(with_layers_of(name, layout), batch) for name in (TORCH, OURS, IN_PLACE)}
    for name, step in steps.items():
        check(f"{name}, {layout}", step.results(), expected)
    memories = {name: step.memory() for name, step in steps.items()}
    contenders = [Contender(name, lambda step: step, lambda step: step(), [step]) for name, step in steps.items()]
    times = measure(contenders, end - monotonic(), LEAST_ROUNDS)
    shape = tuple(batch.images.shape)
    rows = [
        row_of(
            *(TRAINING, layout, name, shape, setting),
            median_ms=times[name].median, p20_ms=times[name].p20, p80_ms=times[name].p80, rounds=times[name].rounds,
            versus_torch=times[TORCH].median / times[name].median,
            peak_MB=memories[name].peak / MB, kept_MB=memories[name].kept / MB,
        )
        for name in steps
    ]  # fmt: skip
    for name, step in steps.items():
        step.net.eval()
        with torch.inference_mode():
            peak = memory_of(lambda net=step.net: net(batch.images)).peak  # type: ignore[misc]
        rows.append(row_of(EVALUATION, layout, name, shape, setting, peak_MB=peak / MB))
    return rows


def table(rows: Sequence[StepRow]) -> str:
    lines = [f"| network | layout | layers | ms | times `{TORCH}` | peak MB | kept MB |", "|---" * 7 + "|"]
    for row in rows:
        numbers = (row.median_ms, row.versus_torch, row.peak_MB, row.kept_MB)
        cells = ["-" if number is None else f"{number:.4g}" for number in numbers]
        lines.append("| " + " | ".join((row.network, row.layout, row.provider, *cells)) + " |")
    return "\n".join(lines)


def page(rows: Sequence[StepRow]) -> str:
    first = rows[0]
    return f"""# What layers in place save

{first.machine}, {first.threads} threads, torch {first.torch}, commit {first.commit}, {first.date}.

Darknet-19 but for its last stage, on {BATCH} float32 images of {SIDE}x{SIDE}: convolutions, each with a batch
normalization and a leaky ReLU. `{TORCH}` has nn.BatchNorm2d and LeakyReLU(inplace=True), `{OURS}` is the same network
after torch_bn.convert and torch_bn.fuse, and in `{IN_PLACE}` each layer's `inplace` is True, too. Training: forward,
loss, backward and a step of SGD. Peak: the most that is allocated at once. Kept: what the forward leaves for the
backward. Both come on top of parameters, momentum and images, and are exact.

{table(rows)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = study.parser("inplace", __doc__, SECONDS).parse_args(arguments)
    return study.run(options, list(LAYOUTS), measure_layout, table, page, StepRow)


if __name__ == "__main__":
    sys.exit(main())
