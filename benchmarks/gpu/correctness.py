"""Before anything is timed: our layers beside plain operations in float64 on the same values, and beside themselves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import torch_bn

from ..cases import Case
from .plan import Run
from .rows import Measurement, first_line, row

CORRECTNESS = "correctness"
# Of |actual - expected| / |expected|, Euclidean. Outputs of half types are rounded to 8 and 11 bits; dx of float32 is
# a difference of terms larger than itself. Gradients of parameters and statistics are float32 whatever the input is.
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
DX_FLOAT32, PARAMETERS, STATISTICS = 1e-5, 1e-5, 1e-6
# Deviations between the mean of x and zero.
FAR = {torch.float32: 1e4, torch.bfloat16: 30.0, torch.float16: 30.0}
RUNS = 3
STEPS = 2
BUFFERS = ("running_mean", "running_var")

SHAPES = [
    (1, 3, 7, 7), (2, 100, 7, 7), (32, 1, 5, 1), (5, 30, 13, 1), (3, 2048, 7, 7), (32, 64, 14, 14), (17, 30, 1, 1),
    (4, 64, 31, 1), (1, 1, 211, 1),
]  # fmt: skip
ROWS = [(32, 1), (17, 3), (29, 100), (32, 2048)]
OPTIONS: dict[str, dict[str, Any]] = {
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.8, "dmax": 0.5}},
    "ghost": {"virtual_batch_size": 5},
    "renorm+ghost": {"renorm": True, "virtual_batch_size": 5},
}
WITH_OPTIONS = [(13, 30, 7, 7), (32, 64, 14, 14)]
CLASSES = {2: "BatchNorm1d", 4: "BatchNorm2d"}


@dataclass(frozen=True)
class Configuration:
    """One layer on one input; `far`: the mean of x lies many deviations from zero."""

    case: Case
    option: str = ""
    far: bool = False

    @property
    def name(self) -> str:
        return f"{self.option or 'plain'}{' far-off mean' * self.far}"

    def layer(self, dtype: torch.dtype, device: torch.device, fused: bool) -> nn.Module:
        make = getattr(torch_bn, CLASSES[len(self.case.shape)])
        layer: nn.Module = make(self.case.channels, fused=fused, **OPTIONS.get(self.option, {}))
        state = self.case.state()
        if "renorm" in self.option:
            # Averages with their full weight, near enough to the batch for some r and d to lie within their bounds.
            near = state["running_mean"] * 0.2 + self.offset
            state |= {"renorm_mean": near, "renorm_stddev": state["running_var"]}
            state |= {"renorm_mean_weight": torch.tensor(1.0), "renorm_stddev_weight": torch.tensor(1.0)}
        layer.load_state_dict(state)
        return layer.to(device, dtype)

    @property
    def offset(self) -> float:
        return FAR[self.case.dtype] if self.far else 0.5

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """x and dy. dy has parts along 1 and x, or its sums would be nothing but noise, and any error large beside
        them."""
        generator = torch.Generator(device).manual_seed(sum(self.case.shape))
        noise, gradient = (
            torch.randn(self.case.shape, generator=generator, device=device, dtype=torch.float64) for _ in range(2)
        )
        layout = torch.channels_last if self.case.layout == "channels_last" else torch.contiguous_format
        x, dy = noise + self.offset, gradient + 0.5 * noise + 0.25
        x, dy = (t.to(self.case.dtype).contiguous(memory_format=layout) for t in (x, dy))
        return x, dy


def configurations() -> list[Configuration]:
    found = []
    for dtype in OUTPUT:
        for layout in ("contiguous", "channels_last"):
            found += [Configuration(Case("correctness", shape, dtype, layout)) for shape in SHAPES]
            cases = [Case("correctness", shape, dtype, layout) for shape in WITH_OPTIONS]
            found += [Configuration(case, option) for case in cases for option in OPTIONS]
            found += [Configuration(case, far=True) for case in cases]
        found += [Configuration(Case("correctness", shape, dtype)) for shape in ROWS]
    return found


@dataclass
class Finding:
    """How far the worst result is off, in parts of its tolerance, and what is wrong."""

    worst: float = 0.0
    result: str = ""
    errors: list[str] = field(default_factory=list)

    def compare(self, name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        error = relative_error(actual, expected)
        if not error <= tolerance:  # NB: not >, so that NaN fails
            self.errors.append(f"{name} is off float64 by {error:.1e}, and may be by {tolerance:g}")
        if not error / tolerance <= self.worst:
            self.worst, self.result = error / tolerance, name


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected))


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Inference, and then two steps of training, so that the second meets the averages of the first."""
    layer.eval()
    with torch.no_grad():
        found = {"inference": layer(x)}
    layer.train()
    for step in range(1, STEPS + 1):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        gradients = torch.autograd.grad(y, (leaf, *layer.parameters()), dy)
        names = ("y", "dx", "dweight", "dbias")
        found |= {f"{name} {step}": t.detach() for name, t in zip(names, (y, *gradients), strict=True)}
        found |= {f"{name} {step}": layer.get_buffer(name).clone() for name in BUFFERS}
    return found


def tolerance(name: str, dtype: torch.dtype) -> float:
    result = name.split()[0]
    if result in BUFFERS:
        return STATISTICS
    if result in ("dweight", "dbias"):
        return PARAMETERS
    return DX_FLOAT32 if result == "dx" and dtype == torch.float32 else OUTPUT[dtype]


def check(configuration: Configuration, device: torch.device, runs: int = RUNS) -> Finding:
    """Compares with float64, and the runs, which must be equal to the bit, with each other."""
    x, dy = configuration.tensors(device)
    exact = configuration.layer(torch.float64, device, fused=False)
    expected = results(exact, x.double(), dy.double())
    actual = [results(configuration.layer(torch.float32, device, fused=True), x, dy) for _ in range(runs)]
    finding = Finding()
    for name, right in expected.items():
        finding.compare(name, actual[0][name], right, tolerance(name, configuration.case.dtype))
    finding.errors += differences(actual)
    return finding


def differences(runs: list[Mapping[str, Tensor]]) -> list[str]:
    first, *others = runs
    changed = [name for name in first if not all(torch.equal(first[name], other[name]) for other in others)]
    return [f"{', '.join(changed)} changed between runs on the same values"] if changed else []


def stage(run: Run, chosen: list[Configuration] | None = None) -> Iterator[list[Measurement]]:
    """Checks every configuration however long it takes: a benchmark of what is wrong is worth nothing."""
    for configuration in chosen or configurations():
        if not run.wants(f"{CORRECTNESS} {configuration.name} {configuration.case.name}"):
            continue
        try:
            finding = check(configuration, run.timer.device)
        except Exception as error:
            finding = Finding(errors=[first_line(error)])
        plain = row(run.place, CORRECTNESS, configuration.name, configuration.case, provider="torch_bn")
        worst = f"worst: {finding.result}, {finding.worst:.2f} of its tolerance" if finding.result else ""
        yield [replace(plain, note=worst, error="; ".join(finding.errors))]
