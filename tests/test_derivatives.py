"""First and second derivatives of what training may add to a batch normalization, against finite differences."""

import pytest
import torch
from paths import PATHS, needs_kernels
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torch_bn import functional

C = 3
SHAPES = {"(N, C)": (7, C), "NCHW": (4, C, 2, 2), "channels_last": (5, C, 1, 3)}
# Of these the kernels keep in bits what relu lets through behind a residual.
MASKED = {"planes": (4, C, 4, 5), "eight channels": (5, 8, 1, 3), "rows": (7, 8)}
R, D = 1.25, 0.5


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def example(name: str) -> tuple[Tensor, Tensor, Tensor]:
    shape = (SHAPES | MASKED)[name]
    x = double(*shape)
    if name in ("channels_last", "eight channels"):
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), double(shape[1]).requires_grad_(), double(shape[1]).requires_grad_()


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("virtual_batch_size", [None, 3], ids=["one group", "ghosts of three at most"])
@pytest.mark.parametrize("shape", SHAPES)
def test_renorm_with_r_and_d_held_constant(shape, virtual_batch_size, fused):
    """The averages lie so far away that both corrections are at their bounds, wherever the differences reach."""
    x, weight, bias = example(shape)
    far = torch.tensor([-100.0, 100.0, -100.0], dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm(
            *(x, None, None, weight, bias, True),
            renorm=functional.RenormState(far.clone(), torch.full_like(far, 3), one.clone(), one.clone()),
            renorm_clipping={"rmin": R, "rmax": R, "dmax": D},
            virtual_batch_size=virtual_batch_size,
            fused=fused,
        )

    if virtual_batch_size is None:
        shape_of_channels = (1, C) + (1,) * (x.dim() - 2)
        plain = torch.nn.functional.batch_norm(x, None, None, training=True)
        d = (D * -far.sign()).view(shape_of_channels)
        expected = (plain * R + d) * weight.view(shape_of_channels) + bias.view(shape_of_channels)
        torch.testing.assert_close(run(x, weight, bias), expected)
    assert gradcheck(run, (x, weight, bias))
    assert gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("virtual_batch_size", [None, 3], ids=["one group", "ghosts of three at most"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per example"])
@pytest.mark.parametrize("shape", SHAPES)
def test_adjustment(shape, per_channel, virtual_batch_size, fused):
    """Gradients flow into what the adjustment returns, too."""
    x, weight, bias = example(shape)
    others = (1,) * (x.dim() - 2)
    sizes = (C,) if per_channel else (x.size(0), C, *others)
    scale, shift = double(*sizes).requires_grad_(), double(*sizes).requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.batch_norm(
            *(x, None, None, weight, bias, True),
            virtual_batch_size=virtual_batch_size,
            adjustment=lambda size: (scale, shift),
            fused=fused,
        )

    inputs = (x, weight, bias, scale, shift)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.kernels
@needs_kernels
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("virtual_batch_size", [None, 3], ids=["one group", "ghosts of three at most"])
@pytest.mark.parametrize("shape", SHAPES | MASKED)
def test_derivatives_of_a_penalty_on_gradients_up_to_the_third(shape, virtual_batch_size, activation):
    """The gradient that comes from above depends on the input, too, as behind every layer that is not linear."""
    x, weight, bias = example(shape)
    leaves = [x, weight, bias, torch.randn_like(x).requires_grad_()]

    def derivatives(fused: bool) -> list[Tensor]:
        y = functional.batch_norm(
            *(x, None, None, weight, bias, True),
            virtual_batch_size=virtual_batch_size,
            residual=leaves[3],
            activation=activation,
            fused=fused,
        )
        found, value = [y], y.pow(3).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            found += gradients
            value = sum(gradient.pow(2).sum() for gradient in gradients)
        return found

    for one, other in zip(derivatives(True), derivatives(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
