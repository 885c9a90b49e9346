"""What all tests share: the devices, the tolerances, and a random state of their own."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Graphs of earlier builds are found again by the names of operators, whatever these return now.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"

TOLERANCES = {
    # Results are rounded once, so a half type may be off by one unit in the last place, 2^-8 and 2^-11 relative.
    # The sums behind them are kept in float32 or better: about 30 units, as measured with far-off means.
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
    torch.float32: {"rtol": 4e-6, "atol": 4e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}


def _cuda() -> object:
    """The parameter "cuda": skipped where there is none, a failure where TORCH_BN_REQUIRE_CUDA=1 promises one."""
    missing = not torch.cuda.is_available() and os.environ.get("TORCH_BN_REQUIRE_CUDA") != "1"
    return pytest.param("cuda", marks=pytest.mark.skipif(missing, reason="torch sees no CUDA device"))


@pytest.fixture(params=["cpu", _cuda()])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the machine has."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("TORCH_BN_REQUIRE_CUDA=1, and torch sees no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _device_of_the_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `kernels` make their tensors on the device that TORCH_BN_TEST_DEVICE names, if it is set."""
    name = os.environ.get("TORCH_BN_TEST_DEVICE")
    stays = request.node.get_closest_marker("on_cpu") or not request.node.get_closest_marker("kernels")
    if name is None or stays:
        yield
        return
    torch.set_default_device(name)
    yield
    torch.set_default_device(None)


@pytest.fixture
def tolerances() -> dict[torch.dtype, dict[str, float]]:
    """For torch.testing.assert_close(actual, expected, **tolerances[dtype])."""
    return TOLERANCES


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test draws the same numbers whatever ran before it, and leaves torch's generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(20250211)
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A script has what it starts in the background ignore interrupts, and so would the processes that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
