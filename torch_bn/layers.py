"""BatchNormalization and batch_normalization: TensorFlow 1's layer, its conventions and all of its parameters."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _shapes
from ._checks import FLOATS, Renorm
from ._store import VariableStore, batch_normalization
from .functional import Extras, _batch_norm_with
from .modules import RENORM_STATE, keep_from_half, renorm_averages, settle_renorm
from .regularizers import losses_of
from .schedules import check_clipping, clipping_at

__all__ = ["BatchNormalization", "VariableStore", "batch_normalization"]

Initializer = str | Callable[[Tensor], Any]
_FILLS: dict[str, Callable[[Tensor], Any]] = {"zeros": nn.init.zeros_, "ones": nn.init.ones_}


class BatchNormalization(nn.Module):
    """TensorFlow 1's tf.layers.BatchNormalization (1.8 to 1.12), on the engine of :class:`torch_bn.BatchNorm2d`.

    The formulas: :func:`torch_bn.functional.batch_norm`. The state has the names of torch's layers, so that checkpoints
    move between the two. Variables are made at the first call, or by :meth:`build`, or when a state_dict is loaded:
    make the optimizer after that.

    Args:
        axis: the channel axis, or a list or tuple of axes whose every combination of indices is a channel. Default: -1.
        momentum: of the moving statistics: moving = momentum * moving + (1 - momentum) * batch. **One minus
            PyTorch's.** Any number. Default: 0.99.
        epsilon: added to the variance; any number. Default: 1e-3.
        center, scale: have beta, gamma. Default: True.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: 'zeros', 'ones' or a
            callable that fills a tensor, as those of torch.nn.init. Default: beta and mean zeros, the others ones.
        beta_regularizer, gamma_regularizer: callables variable -> scalar, or None; see
            :func:`torch_bn.regularization_losses`. Default: None.
        beta_constraint, gamma_constraint: callables variable -> variable, or None; see
            :func:`torch_bn.apply_constraints`. Default: None.
        trainable: False: gamma and beta need no gradient and the moving statistics stay; training still normalises with
            the statistics of the batch. May be set later. Default: True.
        name: kept as an attribute. Default: None.
        renorm: Batch Renormalization. Default: False.
        renorm_clipping: any of the keys rmax, rmin, dmax: numbers, tensors of one element, or callables of the
            number of batches so far (:mod:`torch_bn.schedules`). Without renorm it is ignored. Default: None.
        renorm_momentum: of its averages, one minus PyTorch's; not 1. Default: 0.99.
        fused: None takes the compiled kernels where they can serve, True insists on them, False takes plain torch
            operations. As in TensorFlow, False also keeps the moving variance biased where a fused kernel would have
            corrected it: rank 4, one axis, 1 or 3, without renorm, virtual_batch_size and adjustment. Default: None.
        virtual_batch_size: ghost batches of that many examples, example i with those of group i % G. Must divide the
            batch in training. Default: None.
        adjustment: called in training with the input's size, returns (scale, bias), applied before gamma and beta; not
            with virtual_batch_size. Default: None.
        device, dtype: of the variables. Default: the first input's device; float64 for such an input, else float32.

    State:
        weight, bias (gamma, beta), running_mean, running_var (moving_mean, moving_variance): (C,) for one axis; for
        several the input's rank, with 1 on the other axes. num_batches_tracked: int64. With renorm renorm_mean,
        renorm_stddev of that shape, renorm_mean_weight, renorm_stddev_weight of one value.

    Raises:
        The exception types of TensorFlow 1.8, with messages of our own: ValueError, TypeError, IndexError for an empty
        list of axes, AttributeError for a renorm_clipping without keys. Nothing is changed then.
    """

    renorm_mean: Tensor
    renorm_stddev: Tensor
    renorm_mean_weight: Tensor
    renorm_stddev_weight: Tensor

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        moving_mean_initializer: Initializer = "zeros",
        moving_variance_initializer: Initializer = "ones",
        beta_regularizer: Callable[[Tensor], Any] | None = None,
        gamma_regularizer: Callable[[Tensor], Any] | None = None,
        beta_constraint: Callable[[Tensor], Tensor] | None = None,
        gamma_constraint: Callable[[Tensor], Tensor] | None = None,
        trainable: bool = True,
        name: str | None = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[torch.Size], Any] | None = None,
        *,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis = _shapes.check_axes(axis)
        self.momentum = _number("momentum", momentum)
        if epsilon is None:
            raise ValueError("BatchNormalization: epsilon must be a number, got None")
        self.epsilon = _number("epsilon", epsilon)
        self.center, self.scale = bool(center), bool(scale)
        self._initializers = {
            "weight": _initializer("gamma_initializer", gamma_initializer),
            "bias": _initializer("beta_initializer", beta_initializer),
            "running_mean": _initializer("moving_mean_initializer", moving_mean_initializer),
            "running_var": _initializer("moving_variance_initializer", moving_variance_initializer),
        }
        for what, regularizer in (("beta_regularizer", beta_regularizer), ("gamma_regularizer", gamma_regularizer)):
            if regularizer is not None and not callable(regularizer):
                raise TypeError(f"BatchNormalization: {what} must be callable or None, got {regularizer!r}")
        for what, constraint in (("beta_constraint", beta_constraint), ("gamma_constraint", gamma_constraint)):
            if constraint is not None and not callable(constraint):
                raise ValueError(f"BatchNormalization: {what} must be callable or None, got {constraint!r}")
        self.beta_regularizer, self.gamma_regularizer = beta_regularizer, gamma_regularizer
        self.beta_constraint, self.gamma_constraint = beta_constraint, gamma_constraint
        self.name = name
        self.renorm = bool(renorm)
        self.renorm_clipping = renorm_clipping
        self.renorm_momentum = renorm_momentum
        if self.renorm:
            _check_clipping(renorm_clipping)
            self.renorm_momentum = _number("renorm_momentum", renorm_momentum)
            if self.renorm_momentum == 1:
                raise ValueError(
                    "BatchNormalization: renorm_momentum must not be 1, which lets nothing in, got 1"
                )
        self.fused = None if fused is None else bool(fused)
        self.virtual_batch_size = _virtual_batch_size(virtual_batch_size)
        if self.virtual_batch_size is not None and adjustment is not None:
            raise ValueError("BatchNormalization: adjustment must be None with virtual_batch_size, got both")
        self.adjustment = adjustment
        self._device, self._dtype = device, dtype
        self._trainable = bool(trainable)
        for variable in ("weight", "bias"):
            self.register_parameter(variable, None)
        for variable in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(variable, None)

    @property
    def gamma(self) -> nn.Parameter | None:
        """weight, under TensorFlow's name; None without scale, and before the variables are made."""
        return self.weight

    @property
    def beta(self) -> nn.Parameter | None:
        """bias, under TensorFlow's name; None without center, and before the variables are made."""
        return self.bias

    @property
    def moving_mean(self) -> Tensor | None:
        return self.running_mean

    @property
    def moving_variance(self) -> Tensor | None:
        return self.running_var

    @property
    def trainable(self) -> bool:
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(self._trainable)

    @property
    def built(self) -> bool:
        return self.running_mean is not None

    def build(self, input: Tensor) -> None:
        """Makes the variables for inputs like this one, which may be on the meta device; does nothing the second
        time."""
        if self.built:
            return
        axes = self._axes(input)
        dtype = self._dtype or (torch.float64 if input.dtype == torch.float64 else torch.float32)
        device = self._device
        if device is None:
            device = None if input.is_meta else input.device
        self._make(_shapes.parameter_shape(axes, input), device, dtype)

    def _make(self, shape: Sequence[int], device: torch.types.Device, dtype: torch.dtype) -> None:
        def filled(name: str) -> Tensor:
            value = torch.empty(tuple(shape), device=device, dtype=dtype)
            with torch.no_grad():
                self._initializers[name](value)
            return value

        if self.scale:
            self.weight = nn.Parameter(filled("weight"), requires_grad=self._trainable)
        if self.center:
            self.bias = nn.Parameter(filled("bias"), requires_grad=self._trainable)
        self.running_mean, self.running_var = filled("running_mean"), filled("running_var")
        self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=device)
        if self.renorm:
            for name in RENORM_STATE:
                size = () if name.endswith("weight") else tuple(shape)
                self.register_buffer(name, torch.zeros(size, device=device, dtype=dtype))

    def forward(self, inputs: Tensor, training: bool | Tensor | None = None) -> Tensor:
        """Args:
            inputs: float32, float64, float16 or bfloat16, any rank from 1; the size of the channel axes stays the same.
            training: a bool, 0 or 1, or a bool tensor of one element, which is read at once. None: self.training.

        Returns:
            The normalised inputs, of the same shape and dtype.
        """
        if not isinstance(inputs, Tensor):
            raise TypeError(f"BatchNormalization: inputs must be a Tensor, got {type(inputs).__name__}")
        if inputs.dtype not in FLOATS:
            raise TypeError(
                f"BatchNormalization: inputs must be float32, float64, float16 or bfloat16, got {inputs.dtype}"
            )
        train = self.training if training is None else read_training(training)
        axes = self._axes(inputs)
        groups = self._groups(inputs, axes, train)
        if train and self.adjustment is not None and not callable(self.adjustment):
            raise TypeError(f"BatchNormalization: adjustment must be callable or None, got {self.adjustment!r}")
        adjusted = _shapes.adjustment_of(self.adjustment, inputs, axes) if train else None
        self.build(inputs)
        self._check_channels(inputs, axes)
        extras = Extras(
            groups=groups,
            unbiased=train and self._is_unbiased(inputs, axes),
            strict=False,
            renorm=self._renorm_state() if train and self.renorm else None,
            frozen=not self._trainable,
        )
        return _batch_norm_with(
            *(inputs, self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked, train),
            *(1 - self.momentum, self.epsilon, axes, self.fused, extras, adjusted),
        )

    def layer_losses(self) -> list[Tensor]:
        """The losses of this layer's regularizers: gamma's, then beta's, as far as there are."""
        return losses_of([(self.weight, self.gamma_regularizer), (self.bias, self.beta_regularizer)])

    regularization_losses = layer_losses

    def layer_constraints(self) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """The variables that have a constraint, with it."""
        pairs = ((self.weight, self.gamma_constraint), (self.bias, self.beta_constraint))
        return [
            (variable, constraint) for variable, constraint in pairs if variable is not None and constraint is not None
        ]

    def _axes(self, inputs: Tensor) -> _shapes.Axes:
        """The axes counted from 0."""
        if isinstance(self.axis, tuple):
            return _shapes.resolved(self.axis, inputs)
        rank = inputs.dim()
        if rank == 0:
            raise ValueError("BatchNormalization: inputs must have at least 1 dimension, got 0")
        if not -rank <= self.axis < rank:
            raise ValueError(
                f"BatchNormalization: axis must be in [{-rank}, {rank - 1}] for inputs of rank {rank}, got {self.axis}"
            )
        return self.axis % rank

    def _groups(self, inputs: Tensor, axes: _shapes.Axes, training: bool) -> int:
        """How many ghost batches there are; they must be equally large."""
        size = self.virtual_batch_size
        groups = _shapes.groups_of(inputs, axes, size)
        if training and size is not None and inputs.size(0) % size:
            raise ValueError(
                f"BatchNormalization: virtual_batch_size must divide the batch, got {size} for "
                f"{inputs.size(0)} examples"
            )
        return groups

    def _check_channels(self, inputs: Tensor, axes: _shapes.Axes) -> None:
        assert self.running_mean is not None  # built
        expected, got = tuple(self.running_mean.shape), _shapes.parameter_shape(axes, inputs)
        if expected != got:
            raise ValueError(
                f"BatchNormalization: inputs must have the channels of the variables, {list(expected)}, got {list(got)}"
            )

    def _is_unbiased(self, inputs: Tensor, axes: _shapes.Axes) -> bool:
        """Whether TensorFlow's fused kernel, which corrects the variance that it stores, would have run."""
        plain = not self.renorm and self.virtual_batch_size is None and self.adjustment is None
        return plain and self.fused is not False and inputs.dim() == 4 and axes in (1, 3)

    def _renorm_state(self) -> Renorm:
        clipping, step = self.renorm_clipping, 0
        if clipping and any(map(callable, clipping.values())):
            assert self.num_batches_tracked is not None  # built
            step = int(self.num_batches_tracked)
        return Renorm(*renorm_averages(self), 1 - self.renorm_momentum, *clipping_at(clipping, step))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchNormalization":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_from_half(self, before)
        return self

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
        mean = state_dict.get(prefix + "running_mean")
        if not self.built and mean is not None:
            self._make(mean.shape, self._device, self._dtype or mean.dtype)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        settle_renorm(self, state_dict, prefix, missing_keys, unexpected_keys)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, momentum={self.momentum}, epsilon={self.epsilon}" + "".join(
            f", {name}={getattr(self, name)!r}"
            for name, usual in (("center", True), ("scale", True), ("renorm", False), ("virtual_batch_size", None))
            if getattr(self, name) != usual
        )


def read_training(training: object) -> bool:
    """TensorFlow's `training` as a bool: a bool, 0 or 1, or a bool tensor of no dimensions."""
    if isinstance(training, Tensor):
        if training.dim() > 0:
            raise ValueError(f"training must be a single value, got a tensor of shape {list(training.shape)}")
        if training.dtype != torch.bool:
            raise TypeError(f"training must be a bool, 0 or 1, or a bool tensor, got a tensor of {training.dtype}")
        return bool(training)
    if isinstance(training, str) or training is None or not _equals_bool(training):
        raise TypeError(f"training must be a bool, 0 or 1, or a bool tensor, got {training!r}")
    return bool(training)


def _equals_bool(value: Any) -> bool:
    try:
        return bool(value == 0) or bool(value == 1)
    except (TypeError, ValueError):
        return False


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and (value.numel() != 1 or not value.is_floating_point()):
        raise TypeError(f"BatchNormalization: {name} must be a number, got a tensor of {value.dtype}")
    if value is None or isinstance(value, str):
        raise TypeError(f"BatchNormalization: {name} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"BatchNormalization: {name} must be a number, got {value!r}") from None


def _initializer(name: str, value: Any) -> Callable[[Tensor], Any]:
    if isinstance(value, str) and value in _FILLS:
        return _FILLS[value]
    if not callable(value):
        raise ValueError(
            f"BatchNormalization: {name} must be 'zeros', 'ones' or a callable that fills a tensor, got {value!r}"
        )
    return value  # type: ignore[no-any-return]


def _check_clipping(clipping: Any) -> None:
    if clipping is not None and not isinstance(clipping, Mapping):
        error = ValueError if isinstance(clipping, str) else AttributeError
        raise error(
            "BatchNormalization: renorm_clipping must be a dict with keys among rmax, rmin, dmax, or None, "
            f"got {type(clipping).__name__}"
        )
    check_clipping(clipping)


def _virtual_batch_size(value: Any) -> int | None:
    if value is None:
        return None
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(
            f"BatchNormalization: virtual_batch_size must be a positive int or None, got {value!r}"
        ) from None
    if size < 1:
        raise ValueError(f"BatchNormalization: virtual_batch_size must be a positive int or None, got {size}")
    return size
