"""The kernels alone, with no Python and no torch: every tests/cpp/test_*.cpp, built with the address and undefined
behaviour sanitizers. Each has a main() that returns nonzero on failure and prints what failed."""

from pathlib import Path

import pytest
from native import COMPILER, MEMORY, WARN, Unit, compile_all, run

from torch_bn import _build

FLAGS = ["-Wno-psabi", "-O1", "-g", "-fno-omit-frame-pointer", *MEMORY]
PROGRAMS = sorted((Path(__file__).parent / "cpp").glob("test_*.cpp"))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects of csrc/cpu with sanitizers, compiled once for all programs."""
    folder = tmp_path_factory.mktemp("kernels")
    units = [Unit(source, folder / f"{source.stem}.o", FLAGS) for source in sorted(_build.CSRC.glob("cpu/*.cpp"))]
    compile_all(units)
    return [unit.target for unit in units]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_native_program(program: Path, kernels: list[Path], tmp_path: Path) -> None:
    run([COMPILER, *WARN, *FLAGS, "-pthread", program, *kernels, "-o", tmp_path / program.stem])
    run([tmp_path / program.stem])


def test_there_are_native_programs() -> None:
    assert PROGRAMS
