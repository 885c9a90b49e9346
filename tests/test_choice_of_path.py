"""Which path a call takes: the kernels, directly or through torch.ops, or plain torch operations."""

import pytest
import torch
from paths import needs_kernels
from torch.autograd import forward_ad

import torch_bn
from torch_bn import _operators
from torch_bn.functional import batch_norm


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which path each call took."""
    taken: list[str] = []

    def spy(path, function):
        return lambda *arguments: taken.append(path) or function(*arguments)

    monkeypatch.setattr(torch_bn.reference, "batch_norm", spy("plain", torch_bn.reference.batch_norm))
    if _operators.batch_norm is not None:
        direct = _operators.direct

        def spied(*arguments):
            if (output := direct(*arguments)) is not None:
                taken.append("kernels")
            return output

        monkeypatch.setattr(_operators, "batch_norm", spy("kernels", _operators.batch_norm))
        monkeypatch.setattr(_operators, "direct", spied)
    return taken


@pytest.mark.parametrize(
    ("fused", "path"),
    [
        pytest.param(None, "kernels", marks=needs_kernels),
        pytest.param(True, "kernels", marks=needs_kernels),
        (False, "plain"),
    ],
)
def test_fused_chooses_the_path(fused, path, calls):
    batch_norm(torch.randn(5, 3), None, None, training=True, fused=fused)
    assert calls == [path]


def test_no_kernels_means_plain_operations_or_an_error_that_says_why(calls, monkeypatch):
    monkeypatch.setattr(_operators, "batch_norm", None)
    monkeypatch.setattr(_operators, "unavailable_reason", lambda: "there is no compiler")
    x = torch.randn(5, 3)
    batch_norm(x, None, None, training=True)
    assert calls == ["plain"]
    with pytest.raises(
        RuntimeError, match="^batch_norm: fused=True needs the compiled kernels, but there is no compiler"
    ):
        batch_norm(x, None, None, training=True, fused=True)


def vmapped(function, x):
    return torch.func.vmap(function)(x[None])


def differentiated_forward(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


def traced(function, x):
    return torch.jit.trace(function, x, check_trace=False)  # the check runs it untraced


@pytest.mark.parametrize(
    ("around", "text"),
    [
        (vmapped, "they do not serve inside torch.func transforms"),
        (differentiated_forward, "they have no forward-mode derivative"),
        (traced, "torch.jit.trace does not record them"),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_where_the_kernels_cannot_serve_plain_operations_do(around, text, calls, monkeypatch):
    monkeypatch.setattr(_operators, "batch_norm", lambda *_: pytest.fail("must not be called"))
    x = torch.randn(5, 3)
    around(lambda x: batch_norm(x, None, None, training=True), x)
    assert set(calls) == {"plain"}
    with pytest.raises(RuntimeError, match=f"^batch_norm: fused=True needs the compiled kernels, but {text}$"):
        around(lambda x: batch_norm(x, None, None, training=True, fused=True), x)


@pytest.mark.parametrize("has_cuda", [False, True])
def test_the_kernels_are_for_the_devices_they_were_built_for(has_cuda, monkeypatch):
    monkeypatch.setattr(_operators, "batch_norm", lambda *_: pytest.fail("must not be called"))
    monkeypatch.setattr(_operators, "has_cuda", has_cuda)

    class Elsewhere:
        is_cpu = is_meta = is_cuda = False
        device = "xpu:0"

    class OnCuda(Elsewhere):
        is_cuda = True
        device = "cuda:1"

    where = "the cpu and CUDA devices" if has_cuda else "the cpu"
    assert torch_bn.functional._obstacle(Elsewhere()) == f"they run on {where} and the input is on xpu:0"
    assert torch_bn.functional._obstacle(OnCuda()) == (
        None if has_cuda else "they run on the cpu and the input is on cuda:1"
    )
