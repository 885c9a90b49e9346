"""Compiling on demand, in processes of its own on a copy of the package that has no built extension.

The kernels are compiled once, by two processes that load at the same time. Every other test that must see a compilation
uses a stand-in for the compiler, which hands out that library (stand_in.py).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in import compiler

from torch_bn import _build, _compile, _operators

NOTICE = (
    "torch_bn runs on plain torch operations: no compiled kernels lie in the package; "
    "torch_bn.load() compiles them in two minutes.\n"
)
LOAD = "import torch_bn; torch_bn.load(verbose=True); print(torch_bn.build_info()['extension'])"
Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts Python code that imports the copy of the package, with some environment variables changed."""
    checkout = tmp_path_factory.mktemp("checkout")
    built = shutil.ignore_patterns("*.so", "_built_for.txt", "__pycache__")
    shutil.copytree(_build.HERE, checkout / "torch_bn", ignore=built)
    shutil.copytree(_build.CSRC, checkout / "csrc")

    def start(code: str, **variables: object) -> "subprocess.Popen[str]":
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], cwd=checkout, env=environment, **pipes)

    return start


@pytest.fixture(scope="session")
def run(start: Start) -> Run:
    def run(code: str, **variables: object) -> "subprocess.CompletedProcess[str]":
        process = start(code, **variables)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def compiled(start: Start, run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """The cache after the one real compilation, and the output of the two processes that shared it."""
    cache = tmp_path_factory.mktemp("cache")
    where = run("from torch_bn import _compile; print(_compile._cache_folder())", TORCH_EXTENSIONS_DIR=cache)
    (Path(where.stdout.strip()) / "lock").touch()  # what cpp_extension leaves behind when it is killed
    processes = [start(LOAD, TORCH_EXTENSIONS_DIR=cache) for _ in range(2)]
    return cache, [process.communicate(timeout=600) for process in processes]


@pytest.fixture
def stand_in(compiled: tuple[Path, list[tuple[str, str]]], tmp_path: Path) -> dict[str, Path]:
    """Variables for a cache of its own, filled by a compiler that takes no time; nothing else is on the PATH."""
    (library,) = compiled[0].glob("torch_bn_*/_C.so")
    empty = tmp_path / "empty"
    empty.mkdir()
    return {"CXX": compiler(tmp_path, library), "TORCH_EXTENSIONS_DIR": tmp_path / "cache", "PATH": f"{empty}:/bin"}


def test_without_kernels_the_package_works_and_says_so_once(run: Run) -> None:
    code = """if True:
        import torch, torch_bn
        from torch_bn import functional
        layer = torch_bn.BatchNorm2d(3)
        layer(torch.randn(4, 3, 5, 5)).sum().backward()
        print(layer.num_batches_tracked.item(), torch_bn.build_info()["extension"])
    """
    finished = run(code)
    assert (finished.stdout, finished.stderr) == ("1 None\n", NOTICE)


def test_the_notice_can_be_silenced(run: Run) -> None:
    finished = run("import logging; logging.getLogger('torch_bn').setLevel('ERROR'); import torch_bn")
    assert (finished.returncode, finished.stderr) == (0, "")


def test_one_of_two_processes_compiles_and_a_stale_lock_stops_neither(
    compiled: tuple[Path, list[tuple[str, str]]],
) -> None:
    (_, first), (_, second) = outputs = compiled[1]
    assert all(out.endswith("\ncompiled on demand\n") for out, _ in outputs), outputs
    assert sorted("torch_bn.load: compiled in" in out for out, _ in outputs) == [False, True]
    assert sorted("another process compiles into" in err for err in (first, second)) == [False, True]


def test_a_cached_library_needs_no_tools(run: Run, compiled: tuple[Path, list[tuple[str, str]]]) -> None:
    code = "import sys; sys.modules['ninja'] = None; " + LOAD
    finished = run(code, TORCH_EXTENSIONS_DIR=compiled[0], PATH="/nonexistent")
    assert finished.stdout.startswith("torch_bn.load: found "), finished.stderr
    assert finished.stdout.endswith("\ncompiled on demand\n")


def test_layers_made_before_load_run_on_the_kernels_after_it(
    run: Run, compiled: tuple[Path, list[tuple[str, str]]]
) -> None:
    code = """if True:
        import torch, torch_bn
        from torch.profiler import profile
        x, layer = torch.randn(4, 3, 5, 5), torch_bn.BatchNorm2d(3)
        before = layer(x)
        torch_bn.load()
        library = torch_bn.build_info()["path"]
        torch_bn.load()
        with profile() as events:
            after = layer(x)
        torch.testing.assert_close(before, after)
        assert torch_bn.build_info()["path"] == library and torch_bn._C.__file__ == library
        print(any(event.key == "torch_bn::batch_norm" for event in events.key_averages()))
    """
    finished = run(code, TORCH_EXTENSIONS_DIR=compiled[0])
    assert finished.stdout == "True\n", finished.stderr


def test_progress_goes_where_print_goes(run: Run, stand_in: dict[str, Path]) -> None:
    code = """if True:
        import contextlib, io, torch_bn
        with contextlib.redirect_stdout(io.StringIO()) as cell:
            torch_bn.load(verbose=True)
        print(cell.getvalue())
    """
    lines = run(code, **stand_in).stdout.splitlines()
    steps = len(_build.sources(_compile._with_cuda())) + 1
    assert f"torch_bn.load: [{steps}/{steps}] _C.so" in lines
    assert sum(line.startswith("torch_bn.load: [") for line in lines) == steps


def test_load_is_quiet_unless_asked(run: Run, stand_in: dict[str, Path]) -> None:
    finished = run("import torch_bn; torch_bn.load()", **stand_in)
    assert (finished.stdout, finished.stderr) == ("", NOTICE)


def test_a_truncated_library_is_compiled_again(run: Run, stand_in: dict[str, Path]) -> None:
    assert "compiled in" in run(LOAD, **stand_in).stdout
    assert "found" in run(LOAD, **stand_in).stdout
    (library,) = stand_in["TORCH_EXTENSIONS_DIR"].glob("torch_bn_*/_C.so")
    os.truncate(library, 1000)
    finished = run(LOAD, **stand_in)
    assert "compiled in" in finished.stdout and finished.stdout.endswith("\ncompiled on demand\n")


def test_a_failed_compilation_names_its_cause_and_can_be_tried_again(
    run: Run, stand_in: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "fail").touch()
    code = f"""if True:
        import os, torch_bn
        try:
            torch_bn.load()
        except RuntimeError as error:
            print(error, torch_bn.build_info()["extension"])
        os.remove({str(tmp_path / "fail")!r})
        torch_bn.load()
        print(torch_bn.build_info()["extension"])
    """
    first, second = run(code, **stand_in).stdout.splitlines()
    assert first.startswith("torch_bn.load: the kernels did not compile: ops.cpp:7:1: error: planted (more in ")
    assert first.endswith(" None")
    assert second == "compiled on demand"


def wait_until(reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_ends_the_compilers_and_leaves_nothing_broken(
    start: Start, run: Run, stand_in: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "hang").touch()
    process = start(LOAD, **stand_in)
    wait_until(lambda: (tmp_path / "hanging").exists(), seconds=60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    wait_until(lambda: not any(map(is_alive, (tmp_path / "hanging").read_text().split())), seconds=10)
    (tmp_path / "hang").unlink()
    assert run(LOAD, **stand_in).stdout.endswith("\ncompiled on demand\n")


@pytest.mark.parametrize(
    ("before", "variables", "message"),
    [
        ("import sys; sys.modules['ninja'] = None; ", {}, "needs ninja to compile the kernels: `pip install ninja`"),
        ("", {"CXX": "/nowhere/c++"}, "needs a C++20 compiler and found no '/nowhere/c++': `apt install g++`"),
        ("", {"TORCH_EXTENSIONS_DIR": __file__}, "TORCH_EXTENSIONS_DIR must name a folder to write to; "),
    ],
    ids=["ninja", "compiler", "cache"],
)
def test_what_is_missing_is_said_in_one_sentence(
    run: Run, stand_in: dict[str, Path], before: str, variables: dict[str, str], message: str
) -> None:
    finished = run(before + LOAD, **(stand_in | {"PATH": "/nonexistent"} | variables))
    assert finished.stderr.splitlines()[-1].startswith(f"RuntimeError: torch_bn.load: {message}"), finished.stderr


def test_the_number_of_jobs_is_the_users_or_fits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= int(_compile._environment()["MAX_JOBS"]) <= (os.cpu_count() or 1)
    monkeypatch.setenv("MAX_JOBS", "77")
    assert _compile._environment()["MAX_JOBS"] == "77"


def test_windows_is_told_that_it_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert _operators._misfit() == "there are no kernels for Windows"
    with pytest.raises(RuntimeError, match="no kernels for Windows; torch_bn runs on plain torch operations"):
        _compile.library(verbose=False)
