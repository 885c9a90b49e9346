"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch's layers on the compiled kernels. State and defaults, no arithmetic."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from ._checks import Activation, Renorm, activation_and_number
from ._shapes import adjustment_of, groups_of
from .functional import (
    Ending,
    Extras,
    _batch_norm,
    _batch_norm_with,
    _check_fused,
    check_inplace,
    check_renorm_momentum,
    check_residual_type,
    check_virtual_batch_size,
)
from .schedules import check_clipping, clipping_at

RENORM_STATE = ("renorm_mean", "renorm_stddev", "renorm_mean_weight", "renorm_stddev_weight")
_STATISTICS = ("running_mean", "running_var", *RENORM_STATE)
_HALVES = (torch.float16, torch.bfloat16)

_ARGUMENTS = """
    A subclass with the same meaning, state, state_dict and errors. The formula: :func:`torch_bn.functional.batch_norm`.

    Args:
        num_features: C, the size of the channel axis.
        eps: added to the variance; positive. Default: 1e-5.
        momentum: weight of a batch in the running statistics, usually in [0, 1]; None averages over all batches since
            reset_running_stats(). Default: 0.1.
        affine: have a weight and a bias. Default: True.
        track_running_stats: have running statistics, for evaluation. Without them evaluation normalises with the
            statistics of the batch as training does. Default: True.
        device, dtype: of parameters and running statistics; float32, float64, float16 or bfloat16, whatever the dtype
            of the inputs. Default: torch's.
        bias: False leaves out the bias. Default: True.
        scale: False leaves out the weight. Default: True.
        axis: which axis of the input holds the channels; negative ones count from the end. Default: 1.
        renorm: Batch Renormalization: training normalises with averages over the last batches, as far as
            renorm_clipping allows; for small batches. Default: False.
        renorm_clipping: bounds of the correction, any of the keys rmax, rmin, dmax. Numbers, tensors of one element, or
            callables of the number of batches so far, as in :mod:`torch_bn.schedules`. None or a missing key: no bound.
            Default: None.
        renorm_momentum: weight of a batch in the averages of renorm; not 0. Default: 0.01.
        virtual_batch_size: ghost batches: training normalises the examples in groups of at most so many, example i with
            those of group i % G; for large batches. Default: None.
        adjustment: called in training with the input's size, returns the (scale, bias) that act before weight and bias:
            one value per channel, or what broadcasts against the input. Default: None.
        activation: what comes at the end, in the same pass: with "relu" layer(x) is relu(bn(x)), and layer(x, residual)
            is relu(bn(x) + residual). Or "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "hardswish", or a pair such
            as ("leaky_relu", 0.2) with the slope of leaky_relu, by default 0.01, or the alpha of elu, by default 1.
            Default: None, none; the residual is added all the same. The forward takes one for the call, too:
            layer(x, residual, "relu").
        inplace: let y take the place of the input, which must not be used any more: one tensor less in memory. In
            training with activation None or leaky_relu of a positive slope, whose input can be found again from y, in
            float32 or float64; :func:`torch_bn.functional.batch_norm` says more. Default: False.
        fused: True insists on the compiled kernels, False on plain torch operations. Default: None, the kernels where
            they can serve.

    State:
        weight, bias: parameters, C values each, ones and zeros at first.
        running_mean, running_var: buffers, C values each, zeros and ones at first; training moves them towards the
            mean and the unbiased variance of each batch.
        num_batches_tracked: buffer, one int64; training adds one for each batch, an empty one too.
        renorm_mean, renorm_stddev, renorm_mean_weight, renorm_stddev_weight: only with renorm; buffers, C, C, 1 and 1
            values, zeros at first: :class:`torch_bn.functional.RenormState`. A state_dict without them starts them
            anew; a layer without renorm ignores them.
        .half() and .bfloat16() leave the statistics in float32: as float16 a variance beyond 65504 would turn infinite.

    Raises:
        ValueError: an input of another rank, one value per channel (of a group) in training, `axis` out of range,
            renorm without running statistics, unknown keys in renorm_clipping, virtual_batch_size not positive, an
            unknown activation.
        RuntimeError: an input with another number of channels, or on another device.
        TypeError: `axis` not an int, `fused` not one of its three values.
        The others are those of :func:`torch_bn.functional.batch_norm`. The state does not change then.
    """


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three layers share. Everything not named here is nn.BatchNorm's own."""

    _ranks: ClassVar[tuple[int, ...]]  # of the inputs that _check_input_dim lets through

    # Defaults on the class, so that an nn.BatchNorm that `convert` has given this class has them as well.
    axis: int = 1
    renorm: bool = False
    renorm_clipping: Mapping[str, Any] | None = None
    renorm_momentum: float = 0.01
    virtual_batch_size: int | None = None
    adjustment: Callable[[torch.Size], Any] | None = None
    activation: Activation = None
    inplace: bool = False
    fused: bool | None = None

    renorm_mean: Tensor
    renorm_stddev: Tensor
    renorm_mean_weight: Tensor
    renorm_stddev_weight: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        scale: bool = True,
        axis: SupportsIndex = 1,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | None = None,
        renorm_momentum: float = 0.01,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[torch.Size], Any] | None = None,
        activation: Activation = None,
        inplace: bool = False,
        fused: bool | None = None,
    ) -> None:
        index = self._checked_axis(axis)
        options = {
            "renorm": renorm,
            "renorm_clipping": renorm_clipping,
            "renorm_momentum": renorm_momentum,
            "virtual_batch_size": virtual_batch_size,
            "adjustment": adjustment,
            "fused": fused,
        }
        check_options(options, track_running_stats)
        activation_and_number(activation)  # raises if it is none
        check_inplace(inplace)
        affine = bool(affine and (scale or bias))
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        # torch before 2.13 has no `bias` keyword, and none has `scale`.
        if not scale:
            self.register_parameter("weight", None)
        if not bias:
            self.register_parameter("bias", None)
        self.axis = index
        self.activation = activation
        self.inplace = inplace
        self._set_options(options)

    def _set_options(self, options: Mapping[str, Any]) -> None:
        """Sets what :func:`check_options` has let through, and makes or drops the state that renorm needs."""
        for name, value in options.items():
            setattr(self, name, value)
        if "renorm" not in options:
            return
        for name in RENORM_STATE:
            if self.renorm and name not in self._buffers:
                one = self.running_mean
                assert one is not None  # check_options() has seen to it
                zeros = torch.zeros_like(one) if not name.endswith("weight") else one.new_zeros(())
                self.register_buffer(name, zeros)
            elif not self.renorm:
                self._buffers.pop(name, None)

    @classmethod
    def _checked_axis(cls, axis: SupportsIndex) -> int:
        try:
            index = operator.index(axis)
        except TypeError:
            raise TypeError(f"{cls.__name__}: axis must be an int, got {axis!r}") from None
        rank = max(cls._ranks)
        if not -rank <= index < rank:
            raise ValueError(f"{cls.__name__}: axis must be in [{-rank}, {rank - 1}], got {index}")
        return index

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for name in RENORM_STATE:
            if name in self._buffers:
                self._buffers[name].zero_()  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: Activation = None) -> Tensor:
        if not isinstance(input, Tensor):
            return self._in_graph_of(input, residual, activation)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        try:  # what self.weight and the like find, at a tenth of the time of nn.Module.__getattr__
            parameters, buffers = self._parameters, self._buffers
            weight, bias = parameters["weight"], parameters["bias"]
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            num_batches_tracked = buffers["num_batches_tracked"]
        except KeyError:  # parametrized, weight-normed, or a replica of nn.DataParallel: plain attributes
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        training = self.training
        if not training:
            num_batches_tracked = None
            training = running_mean is None and running_var is None
        elif not self.track_running_stats:
            running_mean = running_var = num_batches_tracked = None
        if weight is None and bias is None and running_mean is None:
            self._check_num_features(input)
        ending = None
        if activation is None:
            activation = self.activation
        if residual is not None or activation is not None:
            check_residual_type(residual)
            ending = Ending(residual, *activation_and_number(activation))
        extras = None
        if training and (self.renorm or self.virtual_batch_size is not None or self.adjustment is not None):
            groups = groups_of(input, self.axis, self.virtual_batch_size)
            extras = Extras(groups, renorm=self._renorm_state() if self.renorm else None)
            if self.adjustment is not None:
                return _batch_norm_with(
                    *(input, weight, bias, running_mean, running_var, num_batches_tracked, training),
                    *(self.momentum, self.eps, self.axis, self.fused, extras),
                    adjustment_of(self.adjustment, input, self.axis),
                    ending,
                )
        if self.inplace:
            extras = (extras or Extras())._replace(inplace=True)
        return _batch_norm(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            self.momentum,
            self.eps,
            self.axis,
            self.fused,
            extras,
            ending,
        )

    def _renorm_state(self) -> Renorm:
        clipping = self.renorm_clipping
        step = 0
        if clipping and any(map(callable, clipping.values())):
            step = int(self.num_batches_tracked) if self.num_batches_tracked is not None else 0
        return Renorm(*renorm_averages(self), self.renorm_momentum, *clipping_at(clipping, step))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_BatchNorm":
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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        settle_renorm(self, state_dict, prefix, missing_keys, unexpected_keys)

    def _in_graph_of(self, proxy: object, residual: object, activation: object) -> Any:
        """The node of this layer in a graph that torch.fx records. As for torch's own layers it stands for the module,
        so that train() and eval() of the graph still reach it; torch.fx has that only for classes of torch.nn."""
        if not isinstance(proxy, torch.fx.Proxy):
            raise TypeError(f"{type(self).__name__}: input must be a Tensor, got {type(proxy).__name__}")
        tracer: Any = proxy.tracer
        arguments = (proxy,) if residual is None and activation is None else (proxy, residual, activation)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})

    def _check_num_features(self, input: Tensor) -> None:
        """For a layer without any tensor whose length would tell."""
        if input.size(self.axis) != self.num_features:
            raise RuntimeError(
                f"{type(self).__name__}: input.size({self.axis}) must be num_features, {self.num_features}, "
                f"got {input.size(self.axis)}"
            )

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(f"torch.jit.script cannot compile {type(self).__name__}; script torch_bn.revert(model)")

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.affine and self.bias is None and "bias=" not in text:  # torch before 2.13
            text += ", bias=False"
        if self.affine and self.weight is None:
            text += ", scale=False"
        if self.axis != 1:
            text += f", axis={self.axis}"
        for name in ("activation", "inplace", *OPTIONS):
            if getattr(self, name) != getattr(_BatchNorm, name):
                text += f", {name}={getattr(self, name)!r}"
        return text


OPTIONS = ("renorm", "renorm_clipping", "renorm_momentum", "virtual_batch_size", "adjustment", "fused")


def keep_from_half(layer: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Takes back what has made half types of a layer's statistics, which could not hold them."""
    for name in _STATISTICS:
        old, new = before.get(name), layer._buffers.get(name)
        if old is not None and new is not None and new.dtype in _HALVES and old.dtype not in _HALVES:
            layer._buffers[name] = old.to(new.device)


def renorm_averages(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors that RENORM_STATE names, as quickly as forward finds its own."""
    try:
        held = layer._buffers
        mean, stddev = held["renorm_mean"], held["renorm_stddev"]
        return mean, stddev, held["renorm_mean_weight"], held["renorm_stddev_weight"]  # type: ignore[return-value]
    except KeyError:
        return operator.attrgetter(*RENORM_STATE)(layer)


def settle_renorm(
    layer: nn.Module, state_dict: Mapping[str, Any], prefix: str, missing_keys: list[str], unexpected_keys: list[str]
) -> None:
    """After a state_dict was loaded: averages that it has and the layer has not are ignored, and the other way round
    they start anew, so that checkpoints move between layers with renorm and without."""
    names = [prefix + name for name in RENORM_STATE]
    unexpected_keys[:] = [key for key in unexpected_keys if key not in names]
    if not any(name in state_dict for name in names):
        missing_keys[:] = [key for key in missing_keys if key not in names]
        for name in RENORM_STATE:
            buffer = layer._buffers.get(name)
            if buffer is not None:
                buffer.zero_()


def check_options(options: Mapping[str, Any], track_running_stats: bool) -> None:
    """Raises for values that no layer may have; nothing is changed then."""
    if options.get("renorm"):
        if not track_running_stats:
            raise ValueError("batch_norm: renorm needs running statistics, got track_running_stats=False")
        check_clipping(options.get("renorm_clipping"))
        momentum = options.get("renorm_momentum", _BatchNorm.renorm_momentum)
        check_renorm_momentum(momentum)
        if momentum == 0:
            raise ValueError(
                "batch_norm: renorm_momentum must not be 0, which lets nothing in, got 0"
            )
    check_virtual_batch_size(options.get("virtual_batch_size"))
    adjustment = options.get("adjustment")
    if adjustment is not None and not callable(adjustment):
        raise TypeError(f"batch_norm: adjustment must be callable or None, got {adjustment!r}")
    _check_fused(options.get("fused"))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = f"""nn.BatchNorm1d on compiled kernels, for inputs [N, C] or [N, C, L].\n{_ARGUMENTS}"""
    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = f"""nn.BatchNorm2d on compiled kernels, for inputs [N, C, H, W].\n{_ARGUMENTS}"""
    _ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = f"""nn.BatchNorm3d on compiled kernels, for inputs [N, C, D, H, W].\n{_ARGUMENTS}"""
    _ranks = (5,)
