"""The two ways to the same result, as values of `fused`, for pytest.mark.parametrize."""

import pytest

import torch_bn._operators

needs_kernels = pytest.mark.skipif(torch_bn._operators.batch_norm is None, reason="no compiled kernels")
KERNELS = pytest.param(True, id="kernels", marks=[pytest.mark.kernels, needs_kernels])
PATHS = [pytest.param(False, id="plain"), KERNELS]
