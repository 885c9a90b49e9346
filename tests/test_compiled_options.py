"""Compiled layers with renorm and ghost batches: the numbers and the state are those of the eager ones."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from faces import CHANNELS, batch, one_thread, same, state, tensorflows_face, torchs_face
from layer_pairs import both_paths
from paths import KERNELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_bn import schedules

_one_thread = pytest.fixture(autouse=True)(one_thread)

RENORM: dict[str, Any] = {"renorm": True, "renorm_momentum": 0.3}


@contextmanager
def compiled(model: nn.Module, **options: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()
    yield torch.compile(model, backend="aot_eager", **options)
    torch._dynamo.reset()


def assert_trains_like(run: Callable[[Tensor], Tensor], model: nn.Module, twin: nn.Module, dtype: torch.dtype) -> None:
    for factor in (1.0, 2.0, 0.5):
        found, x = [], batch(factor).to(dtype)
        for call, module in ((run, model), (twin, twin)):
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            y = call(leaf)
            y.pow(3).mean().backward()
            found.append([y, leaf.grad, *(p.grad for p in module.parameters()), *state(module).values()])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@both_paths
def test_renorm_and_groups_compile_into_one_graph(fused, dtype):
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1, dtype=dtype),
        torchs_face(fused, dtype=dtype, **RENORM),
        tensorflows_face(fused, dtype=dtype, virtual_batch_size=2),
        torchs_face(fused, dtype=dtype, virtual_batch_size=3, **RENORM),
    )
    twin = copy.deepcopy(model)
    with compiled(model, fullgraph=True) as run:
        assert_trains_like(run, model, twin, dtype)
        model.eval()
        twin.eval()
        x = batch().to(dtype)
        torch.testing.assert_close(run(x), twin(x))


@both_paths
def test_a_schedule_compiles_with_breaks(fused):
    model = torchs_face(fused, renorm=True, renorm_clipping=schedules.linear(0, 3), renorm_momentum=0.3)
    twin = copy.deepcopy(model)
    with compiled(model) as run:
        assert_trains_like(run, model, twin, torch.float32)


@both_paths
def test_a_compiled_layer_that_is_not_trainable_stays(fused):
    layer = tensorflows_face(fused, renorm=True)
    layer(batch(2.0))
    layer.trainable = False
    before, x = state(layer), batch()
    with compiled(layer, fullgraph=True) as run:
        assert torch.equal(run(x), layer(x)) and same(state(layer), before)


@contextmanager
def compiled_and_checkpointed(
    model: nn.Module, order: str, use_reentrant: bool
) -> Iterator[Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()
    segment = torch.compile(model, backend="aot_eager") if order == "a compiled segment" else model

    def run(x: Tensor) -> Tensor:
        return checkpoint(segment, x, use_reentrant=use_reentrant)

    yield torch.compile(run, backend="aot_eager") if order == "a segment in a compiled function" else run
    torch._dynamo.reset()


both_orders = pytest.mark.parametrize("order", ["a compiled segment", "a segment in a compiled function"])
both_kinds = pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])


@both_kinds
@both_orders
@pytest.mark.parametrize("virtual_batch_size", [None, 3], ids=["", "ghosts"])
@pytest.mark.parametrize("fused", [KERNELS])
def test_a_compiled_forward_repeated_by_checkpointing_updates_once(fused, virtual_batch_size, order, use_reentrant):
    layer = torchs_face(fused, momentum=None, virtual_batch_size=virtual_batch_size)
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), layer)
    twin = copy.deepcopy(model)
    with compiled_and_checkpointed(model, order, use_reentrant) as run:
        assert_trains_like(run, model, twin, torch.float32)
    assert model[1].num_batches_tracked == 3


@both_kinds
@both_orders
@pytest.mark.parametrize("fused", [KERNELS])
def test_a_compiled_forward_with_renorm_refuses_to_be_repeated(fused, order, use_reentrant):
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), torchs_face(fused, **RENORM))
    x = batch().requires_grad_()
    with compiled_and_checkpointed(model, order, use_reentrant) as run:
        y = run(x)
        before = state(model)
        with pytest.raises(
            RuntimeError, match="a forward with renorm cannot be repeated"
        ):
            y.sum().backward()
    assert same(state(model), before)
