"""Tests that need CUDA's compiler and headers, but no GPU."""

import os

import pytest

from torch_bn import _build

needs_nvcc = pytest.mark.skipif(
    _build.cuda_home() is None and os.environ.get("TORCH_BN_REQUIRE_NVCC") != "1",
    reason="there is no nvcc; CUDA_HOME must name a CUDA toolkit",
)
"""Skips where there is no nvcc; where TORCH_BN_REQUIRE_NVCC=1 promises one, the tests run, and fail without it."""
