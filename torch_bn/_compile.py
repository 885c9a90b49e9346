"""Compiles the extension on demand, once for each torch, Python, set of flags and content of the sources.

torch.utils.cpp_extension does the work, in a process of its own: there it can fail and be tried again, its output can
be shown in a notebook, and a library that does not load harms nobody.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from . import _build

_COMPILE = "import json, sys; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"
_INSTALL_COMPILER = "`apt install g++` or `dnf install gcc-c++` on Linux, `xcode-select --install` on macOS"


def library(verbose: bool) -> Path:
    """The path of the compiled extension, from the cache if a sound one lies there."""
    if sys.platform == "win32":
        raise RuntimeError("torch_bn.load: there are no kernels for Windows; torch_bn runs on plain torch operations")
    folder = _cache_folder()
    path = folder / "_C.so"
    with _sole_use(folder):
        if _is_sound(path):
            _say(verbose, f"found {path}")
        else:
            shutil.rmtree(folder)
            folder.mkdir()
            _compile(folder, verbose)
            _seal(path).write_text(_digest(path))
    return path


def import_library(name: str, path: Path) -> ModuleType:
    """Imports the extension module at `path` as `name`, whatever its file is called."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)
    return module


def _cache_folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    key = hashlib.sha256()
    about = [torch.__version__, sysconfig.get_config_var("EXT_SUFFIX"), os.environ.get("CXX"), _build.CXX_FLAGS]
    if _with_cuda():
        about += [_build.NVCC_FLAGS, _architectures()]
    key.update(repr(about).encode())
    for file in sorted(path for path in _build.CSRC.rglob("*") if path.is_file()):
        key.update(f"{file.relative_to(_build.CSRC)} {_digest(file)}\n".encode())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    folder = root / f"torch_bn_{key.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"torch_bn.load: TORCH_EXTENSIONS_DIR must name a folder to write to; {error}") from error
    return folder


@contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Holds a lock that the kernel takes back from a process that dies, unlike the lock files of cpp_extension."""
    import fcntl

    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger("torch_bn").warning("torch_bn.load: another process compiles into %s; waiting.", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_sound(path: Path) -> bool:
    """Whether the file is the one that the compiler wrote: loading a truncated library can kill the process."""
    return path.is_file() and _seal(path).is_file() and _seal(path).read_text() == _digest(path)


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _with_cuda() -> bool:
    return _build.cuda_obstacle(torch.version.cuda) is None


def _architectures() -> str:
    """For TORCH_CUDA_ARCH_LIST: what the environment says, the GPUs that torch sees, or what serves most."""
    seen = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return named or ";".join(f"{major}.{minor}" for major, minor in sorted(seen)) or _build.CUDA_ARCHITECTURES


def _environment() -> dict[str, str]:
    """The environment to compile in: ninja on the PATH, even when its virtual environment is not activated."""
    path = os.environ.get("PATH", os.defpath)
    if importlib.util.find_spec("ninja"):
        path = os.pathsep.join(filter(None, [importlib.import_module("ninja").BIN_DIR, path]))
    search = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    cuda = {"CUDA_HOME": str(_build.cuda_home()), "TORCH_CUDA_ARCH_LIST": _architectures()} if _with_cuda() else {}
    return {"MAX_JOBS": str(_build.MAX_JOBS), **os.environ, "PATH": path, "PYTHONPATH": search, **cuda}


def _check_tools(path: str) -> None:
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which("ninja", path=path):
        raise RuntimeError("torch_bn.load: needs ninja to compile the kernels: `pip install ninja`")
    if not shutil.which(shlex.split(compiler)[0], path=path):
        raise RuntimeError(f"torch_bn.load: needs a C++20 compiler and found no {compiler!r}: {_INSTALL_COMPILER}")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise RuntimeError("torch_bn.load: needs the headers of Python: `apt install python3-dev`")


def _compile(folder: Path, verbose: bool) -> None:
    environment = _environment()
    _check_tools(environment["PATH"])
    arguments = {
        "name": "_C",
        "sources": _build.sources(_with_cuda()),
        "with_cuda": _with_cuda(),
        "extra_cflags": _build.CXX_FLAGS,
        "extra_cuda_cflags": _build.NVCC_FLAGS,
        "build_directory": str(folder),
        "verbose": True,
    }
    start = time.monotonic()
    try:
        _run([sys.executable, "-c", _COMPILE, json.dumps(arguments)], environment, verbose)
    except subprocess.CalledProcessError as failure:
        log = folder / "compile.log"
        log.write_text(failure.output)
        lines = failure.output.splitlines()
        cause = next((line for line in lines if re.search(r"[Ee]rror: ", line)), "the compiler was killed")
        raise RuntimeError(f"torch_bn.load: the kernels did not compile: {cause} (more in {log})") from None
    _say(verbose, f"compiled in {time.monotonic() - start:.0f} s into {folder}")


def _run(command: list[str], environment: dict[str, str], verbose: bool) -> None:
    log = []
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.append(line)
                if step := re.match(r"(\[\d+/\d+\]) .* -o (\S+)", line):
                    _say(verbose, f"{step[1]} {step[2]}")
        except BaseException:  # NB: not SIGKILL: ninja ends the compilers, which have groups of their own
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(log))


def _say(verbose: bool, text: str) -> None:
    if verbose:
        print(f"torch_bn.load: {text}", flush=True)
