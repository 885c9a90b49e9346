"""What only a GPU can show: graphs, streams, sizes past 2^31, no waiting, and what compute-sanitizer finds.

What the kernels compute is tested by the tests marked `kernels`, which TORCH_BN_TEST_DEVICE=cuda moves to the GPU.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_bn

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TORCH_BN_REQUIRE_CUDA") != "1",
    reason="torch sees no CUDA device",
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0}},
    "ghost": {"virtual_batch_size": 3},
    "cumulative": {"momentum": None},
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(autouse=True)
def _on_cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.fail("TORCH_BN_REQUIRE_CUDA=1, and torch sees no CUDA device")
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
    torch.cuda.empty_cache()


def layer(channels: int, **options: Any) -> nn.Module:
    made = torch_bn.BatchNorm2d(channels, fused=True, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(0.5, 1.5)
    return made


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, the gradients of x and the parameters, and copies of all buffers after one training step."""
    x = x.detach().requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y, (x, *module.parameters()), dy)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in module.buffers())]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {index} differs by {(a.double() - b.double()).abs().max().item()}"


def test_the_kernels_serve_the_device() -> None:
    facts = torch_bn.build_info()
    assert facts["cuda"] and facts["cuda_reason"] is None
    x = torch.randn(4, 3, 5, 5)
    assert torch_bn.functional._obstacle(x) is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as events:
        layer(3)(x)
        torch.cuda.synchronize()
    names = [event.name for event in events.events()]
    assert any("moments_kernel" in name for name in names) and any("normalize_kernel" in name for name in names), names


@each_layout
@each_option
def test_results_are_the_same_to_the_bit_in_every_run(options: dict[str, Any], layout: torch.memory_format) -> None:
    for shape in [(7, 64, 14, 14), (32, 100, 7, 7), (5, 3, 31, 33), (64, 2048, 2, 2)]:
        x, dy = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
        module = layer(shape[1], **options)
        start = {name: value.clone() for name, value in module.state_dict().items()}
        runs = []
        for _ in range(3):
            module.load_state_dict(start)
            runs.append(step(module, x, dy))
        assert_same(runs[1], runs[0])
        assert_same(runs[2], runs[0])


@each_option
def test_a_training_step_waits_for_nothing(options: dict[str, Any]) -> None:
    x, dy = torch.randn(8, 16, 9, 9), torch.randn(8, 16, 9, 9)
    module = layer(16, **options)
    step(module, x, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, x, dy)
        module.eval()
        module(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one training step, and the tensors that a replay fills. The module's state is as before."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(module, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(module, x, dy)
    module.load_state_dict(state)
    return graph, results


@each_layout
@each_option
def test_a_graph_replays_the_step(options: dict[str, Any], layout: torch.memory_format) -> None:
    shape = (8, 24, 10, 10)
    x, dy = (torch.empty(shape).contiguous(memory_format=layout) for _ in range(2))
    module, eager = layer(24, **options), layer(24, **options)
    eager.load_state_dict(module.state_dict())
    graph, results = captured(module, x, dy)
    for _ in range(5):
        x.copy_(torch.randn(shape) * 2 + 1)
        dy.copy_(torch.randn(shape))
        graph.replay()
        assert_same(results, step(eager, x, dy))


def test_two_graphs_of_one_stream_may_be_replayed_at_once() -> None:
    shape = (64, 64, 28, 28)
    made = []
    for _ in range(2):
        x, dy, module = torch.randn(shape), torch.randn(shape), layer(64)
        expected = layer(64)
        expected.load_state_dict(module.state_dict())
        # A graph reads where its inputs were: they must live as long.
        inputs, stream = (x, dy, module), torch.cuda.Stream()
        made.append((*captured(module, x, dy), [step(expected, x, dy) for _ in range(20)][-1], stream, inputs))
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, _, _, stream, _ in made:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, results, expected_results, _, _ in made:
        assert_same(results, expected_results)


def test_two_streams_at_once_keep_to_themselves() -> None:
    shapes = [(64, 64, 28, 28), (128, 256, 14, 14)]
    cases = [(torch.randn(shape), torch.randn(shape), layer(shape[1]), torch.cuda.Stream()) for shape in shapes]
    alone = []
    for x, dy, module, _ in cases:
        start = {name: value.clone() for name, value in module.state_dict().items()}
        alone.append([step(module, x, dy) for _ in range(20)][-1])
        module.load_state_dict(start)
    torch.cuda.synchronize()
    together: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, (x, dy, module, stream) in enumerate(cases):
            with torch.cuda.stream(stream):
                together[index] = step(module, x, dy)
    torch.cuda.synchronize()
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)


def test_tickets_grow_with_the_channels() -> None:
    for channels in (3, 20_000, 64):
        x = torch.randn(16, channels, 2, 2)
        module = torch_bn.BatchNorm2d(channels, fused=True, momentum=1.0)
        y = module(x).detach()
        torch.testing.assert_close(module.running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y.square().mean((0, 2, 3)), torch.ones(channels), rtol=1e-3, atol=1e-3)


@each_layout
def test_more_than_two_to_the_31_elements(layout: torch.memory_format) -> None:
    shape = (3, 64, 3400, 3400)
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=layout)
    for example in x:
        example.normal_().add_(0.5)
    x[-1, -1] += 3  # the last plane alone is elsewhere
    module = torch_bn.BatchNorm2d(64, fused=True, momentum=1.0)
    leaf = x.requires_grad_()
    y = module(leaf)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).expand(shape))
    for channel in (0, 63):
        values = x.detach()[:, channel].double()
        var, mean = torch.var_mean(values)
        torch.testing.assert_close(module.running_mean[channel].double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(module.running_var[channel].double(), var, rtol=1e-6, atol=1e-6)
        expected = (values - mean) * torch.rsqrt(var + module.eps)
        torch.testing.assert_close(y.detach()[:, channel].double(), expected, rtol=2**-7, atol=2**-7)
        assert dx[:, channel].abs().max() < 1e-3


def test_the_current_device_need_not_be_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = torch.randn(6, 5, 4, 4, device="cuda:1")
    module = layer(5).to("cuda:1")
    with torch.cuda.device(0):
        y = module(x)
    assert y.device == x.device
    torch.testing.assert_close(y.mean((0, 2, 3)), module.bias.detach(), rtol=1e-4, atol=1e-4)


SANITIZED = """if True:
    import torch, torch_bn
    for shape in [(3, 5, 7, 7), (4, 16, 8, 8), (40, 33), (6, 64, 3, 5)]:
        for dtype in (torch.float32, torch.bfloat16):
            for format in (torch.contiguous_format, torch.channels_last):
                for options in ({}, {"renorm": True, "virtual_batch_size": 2}):
                    x = torch.randn(shape, device="cuda", dtype=dtype)
                    x = x.contiguous(memory_format=format) if x.dim() == 4 else x
                    kind = torch_bn.BatchNorm2d if x.dim() == 4 else torch_bn.BatchNorm1d
                    layer = kind(shape[1], fused=True, device="cuda", **options)
                    layer(x.requires_grad_()).float().square().sum().backward()
                    layer.eval()(x)
    torch.cuda.synchronize()
    print("all ran")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = finished.stdout + finished.stderr
    if "not supported" in report.lower():
        pytest.skip("compute-sanitizer does not support this machine")
    assert finished.returncode == 0 and "all ran" in report, report[-4000:]
