"""Building and running native test programs, with warnings as errors."""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch_bn import _build

COMPILER = os.environ.get("CXX", "c++")
WARN = ["-std=c++20", "-Wall", "-Wextra", "-Werror"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(command: Sequence[object]) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


class Unit(NamedTuple):
    """One source file, compiled to `target`. Flags stand before the source."""

    source: Path
    target: Path
    flags: list[str]

    def compile(self) -> None:
        run([COMPILER, *WARN, *self.flags, "-c", self.source, "-o", self.target])


def compile_all(units: Sequence[Unit]) -> None:
    """Side by side, as far as the machine's memory allows."""
    with ThreadPoolExecutor(_build.MAX_JOBS) as pool:
        list(pool.map(Unit.compile, units))
