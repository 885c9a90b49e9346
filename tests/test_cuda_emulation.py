"""The CUDA kernels without a GPU: on a model of CUDA, under sanitizers, against the oracle of the CPU's kernels.

tests/cuda_emulation/README.md says what this can show and what it cannot.
"""

from pathlib import Path

import pytest
from cuda_emulation import planted_bugs
from cuda_emulation.programs import HERE, MODES, execute, flags, host_units, kernel_units, link
from cuda_toolkit import needs_nvcc
from native import Unit, compile_all

from torch_bn import _build

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all objects."""
    folder = tmp_path_factory.mktemp("emulated")
    memory, races = MODES["memory"], MODES["races"]
    self_test = Unit(HERE / "test_emulation.cpp", folder / "test_emulation.o", flags() + memory.host)
    compile_all(
        [unit for mode in (memory, races) for unit in kernel_units(mode, _build.CSRC, folder)]
        + [unit for mode in (memory, races) for unit in host_units(mode, folder)]
        + [self_test]
    )
    return folder


def check(program: Path, *arguments: str) -> None:
    finished = execute(program, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_emulation_itself(objects: Path, tmp_path: Path) -> None:
    parts = [objects / "test_emulation.o", objects / "cuda_emulation-memory.o"]
    check(link(MODES["memory"], parts, tmp_path / "test_emulation"))


@pytest.mark.parametrize(("mode", "cases", "seeds"), [("memory", "all", "2"), ("races", "some", "1")])
def test_kernels(objects: Path, tmp_path: Path, mode: str, cases: str, seeds: str) -> None:
    program = link(MODES[mode], sorted(objects.glob(f"*-{mode}.o")), tmp_path / "test_kernels")
    check(program, cases, seeds)


# In files that take little to compile. The whole table: python tests/cuda_emulation/planted_bugs.py
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("update: the counter changes too early", "data race"),
        ("update: channels beyond a block are left", "running statistics"),
        ("inference: threads leave before the barrier", "deadlock"),
    ],
)
def test_a_planted_bug_is_noticed(objects: Path, tmp_path: Path, bug: str, message: str) -> None:
    found = planted_bugs.notice(planted_bugs.named(bug), objects, tmp_path)
    assert message in " ".join(found.values()), found


def test_every_bug_can_be_planted() -> None:
    assert [bug.name for bug in planted_bugs.BUGS if not bug.fits(_build.CSRC)] == []


def test_nothing_is_noticed_without_a_bug(objects: Path, tmp_path: Path) -> None:
    nothing = planted_bugs.Bug("none", "cuda/update.cu", "namespace torch_bn", "namespace torch_bn")
    assert not any(planted_bugs.notice(nothing, objects, tmp_path).values())
