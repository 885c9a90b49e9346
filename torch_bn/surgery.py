"""Exchanges the batch normalization layers of a model for ours, and back."""

from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from . import modules

Model = TypeVar("Model", bound=nn.Module)

_OURS: dict[type, type] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}
_TORCHS: dict[type, type] = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: Model, **options: Any) -> Model:
    """Makes every nn.BatchNorm1d, 2d and 3d of the model the layer of that name of torch_bn. :func:`revert` undoes it.

    The layers stay the objects they are and only change their class, because that loses nothing: parameters, buffers,
    hooks, the training flag, attributes of your own, parametrizations, optimizers, modules reached by two names and
    references held elsewhere all stay as they are.

    Args:
        model: any module; may itself be a batch normalization. nn.SyncBatchNorm, lazy layers and subclasses of other
            libraries are left alone: they have reasons to be what they are.
        options: renorm, renorm_clipping, renorm_momentum, virtual_batch_size, adjustment, fused, as
            :class:`torch_bn.BatchNorm2d` takes them; set on every layer exchanged, and on layers of torch_bn too, which
            otherwise are left alone. Their defaults are those of the layer.

    Returns:
        The same model.

    Raises:
        TypeError for an unknown option; TypeError and ValueError for values that the layers refuse. No layer is changed
        then.
    """
    unknown = sorted(set(options) - set(modules.OPTIONS))
    if unknown:
        raise TypeError(f"convert: options must be among {', '.join(modules.OPTIONS)}, got {', '.join(unknown)}")
    layers = [layer for layer in model.modules() if _class(layer) in _OURS or _class(layer) in _TORCHS]
    modules.check_options(options, True)
    for layer in layers:
        own = {name: getattr(layer, name) for name in modules.OPTIONS} if _class(layer) in _TORCHS else {}
        modules.check_options(own | options, getattr(layer, "running_mean", None) is not None)
    for layer in layers:
        if _class(layer) in _OURS:
            _change_class(layer, _OURS[_class(layer)])
        layer._set_options(options)  # type: ignore[operator]
    return model


def revert(model: Model) -> Model:
    """Makes every torch_bn.BatchNorm1d, 2d and 3d of the model torch's layer of that name; undoes :func:`convert`.

    Use it before handing the model to code that looks for the exact class (quantization, nn.SyncBatchNorm's converter).

    Args:
        model: any module; may itself be a batch normalization. Subclasses of our layers are left alone.

    Returns:
        The same model, whose outputs in evaluation are the same; what nn.BatchNorm cannot do in training (renorm with
        its averages, ghost batches, adjustment) is dropped.

    Raises:
        ValueError if a layer has an axis other than 1 or an activation, which nn.BatchNorm cannot have; no layer is
        exchanged then.
    """
    ours = {name: layer for name, layer in model.named_modules() if _class(layer) in _TORCHS}
    for name, layer in ours.items():
        if any(layer.axis % rank != 1 for rank in layer._ranks):
            raise ValueError(f"revert: axis must be 1 for nn.BatchNorm, got {layer.axis} in {name or 'the model'!r}")
        if layer.activation is not None:
            raise ValueError(
                f"revert: activation must be None for nn.BatchNorm, got {layer.activation!r} in {name or 'the model'!r}"
            )
    for layer in ours.values():
        layer._set_options({"renorm": False})
        _change_class(layer, _TORCHS[_class(layer)])
        for option in ("axis", "activation", "inplace", *modules.OPTIONS):
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
