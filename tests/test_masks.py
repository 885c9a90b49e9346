"""What relu lets through behind a residual, kept in bits in place of the residual."""

from typing import Any

import pytest
import torch
from paths import KERNELS, needs_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_bn
from torch_bn.functional import batch_norm

pytestmark = KERNELS.marks

channels_last = {"memory_format": torch.channels_last}
# Planes that fill bytes and that do not, long and short ones, rows, rows that share bytes.
MASKED = [(4, 3, 5, 5), (2, 5, 4, 2), (3, 8, 4, 4), (1, 1, 33, 31), (2, 64, 1, 1), (5, 24), (2, 16, 3, 3, 3)]
MASKED += [(4, 8, 2, 2), (20, 8, 3, 3), (6, 24, 7, 7), (5, 17, 7, 9), (3, 9, 14, 14), (2, 3, 17, 31)]
UNMASKED = [(4, 3, 3, 5), (4, 5, 2, 2), (5, 3), (17,)]


def forward(x: Tensor, residual: Tensor, keep_mask: bool = True, axis: int = 1, groups: int = 1) -> Any:
    """(output, saved, mask) in training."""
    return torch.ops.torch_bn._batch_norm_forward(
        *(x, None, None, None, None, None, 0.1, 1e-5, axis, groups, True, False),
        *(None, None, None, None, 0.01, None, None, None, None, residual, "relu", 0.0, keep_mask),
    )


def inference(x: Tensor, residual: Tensor, keep_mask: bool = True) -> Any:
    """(output, mask)."""
    mean, var = torch.zeros(x.size(1)), torch.ones(x.size(1))
    return torch.ops.torch_bn._batch_norm_inference(
        x, None, None, mean, var, 1e-5, 1, False, residual, "relu", 0.0, keep_mask
    )


def pair(shape: tuple[int, ...], **more: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, **more), torch.randn(shape, **more)


@pytest.mark.on_cpu
def test_a_bit_for_each_element_where_bytes_need_not_be_shared():
    for shape in MASKED:
        _, _, mask = forward(*pair(shape))
        bits = 8 * mask.numel()
        elements = torch.Size(shape).numel()
        assert mask.dtype == torch.uint8 and elements <= bits <= elements * 28 / 25 + 32, shape
        assert inference(*pair(shape))[1].shape == mask.shape
    for shape in UNMASKED:
        assert forward(*pair(shape), axis=len(shape) - 1 if len(shape) < 3 else 1)[2] is None, shape
    assert forward(*pair((4, 8)), keep_mask=False)[2] is None and inference(*pair((4, 8)), keep_mask=False)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_fake_operators_know_its_size(dtype):
    cases = [(shape, layout, axis, 1) for shape in (*MASKED, *UNMASKED) for layout in (0, 1) for axis in (0, -1)]
    cases += [((4, 1, 4, 5), layout, 1, groups) for layout in (0, 1) for groups in (1, 2)]
    cases += [((4, 24, 3, 6), layout, axis, 2) for layout in (0, 1) for axis in (1, 2, 3)]
    for shape, layout, axis, groups in cases:
        x, residual = (t.to(dtype) for t in pair(shape))
        if layout and x.dim() == 4:
            x = x.contiguous(**channels_last)
        axis %= x.dim()
        real = forward(x, residual, axis=axis, groups=groups)[2]
        with FakeTensorMode() as mode:
            fake = forward(mode.from_tensor(x), mode.from_tensor(residual), axis=axis, groups=groups)[2]
        found, expected = (None if mask is None else (mask.shape, mask.dtype) for mask in (fake, real))
        assert found == expected, (shape, layout, axis, groups)


def derivatives(x: Tensor, residual: Tensor, order: int) -> list[Tensor]:
    """Of a value in which gradients of all lower orders take part."""
    y = batch_norm(x, None, None, training=True, residual=residual, activation="relu", fused=True)
    found, value = [y], y.pow(3).sum()
    for _ in range(order):
        gradients = torch.autograd.grad(value, (x, residual), create_graph=True)
        found += gradients
        value = sum(gradient.pow(2).sum() for gradient in gradients)
    return found


@pytest.mark.parametrize("order", [1, 2])
def test_hooks_may_bring_the_input_back_in_another_layout(order):
    x, residual = (t.contiguous(**channels_last).requires_grad_() for t in pair((4, 8, 3, 5), dtype=torch.float64))
    expected = derivatives(x, residual, order)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous(), lambda t: t):
        actual = derivatives(x, residual, order)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_residual_may_change_after_the_forward(training):
    layer = torch_bn.BatchNorm2d(8, activation="relu", fused=True).train(training)
    x, residual = (t.requires_grad_() for t in pair((4, 8, 5, 5)))
    dy = torch.randn(4, 8, 5, 5)
    expected = torch.autograd.grad(layer(x, residual), (x, residual), dy)
    changed = residual * 1
    y = layer(x, changed)
    changed.detach().zero_()
    changed.add_(1)
    for one, other in zip(torch.autograd.grad(y, (x, residual), dy), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operands_at_odd_places(dtype):
    """Of which a GPU cannot read as many neighbours at once as share a byte."""
    shape = (4, 8, 5, 8)
    x, residual, dy = (torch.randn(4 * 8 * 5 * 8).to(dtype) for _ in range(3))
    expected = None
    for shift in (0, 1, 2):
        tensors = [torch.cat([t[:shift], t])[shift:].view(shape) for t in (x, residual, dy)]
        leaves = [t.requires_grad_() for t in tensors[:2]]
        y = batch_norm(leaves[0], None, None, training=True, residual=leaves[1], activation="relu", fused=True)
        found = (y, *torch.autograd.grad(y, leaves, tensors[2]))
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_the_backward_operator_refuses_a_mask_of_another_input():
    x, residual = pair((4, 8, 5, 5))
    _, saved, mask = forward(x, residual)
    backward = torch.ops.torch_bn._batch_norm_backward
    for wrong in (mask[1:], mask.bool(), mask.view(1, -1)):
        with pytest.raises(RuntimeError, match=r"^batch_norm: mask must be contiguous Byte of \[\d+\], as"):
            backward(x, x, None, saved, True, 1e-5, 1, 1, True, None, None, "relu", True, 0.0, wrong)


@needs_kernels
@pytest.mark.on_cpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_graphs_keep_it(dynamic):
    torch._dynamo.reset()
    layer = torch_bn.BatchNorm2d(8, activation="relu")
    run = torch.compile(layer, fullgraph=True, backend="inductor", dynamic=dynamic)
    for size in (5, 7):
        leaves = [t.requires_grad_() for t in pair((4, 8, size, size))]
        dy = torch.randn(4, 8, size, size)
        y = run(*leaves)
        assert torch.uint8 in {t.dtype for t in y.grad_fn.saved_tensors}
        expected = torch.autograd.grad(layer(*leaves), leaves, dy)
        for one, other in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
            torch.testing.assert_close(one, other)
