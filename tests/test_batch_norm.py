"""The compiled operator against plain torch operations in float64, and against nn.BatchNorm: every dtype, layout, rank,
axis and direction. On each CPU table: the marker `kernels` runs the whole file once per table."""

import itertools
from collections.abc import Callable

import pytest
import torch
from paths import KERNELS, PATHS
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bn
from torch_bn import reference
from torch_bn.functional import batch_norm

pytestmark = KERNELS.marks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-5
# Every kind of walk over memory: rows and planes; tiny, short and long planes; few, odd and many channels; one example.
SHAPES = [
    (2, 1),
    (7, 3),
    (64, 17),
    (1040, 5),
    (3, 2050),
    (2, 3, 1),
    (5, 4, 7),
    (33, 6, 4),
    (1, 2, 3001),
    (1, 2, 9001),
    (2, 3, 1, 2),
    (4, 5, 6, 7),
    (3, 17, 5, 13),
    (1, 1, 9, 9),
    (2, 3, 4, 5, 2),
]


def cut(x: Tensor) -> Tensor:
    """The same values as a window into a larger tensor that holds NaN elsewhere."""
    larger = x.new_full([size + 2 for size in x.shape], torch.nan)
    window = larger[tuple(slice(1, -1) for _ in x.shape)]
    return window.copy_(x)


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x.contiguous()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "cut": cut,
    "reversed_axes": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every_other": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "channel_slice": lambda x: torch.cat([x, x, x], dim=1)[:, x.size(1) : 2 * x.size(1)],
}


def sample(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)


def parameters(channels: int, dtype: torch.dtype) -> list[Tensor]:
    """weight, bias, running_mean, running_var in the type that a layer has them in."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    values = [torch.randn(channels) + 1, torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5]
    return [value.to(kept) for value in values]


def both(
    x: Tensor, dy: Tensor, tensors: list[Tensor], training: bool, axis: int = 1, momentum: float = 0.3
) -> tuple[list[Tensor], list[Tensor]]:
    """y, dx, dweight, dbias, running_mean, running_var of the kernels, and of the reference in float64."""
    results = []
    for exact in (False, True):
        input = (x.double() if exact else x).detach().requires_grad_()
        weight, bias, mean, var = ((tensor.double() if exact else tensor).clone() for tensor in tensors)
        weight.requires_grad_()
        bias.requires_grad_()
        run = reference.batch_norm if exact else torch.ops.torch_bn.batch_norm
        y = run(input, weight, bias, mean, var, None, training, momentum, EPS, axis)
        gradients = torch.autograd.grad(y, (input, weight, bias), dy.double() if exact else dy)
        results.append([y.detach(), *gradients, mean, var])
    return results[0], results[1]


def assert_agree(
    kernels: list[Tensor], exact: list[Tensor], dtype: torch.dtype, tolerances: dict, terms: int, training: bool
) -> None:
    tolerance = tolerances[dtype]
    # Sums and statistics are not rounded to the half types; a sum of many terms that cancel is exact to their size.
    summed = tolerances[torch.float64 if dtype == torch.float64 else torch.float32]
    loose = {"rtol": summed["rtol"], "atol": summed["atol"] * max(1, terms) ** 0.5 * 4}
    spread = exact[1].abs().max().clamp(min=1).item()
    for name, actual, expected in zip(("y", "dx", "dweight", "dbias", "mean", "var"), kernels, exact, strict=True):
        if name == "y":
            chosen = tolerance
        elif name == "dx":
            chosen = {"rtol": tolerance["rtol"], "atol": tolerance["atol"] * spread}
        else:
            chosen = loose
        torch.testing.assert_close(actual.double(), expected, **chosen, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_agrees_with_float64_in_every_layout(dtype, layout, training, tolerances):
    for shape in SHAPES:
        x = LAYOUTS[layout](sample(shape, dtype))
        dy = torch.randn(shape).to(dtype)
        kernels, exact = both(x, dy, parameters(shape[1], dtype), training)
        assert_agree(kernels, exact, dtype, tolerances, x.numel() // shape[1], training)
        native = F.batch_norm(x.float().cpu(), None, None, training=True)
        assert kernels[0].stride() == native.stride() and kernels[0].dtype == dtype
        assert kernels[1].dtype == dtype and kernels[2].dtype == kernels[3].dtype


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cut", "reversed_axes"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_any_axis_holds_the_channels(dtype, axis, layout, tolerances):
    for shape in ((5, 4, 6, 3), (2, 3, 1, 7), (1, 5, 4, 33)):
        x = LAYOUTS[layout](sample(shape, dtype))
        for training in (True, False):
            kernels, exact = both(x, torch.randn(shape).to(dtype), parameters(shape[axis], dtype), training, axis)
            assert_agree(kernels, exact, dtype, tolerances, x.numel() // shape[axis], training)


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_any_rank(rank, tolerances):
    shape = (4, 3, 5, 2, 3, 2)[:rank]
    for axis in range(rank if rank > 1 else 0):
        kernels, exact = both(
            sample(shape, torch.float32), torch.randn(shape), parameters(shape[axis], torch.float32), True, axis
        )
        assert_agree(kernels, exact, torch.float32, tolerances, 200, True)
    kernels, exact = both(
        sample(shape, torch.float32), torch.randn(shape), parameters(shape[-1], torch.float32), False, -1
    )
    assert_agree(kernels, exact, torch.float32, tolerances, 200, False)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "other_format": lambda dy: (
        dy.contiguous() if dy.is_contiguous(memory_format=torch.channels_last) else channels_last(dy)
    ),
    "expanded_scalar": lambda dy: dy.flatten()[0].expand(dy.shape),
    "expanded_batch": lambda dy: dy[:1].expand(dy.shape),
    "expanded_plane": lambda dy: dy[:, :, :1, :1].expand(dy.shape),
    "expanded_channels": lambda dy: dy[:, :1].expand(dy.shape),
    "cut": cut,
    "reversed_axes": LAYOUTS["reversed_axes"],
    "negated_view": lambda dy: torch._neg_view(-dy),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_gradients_of_any_layout(dtype, layout, gradient, tolerances):
    for shape in ((4, 5, 6, 7), (2, 20, 3, 3), (40, 3, 2, 2)):
        x = LAYOUTS[layout](sample(shape, dtype))
        dy = GRADIENTS[gradient](LAYOUTS[layout](torch.randn(shape).to(dtype)))
        for training in (True, False):
            kernels, exact = both(x, dy, parameters(shape[1], dtype), training)
            assert_agree(kernels, exact, dtype, tolerances, x.numel() // shape[1], training)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_that_are_needed(needs, tolerances):
    x, dy = sample((6, 5, 4, 3), torch.float32), torch.randn(6, 5, 4, 3)
    weight, bias, mean, var = parameters(5, torch.float32)
    expected = both(x, dy, [weight, bias, mean, var], True)[1]
    inputs = [tensor.clone().requires_grad_(need) for tensor, need in zip((x, weight, bias), needs, strict=True)]
    y = torch.ops.torch_bn.batch_norm(*inputs, mean, var, None, True, 0.1, EPS, 1)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(dy)
    for tensor, need, exact in zip(inputs, needs, expected[1:4], strict=True):
        assert (tensor.grad is None) != need
        if need:
            torch.testing.assert_close(tensor.grad.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [0, 10, 1e3, 1e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(16, 3, 32, 32), (8, 16, 14, 14), (32, 24, 7, 7), (64, 32), (128, 8, 5), (4, 5, 3, 9, 11)]
)
def test_forward_error_is_at_most_that_of_torch(shape, layout, mean):
    for seed in range(4):
        torch.manual_seed(seed)
        x = LAYOUTS[layout]((torch.randn(shape, dtype=torch.float64) + mean).float())
        exact = F.batch_norm(x.double(), None, None, training=True)

        def error(y, exact=exact):
            return (y.double() - exact).abs().max().item()

        ours = error(batch_norm(x, None, None, training=True, fused=True))
        torchs = error(F.batch_norm(x, None, None, training=True))
        # Torch's may by chance be below half a unit in the last place, the best that one rounding can promise.
        half_unit = torch.finfo(torch.float32).eps / 2 * 2 ** (exact.abs().max().log2().floor().item())
        assert ours <= max(torchs, 1.05 * half_unit)


def test_statistics_keep_their_digits_far_from_zero():
    """The running statistics and all gradients too, not only the output: at 1e4 deviations torch loses them."""
    x = (torch.randn(64, 7, 9, 9, dtype=torch.float64) + 1e4).float()
    dy = torch.randn(x.shape)
    weight, bias, mean, var = parameters(7, torch.float32)
    kernels, exact = both(x, dy, [weight, bias, mean, var], True, momentum=1.0)
    for actual, expected in zip(kernels, exact, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 200, 201), (8, 24, 7, 7)])
def test_a_beginning_unlike_the_rest_does_not_mislead(shape, layout, dtype):
    """Every other channel lies far off but for its first elements, which lie about 0, and the others the reverse. Sums
    about the mean of so few elements of so many would miss the variance by 8e-6 and more."""
    x, dy = torch.randn(shape), torch.randn(shape).to(dtype)
    x[:, ::2] += 1e3
    x[0, ::2, 0, :8] -= 1e3
    x[0, 1::2, 0, :8] += 1e3
    x, dy = LAYOUTS[layout](x.to(dtype)), LAYOUTS[layout](dy)
    kernels, exact = both(x, dy, parameters(shape[1], dtype), True, momentum=1.0)
    for actual, expected in zip(kernels[:4], exact[:4], strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if actual.dtype == torch.float32 else 2**-8)
    for actual, expected in zip(kernels[4:], exact[4:], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bitwise_equal_from_run_to_run_and_for_any_number_of_threads(layout):
    threads = torch.get_num_threads()
    for shape, dtype in itertools.product([(3, 5, 301, 67), (64, 300, 5, 4), (4100, 33), (2, 2, 400, 400)], DTYPES[:3]):
        x = LAYOUTS[layout](sample(shape, dtype))
        dy, tensors = torch.randn(shape).to(dtype), parameters(shape[1], dtype)
        results = []
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            try:
                results.append(both(x, dy, tensors, True)[0])
            finally:
                torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_groups_are_bitwise_equal_for_any_number_of_threads(layout):
    threads = torch.get_num_threads()
    for shape, size in (((4, 3, 301, 67), 2), ((21, 70, 7, 7), 4), ((8, 4, 200, 200), 2), ((40, 1100), 7)):
        x, dy = LAYOUTS[layout](sample(shape, torch.float32)), torch.randn(shape)
        results = []
        for count in (1, 2, 5):
            layer = (torch_bn.BatchNorm2d if len(shape) == 4 else torch_bn.BatchNorm1d)(
                shape[1], virtual_batch_size=size, fused=True
            )
            inputs = x.clone().requires_grad_()
            torch.set_num_threads(count)
            try:
                y = layer(inputs)
                gradients = torch.autograd.grad(y, (inputs, *layer.parameters()), dy)
            finally:
                torch.set_num_threads(threads)
            results.append((y, *gradients, layer.running_mean, layer.running_var))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_stay_in_their_channel_as_in_torch():
    x = sample((4, 6, 5, 5), torch.float32)
    x[2, 1, 3, 3], x[1, 3, 0, 0], x[0, 4, 1, 1], x[1, 4, 1, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    for layout in (Tensor.contiguous, channels_last):
        # Torch on the CPU: on CUDA it finds no mean of infinities.
        ours, torchs = torch_bn.BatchNorm2d(6, fused=True), nn.BatchNorm2d(6, device="cpu")
        a, b = ours(layout(x)), torchs(layout(x.cpu()))
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5, equal_nan=True)
        ours.cpu()
        assert torch.equal(ours.running_mean.isfinite(), torchs.running_mean.isfinite())
        assert torch.equal(ours.running_mean.isinf(), torchs.running_mean.isinf())
        assert torch.equal(ours.running_var.isfinite(), torchs.running_var.isfinite())
        assert a[:, [0, 2, 5]].isfinite().all() and a[:, [1, 3, 4]].isnan().all()


def test_huge_values_do_not_overflow():
    x = sample((8, 3, 4, 4), torch.float32) * 1e30
    expected = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True, fused=True).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(40, 3), (300, 64), (8, 3, 7, 7), (4, 3, 40, 40)], ids=str)
@pytest.mark.parametrize("fused", PATHS)
def test_a_mean_whose_square_overflows_float64(fused, shape):
    x = torch.full(shape, 1e170, dtype=torch.float64)
    mean, var = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    y = batch_norm(x, mean, var, training=True, momentum=1.0, fused=fused)
    assert y.eq(0).all() and mean.eq(1e170).all() and var.eq(0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_a_training_run_is_that_of_nn(dtype, layout, tolerances):
    """Several steps of a layer against nn.BatchNorm2d: output, gradients, state, and state_dict both ways, strict."""
    ours, torchs = (
        torch_bn.BatchNorm2d(6, momentum=None, fused=True).to(dtype),
        nn.BatchNorm2d(6, momentum=None).to(dtype),
    )
    for _ in range(4):
        x = LAYOUTS[layout](sample((5, 6, 7, 3), dtype))
        dy = torch.randn(5, 6, 7, 3, dtype=dtype)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for layer, input in zip((ours, torchs), inputs, strict=True):
            layer.zero_grad()
            layer(input).backward(dy)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else tolerances[dtype]
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **close)
        torch.testing.assert_close(ours.weight.grad, torchs.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()), rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == 4
    torchs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(torchs.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0, 3), (0, 4, 0, 0)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_changes_nothing(shape, training):
    weight, bias, mean, var = parameters(4, torch.float32)
    counter = torch.tensor(7)
    tensors = [tensor.clone() for tensor in (mean, var)]
    x = torch.randn(shape, requires_grad=True)
    weight.requires_grad_()
    bias.requires_grad_()
    y = torch.ops.torch_bn.batch_norm(x, weight, bias, *tensors, counter, training, 0.5, EPS, 1)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(4)) and torch.equal(bias.grad, torch.zeros(4))
    assert torch.equal(tensors[0], mean) and torch.equal(tensors[1], var)
    assert counter == (8 if training else 7), "nn.BatchNorm counts an empty batch too"


def test_the_number_of_elements_may_exceed_what_a_float_counts():
    """2^24 + 2 values of one channel: a count kept in float32 would stop there."""
    x = torch.zeros(2, 1, 2**12 + 1, 2**11)
    x[1] = 1
    mean, var = torch.zeros(1), torch.zeros(1)
    batch_norm(x, mean, var, training=True, momentum=1.0, fused=True)
    assert mean.item() == 0.5 and abs(var.item() - 0.25) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_rounded_to_nearest_even(dtype, layout, device):
    # Of a zero input y is the bias: ties, what lies next to them on both sides, and carries into the exponent.
    kept = torch.arange(0x3C00, 0x3C00 + 257, dtype=torch.int32) << 16
    dropped = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    if dtype == torch.float16:
        kept, dropped = kept >> 3, dropped >> 3
        dropped[-2:] += 1
    bias = (kept[:, None] + dropped).flatten().view(torch.float32).to(device)
    bias = torch.cat([bias, -bias])
    x = LAYOUTS[layout](torch.zeros(2, bias.numel(), 5, 7, dtype=dtype, device=device))
    zeros, ones = torch.zeros_like(bias), torch.ones_like(bias)
    y = batch_norm(x, zeros, ones, ones, bias)
    torch.testing.assert_close(y, bias.to(dtype)[:, None, None].expand_as(x), rtol=0, atol=0)
