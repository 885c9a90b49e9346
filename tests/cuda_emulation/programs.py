"""The kernels of csrc/cuda as programs for the host: which files, which flags, and how a program is run."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from native import COMPILER, MEMORY, Unit, run

from torch_bn import _build

HERE = Path(__file__).resolve().parent
RACES = ["-fsanitize=thread"]


@dataclass(frozen=True)
class Mode:
    """A set of sanitizers. `host` is for what is no kernel: the race detector must see the kernels alone."""

    name: str
    kernels: list[str]
    host: list[str]


MODES = {mode.name: mode for mode in (Mode("memory", MEMORY, MEMORY), Mode("races", RACES, []))}


def flags() -> list[str]:
    home = _build.cuda_home()
    assert home, "there is no nvcc; CUDA_HOME must name a CUDA toolkit"
    # NB: -g1 has the lines for messages; what -g adds takes most of the time to compile.
    return ["-O1", "-g1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-isystem", str(home / "include")]


def kernel_units(mode: Mode, csrc: Path, folder: Path, stems: set[str] | None = None) -> list[Unit]:
    """All kernel files, or those of these names; the ones that take longest first."""
    emulated = ["-include", str(HERE / "cuda_emulation.h"), "-x", "c++"]
    sources = [path for path in csrc.glob("cuda/*.cu") if stems is None or path.stem in stems]
    sources.sort(key=lambda path: path.stat().st_size, reverse=True)
    return [Unit(path, folder / f"{path.stem}-{mode.name}.o", flags() + mode.kernels + emulated) for path in sources]


def host_units(mode: Mode, folder: Path) -> list[Unit]:
    stems = ("test_kernels", "cuda_emulation")
    return [Unit(HERE / f"{stem}.cpp", folder / f"{stem}-{mode.name}.o", flags() + mode.host) for stem in stems]


def link(mode: Mode, objects: list[Path], program: Path) -> Path:
    run([COMPILER, *mode.kernels, *objects, "-pthread", "-o", program])
    return program


def execute(program: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout, env=environment
    )
