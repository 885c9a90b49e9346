"""Finds the compiled kernels: the extension built ahead of time where it fits the installed torch, else load()."""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import _build, _compile

logger = logging.getLogger("torch_bn")

batch_norm: Any = None
"""torch.ops.torch_bn.batch_norm.default once the kernels are loaded, else None. Read it at each call."""

direct: Any = None
"""A shorter way to it, _C.direct, which says None where it cannot serve. Read both at each call."""

has_cuda = False
"""Whether the kernels that are loaded run on CUDA devices, too. Read it at each call."""

_extension: ModuleType | None = None
_origin: str | None = None
_reason: str | None = None


def unavailable_reason() -> str | None:
    """Why there are no compiled kernels, in a few words; None when there are."""
    return _reason


def load(verbose: bool = False) -> None:
    """Compiles the kernels for the installed torch, unless a cache holds them already, and switches to them.

    Takes about two minutes the first time, on two cores; needs ninja and a C++20 compiler (GCC; on macOS Apple's
    clang). Does nothing where the kernels are loaded already. The cache lies in TORCH_EXTENSIONS_DIR or torch's default
    for it; MAX_JOBS limits the compilers that run at once. Processes that load at the same time share one compilation.

    Args:     verbose: print what is compiled and how far it is.
    Raises:   RuntimeError if a tool is missing (it says which to install), the compiler fails, or on Windows.
    """
    if batch_norm is None:
        path = _compile.library(verbose)
        if batch_norm is None:  # another thread may have loaded it while this one waited
            _adopt(_compile.import_library("torch_bn._C", path), "compiled on demand")


def update_statistics(*arguments: Any) -> None:
    """torch.ops.torch_bn.update_statistics; the last argument is a Renorm or None."""
    *plain, renorm = arguments
    torch.ops.torch_bn.update_statistics.default(*plain, *(renorm[:5] if renorm is not None else ()))


def build_info() -> dict[str, Any]:
    """What runs here: versions, where the kernels come from or why there are none, the CPU table in use, and the CUDA
    that they were built with or why they were not."""
    from . import __version__

    facts = dict(_extension.build_info()) if _extension else {}
    cuda = facts.get("cuda")
    missing = _build.cuda_obstacle(torch.version.cuda) or "the kernels were built without; build them again"
    return {
        "version": __version__,
        "torch": torch.__version__,
        "extension": _origin,
        "reason": _reason,
        "path": getattr(_extension, "__file__", None),
        "cpu_table": _extension.cpu_table() if _extension else None,
        "cpu_tables": _extension.cpu_tables() if _extension else [],
        "threads": torch.get_num_threads(),
        "compiler": facts.get("compiler"),
        "openmp": facts.get("openmp"),
        "cuda": cuda,
        "cuda_reason": None if cuda or not _extension else missing,
    }


def _adopt(extension: ModuleType, origin: str) -> None:
    """Makes a loaded extension the one in use."""
    global batch_norm, direct, has_cuda, _extension, _origin, _reason
    from . import _fake  # noqa: F401  describes the operators, so they must be registered first

    _extension, _origin, _reason = extension, origin, None
    has_cuda = extension.build_info()["cuda"] is not None
    batch_norm = torch.ops.torch_bn.batch_norm.default
    direct = extension.direct


def _misfit() -> str | None:
    """Why the extension beside this file cannot be used. Found without loading it: that would register its operators,
    and a library compiled on demand could not register them again."""
    if sys.platform == "win32":
        return "there are no kernels for Windows"
    spec = importlib.util.find_spec("._C", __package__)
    if spec is None or spec.origin is None:
        return "no compiled kernels lie in the package"
    record = Path(spec.origin).with_name("_built_for.txt")
    built_for = record.read_text().strip() if record.is_file() else "unknown"
    if built_for != torch.__version__:
        return f"its kernels were built for torch {built_for}, and torch {torch.__version__} is installed"
    return None


def _start() -> None:
    global _reason
    _reason = _misfit()
    if _reason is None:
        try:
            from . import _C  # type: ignore[attr-defined]
        except ImportError as error:
            _reason = f"its kernels do not load ({str(error).splitlines()[0]})"
        else:
            _adopt(_C, "built")
    if _reason is not None:
        hint = "" if sys.platform == "win32" else "; torch_bn.load() compiles them in two minutes"
        logger.warning("torch_bn runs on plain torch operations: %s%s.", _reason, hint)


_start()
