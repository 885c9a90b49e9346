"""The formulas of every option of training, in NumPy and float64: an oracle that shares nothing with the project.

Written from the papers and from TensorFlow 1.12, whose numbers tests/golden holds. Each result comes with the size of
what was summed for it, the measure of its rounding error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy import ndarray


@dataclass
class State:
    """Everything a layer keeps, in the shape of the channels: the input's with 1 on the other axes."""

    mean: ndarray
    var: ndarray
    renorm_mean: ndarray | float = 0.0
    renorm_stddev: ndarray | float = 0.0
    renorm_mean_weight: ndarray | float = 0.0
    renorm_stddev_weight: ndarray | float = 0.0


@dataclass
class Rules:
    """What the formulas depend on beside tensors."""

    axes: tuple[int, ...]
    eps: float
    momentum: float
    renorm: bool = False
    renorm_momentum: float = 0.01
    clipping: dict[str, float] = field(default_factory=dict)
    groups: int = 1
    unbiased: bool = True
    activation: tuple[str | None, float] = (None, 0.0)


@dataclass
class Curve:
    """An activation: its values and slopes, and how far from 0 its slope jumps."""

    value: Callable[[ndarray], ndarray]
    slope: Callable[[ndarray], ndarray]
    kink: float | None = None


def curve_of(name: str | None, number: float) -> Curve:
    """By the definitions (GELU: Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    cumulative = np.vectorize(lambda z: math.erfc(-z / math.sqrt(2)) / 2, otypes=[float])

    def density(z: ndarray) -> ndarray:
        return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    def logistic(z: ndarray) -> ndarray:
        return (1 + np.tanh(z / 2)) / 2

    def inner(z: ndarray) -> ndarray:
        return math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)

    def step(z: ndarray, below: ndarray | float) -> ndarray:
        return np.where(z > 0, 1.0, below)

    def bend(z: ndarray) -> ndarray:
        return logistic(z) * logistic(-z)

    curves = {
        None: Curve(lambda z: z, np.ones_like),
        "relu": Curve(lambda z: np.maximum(z, 0), lambda z: step(z, 0), 0),
        "leaky_relu": Curve(lambda z: np.where(z > 0, z, z * number), lambda z: step(z, number), 0),
        "elu": Curve(
            lambda z: np.where(z > 0, z, number * np.expm1(np.minimum(z, 0))),
            lambda z: step(z, number * np.exp(np.minimum(z, 0))),
            0,
        ),
        "silu": Curve(lambda z: z * logistic(z), lambda z: logistic(z) + z * bend(z)),
        "gelu": Curve(lambda z: z * cumulative(z), lambda z: cumulative(z) + z * density(z)),
        "gelu_tanh": Curve(
            lambda z: z * logistic(inner(z)),
            lambda z: logistic(inner(z)) + z * bend(inner(z)) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * z**2),
        ),
        "hardswish": Curve(
            lambda z: z * np.clip(z + 3, 0, 6) / 6,
            lambda z: np.where(z <= -3, 0, np.where(z >= 3, 1, z / 3 + 0.5)),
            3,
        ),
    }
    return curves[name]


@dataclass
class Value:
    """A result, and the size of what was summed for it: the measure of its rounding error."""

    value: ndarray
    size: ndarray


def formulas(
    x: ndarray,
    dy: ndarray,
    weight: ndarray,
    bias: ndarray,
    scale: ndarray,
    shift: ndarray,
    state: State,
    rules: Rules,
    residual: ndarray | float = 0.0,
) -> tuple[dict[str, Value], State]:
    """One step of training: outputs and gradients, and the state after it. `scale` and `shift` are the adjustment;
    "before" is what the activation is applied to."""
    others = tuple(axis for axis in range(x.ndim) if axis not in rules.axes)
    parts = [slice(group, None, rules.groups) for group in range(rules.groups)]

    def mean_of(values: ndarray) -> ndarray:
        return values.mean(others, keepdims=True)

    means, variances, entering, inverses = [], [], [], []
    deviation, x_hat, inverse = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for part in parts:
        count = x[part].size // math.prod(x.shape[axis] for axis in rules.axes)
        means.append(mean_of(x[part]))
        variances.append(mean_of((x[part] - means[-1]) ** 2))
        entering.append(variances[-1] * (count / max(count - 1, 1) if rules.unbiased else 1))
        inverses.append(1 / np.sqrt(variances[-1] + rules.eps))
        deviation[part] = x[part] - means[-1]
        x_hat[part] = deviation[part] * inverses[-1]
        inverse[part] = inverses[-1] + 0 * x[part]
    mean, variance = sum(means) / rules.groups, sum(variances) / rules.groups
    stddev = np.sqrt(variance + rules.eps)

    r, d = np.ones_like(mean), np.zeros_like(mean)
    if rules.renorm:
        stddev_reference = state.renorm_stddev + (1 - state.renorm_stddev_weight) * stddev
        r = stddev / stddev_reference
        d = (mean - state.renorm_mean - (1 - state.renorm_mean_weight) * mean) / stddev_reference
        r = np.maximum(r, rules.clipping.get("rmin", -np.inf))
        r = np.minimum(r, rules.clipping.get("rmax", np.inf))
        d = np.maximum(d, -rules.clipping.get("dmax", np.inf))
        d = np.minimum(d, rules.clipping.get("dmax", np.inf))

    # A deviation's error is that of the mean, which is as exact as the largest one.
    size_of_x_hat = abs(x_hat) + inverse * abs(deviation).max(others, keepdims=True)
    z, size_of_z = x_hat * r + d, size_of_x_hat * abs(r) + abs(d)
    adjusted, size_of_adjusted = z * scale + shift, size_of_z * abs(scale) + abs(shift)
    before = adjusted * weight + bias + residual
    size_of_before = size_of_adjusted * abs(weight) + abs(bias) + abs(residual)
    curve = curve_of(*rules.activation)
    dz = np.where(curve.slope(before) == 0, 0, dy * curve.slope(before))
    # The slope of most changes as z does, by no more than the number of elu or 1.
    bent = rules.activation[0] not in (None, "relu", "leaky_relu")
    size_of_dz = abs(dz) + (abs(dy) * size_of_before * max(1, rules.activation[1]) if bent else 0)
    q, size_of_q = dz * weight * scale * r, size_of_dz * abs(weight * scale * r)
    dx, size_of_dx = np.empty_like(x), np.empty_like(x)
    for part, inv in zip(parts, inverses, strict=True):
        h, size_of_h = x_hat[part], size_of_x_hat[part]
        dx[part] = (q[part] - mean_of(q[part]) - h * mean_of(q[part] * h)) * inv
        size = size_of_q[part]
        size_of_dx[part] = (size + mean_of(size) + size_of_h * mean_of(size * size_of_h)) * inv

    results = {
        "y": Value(curve.value(before), size_of_before * max(1, rules.activation[1])),
        "before": Value(before, size_of_before),
        "dresidual": Value(dz, size_of_dz),
        "dx": Value(dx, size_of_dx),
        "dweight": total(dz * adjusted, size_of_dz * size_of_adjusted, mean.shape),
        "dbias": total(dz, size_of_dz, mean.shape),
        "dscale": total(dz * weight * z, size_of_dz * weight * size_of_z, scale.shape),
        "dshift": total(dz * weight, size_of_dz * weight, shift.shape),
    }
    return results, entered(state, rules, mean, sum(entering) / rules.groups, stddev)


def entered(state: State, rules: Rules, mean: ndarray, variance: ndarray, stddev: ndarray) -> State:
    """The state after the batch's statistics have entered."""

    def moved(old: Any, new: Any, weight: float) -> Any:
        return old * (1 - weight) + new * weight

    if rules.renorm:
        p = rules.renorm_momentum
        state = replace(
            state,
            renorm_mean=moved(state.renorm_mean, mean, p),
            renorm_mean_weight=moved(state.renorm_mean_weight, 1, p),
            renorm_stddev=moved(state.renorm_stddev, stddev, p),
            renorm_stddev_weight=moved(state.renorm_stddev_weight, 1, p),
        )
        mean = state.renorm_mean / state.renorm_mean_weight
        variance = (state.renorm_stddev / state.renorm_stddev_weight) ** 2 - rules.eps
    return replace(state, mean=moved(state.mean, mean, rules.momentum), var=moved(state.var, variance, rules.momentum))


def total(terms: ndarray, sizes: ndarray, shape: tuple[int, ...]) -> Value:
    """The sum of the terms that belong to each value of a broadcast array."""
    padded = (1,) * (terms.ndim - len(shape)) + shape
    axes = tuple(axis for axis, size in enumerate(padded) if size == 1)
    return Value(terms.sum(axes, keepdims=True).reshape(shape), abs(sizes).sum(axes, keepdims=True).reshape(shape))
