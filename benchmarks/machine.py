"""Where and on what a measurement was taken: the processor, its last-level cache, the version of the code."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch_bn

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
TYPICAL_CACHE = 32 << 20

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt, beyond what a case frees and allocates at once.
KEEP_MEMORY = ((-1, 1 << 30), (-3, 32 << 20))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def description() -> str:
    """The CPU's model and the number of cores, such as `AMD EPYC, 2 cores`."""
    found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.M) if CPUINFO.is_file() else None
    model = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{model}, {cores()} core{'s' * (cores() != 1)}"


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=TYPICAL_CACHE)


def cpu_results() -> Path:
    """The folder for what is measured here. Each instruction set has its own: they are different kernels, and faster
    than torch's to a different degree."""
    return REPOSITORY / RESULTS / (torch_bn.build_info()["cpu_table"] or "reference")


def load() -> float:
    """How many processes have competed for the cores in the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def keep_memory() -> None:
    """Makes glibc keep the memory that tensors leave behind. Otherwise it hands some of it back at random, and whoever
    allocates next pays for fetching it again page by page, which is as long as a batch norm. Elsewhere does nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in KEEP_MEMORY:
            libc.mallopt(parameter, value)


def commit() -> str:
    """The short name of the commit, with `-dirty` where the working tree differs from it; `unknown` outside git."""
    name = _git("rev-parse", "--short", "HEAD")
    # The results are left out: a run that rewrites them measures the same code.
    return name + "-dirty" * bool(_git("status", "--porcelain", "--", ".", f":!{RESULTS}")) if name else "unknown"


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
