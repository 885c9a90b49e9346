"""What the extension is built from: setup.py reads this file ahead of time, torch_bn.load() on demand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = next(folder for folder in (HERE / "csrc", HERE.parent / "csrc") if folder.is_dir())

_APPLE = sys.platform == "darwin"
_CLANG = _APPLE or "clang" in os.path.basename(os.path.realpath(shutil.which(os.environ.get("CXX", "c++")) or ""))

CXX_FLAGS = [
    # -O3 takes far longer to compile, for unrolled remainders; the loops that count are the same.
    "-O2",
    *([] if _CLANG else ["-ftree-vectorize", "-fvect-cost-model=dynamic"]),
    # NB: not -ffast-math. These two change no value: nobody reads errno or the floating point flags.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-wrapv",  # Python's own flags may ask for signed integers that wrap, with which GCC makes slower loops
    # A loop's speed else depends on where it happens to lie among the others, by up to a tenth.
    "-falign-loops=64",
    "-ffp-contract=fast",  # one rounding in place of two where the machine has fused multiply-add
    "-std=c++20",
    # Without OpenMP at::parallel_for is silently serial. Apple's clang hides the flag behind -Xclang; omp.h and the
    # runtime come with torch. Nothing is linked: our calls must end in the one runtime that torch has loaded.
    *(["-Xclang", "-fopenmp"] if _APPLE else ["-fopenmp"]),
    "-Wno-psabi",  # vector types cross no library boundary here
    "-g0",  # Python's own flags may ask for debug symbols, which double the time to compile
    # clang drops a whole target attribute when it does not know one word of it: an "AVX-512" kernel of pure SSE2.
    *(["-Werror=ignored-attributes"] if _CLANG else []),
]

# A file with torch's headers takes up to 1.2 GB to compile.
_GIGABYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 4
MAX_JOBS = max(1, min(os.cpu_count() or 1, int(_GIGABYTES / 1.2)))


NVCC_FLAGS = ["-O2", "-std=c++20"]
# For TORCH_CUDA_ARCH_LIST where nobody has set it and torch sees no GPU to take it from: Turing, Ampere, Hopper, and
# code from which the driver compiles for all that came after.
CUDA_ARCHITECTURES = "7.5;8.0;9.0+PTX"


def cuda_home() -> Path | None:
    """The CUDA toolkit: what CUDA_HOME or CUDA_PATH names, or where nvcc lies; None without nvcc and its headers."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    usual = [Path(on_path).resolve().parents[1]] if on_path else []
    candidates = [Path(named)] if named else [*usual, Path("/usr/local/cuda")]
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    return next((home for home in candidates if all((home / file).is_file() for file in needed)), None)


def cuda_obstacle(torch_cuda: str | None) -> str | None:
    """Why the CUDA kernels cannot be built for a torch with that CUDA, in a few words; None when they can."""
    if torch_cuda is None:
        return "torch was built without CUDA"
    home = cuda_home()
    if home is None:
        return "there is no nvcc; CUDA_HOME must name a CUDA toolkit"
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release is None or release[1] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1] if release else 'unknown'}, and torch of CUDA {torch_cuda}"
    return None


def sources(with_cuda: bool) -> list[str]:
    """The translation units. No file needs a flag of its own: cpu/avx2.cpp sets its target itself.

    Those with torch's headers come first: they take longest, and no core should end with one of them alone.
    """
    patterns = [*(["torch/cuda/*.cpp", "cuda/*.cu"] if with_cuda else []), "torch/*.cpp", "cpu/*.cpp"]
    return [str(path) for pattern in patterns for path in sorted(CSRC.glob(pattern))]
