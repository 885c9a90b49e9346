"""The formulas of every option of training, in NumPy and float64: an oracle that shares nothing with the project.

Written from the papers and from TensorFlow 1.12, whose numbers tests/golden holds. Each result comes with the size of
what was summed for it, the measure of its rounding error.
"""

import math
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
    relu: bool = False


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
    if rules.relu:
        dy = np.where(before > 0, dy, 0)
    q = dy * weight * scale * r
    dx, size_of_dx = np.empty_like(x), np.empty_like(x)
    for part, inv in zip(parts, inverses, strict=True):
        h, size_of_h = x_hat[part], size_of_x_hat[part]
        dx[part] = (q[part] - mean_of(q[part]) - h * mean_of(q[part] * h)) * inv
        size_of_dx[part] = (abs(q[part]) + mean_of(abs(q[part])) + size_of_h * mean_of(abs(q[part]) * size_of_h)) * inv

    results = {
        "y": Value(np.maximum(before, 0) if rules.relu else before, size_of_before),
        "before": Value(before, size_of_before),
        "dresidual": Value(dy, abs(dy)),
        "dx": Value(dx, size_of_dx),
        "dweight": total(dy * adjusted, dy * size_of_adjusted, mean.shape),
        "dbias": total(dy, dy, mean.shape),
        "dscale": total(dy * weight * z, dy * weight * size_of_z, scale.shape),
        "dshift": total(dy * weight, dy * weight, shift.shape),
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
