"""Steps of training ResNet-50 in mixed precision: torch's layers, ours with what follows them fused, both compiled."""

from collections.abc import Callable, Iterator
from time import monotonic

import torch
import torch.nn.functional as F
from torch import nn

import torch_bn

from ..resnet import resnet50
from .contenders import COMPILED, EAGER, OURS
from .plan import Allowance, Run
from .rows import Measurement, first_line, row
from .timer import STREAM, Timer, timing

TRAINING, MODEL = "training", "resnet50"
OURS_COMPILED = "torch_bn, torch.compile"
BATCHES = (256, 128, 32)
COMPILE_GUESS = 90.0
WARM_UP, STEPS = 10, 30
CLASSES = 1000


def stage(
    run: Run,
    model: Callable[[], nn.Module] = resnet50,
    batches: tuple[int, ...] = BATCHES,
    side: int = 224,
    warm_up: int = WARM_UP,
    steps: int = STEPS,
    guess: float = COMPILE_GUESS,
) -> Iterator[list[Measurement]]:
    """First all batches without the compiler, whose time is short and known, then the largest with it, and so on."""
    allowance = Allowance(run.seconds_left, guess)
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    eager: dict[int, float] = {}
    try:
        for provider in ((EAGER, OURS), (COMPILED, OURS_COMPILED)):
            for batch in batches:
                for name in provider:
                    if not run.wants(f"{TRAINING} {name} {batch}x3x{side}x{side}"):
                        continue
                    begin = monotonic()
                    if run.seconds_left <= 0 or (name in (COMPILED, OURS_COMPILED) and not allowance.may_begin()):
                        print(f"training: no time for {name} with a batch of {batch}", flush=True)
                        continue
                    found = _measure(run, name, model, batch, side, warm_up, steps, eager.get(batch))
                    if name == EAGER and found.median_us:
                        eager[batch] = found.median_us
                    allowance.spend(monotonic() - begin)
                    yield [found]
    finally:
        torch.backends.cudnn.benchmark = benchmark


def _measure(
    run: Run,
    name: str,
    model: Callable[[], nn.Module],
    batch: int,
    side: int,
    warm_up: int,
    steps: int,
    eager: float | None,
) -> Measurement:
    shape = {"dtype": "bfloat16", "layout": "channels_last", "shape": f"{batch}x3x{side}x{side}"}
    place = {"direction": "step", "provider": name, **shape}
    try:
        run.timer.free()
        run.timer.reset_peak()
        step = Step(name, model, batch, side, run.timer.device)
        times = timed_steps(run.timer, step, warm_up, steps)
        if not torch.isfinite(step.loss):
            raise ValueError(f"the loss must stay finite, got {float(step.loss)}")
    except Exception as error:  # a result of the benchmark, not its end
        return row(run.place, TRAINING, MODEL, error=first_line(error), **place)
    quantiles = timing(times, STREAM, f"loss {float(step.loss):.4f} after {warm_up + steps} steps")
    return row(
        run.place, TRAINING, MODEL, timing=quantiles, peak_MB=run.timer.peak_bytes() / 1e6,
        versus_torch=1.0 if name == EAGER else eager and eager / quantiles.median, **place,
    )  # fmt: skip


class Step:
    """A model with its optimizer on one batch of random images; a call is one step."""

    def __init__(self, name: str, model: Callable[[], nn.Module], batch: int, side: int, device: torch.device) -> None:
        torch.manual_seed(0)
        net = model().to(device, memory_format=torch.channels_last).train()
        if name in (OURS, OURS_COMPILED):
            net = torch_bn.convert(net, fused=True)
            torch_bn.fuse(net)
        if name in (COMPILED, OURS_COMPILED):
            torch._dynamo.reset()
        self._net = torch.compile(net, dynamic=False) if name in (COMPILED, OURS_COMPILED) else net
        self._optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        self._device = device.type
        images = torch.randn(batch, 3, side, side, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(CLASSES, (batch,), device=device)
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, torch.bfloat16):
            self.loss = F.cross_entropy(self._net(self._images), self._labels)
        self.loss.backward()
        self._optimizer.step()
        self.loss = self.loss.detach()


def timed_steps(timer: Timer, step: Callable[[], object], warm_up: int, steps: int) -> list[float]:
    """Microseconds of each step, from the end of the one before: the device waiting for the host counts."""
    for _ in range(warm_up):
        step()
    timer.synchronize()
    marks = [timer.mark()]
    for _ in range(steps):
        step()
        marks.append(timer.mark())
    timer.synchronize()
    return [timer.microseconds(start, end) for start, end in zip(marks, marks[1:], strict=False)]
