"""Compares a provider with torch's own operations in float64, before anything is timed."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, Tensors, dtype_name
from .providers import Layer

# The largest error over the largest value, by the dtype of the input: several times what torch's own layers reach on
# these cases (1.1e-5 and 6e-3). It tells a wrong provider from a right one; how exact a right one is, the tests tell.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2}

# What every provider is built with: nn.BatchNorm's defaults.
EPS = 1e-5
MOMENTUM = 0.1
GRADIENTS = ("dx", "dweight", "dbias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def check(layer: Layer, case: Case, tensors: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Checks the outputs in inference and training, the gradients and the statistics of a fresh layer.

    Args:   expected: what `reference_results` gives for the same case and tensors.
    Raises: ValueError that names the result and says what it must be.
    """
    tolerance = TOLERANCE[case.dtype]
    for name, actual in results(layer, tensors).items():
        wanted = expected[name]
        if wanted.shape == tensors.x.shape and _form(actual) != _form(tensors.x):
            raise ValueError(
                f"{name} must have the shape, dtype and strides of x, {_form(tensors.x)}, got {_form(actual)}"
            )
        error = relative_error(actual, wanted)
        if not error <= tolerance:  # NB: not >, so that NaN fails
            raise ValueError(
                f"{name} must be within {tolerance:g} of float64 for a {dtype_name(case.dtype)} input, got {error:.1e}"
            )


def results(layer: Layer, tensors: Tensors) -> dict[str, Tensor]:
    """Everything a user can see of one call in each mode, by name."""
    module = layer.module.eval()
    with torch.no_grad():
        inference = layer.call(tensors.x)
    module.train()
    y = layer.call(tensors.x)
    gradients = dict(zip(GRADIENTS, layer.gradients(y, tensors), strict=True))
    state = module.state_dict()
    return {"inference": inference, "y": y.detach(), **gradients, **{name: state[name].clone() for name in STATISTICS}}


def reference_results(case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """The same by torch's functions in float64."""
    state = case.state()
    x, weight, bias = (t.detach().double().requires_grad_() for t in (tensors.x, state["weight"], state["bias"]))
    mean, var = state["running_mean"].double(), state["running_var"].double()
    inference = F.batch_norm(x.detach(), mean, var, weight.detach(), bias.detach(), False, MOMENTUM, EPS)
    y = F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)
    gradients = torch.autograd.grad(y, (x, weight, bias), tensors.dy.double())
    return {
        "inference": inference,
        "y": y.detach(),
        **dict(zip(GRADIENTS, gradients, strict=True)),
        **dict(zip(STATISTICS, (mean, var, state["num_batches_tracked"] + 1), strict=True)),
    }


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((actual.double() - wanted).abs().max() / wanted.abs().max())


def _form(tensor: Tensor) -> tuple[list[int], str, list[int]]:
    # The stride of an axis of length 1 means nothing.
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return list(tensor.shape), dtype_name(tensor.dtype), strides
