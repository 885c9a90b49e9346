"""Batch normalization for PyTorch on compiled kernels, a drop-in for nn.BatchNorm1d/2d/3d."""

from . import constraints, functional, layers, regularizers, schedules
from ._operators import build_info, load
from .constraints import apply_constraints, attach_constraints
from .fusion import fuse
from .layers import BatchNormalization
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .regularizers import regularization_losses
from .surgery import convert, revert
from .updates import deferred_updates

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormalization",
    "__version__",
    "apply_constraints",
    "attach_constraints",
    "build_info",
    "constraints",
    "convert",
    "deferred_updates",
    "functional",
    "fuse",
    "layers",
    "load",
    "regularization_losses",
    "regularizers",
    "revert",
    "schedules",
]
