"""Combinations of all options, drawn by hypothesis, and the tensors that belong to them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from formulas import Rules, State, Value, curve_of, formulas
from hypothesis import strategies as st
from numpy import ndarray
from torch import Tensor

from torch_bn._checks import Activation, activation_and_number
from torch_bn.functional import RenormState

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 4, 5, 7, 8, 17]
LARGEST = 4000  # values of an input
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.3), ("elu", 1.5), "silu", "gelu", "gelu_tanh", "hardswish"]


def cut(x: Tensor) -> Tensor:
    """A window into a larger tensor that holds NaN elsewhere."""
    larger = x.new_full([size + 2 for size in x.shape], torch.nan)
    return larger[tuple(slice(1, -1) for _ in x.shape)].copy_(x)


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def transposed(x: Tensor) -> Tensor:
    backwards = tuple(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "cut": cut,
    "transposed": transposed,
    "every_other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "first_axes_swapped": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@dataclass
class Case:
    """One drawn combination; repr() shows it when it fails."""

    seed: int
    shape: tuple[int, ...]
    axis: int | list[int]
    dtype: torch.dtype
    layouts: tuple[str, str]
    has: tuple[bool, bool]
    eps: float
    momentum: float
    renorm: bool
    renorm_momentum: float
    clipping: dict[str, float]
    filled: tuple[float, float]
    virtual_batch_size: int | None
    adjustment: str | None
    residual: str | None  # its layout
    activation: Activation
    steps: int
    offset: float

    @property
    def axes(self) -> tuple[int, ...]:
        axes = self.axis if isinstance(self.axis, list) else [self.axis]
        return tuple(sorted(axis % len(self.shape) for axis in axes))

    @property
    def kept(self) -> torch.dtype:
        """Of parameters and state."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def channels(self) -> tuple[int, ...]:
        """The shape that the formulas have them in."""
        return tuple(size if axis in self.axes else 1 for axis, size in enumerate(self.shape))

    @property
    def groups(self) -> int:
        return math.ceil(self.shape[0] / self.virtual_batch_size) if self.virtual_batch_size else 1

    @property
    def fewest(self) -> int:
        """How many values a channel has in the smallest group."""
        values = math.prod(self.shape) // math.prod(self.channels)
        return values // self.shape[0] * (self.shape[0] // self.groups) if self.groups > 1 else values

    @property
    def rules(self) -> Rules:
        return Rules(
            *(self.axes, self.eps, self.momentum, self.renorm, self.renorm_momentum, self.clipping, self.groups),
            unbiased=not self.renorm,
            activation=activation_and_number(self.activation),
        )


@st.composite
def cases(draw: st.DrawFn, divides: bool = False) -> Case:
    """`divides`: virtual_batch_size divides the batch and comes without adjustment, as TensorFlow wants it, and nothing
    comes after the normalisation."""
    rank = draw(st.integers(1, 5))
    shape: list[int] = []
    for _ in range(rank):
        room = LARGEST // math.prod(shape)
        shape.append(draw(st.sampled_from([size for size in SIZES if size <= room])))
    axis: int | list[int] = draw(st.integers(-rank, rank - 1))
    if rank > 1 and draw(st.booleans()):
        chosen = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
        axis = [one - draw(st.sampled_from([0, rank])) for one in chosen]
    at_batch = 0 in ([one % rank for one in axis] if isinstance(axis, list) else [axis % rank])
    sizes = [size for size in range(1, shape[0] + 2) if not divides or shape[0] % size == 0]
    ghosts = None if at_batch else draw(st.none() | st.sampled_from(sizes))
    adjustments = st.sampled_from([None, "channel", "vector", "example", "scalar", "number", "element", "mixed"])
    keys = draw(st.sets(st.sampled_from(["rmax", "rmin", "dmax"])))
    bounds = {"rmax": st.floats(0.8, 2), "rmin": st.floats(0.3, 1.2), "dmax": st.floats(0, 1)}
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        seed=draw(st.integers(0, 10**6)),
        shape=tuple(shape),
        axis=axis,
        dtype=dtype,
        layouts=(draw(st.sampled_from(list(LAYOUTS))), draw(st.sampled_from(list(LAYOUTS)))),
        has=(draw(st.booleans()), draw(st.booleans())),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        momentum=draw(st.sampled_from([0.01, 0.3, 1.0])),
        renorm=draw(st.booleans()),
        renorm_momentum=draw(st.sampled_from([0.01, 0.4, 1.0])),
        clipping={key: draw(bounds[key]) for key in sorted(keys)},
        filled=draw(st.sampled_from([(0.0, 0.0), (0.3, 0.3), (0.6, 0.2), (1.0, 1.0)])),
        virtual_batch_size=ghosts,
        adjustment=None if divides and ghosts else draw(adjustments),
        residual=None if divides else draw(st.none() | st.sampled_from(list(LAYOUTS))),
        activation=None if divides else draw(st.sampled_from(ACTIVATIONS)),
        steps=draw(st.integers(1, 3)),
        offset=draw(st.sampled_from([0.0, 0.5, 20.0] if dtype != torch.float64 else [0.0])),  # the oracle is as exact
    )


class Numbers:
    """The tensors of a case, drawn from its seed."""

    def __init__(self, case: Case):
        self.case = case
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(case.seed)
        count = math.prod(case.channels)
        kept = case.kept

        def normal(shape: Any, dtype: torch.dtype = kept) -> Tensor:
            return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

        def uniform(shape: Any, low: float) -> Tensor:
            return (torch.rand(shape, generator=self.generator, dtype=torch.float64) + low).to(kept)

        self.normal = normal
        self.weight = normal(count) + 1 if case.has[0] else None
        self.bias = normal(count) if case.has[1] else None
        self.mean, self.var = normal(count), uniform(count, 0.5)
        filled = [torch.tensor(value, dtype=kept) for value in case.filled]
        self.renorm = RenormState(
            (normal(count) + case.offset) * filled[0], uniform(count, 0.5) * filled[1], filled[0], filled[1]
        )
        self.scale, self.shift = self._adjustment(uniform, normal)

    def _adjustment(self, uniform: Callable, normal: Callable) -> tuple[Any, Any]:
        shape, channels = self.case.shape, self.case.channels
        example = (shape[0],) + (1,) * (len(shape) - 1)
        shapes = {
            "channel": (channels, channels),
            "vector": ((math.prod(channels),),) * 2,
            "example": (example, example),
            "scalar": ((), ()),
            "element": (shape, shape),
            "mixed": (shape, channels),
        }
        if self.case.adjustment is None:
            return None, None
        if self.case.adjustment == "number":
            return 1.25, -0.5
        first, second = shapes[self.case.adjustment]
        return uniform(first, 0.5), normal(second)

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, dy and the residual."""
        case = self.case

        def laid_out(layout: str | None, offset: float = 0.0) -> Any:
            if layout is None:
                return None
            return LAYOUTS[layout]((self.normal(case.shape, torch.float64) + offset).to(case.dtype))

        return laid_out(case.layouts[0], case.offset), laid_out(case.layouts[1]), laid_out(case.residual)

    def for_formulas(self, value: Any, missing: float, vector: bool = False) -> ndarray:
        """In float64; `vector`: one value per channel, in the broadcast shape."""
        if value is None:
            return np.full((1,) * len(self.case.shape), missing)
        array = np.asarray(value.detach().double().cpu() if isinstance(value, Tensor) else value, np.float64)
        return array.reshape(self.case.channels) if vector else array

    def state(self) -> dict[str, Tensor]:
        """Copies of what a layer keeps, by the names of State."""
        values = [self.mean, self.var, *(self.renorm if self.case.renorm else ())]
        return {name.name: value.clone() for name, value in zip(fields(State), values, strict=False)}

    def inputs(self, x: Tensor, residual: Tensor | None = None) -> dict[str, Any]:
        """What a gradient is asked of, by the name of the gradient; x and residual with the strides that they have."""
        given = {"dweight": self.weight, "dbias": self.bias, "dscale": self.scale, "dshift": self.shift}
        leaves = {
            name: value.clone().requires_grad_() if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        added = None if residual is None else residual.detach().requires_grad_()
        return {"dx": x.detach().requires_grad_(), **leaves, "dresidual": added}

    def expected(
        self,
        x: Tensor,
        dy: Tensor,
        kept: dict[str, Tensor],
        rules: Rules | None = None,
        residual: Tensor | None = None,
    ) -> tuple[dict[str, Value], State]:
        """What the formulas say to a batch, from the state as it is now."""
        vector = self.case.adjustment == "vector"
        return formulas(
            *(self.for_formulas(value, 0) for value in (x, dy)),
            self.for_formulas(self.weight, 1, self.weight is not None),
            self.for_formulas(self.bias, 0, self.bias is not None),
            self.for_formulas(self.scale, 1, vector),
            self.for_formulas(self.shift, 0, vector),
            State(**{name: self.for_formulas(value, 0, value.dim() > 0) for name, value in kept.items()}),
            rules or self.case.rules,
            self.for_formulas(residual, 0),
        )

    def away_from_the_kink(self, x: Tensor, dy: Tensor, kept: dict[str, Tensor], residual: Tensor | None) -> Tensor:
        """dy, but zero where rounding decides on which side of an activation's kink an element lies."""
        kink = curve_of(*self.case.rules.activation).kink
        if kink is None:
            return dy
        before = self.expected(x, dy, kept, residual=residual)[0]["before"]
        near = torch.from_numpy(np.abs(np.abs(before.value) - kink) < 2**-6 * before.size).to(dy.device)
        return dy.masked_fill_(near, 0)  # with the strides that it has
