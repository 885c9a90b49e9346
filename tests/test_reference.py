"""The plain path against NumPy in float64, and its derivatives against finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from torch_bn import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES_AND_AXES = [
    ((7, 3), 1),
    ((5, 1, 9), 1),
    ((2, 5, 3, 7), 1),
    ((3, 2, 1, 5, 2), 1),
    ((4, 3, 5), -1),
    ((4, 3, 5), 0),
    ((2, 3, 5, 4), -2),
    ((2, 0), 1),
]


def normalized(x: Tensor, weight, bias, mean, var, eps: float, axis: int) -> np.ndarray:
    """Algorithm 1 and 2 of the paper, in float64."""
    shape = [-1 if other == axis % x.dim() else 1 for other in range(x.dim())]
    x, mean, var = (np.asarray(value, np.float64) for value in (x.double(), mean, var))
    y = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    if weight is not None:
        y = y * weight.double().numpy().reshape(shape)
    return y if bias is None else y + bias.double().numpy().reshape(shape)


def moments(x: Tensor, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, biased and unbiased variance of each channel, in float64."""
    values = np.moveaxis(x.double().numpy(), axis, 0)
    values = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    return values.mean(1), values.var(1), values.var(1, ddof=1)


def call(x: Tensor, weight=None, bias=None, mean=None, var=None, counter=None, **options) -> Tensor:
    options = {"training": True, "momentum": 0.1, "eps": 1e-5, "axis": 1} | options
    return reference.batch_norm(x, weight, bias, mean, var, counter, **options)


def close(actual: Tensor, expected: np.ndarray, tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(actual.double(), torch.from_numpy(np.asarray(expected)), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES_AND_AXES, ids=str)
def test_training_matches_the_paper(shape, axis, dtype, tolerances):
    x = torch.randn(shape).mul(3).add(2).to(dtype)
    channels = shape[axis]
    weight, bias = torch.randn(channels), torch.randn(channels, dtype=torch.float64)
    running_mean, running_var = torch.randn(channels), torch.rand(channels)
    expected_mean, expected_var = running_mean.double().numpy(), running_var.double().numpy()
    counter = torch.tensor(4)

    y = call(x, weight, bias, running_mean, running_var, counter, momentum=0.3, eps=1e-3, axis=axis)

    mean, biased, unbiased = moments(x, axis)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    close(y, normalized(x, weight, bias, mean, biased, 1e-3, axis), tolerances[dtype])
    close(running_mean, 0.7 * expected_mean + 0.3 * mean, tolerances[torch.float32])
    close(running_var, 0.7 * expected_var + 0.3 * unbiased, tolerances[torch.float32])
    assert counter == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES_AND_AXES, ids=str)
def test_evaluation_matches_the_paper(shape, axis, dtype, tolerances):
    x = torch.randn(shape).to(dtype)
    mean, var = torch.randn(shape[axis]), torch.rand(shape[axis])
    state = mean.clone(), var.clone(), torch.tensor(2)

    y = call(x, None, None, *state, training=False, eps=0.1, axis=axis)

    close(y, normalized(x, None, None, mean, var, 0.1, axis), tolerances[dtype])
    assert torch.equal(state[0], mean) and torch.equal(state[1], var) and state[2] == 2


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no weight"])
def test_missing_parameters_are_ones_and_zeros(has_weight, has_bias, tolerances):
    x = torch.randn(5, 3, 4)
    weight, bias = torch.randn(3) if has_weight else None, torch.randn(3) if has_bias else None
    mean, biased, _ = moments(x, 1)
    expected = normalized(x, weight, bias, mean, biased, 1e-5, 1)
    close(call(x, weight, bias), expected, tolerances[torch.float32])


def test_momentum_none_averages_over_all_batches(tolerances):
    batches = [torch.randn(6, 3) for _ in range(5)]
    running_mean, running_var, counter = torch.full((3,), 9.0), torch.full((3,), 9.0), torch.tensor(0)
    for batch in batches:
        call(batch, None, None, running_mean, running_var, counter, momentum=None)
    means, _, variances = zip(*(moments(batch, 1) for batch in batches), strict=True)
    close(running_mean, np.mean(means, 0), tolerances[torch.float32])
    close(running_var, np.mean(variances, 0), tolerances[torch.float32])


@pytest.mark.parametrize("momentum", [-1.2, 0.0, 1.0, 2.5])
def test_momentum_may_be_any_number(momentum, tolerances):
    x, running_mean, running_var = torch.randn(6, 3), torch.zeros(3), torch.ones(3)
    call(x, None, None, running_mean, running_var, momentum=momentum)
    mean, _, unbiased = moments(x, 1)
    close(running_mean, momentum * mean, tolerances[torch.float32])
    close(running_var, 1 - momentum + momentum * unbiased, tolerances[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_keep_their_own_dtype(dtype, tolerances):
    x = torch.randn(8, 3, 5)
    running_mean, running_var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    call(x, None, None, running_mean, running_var, momentum=1.0)
    mean, _, unbiased = moments(x, 1)
    tolerance = tolerances[dtype if dtype.itemsize < 4 else torch.float32]
    assert running_mean.dtype == running_var.dtype == dtype
    close(running_mean, mean, tolerance)
    close(running_var, unbiased, tolerance)


def test_half_statistics_do_not_overflow_on_the_way():
    x = (torch.randn(64, 3) * 1000).half()  # the variance, 1e6, is beyond float16
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    y = call(x, None, None, running_mean, running_var, momentum=1.0)
    close(running_var, moments(x, 1)[2], {"rtol": 1e-5, "atol": 0})
    assert y.isfinite().all()


def test_an_empty_batch_changes_only_the_counter():
    x = torch.empty(0, 3, 4, requires_grad=True)
    weight, bias = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    running_mean, running_var, counter = torch.randn(3), torch.rand(3), torch.tensor(1)
    before = running_mean.clone(), running_var.clone()
    y = call(x, weight, bias, running_mean, running_var, counter)
    y.sum().backward()
    assert y.shape == x.shape and counter == 2
    assert torch.equal(running_mean, before[0]) and torch.equal(running_var, before[1])
    assert not weight.grad.any() and not bias.grad.any() and x.grad.shape == x.shape


@pytest.mark.parametrize("mean", [0, 10, 1e3, 1e4])
def test_a_distant_mean_costs_only_the_rounding_of_the_mean_itself(mean):
    x = torch.randn(64, 3, 7) + mean
    expected = normalized(x, None, None, *moments(x, 1)[:2], 1e-5, 1)
    close(call(x), expected, {"rtol": 0, "atol": 2e-6 + mean * 1.05 * 2**-24})


def layouts(dtype=torch.float32) -> dict[str, Tensor]:
    plain = torch.randn(4, 6, 5, 3, dtype=dtype)
    return {
        "contiguous": plain,
        "channels_last": plain.to(memory_format=torch.channels_last),
        "channels_last, one channel": plain[:, :1].contiguous(memory_format=torch.channels_last),
        "channels_last, one pixel": plain[..., :1, :1].contiguous(memory_format=torch.channels_last),
        "channels_last, one example": plain[:1].contiguous(memory_format=torch.channels_last),
        "channels_last_3d": torch.randn(2, 3, 4, 3, 2, dtype=dtype).to(memory_format=torch.channels_last_3d),
        "sliced channels": plain[:, 1:4],
        "sliced channels_last": plain.to(memory_format=torch.channels_last)[:, 1:4],
        "permuted": plain.permute(3, 1, 0, 2),
        "strided": plain[::2, :, ::2, 1:],
        "expanded": plain[:1].expand(4, 6, 5, 3),
        "flipped 3d": plain[..., 0].permute(0, 2, 1),
    }


def meaningful_strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", layouts())
def test_any_layout_gives_the_same_values_in_the_format_that_torch_returns(layout, dtype, training, tolerances):
    x = layouts(dtype)[layout]
    statistics = torch.randn(x.size(1)), torch.rand(x.size(1))
    expected = torch.nn.functional.batch_norm(x, *(s.clone() for s in statistics), training=training)
    y = call(x, None, None, *statistics, training=training)
    torch.testing.assert_close(y, expected, **tolerances[dtype])
    assert meaningful_strides(y) == meaningful_strides(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


def arguments(x_shape=(3, 2, 4), channels=2):
    tensors = torch.randn(x_shape), torch.randn(channels), torch.randn(channels)
    return tuple(tensor.double().requires_grad_() for tensor in tensors)


def training_mode(x, weight, bias):
    return call(x, weight, bias, eps=1e-2)


def evaluation_mode(x, weight, bias):
    mean, var = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([0.7, 2.0], dtype=torch.float64)
    return call(x, weight, bias, mean, var, training=False)


MODES = pytest.mark.parametrize("mode", [training_mode, evaluation_mode])


@MODES
def test_first_and_second_derivatives(mode):
    assert gradcheck(mode, arguments(), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mode, arguments())


@MODES
def test_third_derivatives(mode):
    x, weight, bias = arguments((3, 2))
    u, v = torch.randn(3, 2).double(), torch.randn(3, 2).double()

    def second(x, weight):
        (first,) = torch.autograd.grad((mode(x, weight, bias).sin() * u).sum(), x, create_graph=True)
        return torch.autograd.grad((first * v).sum(), (x, weight), create_graph=True)

    assert gradcheck(second, (x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_dtype_of_their_tensor(dtype):
    x = torch.randn(6, 3, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(3, dtype=dtype, requires_grad=True)
    call(x, weight).float().pow(3).sum().backward()
    assert x.grad.dtype == torch.float16 and weight.grad.dtype == dtype


def test_running_statistics_collect_no_derivative():
    running_mean, running_var = torch.zeros(2).double(), torch.ones(2).double()
    x = arguments()[0]
    call(x, None, None, running_mean, running_var)
    with forward_ad.dual_level():
        call(forward_ad.make_dual(x, torch.ones_like(x)), None, None, running_mean, running_var)
        assert forward_ad.unpack_dual(running_mean).tangent is None
    assert not running_mean.requires_grad and not running_var.requires_grad


@pytest.mark.parametrize("which", [0, 1], ids=["running_mean", "running_var"])
def test_running_statistics_with_a_tangent_are_refused(which):
    x, statistics = torch.randn(5, 2), [torch.zeros(2), torch.ones(2)]
    with forward_ad.dual_level():
        statistics[which] = forward_ad.make_dual(statistics[which], torch.ones(2))
        with pytest.raises(RuntimeError, match="not differentiable wrt running_mean and running_var"):
            call(x, None, None, *statistics)


# ---------------------------------------------------------------------------------------------------------------------
# torch.func
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_vmap_is_a_loop(memory_format):
    x = torch.stack([torch.randn(4, 3, 5, 2).contiguous(memory_format=memory_format) for _ in range(3)])
    weight = torch.randn(3, 3)
    expected = torch.stack([call(one, its_weight) for one, its_weight in zip(x, weight, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(x, weight), expected)


def test_func_transforms_agree_with_autograd():
    x, weight, bias = arguments()

    def loss(x, weight):
        return training_mode(x, weight, bias).pow(3).mean()

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, weight), expected)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: loss(x, weight), (x,), (direction,))
    torch.testing.assert_close(tangent, (expected[0] * direction).sum())
    hessian = torch.autograd.functional.hessian(lambda x: loss(x, weight), x)
    torch.testing.assert_close(torch.func.hessian(loss)(x, weight), hessian)


def test_nested_forward_mode_agrees_with_reverse_mode():
    x, weight, bias = arguments()
    direction = torch.randn_like(x)

    def loss(x):
        return training_mode(x, weight, bias).pow(3).mean()

    def slope(x):
        return torch.func.jvp(loss, (x,), (direction,))[1]

    curvature = torch.func.jvp(slope, (x,), (direction,))[1]
    hessian = torch.autograd.functional.hessian(loss, x).reshape(x.numel(), -1)
    torch.testing.assert_close(curvature, direction.reshape(-1) @ hessian @ direction.reshape(-1))


def test_statistics_that_the_transform_knows_are_updated():
    def loss(x, running_mean, running_var):
        running_mean, running_var = running_mean.clone(), running_var.clone()
        return call(x, None, None, running_mean, running_var).pow(3).sum(), (running_mean, running_var)

    x, expected = torch.randn(5, 3), (torch.zeros(3), torch.ones(3))
    _, updated = torch.func.grad(loss, has_aux=True)(x, torch.zeros(3), torch.ones(3))
    call(x, None, None, *expected)
    torch.testing.assert_close(updated, expected)


def test_statistics_that_vmap_does_not_know_are_refused_and_kept():
    running_mean, running_var, counter = torch.zeros(3), torch.ones(3), torch.tensor(0)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: call(x, None, None, running_mean, running_var, counter))(torch.randn(2, 5, 3))
    assert not running_mean.any() and running_var.eq(1).all() and counter == 0
