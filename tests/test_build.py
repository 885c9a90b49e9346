"""The architecture is a test: include and import arrows, one list of flags, no symbol that two ISAs share."""

import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from architecture import forbidden_imports, forbidden_in_csrc, weak_symbols

import torch_bn
from torch_bn import _build, _compile

PACKAGE = Path(_build.__file__).parent
ISA_FILES = [path for path in sorted(_build.CSRC.glob("cpu/*.cpp")) if ".inl" in path.read_text()]
COMPILER = os.environ.get("CXX", "c++")


def compile_object(source: Path, target: Path, *flags: str) -> Path:
    subprocess.run([COMPILER, *_build.CXX_FLAGS, *flags, "-fPIC", "-c", source, "-o", target], check=True)
    return target


def test_csrc_keeps_to_the_arrows() -> None:
    assert forbidden_in_csrc(_build.CSRC) == []


def test_the_package_keeps_to_the_arrows() -> None:
    assert forbidden_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "finding"),
    [
        ("kernels.h", "#include <vector>", "may not include <vector>"),
        ("math/affine.h", "#include <cmath>", "may not include <cmath>"),
        ("math/affine.h", '#include "../kernels.h"', "may not include kernels.h"),
        ("cpu/avx2.cpp", "#include <ATen/Parallel.h>", "may not include <ATen/Parallel.h>"),
        ("cpu/avx2.cpp", '#include "../torch/checks.h"', "may not include torch/checks.h"),
        ("cpu/avx2.cpp", '#include "../cuda/device.cuh"', "may not include cuda/device.cuh"),
        ("cuda/forward.cu", "#include <ATen/core/Tensor.h>", "may not include <ATen/core/Tensor.h>"),
        ("cuda/plan.h", '#include "../cpu/target.h"', "may not include cpu/target.h"),
        ("cuda/forward.cu", "int* scratch = new int[8];", "may not use new"),
        ("torch/cuda/backend.cpp", '#include "../../cuda/plan.h"', "may not include cuda/plan.h"),
        ("cpu/select.cpp", "#include <thread>", "may not include <thread>"),
        ("cpu/loops.inl", "float* scratch = (float*)malloc(8);", "may not use malloc"),
        ("cpu/loops.inl", "float* scratch = new float[8];", "may not use new"),
        ("cpu/loops.inl", "std::vector<float> scratch;", "may not use std::vector"),
        ("cpu/loops.inl", '#include "target.h"', "may include nothing, not even cpu/target.h"),
        ("cpu/avx2.cpp", 'BN_TARGET_BEGIN("avx2")\n#include "target.h"', "cpu/target.h would be compiled for"),
        ("torch/ops.cpp", "#include <torch/extension.h>", "may not include <torch/extension.h>"),
        ("torch/ops.cpp", "#include <torch/all.h>", "may not include <torch/all.h>"),
        ("torch/ops.cpp", "# include <ATen/ATen.h>", "may not include <ATen/ATen.h>"),
        ("torch/ops.cpp", '#include "../math/affine.h"', "may not include math/affine.h"),
    ],
)
def test_a_forbidden_line_in_csrc_is_found(tmp_path: Path, file: str, line: str, finding: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"// malloc, new and #include <torch/all.h> in a comment harm nobody\n{line}\n")
    findings = forbidden_in_csrc(tmp_path)
    assert len(findings) == 1 and findings[0].startswith(f"{file}: ") and finding in findings[0], findings


@pytest.mark.parametrize(
    ("module", "line", "finding"),
    [
        ("reference", "from . import functional", "may not import functional"),
        ("reference", "from .functional import batch_norm", "may not import functional"),
        ("functional", "def f():\n    from .modules import BatchNorm1d", "may not import modules"),
        ("modules", "import numpy as np", "may not import numpy"),
        ("_build", "import torch.utils", "may not import torch"),
        ("unheard_of", "", "say in tests/architecture.py what it may import"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, line: str, finding: str) -> None:
    (tmp_path / f"{module}.py").write_text(f"import os\n{line}\n")
    assert forbidden_imports(tmp_path) == [f"{module}: {finding}"]


@pytest.mark.parametrize("source", ISA_FILES, ids=lambda path: path.stem)
def test_each_instruction_set_keeps_to_itself(tmp_path: Path, source: Path) -> None:
    for optimization in ("-O0", "-O3"):
        compiled = compile_object(source, tmp_path / "object.o", optimization)
        assert weak_symbols(compiled) == [], optimization
    if platform.machine() == "x86_64":
        assembly = subprocess.run(["objdump", "-d", compiled], check=True, capture_output=True, text=True).stdout
        widest = max(register for register in ("xmm", "ymm", "zmm") if f"%{register}" in assembly)
        assert widest == {"avx2": "ymm", "avx512": "zmm"}.get(source.stem, "xmm")


def test_a_symbol_shared_between_instruction_sets_is_found(tmp_path: Path) -> None:
    source = tmp_path / "shared.cpp"
    source.write_text("inline int shared(int x) { return x + 1; }\nint (*use)(int) = shared;\n")
    assert weak_symbols(compile_object(source, tmp_path / "object.o")) == ["shared(int)"]


def test_one_list_of_flags_serves_every_file() -> None:
    assert not [flag for flag in _build.CXX_FLAGS if flag.startswith(("-m", "-ffast-math", "-Ofast"))]
    assert "-fopenmp" in _build.CXX_FLAGS, "at::parallel_for is silently serial without it"


def test_every_source_is_listed_under_a_name_of_its_own() -> None:
    listed = [Path(path) for path in _build.sources(with_cuda=True)]
    assert sorted(listed) == sorted([*_build.CSRC.rglob("*.cpp"), *_build.CSRC.rglob("*.cu")])
    without = {Path(path) for path in _build.sources(with_cuda=False)}
    assert {path.parent.name for path in set(listed) - without} == {"cuda"}
    stems = [path.stem for path in listed]
    assert len(set(stems)) == len(stems), "objects compiled on demand lie in one folder, named by the file alone"


def toolkit(folder: Path, release: str) -> Path:
    """Something that looks like a CUDA toolkit."""
    for name in ("bin", "include"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return folder


def test_the_toolkit_is_what_the_environment_names_or_where_nvcc_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, found = toolkit(tmp_path / "named", "13.0"), toolkit(tmp_path / "found", "13.0")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{found / 'bin'}:{os.environ['PATH']}")
    assert _build.cuda_home() == found
    monkeypatch.setenv("CUDA_PATH", str(named))
    assert _build.cuda_home() == named
    monkeypatch.setenv("CUDA_HOME", str(found))
    assert _build.cuda_home() == found
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.cuda_home() is None


def test_why_the_cuda_kernels_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.cuda_obstacle(None) == "torch was built without CUDA"
    assert _build.cuda_obstacle("13.0") == "there is no nvcc; CUDA_HOME must name a CUDA toolkit"
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "old", "12.8")))
    assert _build.cuda_obstacle("13.0") == "nvcc is of CUDA 12, and torch of CUDA 13.0"
    assert _build.cuda_obstacle("12.6") is None


def test_without_cuda_the_build_says_why() -> None:
    facts = torch_bn.build_info()
    assert (facts["cuda"] is None) == bool(facts["cuda_reason"]) == (not torch_bn._operators.has_cuda)
    if torch.version.cuda is None:
        assert facts["cuda_reason"] == "torch was built without CUDA"


@pytest.mark.parametrize(
    ("named", "devices", "expected"),
    [("8.6", [(9, 0)], "8.6"), ("", [(9, 0), (7, 5), (9, 0)], "7.5;9.0"), ("", [], _build.CUDA_ARCHITECTURES)],
)
def test_architectures_are_those_named_or_seen_or_many(
    named: str, devices: list[tuple[int, int]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: devices[device])
    assert _compile._architectures() == expected
