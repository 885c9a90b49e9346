"""The kernels alone, with no Python and no torch: every tests/cpp/test_*.cpp, built with the address and undefined
behaviour sanitizers. Each has a main() that returns nonzero on failure and prints what failed."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from torch_bn import _build

COMPILER = os.environ.get("CXX", "c++")
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *SANITIZE]
PROGRAMS = sorted((Path(__file__).parent / "cpp").glob("test_*.cpp"))


def run(command: list[object]) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects of csrc/cpu with sanitizers, compiled once for all programs."""
    folder = tmp_path_factory.mktemp("kernels")
    sources = sorted(_build.CSRC.glob("cpu/*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(_build.MAX_JOBS) as pool:
        list(pool.map(lambda s, o: run([COMPILER, *FLAGS, "-c", s, "-o", o]), sources, objects))
    return objects


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_native_program(program: Path, kernels: list[Path], tmp_path: Path) -> None:
    run([COMPILER, *FLAGS, "-pthread", program, *kernels, "-o", tmp_path / program.stem])
    run([tmp_path / program.stem])


def test_there_are_native_programs() -> None:
    assert PROGRAMS
