"""What is measured: the shapes, dtypes and layouts, and the tensors of one case."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DIRECTIONS = ("forward", "backward", "forward+backward", "inference")
TRAINING = DIRECTIONS[:3]

# Channels and side length of every distinct batch norm in ResNet-50 at 224x224, stem first.
RESNET50 = [(64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28)] + [
    (256, 14), (512, 14), (1024, 14), (512, 7), (2048, 7),
]  # fmt: skip
MLP = [(128, 64), (256, 256), (256, 4096), (4096, 256), (16, 64, 500), (64, 128, 256)]
TINY = [(32, 16), (2, 4, 4, 4), (8, 16, 8, 8), (1, 64, 7, 7)]

LARGEST_BATCH = 32
LARGEST_TENSOR = 30 << 20  # bytes in float32: the batch is halved until the tensor fits
WARM_TENSOR = 1 << 20  # bytes: what a core's own cache holds, so a layer finds it there in a real network too


@dataclass(frozen=True)
class Tensors:
    """The input of a layer and the gradient of its output: dense, of the same shape, dtype and layout."""

    x: Tensor
    dy: Tensor

    def clone(self) -> "Tensors":
        return Tensors(self.x.detach().clone().requires_grad_(), self.dy.clone())


@dataclass(frozen=True)
class Case:
    """One layer on one input. `parameters` is the dtype of weight, bias and running statistics; autocast gives a
    bfloat16 input with float32 parameters."""

    group: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    parameters: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def tensor_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def warm(self) -> bool:
        """Whether the tensors may stay in the cache from one call to the next."""
        return self.tensor_bytes <= WARM_TENSOR

    @cached_property
    def name(self) -> str:
        """What --only is matched with, as in `ResNet-50 bfloat16/float32 channels_last 32x64x56x56`."""
        dtypes = f"{dtype_name(self.dtype)}/{dtype_name(self.parameters)}"
        return f"{self.group} {dtypes} {self.layout} {shape_name(self.shape)}"

    def tensors(self, seed: int = 0) -> Tensors:
        """Normal values with a mean of half a standard deviation; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

        def normal(mean: float) -> Tensor:
            values = torch.randn(self.shape, generator=generator).add_(mean)
            return values.to(self.dtype).contiguous(memory_format=memory_format)

        return Tensors(normal(0.5).requires_grad_(), normal(0.0))

    def state(self, seed: int = 1) -> dict[str, Tensor]:
        """The state_dict that every layer starts from: parameters and statistics unlike 0 and 1, the counter at 0."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float) -> Tensor:
            return torch.empty(self.channels).uniform_(low, low + 1.0, generator=generator).to(self.parameters)

        return {
            "weight": uniform(0.5),
            "bias": uniform(-1.0),
            "running_mean": uniform(-1.0),
            "running_var": uniform(0.5),
            "num_batches_tracked": torch.tensor(0),
        }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def all_cases() -> list[Case]:
    """Every case of a full run."""
    dtypes = (torch.float32, torch.bfloat16)
    resnet50 = [_resnet50_shape(channels, side) for channels, side in RESNET50]
    cases = [Case("ResNet-50", s, d, layout) for d in dtypes for layout in _layouts(4) for s in resnet50]
    cases += [Case("MLP", s, d) for d in dtypes for s in MLP]
    cases += [Case("tiny", s, d, layout) for d in dtypes for s in TINY for layout in _layouts(len(s))]
    pure = [_resnet50_shape(128, 28), _resnet50_shape(1024, 14)]
    cases += [Case("all bfloat16", s, torch.bfloat16, layout, torch.bfloat16) for layout in _layouts(4) for s in pure]
    return cases


def quick_cases() -> list[Case]:
    """A smoke of seconds: each dtype and layout, warm and cold tensors."""
    return [
        Case("ResNet-50", (8, 64, 28, 28), torch.float32, "contiguous"),
        Case("ResNet-50", (8, 64, 56, 56), torch.bfloat16, "channels_last"),
        Case("MLP", (128, 64), torch.float32),
        Case("tiny", (2, 4, 4, 4), torch.float32, "channels_last"),
    ]


def _layouts(rank: int) -> tuple[str, ...]:
    return ("contiguous", "channels_last") if rank == 4 else ("contiguous",)


def _resnet50_shape(channels: int, side: int) -> tuple[int, ...]:
    batch = LARGEST_BATCH
    while batch * channels * side * side * torch.float32.itemsize > LARGEST_TENSOR:
        batch //= 2
    return batch, channels, side, side
