"""`python -m torch_bn` prints what runs here: the first thing to put into a bug report."""

from . import build_info

for name, value in build_info().items():
    print(f"{name:12}{value}")
