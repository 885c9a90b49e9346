"""Who may know whom, as data, and the functions that list what breaks it. test_build.py holds the project to it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Regular expressions of what a file of each folder of csrc may include: a path from csrc, or a header in <>.
MAY_INCLUDE = {
    ".": r"<cstdint>",
    "math": r"math/\w+\.h|<math\.h>",
    "cpu": r"kernels\.h|math/\w+\.h|cpu/\w+\.(h|inl)|<(atomic|cstdint|cstdlib|cstring|utility)>",
    "cuda": r"kernels\.h|math/\w+\.h|cuda/\w+\.(cuh|h)|<cuda\w*\.h>",
    "torch": r"kernels\.h|torch/\w+\.h|<[a-z_]+>|<(torch|ATen|c10)/.+>|<Python\.h>",
    "torch/cuda": r"kernels\.h|cuda/launch\.h|torch/(cuda/)?\w+\.h|<[a-z_]+>|<(torch|ATen|c10)/.+>",
}
# Headers that include the whole of torch: each costs every file that sees it half a minute and a gigabyte.
WHOLE_TORCH = r"<torch/(extension|all|torch|script|types|autograd|csrc/api/.*)\.h>|<ATen/(ATen|Functions)\.h>"
# Kernels get their memory and their threads from the caller, and leave checks to it.
NOT_IN_KERNELS = r"\b(malloc|calloc|realloc|alloca|new|throw|printf|std::(vector|string|thread)|omp_\w+|pthread_\w+)\b"
KERNEL_FOLDERS = ("math", "cpu", "cuda")

# What each module of the package may import from the package. All may import torch and the standard library.
MAY_IMPORT = {
    "__init__": {
        *("_operators", "constraints", "functional", "fusion", "layers", "modules", "regularizers", "schedules"),
        *("surgery", "updates"),
    },
    "__main__": {"build_info"},
    "_build": set(),
    "_checks": set(),
    "_compile": {"_build"},
    "_operators": {"_build", "_compile", "_C", "_fake", "__version__"},
    "_fake": {"_checks"},
    "_shapes": set(),
    "_inplace": set(),
    "_store": {"_checks", "layers", "regularizers", "updates"},
    "constraints": set(),
    "reference": {"_checks"},
    "regularizers": set(),
    "schedules": set(),
    "updates": {"_checks"},
    "functional": {"_checks", "_inplace", "_operators", "_shapes", "reference", "schedules", "updates"},
    "modules": {"_checks", "_shapes", "functional", "schedules"},
    "layers": {"_checks", "_shapes", "_store", "functional", "modules", "regularizers", "schedules"},
    "surgery": {"modules"},
    "fusion": {"_checks", "surgery"},
}
WITHOUT_TORCH = {"_build"}


def forbidden_in_csrc(csrc: Path) -> list[str]:
    """Every include that breaks an arrow, and every word that a kernel must do without, as `file: what`."""
    return sorted(
        f"{path.relative_to(csrc)}: {finding}"
        for path in csrc.rglob("*")
        if path.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh")
        for finding in _findings(csrc, path)
    )


def _findings(csrc: Path, path: Path) -> Iterator[str]:
    folder = path.parent.relative_to(csrc).as_posix()
    code = re.sub(r"//.*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL if "/*" in path.read_text() else 0)
    region = code.find("BN_TARGET_BEGIN(")
    for include in re.finditer(r'#\s*include\s*(<[^>]+>|"[^"]+")', code):
        header = include[1]
        if header.startswith('"'):
            header = (path.parent / header.strip('"')).resolve().relative_to(csrc.resolve()).as_posix()
        if not re.fullmatch(MAY_INCLUDE[folder], header) or re.fullmatch(WHOLE_TORCH, header):
            yield f"may not include {header}"
        if path.suffix == ".inl":
            yield f"an .inl file stands in a target region and may include nothing, not even {header}"
        if 0 <= region < include.start() and not header.endswith(".inl"):
            yield f"{header} would be compiled for the instruction set of the region it stands in"
    if folder in KERNEL_FOLDERS:
        yield from (f"may not use {word[0]}" for word in re.finditer(NOT_IN_KERNELS, code))


def forbidden_imports(package: Path) -> list[str]:
    """Every import of the package that breaks an arrow, as `module: what`; a module without a rule is one, too."""
    findings = []
    for path in sorted(package.glob("*.py")):
        if path.stem not in MAY_IMPORT:
            findings.append(f"{path.stem}: say in tests/architecture.py what it may import")
            continue
        inside, outside = _imports(ast.parse(path.read_text()))
        allowed_outside = sys.stdlib_module_names | (set() if path.stem in WITHOUT_TORCH else {"torch"})
        findings += [f"{path.stem}: may not import {name}" for name in sorted(inside - MAY_IMPORT[path.stem])]
        findings += [f"{path.stem}: may not import {name}" for name in sorted(outside - allowed_outside)]
    return findings


def _imports(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The names imported from the package itself, and the packages imported from elsewhere."""
    inside: set[str] = set()
    outside: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            inside |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return inside, outside


def weak_symbols(object_file: Path) -> list[str]:
    """Symbols of which the linker keeps one copy for all files, built for whichever instruction set came first."""
    lines = subprocess.run(["nm", "-C", object_file], check=True, capture_output=True, text=True).stdout.splitlines()
    symbols = [match[1] for line in lines if (match := re.match(r"[0-9a-f]+ [WVu] (.+)", line))]
    # Not code but a pointer, the same in every file: to the function that unwinds the stack.
    return [symbol for symbol in symbols if symbol != "DW.ref.__gxx_personality_v0"]
