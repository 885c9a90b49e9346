"""First and second derivatives of what training may add to a batch normalization, against finite differences."""

import pytest
import torch
from paths import PATHS
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torch_bn import functional

C = 3
SHAPES = {"(N, C)": (7, C), "NCHW": (4, C, 2, 2), "channels_last": (5, C, 1, 3)}
R, D = 1.25, 0.5


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def example(name: str) -> tuple[Tensor, Tensor, Tensor]:
    x = double(*SHAPES[name])
    if name == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), double(C).requires_grad_(), double(C).requires_grad_()


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
