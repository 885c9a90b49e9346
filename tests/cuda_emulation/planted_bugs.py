"""Plants one bug at a time into a copy of the kernels and says what, if anything, notices it: the test of the tests.

    python tests/cuda_emulation/planted_bugs.py [words of the name]
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cuda_emulation.programs import MODES, Mode, execute, host_units, kernel_units, link
from native import compile_all

from torch_bn import _build

SEEDS = {"memory": "2", "races": "1"}


class Bug(NamedTuple):
    name: str
    file: str  # of csrc
    text: str  # which must stand there once,
    replacement: str

    def fits(self, csrc: Path) -> bool:
        return (csrc / self.file).read_text().count(self.text) == 1

    def plant(self, csrc: Path) -> None:
        path = csrc / self.file
        path.write_text(path.read_text().replace(self.text, self.replacement))


BUGS = [
    Bug(
        "reduce: no barrier before the warps' results are joined",
        "cuda/reduce.cuh",
        "= own[i];\n  __syncthreads();",
        "= own[i];",
    ),
    Bug("reduce: a warp is left out", "cuda/reduce.cuh", "i < warps; ++i)", "i < warps - 1; ++i)"),
    Bug("reduce: half a warp exchanges", "cuda/reduce.cuh", "{__shfl_xor_sync(~0u,", "{__shfl_xor_sync(0xffffu,"),
    Bug(
        "reduce: an exchange is left out",
        "cuda/reduce.cuh",
        "flip = K::kPlanes ? 1 : plan.columns; flip < kWarp",
        "flip = K::kPlanes ? 2 : plan.columns; flip < kWarp",
    ),
    Bug(
        "reduce: shared memory for half a tile",
        "cuda/reduce.cuh",
        "[K::kPlanes ? 1 : kMaxWidth]",
        "[K::kPlanes ? 1 : kMaxWidth / 2]",
    ),
    Bug(
        "reduce: no barrier before the ticket",
        "cuda/reduce.cuh",
        "= found;\n  __syncthreads();",
        "= found;",
    ),
    Bug("reduce: no fence before the ticket", "cuda/reduce.cuh", "    __threadfence();\n    last", "    last"),
    Bug("reduce: no fence after the ticket", "cuda/reduce.cuh", "== others;\n    __threadfence();", "== others;"),
    Bug("reduce: no barrier after the ticket", "cuda/reduce.cuh", "  __syncthreads();\n  return last;", "return last;"),
    Bug(
        "reduce: half the threads do not wait for the ticket",
        "cuda/reduce.cuh",
        "  __syncthreads();\n  return last;",
        "  if (threadIdx.x < kThreads / 2) __syncthreads();\n  return last;",
    ),
    Bug(
        "reduce: the ticket stays",
        "cuda/reduce.cuh",
        "atomicInc(tickets + part.tile, others)",
        "atomicAdd(tickets + part.tile, 1u)",
    ),
    Bug("reduce: one ticket for all tiles", "cuda/reduce.cuh", "tickets + part.tile", "tickets"),
    Bug(
        "reduce: the last split counts like the others",
        "cuda/reduce.cuh",
        "plan.units(group, split + i * lanes) * K::kSamples",
        "plan.units(group, 0) * K::kSamples",
    ),
    Bug(
        "reduce: channels past the end",
        "cuda/reduce.cuh",
        "item < items && channel < plan.channels",
        "item < items",
    ),
    Bug("walk: channels past the end", "cuda/walk.cuh", "end = channel < plan.channels ?", "end = channel >= 0 ?"),
    Bug("walk: a unit past the end", "cuda/walk.cuh", "return unit < end;", "return unit <= end;"),
    Bug("walk: planes have one unit more", "cuda/walk.cuh", "carry = i >= plan.inner;", "carry = i > plan.inner;"),
    Bug("walk: other groups are not skipped", "cuda/walk.cuh", "outer += plan.skip;", "outer += 0;"),
    Bug(
        "walk: groups are neighbours",
        "cuda/walk.cuh",
        "(example * plan.groups + group) * plan.period",
        "(example + group * plan.examples) * plan.period",
    ),
    Bug(
        "walk: the map leaves its rest",
        "cuda/walk.cuh",
        "for (; walk.inside(); walk.advance()) {",
        "for (; walk.has(2); walk.advance()) {",
    ),
    Bug("walk: a batch counts one too many", "cuda/walk.cuh", "read = At::kUnroll;", "read = At::kUnroll + 1;"),
    Bug("walk: the last batch counts one too many", "cuda/walk.cuh", "read = 0;", "read = 1;"),
    Bug("walk: the last batch is left out", "cuda/walk.cuh", "inside() && units < most", "has(2) && units < most"),
    Bug("plan: every group is a large one", "cuda/plan.h", "(group < surplus)", "(group <= surplus)"),
    Bug(
        "plan: vectors wherever a tensor begins",
        "cuda/plan.h",
        "reinterpret_cast<uintptr_t>(o.data) % unsigned(bytes) == 0",
        "o.data",
    ),
    Bug("plan: vectors whatever the outer stride", "cuda/plan.h", "o.strides.outer % n == 0", "true"),
    Bug("plan: vectors whatever the channel stride", "cuda/plan.h", "o.strides.channel % n == 0", "true"),
    Bug("plan: vectors whatever the size", "cuda/plan.h", "(planes ? e.inner : e.channels) % n == 0", "true"),
    Bug("plan: a small workspace", "cuda/plan.h", "kMaxWidth * kMostRounds * int64_t(blocks)", "int64_t(blocks)"),
    Bug("forward: huge values overflow", "cuda/forward.cu", "is_finite(chains[c].squares)", "true"),
    Bug(
        "forward: no barrier before the groups are joined",
        "cuda/forward.cu",
        "weights[kMaxWidth];\n  __syncthreads();\n",
        "weights[kMaxWidth];\n",
    ),
    Bug(
        "forward: no barrier after the weights",
        "cuda/forward.cu",
        "variance / double(plan.groups));\n  }\n  __syncthreads();",
        "variance / double(plan.groups));\n  }",
    ),
    Bug(
        "forward: no barrier before the pivots are read",
        "cuda/forward.cu",
        "= own.mean[c];\n  __syncthreads();",
        "= own.mean[c];",
    ),
    Bug("forward: a split without samples", "cuda/forward.cu", "if (count == 0) return {};", ""),
    Bug("forward: the pivot of another channel", "cuda/forward.cu", "({pivots[thread], 0})", "({pivots[0], 0})"),
    Bug(
        "forward: the batch counts once per block",
        "cuda/forward.cu",
        "blockIdx.x == 0 && threadIdx.x == 0 &&",
        "threadIdx.x == 0 &&",
    ),
    Bug("forward: the batch counts though it is kept", "cuda/forward.cu", " && !p.statistics)", ")"),
    Bug(
        "forward: Bessel's correction with renorm",
        "cuda/forward.cu",
        "p.unbiased && !p.running.renorm.mean",
        "p.unbiased",
    ),
    Bug("forward: residual wherever it begins", "cuda/forward.cu", "{p.residual, p.residual_strides}, ", ""),
    Bug(
        "backward: no barrier after the forward's coefficients",
        "cuda/backward.cu",
        "weights.beta);\n  }\n  __syncthreads();",
        "weights.beta);\n  }",
    ),
    Bug(
        "backward: no barrier before the groups are joined",
        "cuda/backward.cu",
        "return;\n  __syncthreads();\n",
        "return;\n",
    ),
    Bug(
        "backward: centers that nobody has set",
        "cuda/backward.cu",
        "for_each(p, gradients, forwarded,",
        "for_each(p, forwarded, forwarded,",
    ),
    Bug(
        "backward: the gradients of one group",
        "cuda/backward.cu",
        "group < plan.groups; ++group) {\n    const double2",
        "group < 1; ++group) {\n    const double2",
    ),
    Bug("backward: dx wherever it begins", "cuda/backward.cu", "{p.dx, p.dx_strides},", ""),
    Bug("backward: dx though it is not asked for", "cuda/backward.cu", "if (p.dx) walk.store", "walk.store"),
    Bug(
        "backward: residual forgotten in z",
        "cuda/backward.cu",
        "if (p.residual) z +=",
        "if (p.residual && false) z +=",
    ),
    Bug("activation: NaN ends in relu", "math/activation.h", "return z < V{} ? V{} : z;", "return z > V{} ? z : V{};"),
    Bug(
        "activation: the gradient ends at NaN",
        "math/activation.h",
        "return z <= V{} ? V{} : dy;",
        "return z > V{} ? dy : V{};",
    ),
    Bug(
        "activation: its number ends in the forward",
        "cuda/activations.cuh",
        "T(p.activation_number), z);",
        "T(0), z);",
    ),
    Bug(
        "activation: its number ends in the backward",
        "cuda/activations.cuh",
        "T(p.activation_number), z, dy);",
        "T(0), z, dy);",
    ),
    Bug(
        "activation: the gradient of elu is that of its value",
        "math/activation.h",
        "dy * number * M::exp(",
        "dy * number * M::expm1(",
    ),
    Bug(
        "inference: no barrier after the coefficients",
        "cuda/inference.cu",
        "  __syncthreads();\n",
        "",
    ),
    Bug(
        "inference: threads leave before the barrier",
        "cuda/inference.cu",
        "  __syncthreads();\n",
        "  if (channel >= plan.channels) return;\n  __syncthreads();\n",
    ),
    Bug("update: the counter changes too early", "cuda/update.cu", "  __syncthreads();", "  ;"),
    Bug("update: the counter counts twice", "cuda/update.cu", "threadIdx.x == 0)", "threadIdx.x <= 1)"),
    Bug("update: channels beyond a block are left", "cuda/update.cu", "channel += kThreads", "channel += 1 << 20"),
]


def named(name: str) -> Bug:
    return next(bug for bug in BUGS if bug.name == name)


def _summary(output: str) -> str:
    """What noticed the bug, in the words of the first that did."""
    patterns = (r"cuda emulation.*?: ([a-z].*)", r"runtime error: (.*)", r"(\w+Sanitizer: [\w -]+)", r"(FAILED .*)")
    found = [match for pattern in patterns if (match := re.search(pattern, output))]
    return min(found, key=re.Match.start)[1] if found else output[-200:] or "ended without a word"


def _run(program: Path, mode: Mode) -> str:
    try:
        finished = execute(program, "quick", SEEDS[mode.name], timeout=120)
    except subprocess.TimeoutExpired:
        return "did not end"
    return _summary(finished.stdout + finished.stderr) if finished.returncode else ""


def notice(bug: Bug, objects: Path, folder: Path) -> dict[str, str]:
    """By mode what was noticed of a bug, or nothing. `objects` holds all objects without it."""
    csrc = folder / "csrc"
    shutil.copytree(_build.CSRC, csrc)
    bug.plant(csrc)
    changed = {Path(bug.file).stem} if bug.file.endswith(".cu") else None
    units = {mode.name: kernel_units(mode, csrc, folder, changed) for mode in MODES.values()}
    compile_all([unit for of_mode in units.values() for unit in of_mode])
    found = {}
    for mode in MODES.values():
        new = {unit.target.name: unit.target for unit in units[mode.name]}
        old = {path.name: path for path in objects.glob(f"*-{mode.name}.o")}
        found[mode.name] = _run(link(mode, list({**old, **new}.values()), folder / f"planted-{mode.name}"), mode)
    return found


def main(words: str) -> str:
    """How many bugs were missed or could not be planted, in words; nothing if none."""
    bugs = [bug for bug in BUGS if words in bug.name]
    missed = [bug.name for bug in bugs if not bug.fits(_build.CSRC)]
    with tempfile.TemporaryDirectory() as folder:
        objects = Path(folder)
        modes = MODES.values()
        compile_all([unit for mode in modes for unit in kernel_units(mode, _build.CSRC, objects)])
        compile_all([unit for mode in modes for unit in host_units(mode, objects)])
        for bug in bugs:
            if bug.name in missed:
                print(f"{bug.name}\n    its text does not stand once in {bug.file}")
                continue
            with tempfile.TemporaryDirectory() as own:
                found = notice(bug, objects, Path(own))
            if not any(found.values()):
                missed.append(bug.name)
            print(bug.name, *(f"    {mode:7} {what or '-'}" for mode, what in found.items()), sep="\n", flush=True)
    return f"{len(missed)} of {len(bugs)} not noticed: " + "; ".join(missed) if missed else ""


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])) or 0)
