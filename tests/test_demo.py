"""The demo's clocks, table and verdict."""

import re
import time
from pathlib import Path

import demo
import network
import norm_time
import options
import pytest
import torch
from example_setup import QUICK
from torch import nn

import torch_bn


def test_norm_seconds_clocks_forward_and_backward_of_each_layer():
    model = network.ResidualNetwork(channels=1, classes=10, width=4)
    x = torch.randn(5, 1, 9, 9)
    with norm_time.norm_seconds(model) as spent:
        started = time.perf_counter()
        model(x).sum().backward()
        elapsed = time.perf_counter() - started
    assert 0 < spent.forward < elapsed and 0 < spent.backward < elapsed - spent.forward
    before = (spent.forward, spent.backward)
    model(x).sum().backward()
    assert (spent.forward, spent.backward) == before, "the hooks are gone after the block"


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context, x, seconds):
        context.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(2 * context.seconds)
        return gradient.clone(), None


class SlowNorm(nn.BatchNorm2d):
    def forward(self, x):
        return Sleep.apply(x, 0.02)


class SlowOther(nn.Module):
    def forward(self, x):
        return Sleep.apply(x, 0.4)


def test_norm_seconds_clocks_slow_norms_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), SlowNorm(2), nn.ReLU(inplace=True), SlowOther(), SlowNorm(2))
    with norm_time.norm_seconds(model) as spent:
        model(torch.randn(3, 1, 4, 4)).sum().backward()
    assert 2 * 0.02 <= spent.forward < 0.4
    assert 2 * 0.04 <= spent.backward < 0.8


def test_norm_seconds_refuses_layers_of_plain_operations():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), torch_bn.BatchNorm2d(2, fused=False))
    with pytest.raises(RuntimeError, match="is a chain of operations"), norm_time.norm_seconds(model):
        model(torch.randn(3, 1, 4, 4))


@pytest.fixture
def short_demo(tmp_path, monkeypatch) -> Path:
    """The demo with a training of seconds, in a folder of its own."""
    parse = options.parse
    monkeypatch.setattr(options, "parse", lambda text, arguments: parse(text, [*arguments, *QUICK]))
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "CLOCKED_EPOCHS", 1)
    return tmp_path


@pytest.mark.kernels
@pytest.mark.on_cpu
def test_demo_prints_its_table_and_judges_the_accuracy(capsys, monkeypatch, short_demo):
    assert demo.main() == 1
    captured = capsys.readouterr()
    assert re.search(r"demo\.py: nn\.BatchNorm2d: accuracy must be at least 0\.97, got 0\.\d{4}\n$", captured.err)
    assert "torch_bn: torch_bn on compiled kernels" in captured.out
    for name in demo.NORMS:
        row = rf"^{re.escape(name)} +0\.\d{{4}} +\d+\.\d\d s +\d+ ms +\d+ ms +\d+ ms$"
        assert re.search(row, captured.out, re.MULTILINE)
    assert str(short_demo / "curves.png") in captured.out
    assert (short_demo / "curves.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(demo, "REQUIRED_ACCURACY", 0.05)
    assert demo.main() == 0


def test_demo_fails_without_compiled_kernels(capsys, monkeypatch, short_demo):
    def load(verbose: bool = False) -> None:
        raise RuntimeError("install ninja")

    monkeypatch.setattr(torch_bn, "load", load)
    assert demo.main() == 1
    assert capsys.readouterr().err == "demo.py: torch_bn has no compiled kernels here: install ninja\n"
