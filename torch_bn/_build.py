"""What the extension is built from: setup.py reads this file ahead of time, torch_bn.load() on demand. Data only."""

import os
import shutil
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


def sources(with_cuda: bool = False) -> list[str]:
    """The translation units. No file needs a flag of its own: cpu/avx2.cpp sets its target itself.

    Those with torch's headers come first: they take longest, and no core should end with one of them alone.
    """
    patterns = (["torch/cuda/*.cpp", "cuda/*.cu"] if with_cuda else []) + ["torch/*.cpp", "cpu/*.cpp"]
    return [str(path) for pattern in patterns for path in sorted(CSRC.glob(pattern))]
