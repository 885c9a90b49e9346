"""torch's layers and ours side by side, for the tests of the modules."""

import inspect

import pytest
import torch
from paths import PATHS
from torch import nn

import torch_bn

both_paths = pytest.mark.parametrize("fused", PATHS)
CASES = {
    "1d": (nn.BatchNorm1d, torch_bn.BatchNorm1d, (7, 5)),
    "1d, length": (nn.BatchNorm1d, torch_bn.BatchNorm1d, (4, 5, 3)),
    "2d": (nn.BatchNorm2d, torch_bn.BatchNorm2d, (3, 5, 2, 7)),
    "3d": (nn.BatchNorm3d, torch_bn.BatchNorm3d, (2, 5, 3, 2, 4)),
}
every_rank = pytest.mark.parametrize(("torchs", "ours", "shape"), CASES.values(), ids=CASES)
OURS = [torch_bn.BatchNorm1d, torch_bn.BatchNorm2d, torch_bn.BatchNorm3d]
has_bias_keyword = "bias" in inspect.signature(nn.BatchNorm2d).parameters  # torch 2.13 and newer


def pair(torchs, ours, fused=False, bias=True, **options):
    """torch's layer and ours with the same random state."""
    plain = torchs(5, **options)
    if not bias:
        plain.register_parameter("bias", None)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    layer = ours(5, **options, bias=bias, fused=fused)
    layer.load_state_dict(plain.state_dict(), strict=True)
    return plain, layer


def assert_same_state(layer, plain, **tolerance):
    state, expected = layer.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    torch.testing.assert_close(dict(state), dict(expected), **tolerance)
