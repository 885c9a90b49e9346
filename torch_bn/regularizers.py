"""What a regularizer adds to the loss for a layer's gamma or beta, and how to collect it from a model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

Regularizer = Callable[[Tensor], Tensor | float | None]


@dataclass(frozen=True, repr=False)
class _Penalty:
    """l1 * sum|w| + l2 * sum(w^2). A class and not a closure, so that layers that have one can be copied and saved."""

    l1: float
    l2: float

    def __call__(self, variable: Tensor) -> Tensor:
        w = _at_least_float32(variable)
        loss = w.new_zeros(())
        # NB: a factor of 0 leaves its sum out; 0 * inf would be NaN where the sum overflows.
        if self.l1 != 0:
            loss = loss + self.l1 * w.abs().sum()
        if self.l2 != 0:
            loss = loss + self.l2 * w.square().sum()
        return loss

    def __repr__(self) -> str:
        if self.l2 == 0:
            return f"l1({self.l1})"
        return f"l2({self.l2})" if self.l1 == 0 else f"l1_l2({self.l1}, {self.l2})"


def l1(factor: float) -> Regularizer:
    """factor * sum|w|.

    Args:
        factor: a finite number >= 0.

    Returns:
        A function of a variable, of any shape, that returns a scalar tensor: in the variable's dtype, float32 for half
        types. It can be copied, pickled and compared.

    Raises:
        TypeError, ValueError: another factor.

    Source:
        TensorFlow 1's tf.keras.regularizers.l1.
    """
    return _Penalty(_checked("l1: factor", factor), 0.0)


def l2(factor: float) -> Regularizer:
    """factor * sum(w^2), without the 1/2 of tf.nn.l2_loss. Otherwise as :func:`l1`."""
    return _Penalty(0.0, _checked("l2: factor", factor))


def l1_l2(l1: float, l2: float) -> Regularizer:
    """l1 * sum|w| + l2 * sum(w^2). Otherwise as :func:`l1`."""
    return _Penalty(_checked("l1_l2: l1", l1), _checked("l1_l2: l2", l2))


def regularization_losses(source: object) -> list[Tensor]:
    """The losses of all regularized variables, to be added to the loss: `loss + sum(regularization_losses(model))`.

    Args:
        source: a module, or any other object that has a method regularization_losses(). Of a module those layers count,
            itself included, whose class has a method layer_losses(), a list of tensors. A layer with two names counts
            once.

    Returns:
        One scalar tensor per regularized variable, in the order of source.modules(); derivatives reach the variables.

    Raises:
        TypeError: another source.
        ValueError: see :func:`losses_of`.
    """
    if isinstance(source, nn.Module):
        losses: list[Tensor] = []
        for module in source.modules():
            # NB: asks the class. A compiled module would pass on the method of the layer inside, which counts itself.
            layer_losses = getattr(type(module), "layer_losses", None)
            if callable(layer_losses):
                losses.extend(layer_losses(module))
        return losses
    method = getattr(source, "regularization_losses", None)
    if not callable(method):
        raise TypeError(
            "regularization_losses: source must be an nn.Module or have a method regularization_losses(), "
            f"got {type(source).__name__}"
        )
    return list(method())


def losses_of(pairs: Iterable[tuple[Tensor | None, Regularizer | None]]) -> list[Tensor]:
    """What a layer returns from layer_losses().

    Args:
        pairs: each a variable and its regularizer. A pair with a None is left out. A regularizer gets the variable,
            as float32 if of a half type, and returns a number, a tensor of one element, or None for no loss.

    Returns:
        The losses, scalar tensors.

    Raises:
        ValueError: a regularizer returned anything else.
    """
    losses = []
    for variable, regularizer in pairs:
        if variable is None or regularizer is None:
            continue
        w = _at_least_float32(variable)
        loss = regularizer(w)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            losses.append(loss.reshape(()))
        elif isinstance(loss, Real) and not isinstance(loss, bool):
            losses.append(w.new_tensor(float(loss)))
        elif loss is not None:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{regularizer!r} must return a number or a tensor of one element, got {got}")
    return losses


def _at_least_float32(variable: Tensor) -> Tensor:
    return variable.float() if variable.dtype in (torch.float16, torch.bfloat16) else variable


def _checked(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number, got {value!r}")
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{what} must be finite and >= 0, got {value}")
    return number
