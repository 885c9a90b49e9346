"""The sdist and the wheel: what is in them, and what the installed package does when its binary does not fit."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from stand_in import compiler

import torch_bn
from torch_bn import _build

CHECKOUT = Path(__file__).resolve().parents[1]
CSRC_FILES = {path.relative_to(_build.CSRC).as_posix() for path in _build.CSRC.rglob("*") if path.is_file()}
USE = """if True:
    import torch, torch_bn
    torch_bn.BatchNorm2d(3)(torch.randn(4, 3, 5, 5)).sum().backward()
    print(torch_bn.build_info()["extension"], torch_bn.__file__)
"""


def python(*arguments: object, cwd: Path, **variables: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a fresh clone has of the package, for builds that leave their traces there."""
    folder = tmp_path_factory.mktemp("checkout")
    built = shutil.ignore_patterns("*.so", "_built_for.txt", "__pycache__")
    for name in ("csrc", "torch_bn"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(CHECKOUT / name, folder)
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Variables with which building takes no time: "compiling" gives the library that the checkout has already."""
    library = torch_bn.build_info()["path"]
    assert library, "the packaging tests need the built extension: make build"
    folder = tmp_path_factory.mktemp("stand_in")
    return {"CXX": compiler(folder, Path(library)), "TORCH_EXTENSIONS_DIR": folder / "cache"}


@pytest.fixture(scope="module")
def wheel(checkout: Path, stand_in: dict[str, Path]) -> Path:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist")
    built = python("-m", "pip", "wheel", *options, ".", cwd=checkout, **stand_in)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (checkout / "dist").glob("*.whl")
    return path


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    """A folder that the wheel is installed into."""
    options = ("--no-deps", "--no-index", "--target", "site")
    installed = python("-m", "pip", "install", *options, wheel, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    return tmp_path / "site"


def test_the_sdist_has_all_that_a_build_needs(checkout: Path, tmp_path: Path) -> None:
    built = python("setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=checkout)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"csrc/{file}" for file in CSRC_FILES} <= names
    assert {"setup.py", "torch_bn/_build.py", "torch_bn/py.typed", "LICENSE", "CHANGELOG.md"} <= names


def test_the_wheel_has_the_binary_the_sources_and_the_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = email.message_from_bytes(archive.read(metadata))
        assert archive.read("torch_bn/_built_for.txt").decode() == torch.__version__
    assert {f"torch_bn/csrc/{file}" for file in CSRC_FILES} <= names
    assert "torch_bn/py.typed" in names
    assert [name for name in names if name.startswith("torch_bn/_C.") and name.endswith(".so")]
    assert facts["Version"] == torch_bn.__version__
    assert facts["License-Expression"] == "BSD-3-Clause"
    assert facts["Requires-Dist"] == "torch>=2.11"


def test_an_installed_wheel_works_from_elsewhere(site: Path, tmp_path: Path) -> None:
    finished = python("-c", USE, cwd=tmp_path, PYTHONPATH=site)
    assert finished.stdout == f"built {site}/torch_bn/__init__.py\n", finished.stderr
    assert finished.stderr == ""


def test_the_module_prints_what_runs(site: Path, tmp_path: Path) -> None:
    printed = python("-m", "torch_bn", cwd=tmp_path, PYTHONPATH=site).stdout
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert facts["version"] == torch_bn.__version__
    assert facts["torch"] == torch.__version__
    assert facts["extension"] == "built"
    assert Path(facts["path"]).parent == site / "torch_bn"
    assert facts["cpu_table"] in facts["cpu_tables"]


def test_a_binary_for_another_torch_is_left_alone_and_replaced_on_demand(
    site: Path, tmp_path: Path, stand_in: dict[str, Path]
) -> None:
    (site / "torch_bn" / "_built_for.txt").write_text("2.11.0+cu128")
    code = USE + "torch_bn.load()\n" + USE
    finished = python("-c", code, cwd=tmp_path, PYTHONPATH=site, **stand_in)
    here = f"{site}/torch_bn/__init__.py"
    assert finished.stdout == f"None {here}\ncompiled on demand {here}\n", finished.stderr
    assert finished.stderr == (
        "torch_bn runs on plain torch operations: its kernels were built for torch 2.11.0+cu128, and torch "
        f"{torch.__version__} is installed; torch_bn.load() compiles them in two minutes.\n"
    )


def test_a_binary_that_does_not_load_is_no_error(site: Path, tmp_path: Path) -> None:
    (binary,) = (site / "torch_bn").glob("_C.*.so")
    binary.write_bytes(b"not a library")
    finished = python("-c", USE, cwd=tmp_path, PYTHONPATH=site)
    assert finished.stdout.startswith("None "), finished.stderr
    assert finished.stderr.startswith("torch_bn runs on plain torch operations: its kernels do not load (")
    assert len(finished.stderr.splitlines()) == 1


def test_an_installed_package_compiles_the_sources_it_brought(
    site: Path, tmp_path: Path, stand_in: dict[str, Path]
) -> None:
    (binary,) = (site / "torch_bn").glob("_C.*.so")
    binary.unlink()
    code = USE + "torch_bn.load()\n" + USE + "print(torch_bn._operators._compile._build.CSRC)"
    finished = python("-c", code, cwd=tmp_path, PYTHONPATH=site, **stand_in)
    first, second, csrc = finished.stdout.splitlines()
    assert (first[:4], second[:18], csrc) == ("None", "compiled on demand", str(site / "torch_bn" / "csrc"))


def test_a_build_without_torch_says_what_to_do(checkout: Path) -> None:
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    finished = python("-c", code, cwd=checkout)
    assert finished.returncode == 1
    assert finished.stderr == (
        "torch_bn needs torch to build: install torch first, then `pip install --no-build-isolation torch_bn`.\n"
    )
