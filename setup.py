"""Builds torch_bn._C from the list in torch_bn/_build.py; everything else about the package is in pyproject.toml.

torch is deliberately no build dependency: an extension fits only the torch it was compiled against, and an isolated
build would compile against another copy, of whatever version pip likes, than the one that you run.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("torch_bn needs torch to build: install torch first, then `pip install --no-build-isolation torch_bn`.")

build = runpy.run_path("torch_bn/_build.py")
os.environ.setdefault("MAX_JOBS", str(build["MAX_JOBS"]))
sources = [os.path.relpath(path) for path in build["sources"]()]
headers = [os.path.relpath(path) for path in build["CSRC"].rglob("*.*")]
extension = CppExtension("torch_bn._C", sources, depends=headers, extra_compile_args={"cxx": build["CXX_FLAGS"]})


class Build(BuildExtension):
    """Leaves a note beside the extension of the torch that it fits."""

    def run(self) -> None:
        note = Path(self.get_ext_fullpath(extension.name)).with_name("_built_for.txt")
        self.force = self.force or not note.is_file() or note.read_text() != torch.__version__
        super().run()
        note.write_text(torch.__version__)


setup(ext_modules=[] if sys.platform == "win32" else [extension], cmdclass={"build_ext": Build})
