"""y in the place of the input, and gradients that are found from y alone, against the layer that keeps its input."""

import copy
import re
from typing import Any

import pytest
import torch
from paths import PATHS, needs_kernels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_bn
from torch_bn.functional import RenormState, batch_norm

kernels = pytest.mark.kernels
both_paths = pytest.mark.parametrize("fused", PATHS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
# Ends of rows and planes that fill no register; one that is shorter than any; several channels in one row.
SHAPES = [(6, 5, 7, 7), (4, 16, 3, 1), (5, 1, 1, 2), (3, 37), (40, 8), (2, 3, 33, 3), (20, 8, 2, 2)]
LAYOUTS = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format),
    "cut": lambda x: nn.functional.pad(x, (1, 2))[..., 1:-2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


def statistics(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(channels), torch.rand(channels) + 0.5


@kernels
@needs_kernels
@in_both_modes
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_gradients_it_is_the_same_y_in_the_place_of_any_input(layout, dtype, training):
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        mean, var = statistics(shape[1])
        for ending in ({}, {"activation": "relu", "residual": torch.randn(shape).to(dtype)}, {"activation": "silu"}):
            kept, moved = (mean.clone(), var.clone()), (mean.clone(), var.clone())
            place = LAYOUTS[layout](x)
            expected = batch_norm(place, *kept, training=training, fused=True, **ending)
            address, strides, version = place.data_ptr(), place.stride(), place._version
            y = batch_norm(place, *moved, training=training, fused=True, inplace=True, **ending)
            assert y is place and (y.data_ptr(), y.stride()) == (address, strides) and y._version > version
            assert torch.equal(y, expected), (shape, ending)
            assert all(torch.equal(one, other) for one, other in zip(kept, moved, strict=True))


def hidden(x: Tensor) -> Tensor:
    """As it comes from the layer before: no leaf."""
    return x * 1


@kernels
@needs_kernels
@in_both_modes
@pytest.mark.parametrize("size", [None, 3], ids=["one group", "ghosts of three at most"])
@pytest.mark.parametrize("renorm", [False, True], ids=["", "renorm"])
@pytest.mark.parametrize("activation", [None, "leaky_relu", ("leaky_relu", 3.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_found_from_y(dtype, activation, renorm, size, training, tolerances):
    for shape in [(7, 6, 5, 5), (7, 37)]:
        channels = shape[1]
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 100).to(dtype).requires_grad_()  # a mean of many deviations
        weight, bias = (torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels, requires_grad=True)
        with torch.no_grad():
            weight[::2] *= -1
        dy = torch.randn(shape, dtype=dtype)
        found = []
        for inplace in (False, True):
            state = RenormState(*(torch.full((n,), 0.3) for n in (channels, channels, 1, 1))) if renorm else None
            place = hidden(x)
            y = batch_norm(
                *(place, *statistics_of(shape), weight, bias, training),
                renorm=state if training else None,
                virtual_batch_size=size,
                activation=activation,
                inplace=inplace,
                fused=True,
            )
            assert (y is place) == inplace
            found.append((y.detach().clone(), *torch.autograd.grad(y, (x, weight, bias), dy)))
        # Beside rounding, which is |bias / weight| times as much, elements at the kink may fall on either side.
        tolerance = {name: 50 * value for name, value in tolerances[dtype].items()}
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, **tolerance)


def statistics_of(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.linspace(90, 110, shape[1]), torch.linspace(0.5, 3, shape[1])


@kernels
@needs_kernels
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_parameters_may_be_missing_or_need_no_gradient(missing):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = None if missing in ("weight", "both") else torch.rand(3).double() + 0.5
    bias = None if missing in ("bias", "both") else torch.randn(3).double()
    dy = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    results = [
        torch.autograd.grad(
            batch_norm(hidden(x), None, None, weight, bias, True, activation="leaky_relu", inplace=inplace, fused=True),
            x,
            dy,
        )[0]
        for inplace in (False, True)
    ]
    torch.testing.assert_close(*results)


TEXT = "batch_norm: inplace=True where gradients are recorded "
INVERTED = "needs an activation that can be inverted, None or 'leaky_relu' with a positive slope, got "
ERRORS = {
    "relu": ({"activation": "relu"}, ValueError, INVERTED + "'relu'"),
    "slope": ({"activation": ("leaky_relu", -0.5)}, ValueError, INVERTED + "'leaky_relu' with -0.5"),
    "residual": ({"residual": torch.zeros(4, 3)}, ValueError, "takes no residual"),
    "zeros": ({"weight": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "needs a weight without zeros"),
}
HALF = "needs an input of Float or Double, as half types round away what the input was, got "
PLACES = {
    "leaf": (lambda x: x, RuntimeError, "may not overwrite a leaf that requires a gradient, nor a view"),
    "view": (lambda x: hidden(x)[:], RuntimeError, "may not overwrite a leaf that requires a gradient, nor a view"),
    "bfloat16": (lambda x: x.bfloat16(), TypeError, HALF + "BFloat16"),
    "float16": (lambda x: x.half(), TypeError, HALF + "Half"),
}


@both_paths
@in_both_modes
@pytest.mark.parametrize(
    ("options", "place", "error", "text"),
    [(options, hidden, error, text) for options, error, text in ERRORS.values()]
    + [({}, place, error, text) for place, error, text in PLACES.values()],
    ids=[*ERRORS, *PLACES],
)
def test_it_refuses_what_it_could_not_find_again(options, place, error, text, training, fused):
    x = place(torch.randn(4, 3, requires_grad=True))
    options = {name: value.to(x.device) if isinstance(value, Tensor) else value for name, value in options.items()}
    before, mean, var = x.detach().clone(), torch.zeros(3), torch.ones(3)
    with pytest.raises(error, match=f"^{re.escape(TEXT + text)}$"):
        batch_norm(x, mean, var, training=training, inplace=True, fused=fused, **options)
    assert torch.equal(x, before) and torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


@both_paths
def test_other_errors(fused):
    for call in (
        lambda: batch_norm(torch.randn(4, 3), None, None, training=True, inplace=1, fused=fused),
        lambda: torch_bn.BatchNorm2d(3, inplace=1),
    ):
        with pytest.raises(TypeError, match="^batch_norm: inplace must be a bool, got 1$"):
            call()


@kernels
@needs_kernels
def test_errors_of_the_operator():
    x = torch.randn(1, 3).expand(4, 3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        batch_norm(x, None, None, training=True, inplace=True, fused=True)
    x = torch.randn(4, 3)
    call = (x, None, None, torch.zeros(3), torch.ones(3), 1e-5, 1, True, None, None, 0.0, False)
    with pytest.raises(RuntimeError, match="^batch_norm: out must be the input itself or None"):
        torch.ops.torch_bn._batch_norm_inference(*call, torch.empty(4, 3))


@kernels
@needs_kernels
def test_autograd_notices_what_must_not_happen():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = batch_norm(hidden(x), None, None, training=True, inplace=True, fused=True)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    y = batch_norm(hidden(x), None, None, training=True, inplace=True, fused=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    needed = torch.sigmoid(x)  # which keeps its result for its own backward
    y = batch_norm(needed, None, None, training=True, inplace=True, fused=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def block(inplace: bool, fused: bool | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    more = {"activation": "leaky_relu", "inplace": inplace, "fused": fused, **options}
    return nn.Sequential(nn.Conv2d(3, 4, 3), torch_bn.BatchNorm2d(4, **more), nn.Conv2d(4, 3, 3))


def results(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in model.parameters()), *model.buffers()]


@both_paths
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}, {"momentum": None}], ids=str)
def test_layers_train_the_same(options, fused):
    x = torch.randn(4, 3, 7, 7)
    for one, other in zip(
        *(results(model, model, x) for model in (block(inplace, fused, **options) for inplace in (False, True))),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@both_paths
@pytest.mark.parametrize("renorm", [False, True], ids=["", "renorm"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_repeats_it(reentrant, renorm, fused):
    x = torch.randn(4, 3, 7, 7, requires_grad=True)
    plain = block(False, fused, renorm=renorm)
    expected = results(plain, plain, x)
    model = block(True, fused, renorm=renorm)
    actual = results(model, lambda x: checkpoint(model, x, use_reentrant=reentrant), x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@both_paths
def test_where_forwards_may_be_repeated_the_input_stays(fused):
    """It may be what the repetition starts from."""
    layer = torch_bn.BatchNorm1d(3, inplace=True, fused=fused)
    x = torch.randn(4, 3, requires_grad=True)
    expected = torch.autograd.grad(copy.deepcopy(layer)(hidden(x)).pow(3).sum(), x)
    actual = torch.autograd.grad(checkpoint(layer, hidden(x), use_reentrant=False).pow(3).sum(), x)
    torch.testing.assert_close(actual, expected)


@needs_kernels
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_do_without(backend):
    torch._dynamo.reset()
    eager, compiled = block(False), block(True)
    x = torch.randn(4, 3, 7, 7)
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    for one, other in zip(results(eager, eager, x), results(compiled, run, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@both_paths
def test_several_axes_and_adjustments_do_without(fused):
    for options in ({"axis": (1, 2)}, {"adjustment": lambda size: (2.0, 1.0)}):
        x = torch.randn(4, 3, 5)
        before = x.clone()
        expected = batch_norm(x, None, None, training=True, fused=fused, **options)
        assert torch.equal(batch_norm(x, None, None, training=True, fused=fused, inplace=True, **options), expected)
        assert torch.equal(x, before)


@kernels
@needs_kernels
def test_an_empty_batch_is_counted():
    layer = torch_bn.BatchNorm1d(3, inplace=True, fused=True)
    x = torch.empty(0, 3)
    assert layer(x) is x and layer.num_batches_tracked == 1


def test_the_layer_shows_it():
    assert "inplace=True" in repr(torch_bn.BatchNorm2d(3, inplace=True))
    assert "inplace" not in repr(torch_bn.BatchNorm2d(3))
    layer = torch_bn.BatchNorm2d(3, inplace=True)
    assert type(torch_bn.revert(layer)) is nn.BatchNorm2d and not hasattr(layer, "inplace")


@pytest.mark.on_cpu
@needs_kernels
def test_memory():
    """A chain of convolutions and layers keeps one tensor for each layer in place of two, and evaluation needs one
    less at its peak."""
    from benchmarks.memory import memory_of

    def chain(inplace: bool) -> nn.Module:
        layers = [torch_bn.BatchNorm2d(8, activation="leaky_relu", inplace=inplace, fused=True) for _ in range(4)]
        return nn.Sequential(*(step for layer in layers for step in (nn.Conv2d(8, 8, 1), layer)))

    x = torch.randn(4, 8, 32, 32)
    kept = {inplace: memory_of(lambda inplace=inplace: chain(inplace)(x)).kept for inplace in (False, True)}
    assert kept[False] - kept[True] == 4 * x.nbytes
    layers = {inplace: torch_bn.BatchNorm2d(8, inplace=inplace, fused=True).eval() for inplace in (False, True)}
    with torch.inference_mode():
        peaks = {inplace: memory_of(lambda layer=layer: layer(x.clone())).peak for inplace, layer in layers.items()}
    assert peaks[False] - peaks[True] == x.nbytes
