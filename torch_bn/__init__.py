"""Batch normalization for PyTorch on compiled kernels, a drop-in for nn.BatchNorm1d/2d/3d."""

from . import functional
from ._operators import build_info, load
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .surgery import convert, revert

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "__version__",
    "build_info",
    "convert",
    "functional",
    "load",
    "revert",
]
