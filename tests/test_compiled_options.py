"""Compiled layers with renorm and ghost batches: the numbers and the state are those of the eager ones."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from faces import CHANNELS, batch, one_thread, same, state, tensorflows_face, torchs_face
from layer_pairs import both_paths
from torch import Tensor, nn

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
