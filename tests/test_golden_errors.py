"""Odd arguments of layers.batch_normalization: taken or refused as by TensorFlow 1.8, see tests/golden/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import PATHS

import torch_bn

RECORDED = json.loads((Path(__file__).with_name("golden") / "errors.json").read_text())
CASES = {case["case"]: case for case in RECORDED["cases"]}
OK, LEFT_OUT = "ok", "left out"
# An error of the right type that came up by chance says something else.
SAID_ON_PURPOSE = r" must | exist|unexpected keyword"
ERRORS = {error.__name__: error for error in (TypeError, ValueError, IndexError, AttributeError)}

NO_STATIC_SHAPES = "a shape is never unknown here"
LISTS_AND_MORE = "what Python takes as an int or as a list of them is an axis, too"
EVERY_FLOAT = "float64 and the half types are supported on every path"
GROUPS_AND_RENORM = "as of TensorFlow 1.10: the groups' moments are merged, then corrected together"
EMPTY = "an empty batch has no statistics, so it changes none; TensorFlow's become NaN"

# All that differs on purpose: what we do, and why.
DECISIONS = {
    "unknown_rank": (LEFT_OUT, NO_STATIC_SHAPES),
    "unknown_channel": (LEFT_OUT, NO_STATIC_SHAPES),
    "axis_tuple": (OK, LISTS_AND_MORE),
    "axis_numpy_int": (OK, LISTS_AND_MORE),
    "float64_rank4_fused_default": (OK, EVERY_FLOAT),
    "float16_rank2": (OK, EVERY_FLOAT),
    "float16_rank4_fused_false": (OK, EVERY_FLOAT),
    "gamma_initializer_str": (OK, "the names of initializers are accepted, as of TensorFlow 1.15"),
    "vbs_not_dividing_dynamic": ("ValueError", "TensorFlow's InvalidArgumentError has no equal here"),
    "vbs_not_dividing_inference": (OK, "inference has no groups, so any batch will do"),
    "vbs_renorm_static": (OK, GROUPS_AND_RENORM),
    "vbs_renorm_dynamic": (OK, GROUPS_AND_RENORM),
    "empty_batch": (OK, EMPTY),
    "empty_batch_fused": (OK, EMPTY),
    "vbs_empty_batch": (OK, EMPTY),
}

# What stands in errors.json for objects that JSON has not. PH: a placeholder, that is a tensor.
OBJECTS = {
    "NPINT1": np.int64(1),
    "PH_INT": torch.tensor(1, dtype=torch.int32),
    "PH_VEC": torch.tensor([True, False]),
    "ADJ": lambda shape: (torch.rand(shape[-1:]) + 0.5, torch.rand(shape[-1:])),
    "ADJ_NONE": lambda shape: (None, None),
    "ADJ_ONE": lambda shape: torch.ones(shape[-1:]),
    "ADJ_THREE": lambda shape: (torch.ones(shape[-1:]),) * 3,
    "ADJ_BAD": lambda shape: (torch.ones(3), torch.zeros(3)),
    "ADJ_GROW": lambda shape: (torch.ones(8, 4), torch.zeros(8, 4)),
    "ADJ_FLOATS": lambda shape: (2.0, 0.5),
}


def recorded(name: str) -> str:
    result = CASES[name]["result"]
    return OK if result["status"] == "ok" else result["error"]["type"]


def expected(name: str) -> str:
    return DECISIONS[name][0] if name in DECISIONS else recorded(name)


def applicable(name: str, path: object) -> bool:
    """fused=True is allowed to TensorFlow everywhere; with us it insists on the kernels, so only these can serve."""
    insists = CASES[name]["kwargs"].get("fused") is True
    return expected(name) != LEFT_OUT and (path.id == "kernels" or not insists)


def calls_of(name: str) -> list[dict[str, object]]:
    """The arguments of each call, inputs among them."""
    case = CASES[name]
    calls = []
    for call in case["kwargs"].get("__calls", [case["kwargs"]]):
        arguments = {key: OBJECTS.get(value, value) if type(value) is str else value for key, value in call.items()}
        shape = [8 if size is None else size for size in arguments.pop("__shape", case["input_shape"])]
        if name == "axis_tuple":
            arguments["axis"] = tuple(arguments["axis"])  # JSON has only lists
        inputs = torch.randn(shape).to(getattr(torch, case["dtype"]))
        calls.append({"inputs": inputs, "training": True, "name": "bn"} | arguments)
    return calls


@pytest.mark.parametrize("defer_updates", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        pytest.param(name, path.values[0], id=f"{name}-{path.id}", marks=path.marks)
        for path in PATHS
        for name in CASES
        if applicable(name, path)
    ],
)
def test_odd_arguments_are_taken_or_refused_as_by_tensorflow(name, kernels, defer_updates, monkeypatch):
    if not kernels:
        monkeypatch.setattr(torch_bn._operators, "batch_norm", None)
    *first, last = calls_of(name)
    with torch_bn.layers.VariableStore(defer_updates) as store:
        for call in first:
            torch_bn.layers.batch_normalization(**call)
        if expected(name) != OK:
            made, used = set(store.variables()), set(store._used)
            with pytest.raises(ERRORS[expected(name)], match=SAID_ON_PURPOSE):
                torch_bn.layers.batch_normalization(**last)
            assert (set(store.variables()), store._used) == (made, used), "what is refused leaves no trace"
            return
        y = torch_bn.layers.batch_normalization(**last)
    assert (y.shape, y.dtype) == (last["inputs"].shape, last["inputs"].dtype)
    assert y.isfinite().all()
    if defer_updates and recorded(name) == OK:  # TensorFlow updates mean and variance separately
        assert 2 * len(store.update_ops) == CASES[name]["result"]["n_update_ops"]
    store.update_ops.apply()
    assert not [variable for variable, value in store.variables().items() if not value.isfinite().all()]


def test_the_table_of_decisions_has_only_differences():
    for name in DECISIONS:
        stays_finite = CASES[name]["result"].get("variables_finite", True)
        assert expected(name) != recorded(name) or not stays_finite, name


def test_every_other_probe_is_run():
    left_out = {name for name in CASES if not any(applicable(name, path) for path in PATHS)}
    assert left_out == {name for name, (outcome, _) in DECISIONS.items() if outcome == LEFT_OUT}
    for name, case in CASES.items():
        assert name in DECISIONS or case["result"].get("variables_finite", True), name
