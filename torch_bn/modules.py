"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch's layers on the compiled kernels. State and defaults, no arithmetic."""

import operator
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from .functional import _batch_norm, _check_fused

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
        fused: True insists on the compiled kernels, False on plain torch operations. Default: None, the kernels where
            they can serve.

    State:
        weight, bias: parameters, C values each, ones and zeros at first.
        running_mean, running_var: buffers, C values each, zeros and ones at first; training moves them towards the
            mean and the unbiased variance of each batch.
        num_batches_tracked: buffer, one int64; training adds one for each batch, an empty one too.

    Raises:
        ValueError: an input of another rank, one value per channel in training, `axis` out of range.
        RuntimeError: an input with another number of channels, or on another device.
        TypeError: `axis` not an int, `fused` not one of its three values.
        The others are those of :func:`torch_bn.functional.batch_norm`. The state does not change then.
    """


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three layers share. Everything not named here is nn.BatchNorm's own."""

    _ranks: ClassVar[tuple[int, ...]]  # of the inputs that _check_input_dim lets through

    # Defaults on the class, so that an nn.BatchNorm that `convert` has given this class has them as well.
    axis: int = 1
    fused: bool | None = None

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
        fused: bool | None = None,
    ) -> None:
        index = self._checked_axis(axis)
        _check_fused(fused)
        affine = bool(affine and (scale or bias))
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        # torch before 2.13 has no `bias` keyword, and none has `scale`.
        if not scale:
            self.register_parameter("weight", None)
        if not bias:
            self.register_parameter("bias", None)
        self.axis = index
        self.fused = fused

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

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return self._in_graph_of(input)
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
        )

    def _in_graph_of(self, proxy: object) -> Any:
        """The node of this layer in a graph that torch.fx records. As for torch's own layers it stands for the module,
        so that train() and eval() of the graph still reach it; torch.fx has that only for classes of torch.nn."""
        if not isinstance(proxy, torch.fx.Proxy):
            raise TypeError(f"{type(self).__name__}: input must be a Tensor, got {type(proxy).__name__}")
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (proxy,), {})

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
        if self.fused is not None:
            text += f", fused={self.fused}"
        return text


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = f"""nn.BatchNorm1d on compiled kernels, for inputs [N, C] or [N, C, L].\n{_ARGUMENTS}"""
    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = f"""nn.BatchNorm2d on compiled kernels, for inputs [N, C, H, W].\n{_ARGUMENTS}"""
    _ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = f"""nn.BatchNorm3d on compiled kernels, for inputs [N, C, D, H, W].\n{_ARGUMENTS}"""
    _ranks = (5,)
