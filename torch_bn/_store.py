"""TensorFlow's variables by name: who makes them, who shares them, and the function that needs no layer object."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import updates
from ._checks import FLOATS
from .regularizers import losses_of

_TENSORFLOW_NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
_active = threading.local()


class VariableStore(nn.Module):
    """Holds the variables that :func:`batch_normalization` makes, by name: a graph's variable scopes.

    Each ``with store:`` is one run of the network. In a run the rules are TensorFlow's: a name may be used once, unless
    `reuse` says otherwise; without a name calls are numbered, in the order in which they come. The next run finds the
    variables of the one before under the same names::

        store = torch_bn.layers.VariableStore()
        for x in batches:
            with store:
                y = torch_bn.layers.batch_normalization(x, training=True)

    The store is a module: parameters() for an optimizer, to(), state_dict(). A state_dict may be loaded before the
    first run; what is made later takes its values from it.

    Args:
        defer_updates: collect the updates of moving statistics in `update_ops` in place of running them: TensorFlow's
            UPDATE_OPS. Default: False.
    """

    def __init__(self, defer_updates: bool = False) -> None:
        super().__init__()
        self.update_ops = updates.DeferredUpdates()
        self._defer = defer_updates
        self._used: set[str] = set()
        self._scopes: list[tuple[str, bool | str | None]] = []
        self._waiting: dict[str, Tensor] = {}

    def __enter__(self) -> "VariableStore":
        stack = vars(_active).setdefault("stack", [])
        if self in stack:
            raise RuntimeError("VariableStore: a store must not be entered again before it is left")
        self._used.clear()
        stack.append(self)
        if self._defer:
            updates.push(self.update_ops)
        return self

    def __exit__(self, *error: object) -> None:
        vars(_active)["stack"].remove(self)
        if self._defer:
            updates.remove(self.update_ops)

    @contextmanager
    def scope(self, name: str, reuse: bool | str | None = None) -> Iterator[None]:
        """Names made inside begin with `name` and a slash; `reuse` holds for calls that say nothing of their own."""
        _check_reuse(reuse)
        self._scopes.append((_check_name(name), reuse))
        try:
            yield
        finally:
            self._scopes.pop()

    def variables(self) -> dict[str, Tensor]:
        """Every variable by TensorFlow's name, as in 'bn/gamma', in the order in which they were made."""
        return {
            f"{scope}/{_TENSORFLOW_NAMES.get(name, name)}": value
            for scope, layer in self.named_children()
            for name, value in (*layer.named_parameters(), *layer.named_buffers())
            if name != "num_batches_tracked"
        }

    def trainable_variables(self) -> list[nn.Parameter]:
        """The parameters that need a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def regularization_losses(self) -> list[Tensor]:
        """One scalar for each variable with a regularizer, whoever shares it."""
        return [
            loss
            for layer in self.children()
            for loss in losses_of(
                [(layer.weight, layer.gamma_regularizer), (layer.bias, layer.beta_regularizer)]  # type: ignore[list-item]
            )
        ]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As of every module; what belongs to variables not yet made waits for them."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        made = dict(self.named_children())
        later = [key for key in state_dict if key.startswith(prefix)]
        later = [key for key in later if key.removeprefix(prefix).rpartition(".")[0] not in made]
        unexpected_keys[:] = [key for key in unexpected_keys if key not in later]
        self._waiting = {key.removeprefix(prefix): state_dict[key].detach().clone() for key in later}

    def _run(
        self, name: str | None, reuse: bool | str | None, layer: Any, inputs: Tensor, training: bool | Tensor
    ) -> Tensor:
        """Calls a layer of its own hyper-parameters with the variables of that name. What fails leaves no trace."""
        _check_reuse(reuse)
        if reuse is None:
            reuse = next((inherited for _, inherited in reversed(self._scopes) if inherited is not None), None)
        prefix = "".join(f"{scope}/" for scope, _ in self._scopes)
        full = prefix + _check_name(name) if name is not None else self._automatic_name(prefix, reuse)
        owner: Any = dict(self.named_children()).get(full)
        if reuse is True and owner is None:
            raise ValueError(f"batch_normalization: variable {full}/gamma does not exist, but reuse is True")
        if not reuse and full in self._used:
            raise ValueError(
                f"batch_normalization: variable {full}/gamma already exists; reuse must be True or 'auto' to share it"
            )
        layer.name = full
        waiting = {key: value for key, value in self._waiting.items() if key.rpartition(".")[0] == full}
        if owner is not None:
            _share(full, owner, layer, inputs)
        elif waiting:
            layer.load_state_dict({key.rpartition(".")[2]: value for key, value in waiting.items()})
        y: Tensor = layer(inputs, training)
        if owner is None:
            self.add_module(full, layer)
            self._waiting = {key: value for key, value in self._waiting.items() if key not in waiting}
        self._used.add(full)
        return y

    def _automatic_name(self, prefix: str, reuse: bool | str | None) -> str:
        base = name = f"{prefix}batch_normalization"
        number = 0
        while not reuse and name in self._used:
            number += 1
            name = f"{base}_{number}"
        return name


def _share(full: str, owner: Any, layer: Any, inputs: Tensor) -> None:
    """Gives a layer the variables of another."""
    layer.build(torch.empty_like(inputs, device="meta"))
    for name in (*layer._parameters, *layer._buffers):
        wanted, found = getattr(layer, name), getattr(owner, name, None)
        if wanted is None:
            continue
        variable = f"{full}/{_TENSORFLOW_NAMES.get(name, name)}"
        if found is None:
            raise ValueError(f"batch_normalization: variable {variable} does not exist, but {full} is shared")
        if wanted.shape != found.shape:
            raise ValueError(
                f"batch_normalization: variable {variable} must have the shape {list(found.shape)} of what it shares, "
                f"got {list(wanted.shape)}"
            )
        if (layer.virtual_batch_size is None) != (owner.virtual_batch_size is None):
            raise ValueError(
                f"batch_normalization: variable {variable} has another shape in TensorFlow with virtual_batch_size; "
                "all who share it must have one, or none"
            )
        if name in layer._parameters:
            layer._parameters[name] = found
        else:
            layer._buffers[name] = found


def batch_normalization(
    inputs: Tensor,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: str | Callable[[Tensor], Any] = "zeros",
    gamma_initializer: str | Callable[[Tensor], Any] = "ones",
    moving_mean_initializer: str | Callable[[Tensor], Any] = "zeros",
    moving_variance_initializer: str | Callable[[Tensor], Any] = "ones",
    beta_regularizer: Callable[[Tensor], Any] | None = None,
    gamma_regularizer: Callable[[Tensor], Any] | None = None,
    beta_constraint: Callable[[Tensor], Tensor] | None = None,
    gamma_constraint: Callable[[Tensor], Tensor] | None = None,
    training: bool | Tensor = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: bool | str | None = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_momentum: float = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Callable[[torch.Size], Any] | None = None,
) -> Tensor:
    """tf.layers.batch_normalization of TensorFlow 1.8 to 1.12: its 24 parameters, in order, with their defaults.

    Must be called inside ``with VariableStore():``, which keeps the variables.

    Args:
        training: a bool, 0 or 1, or a bool tensor of no dimensions. **Default: False**, as TensorFlow has it.
        name: of the variables' scope, as in 'bn' for 'bn/gamma'. Default: None, 'batch_normalization', then with _1,
            ...
        reuse: True shares the variables of that name, which must exist; 'auto' shares them if they exist; None and
            False make them. Default: None, what the scope around says, if anything.
        the others: as for :class:`BatchNormalization`.

    Returns:
        The normalised inputs, of the same shape and dtype.

    Raises:
        RuntimeError outside of a store; ValueError for conflicts of names, shapes and `reuse`; else as
        :class:`BatchNormalization`. Nothing is changed then.
    """
    from .layers import BatchNormalization, read_training

    stack: list[VariableStore] = getattr(_active, "stack", [])
    if not stack:
        raise RuntimeError("batch_normalization: must be called inside `with torch_bn.layers.VariableStore():`")
    train = read_training(training)
    if not isinstance(inputs, Tensor) or inputs.dtype not in FLOATS:
        got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(
            f"batch_normalization: inputs must be a Tensor of float32, float64, float16 or bfloat16, got {got}"
        )
    layer = BatchNormalization(
        axis, momentum, epsilon, center, scale, beta_initializer, gamma_initializer, moving_mean_initializer,
        moving_variance_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint,
        trainable, name, renorm, renorm_clipping, renorm_momentum, fused, virtual_batch_size, adjustment,
    )  # fmt: skip
    return stack[-1]._run(name, reuse, layer, inputs, train)


def _check_reuse(reuse: object) -> None:
    if reuse not in (None, True, False, "auto"):
        raise ValueError(f"batch_normalization: reuse must be None, True, False or 'auto', got {reuse!r}")


def _check_name(name: str) -> str:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"batch_normalization: name must be a non-empty str without dots, got {name!r}")
    return name
