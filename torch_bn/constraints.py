"""Constraints: projections of gamma and beta that run right after an optimizer has changed them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Constraint = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NonNegative:
    """max(w, 0) for each value; NaN stays NaN. Source: tf.keras.constraints.NonNeg."""

    def __call__(self, variable: Tensor) -> Tensor:
        return variable.clamp(min=0)


@dataclass(frozen=True)
class MaxNorm:
    """w * min(1, max_value / ||w||), with the Euclidean norm of the whole variable, however many axes it has.

    Args:
        max_value: a number >= 0. Default: 2.0.

    Raises:
        TypeError, ValueError: another max_value.

    Source:
        tf.keras.constraints.MaxNorm, whose axis=0 is all of a vector; without its 1e-7 in the denominator, so that a
        variable within the bound stays exactly what it is.
    """

    max_value: float = 2.0

    def __post_init__(self) -> None:
        if not _number("MaxNorm: max_value", self.max_value) >= 0:
            raise ValueError(f"MaxNorm: max_value must be >= 0, got {self.max_value}")

    def __call__(self, variable: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(_at_least_float32(variable))
        # NB: not a clamp of the quotient, which is 0 / 0 for a bound of 0 and a variable of zeros.
        factor = torch.where(norm > self.max_value, self.max_value / norm, 1.0)
        return (_at_least_float32(variable) * factor).to(variable.dtype)


@dataclass(frozen=True)
class Clip:
    """min(max(w, minimum), maximum) for each value; NaN stays NaN.

    Args:
        minimum, maximum: numbers, minimum <= maximum; infinite for no bound.

    Raises:
        TypeError: not numbers.
        ValueError: minimum > maximum, or a NaN.
    """

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not _number("Clip: minimum", self.minimum) <= _number("Clip: maximum", self.maximum):
            raise ValueError(f"Clip: minimum must be <= maximum, got {self.minimum} and {self.maximum}")

    def __call__(self, variable: Tensor) -> Tensor:
        # In float32, because torch refuses a bound beyond the range of the variable's dtype, as 1e6 is for float16.
        return _at_least_float32(variable).clamp(self.minimum, self.maximum).to(variable.dtype)


def apply_constraints(source: nn.Module | Iterable[tuple[Tensor, Constraint]]) -> None:
    """Projects every constrained variable once, in place. After a step of an optimizer; :func:`attach_constraints`
    does that by itself.

    Args:
        source: a module, or pairs of a variable and its constraint. Of a module those layers count, itself included,
            whose class has a method layer_constraints() that returns such pairs. A constraint gets a copy of the
            variable and
            returns a tensor of the same shape. A pair that comes twice counts once; several constraints of one variable
            apply in turn.

    Raises:
        TypeError: neither a module nor such pairs.
        ValueError: a constraint returned anything else.
        And what a constraint raises itself. No variable has changed then.
    """
    pairs = _pairs_of(source) if isinstance(source, nn.Module) else _checked_pairs(source)
    applied: dict[Tensor, list[Constraint]] = {}  # tensors are told apart by identity here
    values: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for variable, constraint in pairs:
            if constraint in applied.setdefault(variable, []):
                continue
            applied[variable].append(constraint)
            # A copy, so that a constraint that works in place cannot change one variable before another one fails.
            value = constraint(values.get(variable, variable).clone())
            if not isinstance(value, Tensor) or value.shape != variable.shape:
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"apply_constraints: {constraint!r} must return a tensor of shape {list(variable.shape)}, got {got}"
                )
            values[variable] = value
        for variable, value in values.items():
            variable.copy_(value)


def attach_constraints(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """From now on each step of the optimizer ends with :func:`apply_constraints` for those variables of the model that
    the optimizer holds.

    The layers are asked at each step, so a constraint that is set, changed or taken away later counts. A second call is
    harmless: it projects again what has been projected. The hook lives with this optimizer object; a copy of it, or
    one loaded with pickle, has none.

    Args:
        optimizer: any torch optimizer, whatever its implementation (foreach, fused); alone or under a GradScaler.
        model: the module with the constrained layers, see :func:`apply_constraints`. It lives as long as the hook.

    Returns:
        A handle; its remove() undoes the call.

    Raises:
        TypeError: other arguments.
        ValueError: no variable has a constraint and is held by the optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach_constraints: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach_constraints: model must be an nn.Module, got {type(model).__name__}")
    if not _held(optimizer, model):
        raise ValueError(
            "attach_constraints: model must have a constraint on at least one parameter of the optimizer, got none"
        )

    # A GradScaler that finds an infinite gradient does not call step(), with one exception: a fused optimizer is called
    # and leaves the parameters alone by itself. The hook then projects what the step before has projected already.
    def project(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        apply_constraints(_held(optimizer, model))

    return optimizer.register_step_post_hook(project)


def _held(optimizer: Optimizer, model: nn.Module) -> list[tuple[Tensor, Constraint]]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(variable, constraint) for variable, constraint in _pairs_of(model) if id(variable) in held]


def _pairs_of(model: nn.Module) -> Iterator[tuple[Tensor, Constraint]]:
    for module in model.modules():
        # NB: asks the class. A compiled module would pass on the method of the layer inside, which counts itself.
        constraints = getattr(type(module), "layer_constraints", None)
        if callable(constraints):
            yield from _checked_pairs(constraints(module))


def _checked_pairs(pairs: object) -> Iterator[tuple[Tensor, Constraint]]:
    # A tensor is an iterable, too, of its rows.
    if not isinstance(pairs, Iterable) or isinstance(pairs, Tensor):
        raise TypeError(
            "apply_constraints: source must be an nn.Module or pairs of a tensor and its constraint, "
            f"got {type(pairs).__name__}"
        )
    for pair in pairs:
        match pair:
            case (Tensor() as variable, constraint) if callable(constraint):
                yield variable, constraint
            case _:
                raise TypeError(f"apply_constraints: each pair must be a tensor and its constraint, got {pair!r}")


def _at_least_float32(variable: Tensor) -> Tensor:
    return variable.float() if variable.dtype in (torch.float16, torch.bfloat16) else variable


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number, got {value!r}")
    return float(value)
