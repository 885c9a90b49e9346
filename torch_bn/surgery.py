"""Exchanges the batch normalization layers of a model for ours, and back."""

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from . import modules
from .functional import _check_fused

Model = TypeVar("Model", bound=nn.Module)

_OURS: dict[type, type] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}
_TORCHS: dict[type, type] = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: Model, *, fused: bool | None = None) -> Model:
    """Makes every nn.BatchNorm1d, 2d and 3d of the model the layer of that name of torch_bn. :func:`revert` undoes it.

    The layers stay the objects they are and only change their class, because that loses nothing: parameters, buffers,
    hooks, the training flag, attributes of your own, parametrizations, optimizers, modules reached by two names and
    references held elsewhere all stay as they are.

    Args:
        model: any module; may itself be a batch normalization. nn.SyncBatchNorm, lazy layers and subclasses of other
            libraries are left alone: they have reasons to be what they are. Layers of torch_bn are, too.
        fused: for every layer exchanged; see :func:`torch_bn.functional.batch_norm`. Default: None.

    Returns:
        The same model.

    Raises:
        TypeError for another value of `fused`; no layer is exchanged then.
    """
    _check_fused(fused)
    for layer in model.modules():
        if _class(layer) in _OURS:
            _change_class(layer, _OURS[_class(layer)])
            vars(layer)["fused"] = fused
    return model


def revert(model: Model) -> Model:
    """Makes every torch_bn.BatchNorm1d, 2d and 3d of the model torch's layer of that name; undoes :func:`convert`.

    Use it before handing the model to code that looks for the exact class (quantization, nn.SyncBatchNorm's converter).

    Args:
        model: any module; may itself be a batch normalization. Subclasses of our layers are left alone.

    Returns:
        The same model, whose outputs are the same.

    Raises:
        ValueError if a layer has an axis other than 1, which nn.BatchNorm cannot have; no layer is exchanged then.
    """
    ours = {name: layer for name, layer in model.named_modules() if _class(layer) in _TORCHS}
    for name, layer in ours.items():
        if any(layer.axis % rank != 1 for rank in layer._ranks):
            raise ValueError(f"revert: axis must be 1 for nn.BatchNorm, got {layer.axis} in {name or 'the model'!r}")
    for layer in ours.values():
        _change_class(layer, _TORCHS[_class(layer)])
        for option in ("axis", "fused"):
            vars(layer).pop(option, None)
    return model


def _class(layer: nn.Module) -> type:
    """The layer's class; below the subclass that parametrizations give each layer, if it has any."""
    return type(layer).__base__ if parametrize.is_parametrized(layer) else type(layer)  # type: ignore[return-value]


def _change_class(layer: nn.Module, new: type) -> None:
    if parametrize.is_parametrized(layer):  # a class like its own, on the new base: copies of the layer share its own
        own = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        new = type(type(layer).__name__, (new,), own)
    layer.__class__ = new
