"""functional.batch_norm: torch's function on either path, and its errors on both."""

import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from paths import PATHS, needs_kernels

from torch_bn import _operators
from torch_bn.functional import _batch_norm, batch_norm

both_paths = pytest.mark.parametrize("fused", PATHS)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with torch
# ---------------------------------------------------------------------------------------------------------------------

# As in torch's own samples (torch/testing/_internal/opinfo): every rank, odd momenta, an empty batch.
SAMPLES = [
    ((5, 5, 5), {"training": True, "momentum": 0.5, "eps": 0.6}),
    ((3, 2, 4), {"training": False, "momentum": -1.2}),
    ((3, 1), {"training": True, "momentum": 0.0}),
    ((0, 3), {"training": True, "momentum": -1.0}),
    ((2, 3, 4, 3), {"training": False, "eps": 0.0}),
    ((1, 2, 3, 2, 2), {"training": True, "momentum": 1.0}),
]


@both_paths
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "options"), SAMPLES, ids=str)
def test_agrees_with_torch(shape, options, dtype, affine, fused, tolerances):
    channels = shape[1]
    x = torch.randn(shape, dtype=dtype)
    mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype)
    weight = torch.randn(channels, dtype=dtype) if "weight" in affine else None
    bias = torch.randn(channels, dtype=dtype) if "bias" in affine else None
    dy = torch.linspace(-1, 1, x.numel(), dtype=dtype).reshape(shape)
    results = []
    # On the CPU, since torch's own CUDA function refuses an epsilon of 0 and a bias without a weight.
    for function, choice, device in (F.batch_norm, {}, "cpu"), (batch_norm, {"fused": fused}, x.device):
        leaves = [None if t is None else t.to(device, copy=True).requires_grad_() for t in (x, weight, bias)]
        statistics = [t.to(device, copy=True) for t in (mean, var)]
        y = function(leaves[0], *statistics, *leaves[1:], **options, **choice)
        y.backward(dy.to(device))
        gradients = [t.new_zeros(t.shape) if t.grad is None else t.grad for t in leaves if t is not None]
        results.append([y, *statistics, *gradients])
    tolerance = tolerances[dtype]
    for actual, expected in zip(results[1], results[0], strict=True):
        # torch's own gradients of parameters in bfloat16 sum in bfloat16
        torch.testing.assert_close(actual.cpu(), expected, **{key: 4 * value for key, value in tolerance.items()})


@both_paths
def test_no_channels_at_all(fused):  # torch's own function raises here as soon as the weight requires grad
    x, weight = torch.empty(2, 0, 3, requires_grad=True), torch.empty(0, requires_grad=True)
    y = batch_norm(x, torch.empty(0), torch.empty(0), weight, training=True, fused=fused)
    y.sum().backward()
    assert y.shape == x.grad.shape == (2, 0, 3) and weight.grad.shape == (0,)


@both_paths
def test_without_running_statistics(fused):
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True, fused=fused), F.batch_norm(x, None, None, training=True)
    )


@both_paths
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("axis", [0, 2, -1, -4])
def test_axis_says_which_one_holds_the_channels(axis, training, fused):
    x = torch.randn(4, 6, 3, 5)
    statistics = torch.randn(x.size(axis)), torch.rand(x.size(axis))
    expected_statistics = [s.clone() for s in statistics]
    expected = F.batch_norm(x.movedim(axis, 1), *expected_statistics, training=training).movedim(1, axis)
    y = batch_norm(x, *statistics, training=training, axis=axis, fused=fused)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(statistics), expected_statistics)


@both_paths
def test_parameters_and_statistics_of_any_dtype_and_shape_with_c_values(fused, tolerances):
    x = torch.randn(5, 4, 3)
    weight, bias = torch.randn(4, 1).double().requires_grad_(), torch.randn(2, 2).half().requires_grad_()
    mean, var = torch.zeros(4, dtype=torch.bfloat16), torch.ones(8)[::2]
    y = batch_norm(x, mean, var, weight, bias, True, fused=fused)
    y.square().sum().backward()
    expected = F.batch_norm(x, None, None, weight.float().view(4), bias.float().view(4), True)
    torch.testing.assert_close(y, expected, **tolerances[torch.float32])
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var((0, 2)))
    assert (weight.grad.shape, weight.grad.dtype) == ((4, 1), torch.float64)
    assert (bias.grad.shape, bias.grad.dtype) == ((2, 2), torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def good_arguments() -> dict:
    return {
        "input": torch.randn(5, 4, 3, 2),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "num_batches_tracked": torch.tensor(7),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "axis": 1,
    }


NEEDS_GRAD = (
    "The function 'batch_norm' is not differentiable with respect to argument '{}'. "
    "This input cannot have requires_grad True."
)
EPS = "batch_norm eps must be {}, but got {}"
FOUR = "batch_norm: {} must be Float, Double, Half or BFloat16, got {}"
ERRORS = {
    "scalar": ({"input": torch.tensor(1.0)}, ValueError, "batch_norm: input must have at least 1 dimension, got 0"),
    "axis above": ({"axis": 4}, ValueError, "batch_norm: axis must be in [-4, 3] for an input of rank 4, got 4"),
    "axis below": ({"axis": -5}, ValueError, "batch_norm: axis must be in [-4, 3] for an input of rank 4, got -5"),
    "one value": (
        {"input": torch.randn(1, 4)},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 4])",
    ),
    "one value, other axis": (
        {"input": torch.randn(1, 1, 4), "axis": -1},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 1, 4])",
    ),
    "eps 0": ({"eps": 0.0}, ValueError, EPS.format("positive during training", "0.0")),
    "eps < 0": ({"eps": -1.5}, ValueError, EPS.format("positive during training", "-1.5")),
    "eps nan": ({"eps": float("nan")}, ValueError, EPS.format("positive during training", "nan")),
    "eps < 0, evaluation": ({"eps": -1.5, "training": False}, ValueError, EPS.format("non-negative", "-1.5")),
    "eps nan, evaluation": ({"eps": float("nan"), "training": False}, ValueError, EPS.format("non-negative", "nan")),
    "only running_var": (
        {"running_mean": None},
        ValueError,
        "running_mean and running_var must either both be None or neither be None",
    ),
    "only running_mean": (
        {"running_var": None},
        ValueError,
        "running_mean and running_var must either both be None or neither be None",
    ),
    "momentum None": (
        {"momentum": None, "num_batches_tracked": None},
        ValueError,
        "batch_norm: momentum=None averages over all batches and needs num_batches_tracked, got None",
    ),
    "int64": (
        {"input": torch.ones(5, 4).long()},
        NotImplementedError,
        "\"batch_norm\" not implemented for 'Long'",
    ),
    "bool": ({"input": torch.ones(5, 4).bool()}, NotImplementedError, "\"batch_norm\" not implemented for 'Bool'"),
    "complex": (
        {"input": torch.ones(5, 4).cfloat()},
        NotImplementedError,
        "\"batch_norm\" not implemented for 'ComplexFloat'",
    ),
    "float8": (
        {"input": torch.ones(5, 4).to(torch.float8_e4m3fn)},
        NotImplementedError,
        "\"batch_norm\" not implemented for 'Float8_e4m3fn'",
    ),
    "integer weight": ({"weight": torch.ones(4).int()}, TypeError, FOUR.format("weight", "Int")),
    "integer bias": ({"bias": torch.ones(4).long()}, TypeError, FOUR.format("bias", "Long")),
    "complex mean": (
        {"running_mean": torch.ones(4).cdouble()},
        TypeError,
        FOUR.format("running_mean", "ComplexDouble"),
    ),
    "integer var": ({"running_var": torch.ones(4).short()}, TypeError, FOUR.format("running_var", "Short")),
    "float counter": (
        {"num_batches_tracked": torch.tensor(1.0)},
        TypeError,
        "batch_norm: num_batches_tracked must be Long, got Float",
    ),
    "two counters": (
        {"num_batches_tracked": torch.tensor([1, 2])},
        ValueError,
        "batch_norm: num_batches_tracked must have 1 element, got 2",
    ),
    "weight needs two": (
        {"running_var": torch.ones(2), "weight": torch.ones(3)},
        RuntimeError,
        "running_var should contain 4 elements not 2",
    ),
}
for name in ("running_mean", "running_var", "weight", "bias"):
    ERRORS[f"length of {name}"] = ({name: torch.ones(3)}, RuntimeError, f"{name} should contain 4 elements not 3")
for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
    elsewhere = good_arguments()[name].to("meta")
    ERRORS[f"device of {name}"] = (
        {name: elsewhere},
        RuntimeError,
        f"batch_norm: input is on cpu but {name} is on meta",
    )
for name in ("running_mean", "running_var"):
    ERRORS[f"{name} requires grad"] = ({name: torch.ones(4).requires_grad_()}, RuntimeError, NEEDS_GRAD.format(name))
    ERRORS[f"{name} missing"] = (
        {name: None, "training": False},
        RuntimeError,
        f"{name} must be defined in evaluation mode",
    )


def there(value: object, device: torch.device) -> object:
    """A tensor on that device, if it is one of values."""
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


@both_paths
@pytest.mark.parametrize(("change", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_must_hold_and_change_nothing(change, error, text, fused):
    device = torch.get_default_device()
    arguments = good_arguments() | {name: there(value, device) for name, value in change.items()}
    text = text.replace("is on cpu", f"is on {arguments['input'].device}")
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: value.detach().clone() for name, value in tensors.items() if not value.is_meta}
    with pytest.raises(error, match=f"^{re.escape(text)}") as caught:
        _batch_norm(**arguments, fused=fused)
    assert type(caught.value) is error
    for name, value in before.items():
        assert torch.equal(tensors[name].detach(), value), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input": [1.0]}, "batch_norm: input must be a Tensor, got list"),
        ({"weight": 1.0}, "batch_norm: weight must be a Tensor or None, got float"),
        ({"bias": [0.0]}, "batch_norm: bias must be a Tensor or None, got list"),
        ({"running_mean": 0}, "batch_norm: running_mean must be a Tensor or None, got int"),
        ({"running_var": 1}, "batch_norm: running_var must be a Tensor or None, got int"),
        ({"training": 1}, "batch_norm: training must be a bool, got int"),
        ({"momentum": "0.1"}, "batch_norm: momentum must be a number or None, got str"),
        ({"eps": "1e-5"}, "batch_norm: eps must be a number, got str"),
        ({"axis": 1.0}, "batch_norm: axis must be an int, or a list or tuple of ints, got 1.0"),
        ({"axis": [1.0]}, "batch_norm: axis must be an int, or a list or tuple of ints, got [1.0]"),
        ({"virtual_batch_size": 2.0}, "batch_norm: virtual_batch_size must be a positive int or None, got 2.0"),
        ({"renorm": True}, "batch_norm: renorm must be a RenormState or None, got bool"),
        ({"fused": "yes"}, "batch_norm: fused must be None, True or False, got 'yes'"),
    ],
    ids=str,
)
def test_arguments_of_other_types_are_refused(change, text):
    arguments = good_arguments() | change
    del arguments["num_batches_tracked"]
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        batch_norm(**arguments)


@both_paths
def test_statistics_that_require_grad_serve_where_nothing_is_recorded(fused):
    x, mean, var = torch.randn(5, 3), torch.zeros(3).requires_grad_(), torch.ones(3)
    with torch.no_grad():
        torch.testing.assert_close(batch_norm(x, mean, var, fused=fused), x, rtol=1e-4, atol=1e-4)


@both_paths
def test_momentum_none_is_no_error_where_nothing_is_averaged(fused):
    x = torch.randn(5, 3)
    batch_norm(x, None, None, training=True, momentum=None, fused=fused)
    batch_norm(x, torch.zeros(3), torch.ones(3), momentum=None, fused=fused)


# ---------------------------------------------------------------------------------------------------------------------
# torch's machinery
# ---------------------------------------------------------------------------------------------------------------------


def test_torch_function_sees_the_call():
    class Recording(torch.Tensor):
        seen: list = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is batch_norm:
                cls.seen.append((len(args), kwargs))
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(5, 3)
    y = batch_norm(x.as_subclass(Recording), None, None, training=True, eps=0.1, axis=-1)
    ((positional, keywords),) = Recording.seen
    assert positional == 8 and keywords["axis"] == -1 and keywords["fused"] is None and type(y) is Recording
    torch.testing.assert_close(torch.Tensor(y), F.batch_norm(x, None, None, training=True, eps=0.1))


@both_paths
def test_fx_records_the_call(fused):
    graph = torch.fx.symbolic_trace(lambda x: batch_norm(x, None, None, training=True, fused=fused))
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [batch_norm]
    x = torch.randn(5, 3)
    torch.testing.assert_close(graph(x), F.batch_norm(x, None, None, training=True))


@both_paths
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_into_one_graph(training, fused):
    def function(x, mean, var):
        return batch_norm(x, mean, var, training=training, fused=fused).sin()

    x, mean, var = torch.randn(5, 3, 4), torch.randn(3), torch.rand(3)
    expected_mean, expected_var = mean.clone(), var.clone()
    expected = function(x, expected_mean, expected_var)
    torch._dynamo.reset()
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x, mean, var)
    torch.testing.assert_close((y, mean, var), (expected, expected_mean, expected_var))


@needs_kernels
def test_compiled_graphs_hold_the_operator():
    graphs = []
    torch._dynamo.reset()
    torch.compile(batch_norm, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(
        torch.randn(5, 3), torch.zeros(3), torch.ones(3)
    )
    assert _operators.batch_norm in [node.target for node in graphs[0].graph.nodes]


@both_paths
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_every_grad_mode(mode, fused):
    x, mean, var = torch.randn(5, 3, requires_grad=True), torch.zeros(3), torch.ones(3)
    with mode():
        y = batch_norm(x, mean, var, training=True, fused=fused)
    assert y.requires_grad == (mode is nullcontext)
    torch.testing.assert_close(mean, 0.1 * x.detach().mean(0))


@both_paths
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_meta_input_gives_a_meta_output(training, fused):
    x = torch.empty(2, 3, 4, 5, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    statistics = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
    y = batch_norm(x, *statistics, training=training, fused=fused)
    assert (y.device, y.dtype, y.shape, y.stride()) == (x.device, x.dtype, x.shape, x.stride())
