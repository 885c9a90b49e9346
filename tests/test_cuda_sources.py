"""Every CUDA source compiles for every architecture, without a warning and without a spilled register.

This needs nvcc and no GPU. What the kernels compute is tested in test_cuda_emulation.py, and on a GPU by all tests.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_toolkit import needs_nvcc

from torch_bn import _build

ARCHITECTURES = (75, 80, 90, 100)
KERNELS = sorted(_build.CSRC.glob("cuda/*.cu"))
BINDINGS = sorted(_build.CSRC.glob("torch/cuda/*.cpp"))
STRICT = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]

pytestmark = needs_nvcc


def ptxas_report(source: Path, target: Path, *flags: str) -> str:
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    nvcc = _build.cuda_home() / "bin" / "nvcc"
    command = [nvcc, *_build.NVCC_FLAGS, *STRICT, "-Xptxas", "-v", "--threads", "0", *targets, *flags]
    finished = subprocess.run([*command, "-c", source, "-o", target], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stderr


def spilling(report: str) -> list[str]:
    """The kernels that write registers to memory, as `function for architecture: bytes`."""
    entry = r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(entry, report, re.DOTALL)
    assert {architecture for _, architecture, _, _ in found} == {f"sm_{number}" for number in ARCHITECTURES}, report
    return [f"{function} for {where}: {stores}" for function, where, stores, loads in found if stores + loads != "00"]


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_for_every_architecture(source: Path, tmp_path: Path) -> None:
    assert spilling(ptxas_report(source, tmp_path / "kernels.o")) == []


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.stem)
def test_the_binding_compiles_against_a_torch_without_cuda(source: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    folders = [include, include / "torch/csrc/api/include", _build.cuda_home() / "include"]
    command = ["c++", *_build.CXX_FLAGS, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # a header that torch without CUDA does not have
    command += [word for folder in folders for word in ("-isystem", str(folder))]
    finished = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_there_is_something_to_compile() -> None:
    assert len(KERNELS) >= 4 and BINDINGS


def test_a_spill_and_a_warning_are_found(tmp_path: Path) -> None:
    source = tmp_path / "planted.cu"
    source.write_text("""
        __global__ void planted(const double* in, double* out) {
          double kept[64];
          for (int i = 0; i < 64; ++i) kept[i] = in[i * 32 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 64; ++i)
            for (int j = 0; j < 64; ++j) out[(i * 64 + j) * 32 + threadIdx.x] = kept[i] / kept[j];
        }
    """)
    assert spilling(ptxas_report(source, tmp_path / "planted.o", "-maxrregcount=32"))
    source.write_text("__global__ void planted(int* out) { int unused; out[0] = 1; }\n")
    with pytest.raises(AssertionError, match="was declared but never referenced"):
        ptxas_report(source, tmp_path / "planted.o")
