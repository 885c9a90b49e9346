"""Every error message of BatchNormalization, VariableStore and batch_normalization, and that nothing changes then."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from faces import built, trained
from layer_pairs import assert_same_state, both_paths
from torch import Tensor

import torch_bn
from torch_bn import BatchNormalization
from torch_bn.functional import batch_norm
from torch_bn.layers import VariableStore, batch_normalization

L, F, S = "BatchNormalization: ", "batch_norm: ", "batch_normalization: "
AXIS = f"{F}axis must be an int, or a list or tuple of ints, got "
CLIPPING = f"{L}renorm_clipping must be a dict with keys among rmax, rmin, dmax, or None, got "
INITIALIZER = "must be 'zeros', 'ones' or a callable that fills a tensor, got "
SIZE = f"{L}virtual_batch_size must be a positive int or None, got "

OF_THE_CONSTRUCTOR: list[tuple[dict[str, Any], type, str]] = [
    ({"axis": 1.0}, TypeError, f"{AXIS}1.0"),
    ({"axis": None}, TypeError, f"{AXIS}None"),
    ({"axis": "1"}, TypeError, f"{AXIS}'1'"),
    ({"axis": [1, 1.5]}, TypeError, f"{AXIS}[1, 1.5]"),
    ({"axis": []}, IndexError, f"{F}axis must name at least one axis, got an empty list"),
    ({"momentum": None}, TypeError, f"{L}momentum must be a number, got None"),
    ({"momentum": "0.9"}, TypeError, f"{L}momentum must be a number, got '0.9'"),
    ({"momentum": [0.9]}, TypeError, f"{L}momentum must be a number, got [0.9]"),
    ({"momentum": torch.tensor(1)}, TypeError, f"{L}momentum must be a number, got a tensor of torch.int64"),
    ({"momentum": torch.ones(2)}, TypeError, f"{L}momentum must be a number, got a tensor of torch.float32"),
    ({"epsilon": None}, ValueError, f"{L}epsilon must be a number, got None"),
    ({"epsilon": "1"}, TypeError, f"{L}epsilon must be a number, got '1'"),
    ({"beta_initializer": 0}, ValueError, f"{L}beta_initializer {INITIALIZER}0"),
    ({"gamma_initializer": "one"}, ValueError, f"{L}gamma_initializer {INITIALIZER}'one'"),
    ({"moving_mean_initializer": None}, ValueError, f"{L}moving_mean_initializer {INITIALIZER}None"),
    ({"moving_variance_initializer": 1.0}, ValueError, f"{L}moving_variance_initializer {INITIALIZER}1.0"),
    ({"beta_regularizer": 1}, TypeError, f"{L}beta_regularizer must be callable or None, got 1"),
    ({"gamma_regularizer": "l2"}, TypeError, f"{L}gamma_regularizer must be callable or None, got 'l2'"),
    ({"beta_constraint": 1}, ValueError, f"{L}beta_constraint must be callable or None, got 1"),
    ({"gamma_constraint": "c"}, ValueError, f"{L}gamma_constraint must be callable or None, got 'c'"),
    ({"renorm": 1, "renorm_clipping": [1]}, AttributeError, f"{CLIPPING}list"),
    ({"renorm": 1, "renorm_clipping": "rmax"}, ValueError, f"{CLIPPING}str"),
    (
        {"renorm": 1, "renorm_clipping": {"max": 1}},
        ValueError,
        "renorm_clipping: keys must be among rmax, rmin, dmax, got 'max'",
    ),
    ({"renorm": 1, "renorm_momentum": None}, TypeError, f"{L}renorm_momentum must be a number, got None"),
    (
        {"renorm": 1, "renorm_momentum": 1},
        ValueError,
        f"{L}renorm_momentum must not be 1, which lets nothing in, got 1",
    ),
    ({"virtual_batch_size": 2.0}, TypeError, f"{SIZE}2.0"),
    ({"virtual_batch_size": "2"}, TypeError, f"{SIZE}'2'"),
    ({"virtual_batch_size": 0}, ValueError, f"{SIZE}0"),
    ({"virtual_batch_size": -2}, ValueError, f"{SIZE}-2"),
    (
        {"virtual_batch_size": 2, "adjustment": print},
        ValueError,
        f"{L}adjustment must be None with virtual_batch_size, got both",
    ),
]


@pytest.mark.parametrize(
    ("options", "error", "text"), OF_THE_CONSTRUCTOR, ids=[str(row[0]) for row in OF_THE_CONSTRUCTOR]
)
def test_errors_of_the_constructor(options, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$") as caught:
        BatchNormalization(**options)
    assert type(caught.value) is error
    with VariableStore() as store, pytest.raises(error, match=f"^{re.escape(text)}$"):
        batch_normalization(torch.randn(6, 3), training=True, **options)
    assert not store.state_dict()


def test_what_counts_only_with_renorm_is_not_checked_without():
    for options in ({"renorm_clipping": {"max": 1}}, {"renorm_clipping": [1]}, {"renorm_momentum": None}):
        BatchNormalization(**options)(torch.randn(5, 3))


PAIR = f"{F}adjustment must return a pair (scale, bias), got "
FIT = f"{F}adjustment must return values that broadcast to the input's shape [6, 3, 2], got "
OF_THE_CALL: list[tuple[dict[str, Any], Any, type, str]] = [
    ({}, [1.0], TypeError, f"{L}inputs must be a Tensor, got list"),
    (
        {},
        torch.ones(6, 3).int(),
        TypeError,
        f"{L}inputs must be float32, float64, float16 or bfloat16, got torch.int32",
    ),
    (
        {},
        torch.ones(6, 3, dtype=torch.complex64),
        TypeError,
        f"{L}inputs must be float32, float64, float16 or bfloat16, got torch.complex64",
    ),
    ({}, torch.tensor(1.0), ValueError, f"{L}inputs must have at least 1 dimension, got 0"),
    ({"axis": [0, 1]}, torch.tensor(1.0), ValueError, f"{F}input must have at least 1 dimension, got 0"),
    ({"axis": 3}, (6, 3, 2), ValueError, f"{L}axis must be in [-3, 2] for inputs of rank 3, got 3"),
    ({"axis": -4}, (6, 3, 2), ValueError, f"{L}axis must be in [-3, 2] for inputs of rank 3, got -4"),
    ({"axis": [1, 3]}, (6, 3, 2), ValueError, f"{F}axis must be in [-3, 2] for an input of rank 3, got 3"),
    ({"axis": [1, -2]}, (6, 3, 2), ValueError, f"{F}axis must not name an axis twice, got [1, -2]"),
    (
        {"virtual_batch_size": 4},
        (6, 3, 2),
        ValueError,
        f"{L}virtual_batch_size must divide the batch, got 4 for 6 examples",
    ),
    (
        {"virtual_batch_size": 2, "axis": 0},
        (6, 3, 2),
        ValueError,
        f"{F}virtual_batch_size divides the examples of dimension 0, so axis must not include 0, got 0",
    ),
    (
        {"virtual_batch_size": 2, "axis": [-3, 1]},
        (6, 3, 2),
        ValueError,
        f"{F}virtual_batch_size divides the examples of dimension 0, so axis must not include 0, got [0, 1]",
    ),
    ({"adjustment": 3}, (6, 3, 2), TypeError, f"{L}adjustment must be callable or None, got 3"),
    ({"adjustment": lambda shape: None}, (6, 3, 2), TypeError, f"{PAIR}NoneType"),
    ({"adjustment": lambda shape: "ab"}, (6, 3, 2), TypeError, f"{PAIR}str"),
    ({"adjustment": lambda shape: torch.ones(2, 2)}, (6, 3, 2), TypeError, f"{PAIR}Tensor"),
    ({"adjustment": lambda shape: (1, 2, 3)}, (6, 3, 2), ValueError, f"{PAIR}3 values"),
    (
        {"adjustment": lambda shape: (1, None)},
        (6, 3, 2),
        ValueError,
        f"{F}adjustment must return a pair (scale, bias) without None, got None in it",
    ),
    ({"adjustment": lambda shape: (torch.ones(6), 0)}, (6, 3, 2), ValueError, f"{FIT}[6]"),
    ({"adjustment": lambda shape: (1, torch.ones(4, 6, 3, 2))}, (6, 3, 2), ValueError, f"{FIT}[4, 6, 3, 2]"),
    ({"adjustment": lambda shape: (1, torch.ones(1, 1, 1, 1))}, (6, 3, 2), ValueError, f"{FIT}[1, 1, 1, 1]"),
]


@pytest.mark.parametrize(
    ("options", "inputs", "error", "text"), OF_THE_CALL, ids=[f"{row[2].__name__}-{row[3]}" for row in OF_THE_CALL]
)
def test_errors_of_the_call_make_no_variables(options, inputs, error, text):
    inputs = torch.randn(inputs) if isinstance(inputs, tuple) else inputs
    layer = BatchNormalization(**options)
    with pytest.raises(error, match=f"^{re.escape(text)}$") as caught:
        layer(inputs, training=True)
    assert type(caught.value) is error and not layer.built


def test_errors_change_no_variables():
    layer = trained(built(axis=1), (6, 3, 2))
    before = copy.deepcopy(layer)
    with pytest.raises(
        ValueError, match=r"^BatchNormalization: inputs must have the channels of the variables, \[3\], "
    ):
        layer(torch.randn(6, 4, 2))
    layer.adjustment = lambda shape: (torch.ones(7), 0)
    with pytest.raises(ValueError, match="broadcast"):
        layer(torch.randn(6, 3, 2))
    layer(torch.randn(6, 3, 2), training=False)  # which does not ask
    assert_same_state(layer, before, rtol=0, atol=0)


@pytest.mark.parametrize("inputs", [None, [1.0], torch.ones(5, 3).long()], ids=str)
def test_inputs_of_the_function(inputs):
    got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
    text = f"^{S}inputs must be a Tensor of float32, float64, float16 or bfloat16, got {got}$"
    with VariableStore() as store, pytest.raises(TypeError, match=text):
        batch_normalization(inputs, training=True)
    assert not store.state_dict()


@pytest.mark.parametrize("name", ["", "a.b", 3], ids=repr)
def test_names_that_are_none(name):
    store, text = VariableStore(), f"^{S}name must be a non-empty str without dots, got {re.escape(repr(name))}$"
    with store:
        with pytest.raises(ValueError, match=text):
            batch_normalization(torch.randn(5, 3), name=name)
        with pytest.raises(ValueError, match=text), store.scope(name):
            pass
        batch_normalization(torch.randn(5, 3), name="bn")
    assert [name for name, _ in store.named_children()] == ["bn"]


@pytest.mark.parametrize("reuse", ["yes", 2, "AUTO"], ids=repr)
def test_reuse_that_is_none(reuse):
    store, text = VariableStore(), f"^{S}reuse must be None, True, False or 'auto', got {reuse!r}$"
    with store:
        with pytest.raises(ValueError, match=text):
            batch_normalization(torch.randn(5, 3), reuse=reuse)
        with pytest.raises(ValueError, match=text), store.scope("s", reuse=reuse):
            pass
    assert not store.state_dict()


# The function of the PyTorch face shares some of the checks.
def wrong_parameters() -> Iterator[Any]:
    for what, adjustment in {
        "per channel": lambda shape: (2.0, torch.ones(4)),
        "per example": lambda shape: (torch.ones(shape[0], 1, 1), 0.0),
    }.items():
        for name in ("weight", "bias"):
            yield pytest.param(adjustment, {name: torch.ones(7)}, f"{name} should contain 4 elements not 7", id=what)
        yield pytest.param(
            adjustment,
            {"weight": torch.ones(4).int()},
            "batch_norm: weight must be Float, Double, Half or BFloat16, got Int",
            id=what,
        )


@pytest.mark.parametrize(("adjustment", "parameters", "text"), list(wrong_parameters()))
@both_paths
def test_an_adjustment_hides_no_wrong_parameter(adjustment, parameters, text, fused):
    mean, var = torch.zeros(4), torch.ones(4)
    with pytest.raises((RuntimeError, TypeError), match=f"^{re.escape(text)}$"):
        batch_norm(torch.randn(6, 4, 2), mean, var, training=True, adjustment=adjustment, fused=fused, **parameters)
    assert not mean.any() and var.eq(1).all()


@both_paths
def test_an_adjustment_hides_no_wrong_number_of_channels(fused):
    layer = torch_bn.BatchNorm1d(5, adjustment=lambda shape: (2.0, 0.0), fused=fused)
    with pytest.raises(RuntimeError, match="^running_mean should contain 4 elements not 5$"):
        layer(torch.randn(6, 4))
