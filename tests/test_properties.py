"""The product of all options on the kernels, drawn by hypothesis, against formulas written anew in NumPy; and what must
hold between options whatever the numbers are."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawn_cases import Case, Numbers, cases
from formulas import Rules, State, Value, formulas
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_pairs import both_paths
from paths import KERNELS
from torch import Tensor
from torch._prims_common import suggest_memory_format

import torch_bn
from torch_bn import reference
from torch_bn._checks import Renorm
from torch_bn.functional import RenormState, batch_norm


def drawn(examples: int) -> Callable:
    return settings(derandomize=True, deadline=None, max_examples=examples)


def on_the_kernels(test: Callable) -> Callable:
    for mark in KERNELS.marks:
        test = mark(test)
    return test


# Float32 sums in blocks: a few units in the last place of the size of what is summed.
UNITS = 24
HALF_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_within(name: str, actual: Tensor, expected: Value, dtype: torch.dtype) -> None:
    """Within rounding of the formulas' value, to which half results add their own single rounding."""
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    actual = actual.detach().cpu()
    value = torch.from_numpy(np.array(expected.value)).reshape(-1)
    allowed = UNITS * unit * (torch.from_numpy(np.array(expected.size)).reshape(-1) + 0.25)
    if actual.dtype in HALF_ROUNDING:
        allowed = allowed + 1.01 * HALF_ROUNDING[actual.dtype] * value.abs() + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double().reshape(-1) - value).abs()
    worst = int((error / allowed).nan_to_num(nan=torch.inf).argmax()) if error.numel() else 0
    assert bool((error <= allowed).all()), (
        f"{name}[{worst}] is {actual.reshape(-1)[worst].item():.9g}, the formula says {value[worst].item():.9g}: "
        f"off by {(error / allowed)[worst].item():.3g} of what is allowed"
    )


def assert_step(actual: dict[str, Tensor], expected: dict[str, Value], dtype: torch.dtype) -> None:
    for name, value in actual.items():
        assert_within(name, value, expected[name], dtype)


def assert_state(actual: dict[str, Tensor], expected: State, dtype: torch.dtype) -> None:
    for name, value in actual.items():
        found = np.asarray(getattr(expected, name), np.float64)
        assert_within(name, value, Value(found, abs(found) + 1), dtype)


def gradients_of(y: Tensor, dy: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def is_laid_out_like(y: Tensor, x: Tensor) -> bool:
    """Channels_last where torch takes x for that, otherwise contiguous."""
    return y.is_contiguous(memory_format=suggest_memory_format(x))


# ---------------------------------------------------------------------------------------------------------------------
# The kernels against the formulas
# ---------------------------------------------------------------------------------------------------------------------


@on_the_kernels
@drawn(300)
@given(cases())
def test_every_combination_of_options_follows_the_formulas(case):
    numbers = Numbers(case)
    batches = [numbers.batch() for _ in range(case.steps)]
    kept = numbers.state()
    mean, var, *averages = kept.values()
    options = {
        "axis": case.axis,
        "renorm": RenormState(*averages) if case.renorm else None,
        "renorm_clipping": case.clipping,
        "renorm_momentum": case.renorm_momentum,
        "virtual_batch_size": case.virtual_batch_size,
        "activation": case.activation,
        "fused": True,
    }

    def run(x: Tensor, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any) -> Tensor:
        asked = [] if scale is not None else None
        adjustment = None if asked is None else lambda shape: asked.append(shape) or (scale, shift)
        y = batch_norm(
            *(x, mean, var, weight, bias, True, case.momentum, case.eps),
            **{"adjustment": adjustment, "residual": residual, **options},
        )
        assert asked is None or asked == [x.shape]
        return y

    if case.fewest == 1:
        before = [value.clone() for value in kept.values()]
        with pytest.raises(ValueError, match="^Expected more than 1 value per channel when training, got input size"):
            run(batches[0][0], numbers.weight, numbers.bias, numbers.scale, numbers.shift, batches[0][2])
        assert all(torch.equal(a, b) for a, b in zip(kept.values(), before, strict=True))
        return
    for x, dy, residual in batches:
        dy = numbers.away_from_the_kink(x, dy, kept, residual)
        step, after = numbers.expected(x, dy, kept, residual=residual)
        inputs = numbers.inputs(x, residual)
        y = run(*inputs.values())
        assert y.shape == x.shape and y.dtype == x.dtype
        assert isinstance(case.axis, list) or is_laid_out_like(y, x)
        assert_step({"y": y, **gradients_of(y, dy, inputs)}, step, case.dtype)
        assert_state(kept, after, case.dtype)


NAMES = {"mean": "running_mean", "var": "running_var"}  # of the state in a layer


@on_the_kernels
@drawn(150)
@given(cases(divides=True))
def test_tensorflows_layer_follows_the_formulas(case):
    """Whose variance is biased almost everywhere, and which takes single values per channel."""
    numbers = Numbers(case)
    batches = [numbers.batch() for _ in range(case.steps)]
    plain = not case.renorm and case.virtual_batch_size is None and case.adjustment is None
    unbiased = plain and len(case.shape) == 4 and case.axes in ((1,), (3,))
    adjusted = numbers.inputs(batches[0][0])
    scale, shift = adjusted["dscale"], adjusted["dshift"]
    layer = torch_bn.BatchNormalization(
        case.axis,
        1 - case.momentum,
        case.eps,
        center=numbers.bias is not None,
        scale=numbers.weight is not None,
        renorm=case.renorm,
        renorm_clipping=case.clipping,
        renorm_momentum=1 - case.renorm_momentum,
        virtual_batch_size=case.virtual_batch_size,
        adjustment=None if scale is None else lambda shape: (scale, shift),
        fused=True,
    )
    layer.build(batches[0][0])
    kept = {name: getattr(layer, NAMES.get(name, name)) for name in numbers.state()}
    with torch.no_grad():
        for name, value in numbers.state().items():
            kept[name].copy_(value.reshape(kept[name].shape))
        for parameter, value in ((layer.weight, numbers.weight), (layer.bias, numbers.bias)):
            if value is not None:
                parameter.copy_(value.reshape(parameter.shape))
    for count, (x, dy, _) in enumerate(batches):
        step, after = numbers.expected(x, dy, kept, replace(case.rules, unbiased=unbiased))
        inputs = numbers.inputs(x) | {"dweight": layer.weight, "dbias": layer.bias, "dscale": scale, "dshift": shift}
        y = layer(inputs["dx"], training=True)
        assert_step({"y": y, **gradients_of(y, dy, inputs)}, step, case.dtype)
        assert_state(kept, after, case.dtype)
        assert layer.num_batches_tracked == count + 1


@drawn(150)
@given(cases())
def test_the_reference_follows_the_formulas_to_the_last_digits(case):
    """In float64, so that the oracle of the other tests has an oracle, too."""
    case = replace(case, dtype=torch.float64, axis=case.axes[0], adjustment=None, offset=0.0, eps=1e-3)
    if 0 in case.axes:
        case = replace(case, virtual_batch_size=None)
    numbers = Numbers(case)
    batches = [numbers.batch() for _ in range(case.steps)]
    kept, counter = numbers.state(), torch.tensor(0)
    mean, var, *averages = kept.values()
    bounds = (case.clipping.get(key) for key in ("rmin", "rmax", "dmax"))
    renorm = Renorm(*averages, case.renorm_momentum, *bounds) if case.renorm else None
    for x, dy, residual in batches:
        dy = numbers.away_from_the_kink(x, dy, kept, residual)
        step, after = numbers.expected(x, dy, kept, residual=residual)
        inputs = numbers.inputs(x, residual)
        y = reference.batch_norm(
            *(inputs["dx"], inputs["dweight"], inputs["dbias"], mean, var, counter, True, case.momentum, case.eps),
            *(case.axis, case.groups, True, False, renorm, None, inputs["dresidual"], *case.rules.activation),
        )
        assert_step({"y": y, **gradients_of(y, dy, inputs)}, step, torch.float64)
        assert_state(kept, after, torch.float64)


def test_the_formulas_are_those_of_the_paper():
    """By hand: two values, 0 and 2, twice."""
    rules = Rules((1,), 1.0, 0.5, renorm=True, renorm_momentum=0.5, unbiased=False)
    one, nothing = np.ones((1, 1)), np.zeros((1, 1))
    state = State(nothing, one)
    x, dy = np.array([[0.0], [2.0]]), np.array([[1.0], [0.0]])
    first, state = formulas(x, dy, 2 * one, one, one, nothing, state, rules)
    root = math.sqrt(2)
    assert np.allclose(first["y"].value[:, 0], [1 - 2 / root, 1 + 2 / root])
    assert np.allclose(first["dx"].value[:, 0], [(2 - 1 - 0.5) / root, (-1 + 0.5) / root])
    assert np.allclose([state.mean, state.var], [[[0.5]], [[1.0]]]) and state.renorm_mean_weight == 0.5
    # The second batch, 4 and 6, against averages 0.5 * 1 / 0.5 and root / 2 / 0.5 of which a half is there.
    second, state = formulas(x + 4, dy, 2 * one, one, one, nothing, state, rules)
    d = (5 - (0.5 + 0.5 * 5)) / root
    assert np.allclose(second["y"].value[:, 0], [1 + 2 * (d - 1 / root), 1 + 2 * (d + 1 / root)])
    assert np.allclose(state.mean, 0.25 + 0.5 * 2.75 / 0.75) and state.renorm_stddev_weight == 0.75


# ---------------------------------------------------------------------------------------------------------------------
# Between options
# ---------------------------------------------------------------------------------------------------------------------


def outcome(case: Case, fused: bool, **options: Any) -> list[Tensor]:
    """y, gradients and running statistics after all steps."""
    numbers = Numbers(replace(case, adjustment=None))
    mean, var = numbers.mean.clone(), numbers.var.clone()
    found = []
    for x, dy, _ in [numbers.batch() for _ in range(case.steps)]:
        inputs = numbers.inputs(x)
        y = batch_norm(
            *(inputs["dx"], mean, var, inputs["dweight"], inputs["dbias"], True, case.momentum, case.eps),
            **{"axis": case.axis, "fused": fused, **options},
        )
        found += [y.detach(), *gradients_of(y, dy, inputs).values()]
    return [*found, mean, var]


@both_paths
@drawn(60)
@given(case=cases())
def test_renorm_within_the_tightest_bounds_is_plain(case, fused):
    case = replace(case, virtual_batch_size=None, offset=0.5, eps=1e-3)
    if case.fewest == 1:
        return
    averages = RenormState(*(t.clone() for t in Numbers(case).renorm))
    tight = {"rmax": 1, "rmin": 1.0, "dmax": 0}
    plain = outcome(case, fused)
    corrected = outcome(case, fused, renorm=averages, renorm_clipping=tight)
    for a, b in zip(corrected[:-2], plain[:-2], strict=True):  # the running statistics follow renorm's averages
        assert torch.equal(a, b)


@both_paths
@drawn(60)
@given(case=cases())
def test_outputs_are_laid_out_like_inputs(case, fused):
    if case.fewest == 1 or isinstance(case.axis, list):
        return
    numbers = Numbers(case)
    for layout in ("contiguous", "channels_last", "cut"):
        x, *_ = Numbers(replace(case, layouts=(layout, layout))).batch()
        y = batch_norm(
            *(x, None, None, numbers.weight, numbers.bias, True, case.momentum, case.eps),
            axis=case.axis,
            renorm=RenormState(*(t.clone() for t in numbers.renorm)) if case.renorm else None,
            virtual_batch_size=case.virtual_batch_size,
            adjustment=None if case.adjustment is None else lambda shape: (numbers.scale, numbers.shift),
            fused=fused,
        )
        assert is_laid_out_like(y, x), layout


@both_paths
@drawn(60)
@given(case=cases(), more=st.integers(0, 3))
def test_ghost_batches_as_large_as_the_batch_are_plain(case, more, fused):
    if case.fewest == 1 or 0 in case.axes:
        return
    case = replace(case, virtual_batch_size=None)
    plain, one = outcome(case, fused), outcome(case, fused, virtual_batch_size=case.shape[0] + more)
    assert all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))


@both_paths
@drawn(60)
@given(case=cases(), order=st.permutations(range(3)))
def test_a_deferred_update_is_the_immediate_one_bit_for_bit(case, order, fused):
    """In the order in which they are applied, which need not be that of the forwards."""
    case = replace(case, steps=3)
    if case.fewest == 1:
        return
    numbers = Numbers(case)
    batches = [numbers.batch()[0] for _ in range(case.steps)]

    def run(deferred: bool) -> list[Tensor]:
        mean, var = numbers.mean.clone(), numbers.var.clone()
        averages = RenormState(*(t.clone() for t in numbers.renorm))

        def forward(step: int) -> None:
            batch_norm(
                *(batches[step], mean, var, None, None, True, case.momentum, case.eps),
                axis=case.axis,
                renorm=averages if case.renorm else None,
                renorm_momentum=case.renorm_momentum,
                virtual_batch_size=case.virtual_batch_size,
                fused=fused,
            )

        if deferred:
            collected = []
            for step in range(case.steps):
                with torch_bn.deferred_updates() as updates:
                    forward(step)
                collected.append(updates)
            assert torch.equal(mean, numbers.mean) and torch.equal(averages.stddev, numbers.renorm.stddev)
        for step in order:
            if deferred:
                collected[step].apply()
            else:
                forward(step)
        return [mean, var, *averages]

    for name, a, b in zip(("mean", "var", *RenormState._fields), run(True), run(False), strict=True):
        assert torch.equal(a, b), name


@both_paths
@drawn(100)
@given(case=cases(divides=True))
def test_both_faces_give_the_same_numbers(case, fused):
    """For corresponding options; but for the variance, which TensorFlow keeps biased in most cases."""
    axis = case.axes[0]
    case = replace(case, axis=axis, virtual_batch_size=case.virtual_batch_size if axis else None)
    if len(case.shape) == 1 or case.fewest == 1:
        return
    numbers = Numbers(case)
    kind = [torch_bn.BatchNorm1d, torch_bn.BatchNorm1d, torch_bn.BatchNorm2d, torch_bn.BatchNorm3d][len(case.shape) - 2]
    options = {
        "renorm": case.renorm,
        "renorm_clipping": case.clipping,
        "virtual_batch_size": case.virtual_batch_size,
        "adjustment": None if case.adjustment is None else lambda shape: (numbers.scale, numbers.shift),
        "fused": fused,
        "dtype": case.kept,
    }
    momentum, p = 1 - case.momentum, 1 - case.renorm_momentum
    theirs = torch_bn.BatchNormalization(axis, momentum, case.eps, **options, renorm_momentum=p)
    ours = kind(case.shape[axis], case.eps, 1 - momentum, axis=axis, **options, renorm_momentum=1 - p)
    found = []
    for layer in (ours, theirs):
        gradients, again = [], Numbers(case)
        for _ in range(case.steps):
            x, dy, _ = again.batch()
            x.requires_grad_()
            y = layer(x)
            gradients += [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]
        found.append((gradients, layer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    (_, state), (_, other) = found
    assert list(state) == list(other)
    plain = case.virtual_batch_size is None and case.adjustment is None
    same_variance = case.renorm or (plain and fused and len(case.shape) == 4 and axis in (1, 3))
    for name, value in state.items():
        assert torch.equal(value, other[name]) or (name == "running_var" and not same_variance), name
    with torch.no_grad():
        theirs.running_var.copy_(ours.running_var)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
