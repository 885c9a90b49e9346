"""Builds torch_bn._C from the list in torch_bn/_build.py; everything else about the package is in pyproject.toml.

torch is deliberately no build dependency: an extension fits only the torch it was compiled against, and an isolated
build would compile against another copy, of whatever version pip likes, than the one that you run.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import setup

build = runpy.run_path("torch_bn/_build.py")
if home := build["cuda_home"]():
    os.environ["CUDA_HOME"] = str(home)  # which torch reads when it is imported
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit("torch_bn needs torch to build: install torch first, then `pip install --no-build-isolation torch_bn`.")

os.environ.setdefault("MAX_JOBS", str(build["MAX_JOBS"]))
obstacle = build["cuda_obstacle"](torch.version.cuda)
if obstacle is None and not torch.cuda.is_available():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build["CUDA_ARCHITECTURES"])
extension = (CppExtension if obstacle else CUDAExtension)(
    "torch_bn._C",
    [os.path.relpath(path) for path in build["sources"](with_cuda=obstacle is None)],
    depends=[os.path.relpath(path) for path in build["CSRC"].rglob("*.*")],
    extra_compile_args={"cxx": build["CXX_FLAGS"], "nvcc": build["NVCC_FLAGS"]},
)


class Build(BuildExtension):
    """Leaves a note beside the extension of the torch that it fits."""

    def run(self) -> None:
        note = Path(self.get_ext_fullpath(extension.name)).with_name("_built_for.txt")
        self.force = self.force or not note.is_file() or note.read_text() != torch.__version__
        super().run()
        note.write_text(torch.__version__)


setup(ext_modules=[] if sys.platform == "win32" else [extension], cmdclass={"build_ext": Build})
