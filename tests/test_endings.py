"""Activation and residual in the same pass: relu(bn(x) + residual), on both paths, against torch's own operations."""

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import PATHS, needs_kernels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_bn
from torch_bn.functional import Ending, _batch_norm, batch_norm

both_paths = pytest.mark.parametrize("fused", PATHS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cut": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
}
SHAPES = [(5, 17, 7, 7), (3, 3, 5, 9), (2, 64, 1, 1), (4, 1, 3, 5), (3, 24, 4, 4)]


def layers(channels: int, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours, and nn.BatchNorm2d in float64 with the same state."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    ours = torch_bn.BatchNorm2d(channels, dtype=kept, **options)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.uniform_(-1, 1)
    theirs = nn.BatchNorm2d(channels, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@both_paths
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("channels_last", "cut"), ("cut", "channels_last")])
@each_dtype
def test_agrees_with_torchs_operations_in_float64(dtype, layouts, activation, training, fused, tolerances):
    for shape in SHAPES:
        ours, theirs = layers(shape[1], dtype, activation=activation, fused=fused)
        ours.train(training), theirs.train(training)
        x, residual = (LAYOUTS[layout](torch.randn(shape).to(dtype)).requires_grad_() for layout in layouts)
        wide = [t.detach().double().requires_grad_() for t in (x, residual)]
        before = theirs(wide[0]) + wide[1]
        expected = before.relu() if activation else before
        y = ours(x, residual)
        # Where rounding decides on which side of the kink an element lies, no gradient comes.
        dy = torch.randn(shape).to(dtype).masked_fill(before.abs() < 0.05, 0)
        gradients = torch.autograd.grad(y, (x, residual, ours.weight, ours.bias), dy)
        exact = torch.autograd.grad(expected, (*wide, theirs.weight, theirs.bias), dy.double())
        tolerance = tolerances[dtype]
        torch.testing.assert_close(y.double(), expected, **tolerance)
        assert y.dtype == dtype and y.stride() == ours.eval()(x).stride()
        # Two samples that are nearly equal have a huge gradient, whose size counts.
        torch.testing.assert_close(gradients[0].double(), exact[0], rtol=tolerance["rtol"], atol=20 * tolerance["atol"])
        torch.testing.assert_close(gradients[1].double(), exact[1], **tolerance)
        summed = tolerances[torch.float64 if dtype == torch.float64 else torch.float32]
        for actual, wanted in zip(gradients[2:], exact[2:], strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=summed["rtol"], atol=100 * summed["atol"])


@both_paths
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}, {"axis": (1, 3)}], ids=str)
@pytest.mark.parametrize("adjusted", [None, "channel", "example"])
@pytest.mark.parametrize("inner", [(3, 2), (9, 2)], ids=["short planes", "long planes"])
def test_combines_with_every_option(adjusted, options, inner, fused):
    shape = (6, 4, *inner)
    x, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    channels = 8 if "axis" in options else 4
    scale = {"channel": torch.rand(channels), "example": torch.rand(6, 1, 1, 1)}.get(adjusted)
    scale = None if scale is None else (scale.double() + 0.5).requires_grad_()
    options = dict(options)
    if options.pop("renorm", False):
        zeros = [torch.zeros(size, dtype=torch.float64) for size in (channels, channels, 1, 1)]
        options["renorm"] = torch_bn.functional.RenormState(*zeros)
    if scale is not None:
        options["adjustment"] = lambda _: (scale, 0.25)

    def run(**ending: Any) -> Tensor:
        state = {name: copy.deepcopy(value) for name, value in options.items() if name != "adjustment"}
        more = {"adjustment": options["adjustment"]} if "adjustment" in options else {}
        return batch_norm(x, None, None, training=True, fused=fused, **state, **more, **ending)

    leaves = [x, residual, *([] if scale is None else [scale])]
    dy = torch.randn(shape, dtype=torch.float64)
    expected = (run() + residual).relu()
    actual = run(residual=residual, activation="relu")
    torch.testing.assert_close(actual, expected)
    found, wanted = (torch.autograd.grad(y, leaves, dy) for y in (actual, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@both_paths
def test_only_the_residual_may_need_a_gradient(fused):
    x, residual = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    for activation in (None, "relu"):
        y = batch_norm(x, None, None, training=True, residual=residual, activation=activation, fused=fused)
        dy = torch.randn(4, 3)
        (gradient,) = torch.autograd.grad(y, residual, dy)
        assert torch.equal(gradient, dy if activation is None else dy * (y > 0))


@both_paths
def test_a_residual_of_another_dtype_gets_its_gradient_in_it(fused):
    x = torch.randn(4, 3, 5, 5).bfloat16().requires_grad_()
    residual = torch.randn(4, 3, 5, 5, requires_grad=True)
    layer = torch_bn.BatchNorm2d(3, activation="relu", fused=fused)
    y = layer(x, residual)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, residual.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@both_paths
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_passes_through_activation_and_gradient(layout, fused):
    residual = torch.zeros(4, 5, 3, 3)
    residual[1, 2, 0, 1] = torch.nan
    x, residual = (LAYOUTS[layout](t).requires_grad_() for t in (torch.randn(4, 5, 3, 3), residual))
    y = torch_bn.BatchNorm2d(5, activation="relu", fused=fused)(x, residual)
    assert torch.equal(y.isnan(), residual.isnan())
    y.nan_to_num(0).sum().backward()
    dy = torch.ones_like(y)
    theirs = residual.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(F.relu(theirs), theirs, dy)
    again = torch_bn.BatchNorm2d(5, activation="relu", fused=fused).eval()(torch.zeros_like(x), residual)
    (found,) = torch.autograd.grad(again, residual, dy)
    assert torch.equal(found, wanted)  # at 0 and at NaN as torch has it


@both_paths
def test_an_expanded_gradient_and_an_empty_batch(fused):
    layer = torch_bn.BatchNorm2d(3, activation="relu", fused=fused)
    x, residual = (torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(2))
    y = layer(x, residual)
    y.sum().backward()
    assert torch.equal(residual.grad, (y > 0).float())
    empty = torch.empty(0, 3, 2, 2, requires_grad=True)
    layer(empty, torch.empty(0, 3, 2, 2)).sum().backward()
    assert layer.num_batches_tracked == 2 and empty.grad.shape == empty.shape


def saved_bytes(run: Any) -> int:
    """What autograd keeps of one forward beside parameters and what belongs to channels."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.data_ptr()] = t.nbytes if t.dim() == 4 or t.dtype == torch.uint8 else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


@pytest.mark.kernels
def test_activation_keeps_nothing_but_the_input_and_some_bits():
    x, residual = (torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(2))
    plain, fused = torch_bn.BatchNorm2d(3, fused=True), torch_bn.BatchNorm2d(3, activation="relu", fused=True)
    assert saved_bytes(lambda: fused(x)) == x.nbytes
    assert saved_bytes(lambda: F.relu(plain(x))) == 2 * x.nbytes
    assert saved_bytes(lambda: fused(x, residual)) <= x.nbytes + x.numel() // 4  # a bit for each element, or two
    assert saved_bytes(lambda: plain(x, residual)) == x.nbytes


@both_paths
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_repeats_it(reentrant, fused):
    layer = torch_bn.BatchNorm2d(3, activation="relu", fused=fused)
    x, residual = (torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 3, 2, 2)
    wanted = torch.autograd.grad(copy.deepcopy(layer)(x, residual), (x, residual), dy)
    checkpoint(layer, x, residual, use_reentrant=reentrant).backward(dy)
    assert layer.num_batches_tracked == 1
    assert torch.equal(x.grad, wanted[0]) and torch.equal(residual.grad, wanted[1])


@both_paths
def test_deferred_updates_and_the_running_statistics_do_not_mind(fused):
    fancy, plain = torch_bn.BatchNorm2d(3, activation="relu", fused=fused), torch_bn.BatchNorm2d(3, fused=fused)
    x = torch.randn(4, 3, 2, 2)
    with torch_bn.deferred_updates() as updates:
        fancy(x, x)
    assert fancy.num_batches_tracked == 0
    updates.apply()
    plain(x)
    for name, value in plain.state_dict().items():
        assert torch.equal(fancy.state_dict()[name], value), name
    assert list(fancy.state_dict()) == list(nn.BatchNorm2d(3).state_dict())


NAMES = "None, 'relu', 'leaky_relu', 'elu', 'silu', 'gelu', 'gelu_tanh' or 'hardswish'"
ERRORS = {
    "shape": ({"residual": torch.zeros(4, 2)}, ValueError, "residual must have the input's shape [4, 3], got [4, 2]"),
    "dtype": (
        {"residual": torch.zeros(4, 3, dtype=torch.int64)},
        TypeError,
        "residual must be Float, Double, Half or BFloat16, got Long",
    ),
    "device": (
        {"residual": torch.zeros(4, 3, device="meta")},
        RuntimeError,
        "input is on cpu but residual is on meta",
    ),
    "activation": ({"activation": "tanh"}, ValueError, f"activation must be {NAMES}, got 'tanh'"),
}


@both_paths
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("ending", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_must_hold_and_change_nothing(ending, error, text, training, fused):
    x, counter, mean, var = torch.randn(4, 3), torch.tensor(0), torch.zeros(3), torch.ones(3)
    ending = {
        name: value.to(x.device) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in ending.items()
    }
    text = text.replace("is on cpu", f"is on {x.device}")
    with pytest.raises(error, match=f"^{re.escape('batch_norm: ' + text)}") as caught:
        _batch_norm(
            x, None, None, mean, var, counter, training, 0.1, 1e-5, 1, fused, None, Ending(**ending)
        )
    assert type(caught.value) is error
    assert counter == 0 and torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


def test_errors_of_several_axes_and_of_other_types():
    x = torch.randn(4, 3, 2)
    text = "batch_norm: residual must have the input's shape [4, 3, 2], got [4, 3]"
    with pytest.raises(ValueError, match=re.escape(text)):
        batch_norm(x, None, None, training=True, axis=(1, 2), residual=torch.zeros(4, 3))
    for call in (
        lambda: batch_norm(x, None, None, training=True, residual=1.0),
        lambda: torch_bn.BatchNorm1d(3)(x, 1.0),
    ):
        with pytest.raises(TypeError, match="^batch_norm: residual must be a Tensor or None, got float$"):
            call()
    for call in (
        lambda: batch_norm(x, None, None, training=True, activation=nn.ReLU()),
        lambda: torch_bn.BatchNorm1d(3, activation=nn.ReLU()),
    ):
        text = f"batch_norm: activation must be {NAMES}, or a pair of a name and a number, got ReLU()"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call()


@pytest.mark.kernels
def test_the_backward_operator_checks_what_it_recomputes_from():
    x, saved = torch.randn(4, 3), torch.zeros(2, 3, dtype=torch.float64)
    call = (x, x, None, saved, True, 1e-5, 1, 1, True)
    backward = torch.ops.torch_bn._batch_norm_backward
    with pytest.raises(RuntimeError, match="^bias should contain 3 elements not 2"):
        backward(*call, torch.zeros(2), None, "relu", False)
    with pytest.raises(ValueError, match=r"residual must have the input's shape \[4, 3\], got \[4, 2\]"):
        backward(*call, None, torch.zeros(4, 2), "relu", True)


def test_the_layer_shows_it_and_torch_fx_records_it():
    layer = torch_bn.BatchNorm2d(3, activation="relu")
    assert "activation='relu'" in repr(layer) and "activation" not in repr(torch_bn.BatchNorm2d(3))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.norm(x, residual)

    graph = torch.fx.symbolic_trace(Block())
    x, residual = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(graph(x, residual), (nn.BatchNorm2d(3)(x) + residual).relu())


def test_revert_refuses_what_torchs_layer_cannot_do():
    model = nn.Sequential(torch_bn.BatchNorm2d(3), torch_bn.BatchNorm2d(3, activation="relu"))
    with pytest.raises(ValueError, match="^revert: activation must be None for nn.BatchNorm, got 'relu' in '1'$"):
        torch_bn.revert(model)
    assert all(isinstance(layer, torch_bn.BatchNorm2d) for layer in model)


@needs_kernels
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend):
    eager = torch_bn.BatchNorm2d(3, activation="relu")
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    leaves = [[torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2)]]
    leaves.append([t.detach().clone().requires_grad_() for t in leaves[0]])
    eager(*leaves[0]).square().sum().backward()
    run(*leaves[1]).square().sum().backward()
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(dict(eager.state_dict()), dict(compiled.state_dict()))
