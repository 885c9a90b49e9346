"""Every activation in the same pass, act(bn(x) + residual), on both paths, against torch's own functions in float64."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import PATHS, needs_kernels
from test_endings import LAYOUTS, SHAPES, each_dtype, layers, saved_bytes
from torch import Tensor, nn

import torch_bn
from torch_bn.functional import RenormState, batch_norm

both_paths = pytest.mark.parametrize("fused", PATHS)
FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    ("leaky_relu", 0.3): lambda z: F.leaky_relu(z, 0.3),
    "elu": F.elu,
    ("elu", 1.7): lambda z: F.elu(z, 1.7),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
}
KINKS = {"leaky_relu": 0.0, "elu": 0.0, "hardswish": 3.0}  # how far from 0 the derivative jumps
each_activation = pytest.mark.parametrize("activation", FUNCTIONS, ids=str)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def name_of(activation: Any) -> str:
    return activation if isinstance(activation, str) else activation[0]


def away_from_the_kink(dy: Tensor, z: Tensor, activation: Any) -> Tensor:
    """dy, but zero where rounding decides on which side of the kink an element lies."""
    kink = KINKS.get(name_of(activation))
    return dy if kink is None else dy.masked_fill((z.abs() - kink).abs() < 0.05, 0)


def check_against_torch(shape, dtype, layouts, activation, training, fused, tolerances):
    ours, theirs = layers(shape[1], dtype, activation=activation, fused=fused)
    ours.train(training), theirs.train(training)
    x, residual = (LAYOUTS[layout](torch.randn(shape).to(dtype)).requires_grad_() for layout in layouts)
    wide = [t.detach().double().requires_grad_() for t in (x, residual)]
    z = theirs(wide[0]) + wide[1]
    expected = FUNCTIONS[activation](z)
    y = ours(x, residual)
    dy = away_from_the_kink(torch.randn(shape).to(dtype), z, activation)
    gradients = torch.autograd.grad(y, (x, residual, ours.weight, ours.bias), dy)
    exact = torch.autograd.grad(expected, (*wide, theirs.weight, theirs.bias), dy.double())
    tolerance = tolerances[dtype]
    torch.testing.assert_close(y.double(), expected, **tolerance)
    assert y.dtype == dtype and y.stride() == ours.eval()(x).stride()
    torch.testing.assert_close(gradients[0].double(), exact[0], rtol=0, atol=20 * tolerance["atol"])
    torch.testing.assert_close(gradients[1].double(), exact[1], **tolerance)
    summed = tolerances[torch.float64 if dtype == torch.float64 else torch.float32]
    for actual, wanted in zip(gradients[2:], exact[2:], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=summed["rtol"], atol=100 * summed["atol"])


@both_paths
@in_both_modes
@each_activation
@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("channels_last", "cut")], ids=str)
@each_dtype
def test_agrees_with_torchs_functions_in_float64(dtype, layouts, activation, training, fused, tolerances):
    for shape in SHAPES:
        check_against_torch(shape, dtype, layouts, activation, training, fused, tolerances)


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ["silu", "hardswish"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_dtype
def test_agrees_around_the_length_that_is_activated_at_once(dtype, layout, activation, tolerances):
    for length in (511, 512, 513, 1025):
        shape = (3, 2, length, 1) if layout == "contiguous" else (6, length, 1, 2)
        check_against_torch(shape, dtype, (layout, layout), activation, True, True, tolerances)


SPECIAL = [
    *(torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.0, -3.0, 2.9999998, -2.9999998, 3.0000002, -3.0000002),
    *(1.0, -1.0, 1e-30, -1e-30, 12.0, -12.0, 88.7, -88.7, 104.0, -104.0, 1e4, -1e4, 1e15, -1e15),
]


@pytest.mark.kernels
@each_activation
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_dtype
def test_values_and_derivatives_at_special_values(dtype, layout, activation, tolerances):
    """At NaN, infinities, kinks and far out: those of torch's own functions, with no overflow on the way."""
    places = torch.arange(3 * 8 * 5 * 5).reshape(3, 8, 5, 5) % len(SPECIAL)
    residual = LAYOUTS[layout](torch.tensor(SPECIAL)[places].to(dtype)).requires_grad_()
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    layer = torch_bn.BatchNorm2d(8, dtype=kept, activation=activation, fused=True).eval()
    y = layer(torch.zeros_like(residual), residual)
    (dz,) = torch.autograd.grad(y, residual, torch.full_like(y, 2))
    exact = residual.detach().double().requires_grad_()
    wanted = FUNCTIONS[activation](exact)
    (slope,) = torch.autograd.grad(wanted, exact, torch.full_like(wanted, 2))
    tolerance = {**tolerances[dtype], "equal_nan": True}
    torch.testing.assert_close(y, wanted.to(dtype), **tolerance)
    # NB: of elu and hardswish torch has dy for the derivative at NaN or NaN, as the element lies in a vector or not.
    slope = torch.where(exact.isnan() & torch.tensor(name_of(activation) in ("elu", "hardswish")), torch.nan, slope)
    torch.testing.assert_close(dz, slope.to(dtype), **tolerance)


@pytest.mark.kernels
@each_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype, activation):
    """Of every number of a half type: half a unit of its last place is the rounding, the rest float32's."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    residual = every[every.abs() < 1e4].reshape(1, 1, 1, -1).requires_grad_()
    layer = torch_bn.BatchNorm2d(1, activation=activation, fused=True).eval()
    y = layer(torch.zeros_like(residual), residual)
    (dz,) = torch.autograd.grad(y, residual, torch.ones_like(y))
    exact = residual.detach().double().requires_grad_()
    wanted = FUNCTIONS[activation](exact)
    (slope,) = torch.autograd.grad(wanted, exact, torch.ones_like(wanted))
    for actual, expected in ((y, wanted), (dz, slope)):
        of = torch.finfo(dtype)
        unit = of.eps * expected.abs().clamp_min(of.tiny).log2().floor().exp2()
        assert bool(((actual - expected).abs() <= 0.501 * unit + 3e-7).all())


@pytest.mark.kernels
@each_activation
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_nan_stays_nan(layout, activation):
    """Whatever bits that of an element, a gradient or a coefficient has: rounding to bfloat16 drops the lower."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    nans = every[every.isnan()]
    x = LAYOUTS[layout](nans[torch.arange(9 * 24 * 7 * 7) % len(nans)].reshape(9, 24, 7, 7))
    numbers = torch.rand_like(x)
    layer = torch_bn.BatchNorm2d(24, activation=activation, fused=True).eval()
    assert layer(x).isnan().all() and layer(numbers, x).isnan().all()
    numbers.requires_grad_()
    assert torch.autograd.grad(layer(numbers), numbers, x)[0].isnan().all()
    fullest = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32).repeat(12)
    for coefficient in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        kept = coefficient.detach().clone()
        coefficient.data.copy_(fullest)
        assert layer(numbers).isnan().all()
        coefficient.data.copy_(kept)


@both_paths
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@in_both_modes
@pytest.mark.parametrize("activation", [*FUNCTIONS, "relu"], ids=str)
def test_derivatives_of_first_and_second_order(activation, training, residual, fused):
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, weight, bias, added = normal(5, 3, 2), normal(3), normal(3), normal(5, 3, 2) if residual else None
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None = None) -> Tensor:
        return batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, residual=added, activation=activation, fused=fused
        )

    leaves = (x, weight, bias) if added is None else (x, weight, bias, added)
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.kernels
@needs_kernels
@each_activation
@pytest.mark.parametrize("option", ["renorm", "virtual_batch_size"])
def test_third_derivatives_are_those_of_plain_operations(option, activation):
    """With r and d, and with groups, all leaves at once."""
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in ((6, 3, 2), (3,), (3,), (6, 3, 2))]

    def derivatives(fused: bool) -> list[Tensor]:
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        state = [torch.full((size,), 0.5, dtype=torch.float64) for size in (3, 3, 1, 1)]
        options = {"renorm": RenormState(*state)} if option == "renorm" else {option: 3}
        y = batch_norm(
            own[0], None, None, *own[1:3], True, residual=own[3], activation=activation, fused=fused, **options
        )
        found, value = [y], y.pow(3).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, own, create_graph=True, allow_unused=True)
            found += gradients
            value = sum(gradient.pow(2).sum() for gradient in gradients)
        return found

    for one, other in zip(derivatives(True), derivatives(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.kernels
@needs_kernels
@pytest.mark.parametrize("leaf", ["bias", "residual"])
def test_a_derivative_of_a_derivative_by_what_alone_needs_one(leaf):
    """z depends on it, and the derivative of silu on z."""

    def derivative(fused: bool) -> Tensor:
        generator = torch.Generator(torch.get_default_device()).manual_seed(5)
        x, dy, residual = (torch.randn(6, 3, dtype=torch.float64, generator=generator) for _ in range(3))
        bias = torch.randn(3, dtype=torch.float64, generator=generator)
        own = {"bias": bias, "residual": residual}[leaf].requires_grad_()
        y = batch_norm(x, None, None, None, bias, True, residual=residual, activation="silu", fused=fused)
        (first,) = torch.autograd.grad(y, own, dy, create_graph=True)
        return torch.autograd.grad(first.sum(), own)[0]

    torch.testing.assert_close(derivative(True), derivative(False))


@pytest.mark.kernels
@needs_kernels
@each_activation
def test_nothing_but_the_inputs_is_kept(activation):
    x, residual = (torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(2))
    layer = torch_bn.BatchNorm2d(3, activation=activation, fused=True)
    assert saved_bytes(lambda: layer(x)) == x.nbytes
    assert saved_bytes(lambda: layer(x, residual)) == x.nbytes + residual.nbytes


@both_paths
def test_the_numbers_of_activations_and_their_defaults(fused):
    x, residual = torch.randn(6, 3), torch.randn(6, 3)

    def run(activation: Any) -> Tensor:
        layer = torch_bn.BatchNorm1d(3, activation=activation, fused=fused)
        y = layer(x, residual)
        per_call = torch_bn.BatchNorm1d(3, fused=fused)(x, residual, activation)
        function = batch_norm(x, None, None, training=True, residual=residual, activation=activation, fused=fused)
        assert torch.equal(y, per_call) and torch.equal(y, function)
        return y

    assert torch.equal(run("leaky_relu"), run(("leaky_relu", 0.01)))
    assert torch.equal(run("elu"), run(("elu", 1)))
    assert torch.equal(run(("leaky_relu", 0)), run("relu"))
    assert torch.equal(run(("leaky_relu", 1)), run(None))
    z = run(None)
    for slope in (-0.5, 2.0):
        torch.testing.assert_close(run(("leaky_relu", slope)), F.leaky_relu(z, slope))
        torch.testing.assert_close(run(("elu", slope)), F.elu(z, slope))


NAMES = "None, 'relu', 'leaky_relu', 'elu', 'silu', 'gelu', 'gelu_tanh' or 'hardswish'"
PAIR = f"activation must be {NAMES}, or a pair of a name and a number"
ERRORS = {
    "unknown name": ("tanh", f"{PAIR}, got 'tanh'"),
    "unknown name in a pair": (("tanh", 0.1), f"{PAIR}, got ('tanh', 0.1)"),
    "a list": (["elu", 0.1], f"{PAIR}, got ['elu', 0.1]"),
    "one alone": (("elu",), f"{PAIR}, got ('elu',)"),
    "no number": (("silu", 0.1), "activation must be 'leaky_relu' or 'elu' to have a number, got ('silu', 0.1)"),
    "a word": (("elu", "1"), "the number of an activation must be finite, got ('elu', '1')"),
    "none": (("elu", None), "the number of an activation must be finite, got ('elu', None)"),
    "nan": (("leaky_relu", torch.nan), "the number of an activation must be finite, got ('leaky_relu', nan)"),
}


@pytest.mark.parametrize(("activation", "text"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_an_activation_must_be(activation, text):
    x = torch.randn(4, 3)
    layer = torch_bn.BatchNorm1d(3)
    for call in (
        lambda: batch_norm(x, None, None, training=True, activation=activation),
        lambda: torch_bn.BatchNorm1d(3, activation=activation),
        lambda: layer(x, None, activation),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape('batch_norm: ' + text)}$"):
            call()
    assert layer.num_batches_tracked == 0


@each_activation
def test_layers_show_it_and_can_be_copied_pickled_and_recorded(activation):
    layer = torch_bn.BatchNorm2d(3, activation=activation)
    assert f"activation={activation!r}" in repr(layer)
    x = torch.randn(4, 3, 2, 2)
    y = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.activation == activation and torch.equal(again(x), y)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch_bn.BatchNorm2d(3)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.norm(x, residual, activation)

    graph = torch.fx.symbolic_trace(Block())
    wanted = FUNCTIONS[activation](nn.BatchNorm2d(3)(x) + x)
    torch.testing.assert_close(graph(x, x), wanted)
    with pytest.raises(ValueError, match="^revert: activation must be None"):
        torch_bn.revert(layer)


@needs_kernels
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend):
    eager = nn.ModuleList(torch_bn.BatchNorm2d(3, activation=activation) for activation in FUNCTIONS)
    compiled = copy.deepcopy(eager)

    def run(layers: nn.ModuleList, x: Tensor, residual: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, residual)
        return x

    leaves = [[torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2)]]
    leaves.append([t.detach().clone().requires_grad_() for t in leaves[0]])
    run(eager, *leaves[0]).square().sum().backward()
    torch.compile(run, fullgraph=True, backend=backend)(compiled, *leaves[1]).square().sum().backward()
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(dict(eager.state_dict()), dict(compiled.state_dict()))
