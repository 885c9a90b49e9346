"""The values of renorm_clipping: three schedules, what may stand in the dict, and what holds at a step."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from torch_bn.schedules import check_clipping, clipping_at, crossq, linear, paper

SCHEDULES = {"paper": paper(), "crossq": crossq(), "linear": linear(10, 20, 2.7, 0.3)}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@pytest.mark.parametrize("scale", [1.0, 0.01, 3])
@pytest.mark.parametrize(
    ("step", "rmax", "dmax"),
    [
        (0, 1, 0),
        (4999, 1, 0),
        (5000, 1, 0),
        (15000, 1 + 2 * 10 / 35, 2.5),
        (25000, 1 + 2 * 20 / 35, 5),
        (32500, 1 + 2 * 27.5 / 35, 5),
        (40000, 3, 5),
        (10**9, 3, 5),
    ],
)
def test_paper(step, rmax, dmax, scale):
    bounds = clipping_at(paper(scale), round(step * scale) if scale >= 1 else step * scale)
    assert bounds == pytest.approx((1 / rmax, rmax, dmax), rel=1e-12)


def test_paper_is_exactly_batch_normalization_at_first_and_exactly_the_papers_bounds_at_last():
    assert clipping_at(paper(), 5000) == (1, 1, 0)
    assert clipping_at(paper(), 5001)[1] > 1 and clipping_at(paper(), 5001)[2] > 0
    assert clipping_at(paper(), 40000) == (1 / 3, 3, 5)


def test_crossq():
    for schedule, warmup in ((crossq(), 100_000), (crossq(7), 7), (crossq(0), 0)):
        assert clipping_at(schedule, warmup - 1) == (1, 1, 0)
        assert clipping_at(schedule, warmup) == clipping_at(schedule, 10 * warmup) == (1 / 3, 3, 5)


def test_linear():
    schedule = linear(10, 20, rmax=2.7, dmax=0.3)
    for step, share in ((0, 0), (10, 0), (13, 0.3), (20, 1), (10**12, 1)):
        rmax, dmax = 1 + 1.7 * share, 0.3 * share
        assert clipping_at(schedule, step) == pytest.approx((1 / rmax, rmax, dmax), rel=1e-12)
    assert clipping_at(schedule, 20) == (1 / 2.7, 2.7, 0.3)
    assert clipping_at(linear(0, 4), 4) == (1 / 3, 3, 5)
    assert clipping_at(linear(0, 4, 1, 0), 2) == (1, 1, 0)


@schedules
def test_rmax_and_dmax_never_fall_and_rmin_is_the_inverse(schedule):
    bounds = [clipping_at(schedule, step) for step in [*range(30), *range(30, 120_000, 997)]]
    for (_, r, d), (rmin, rmax, dmax) in zip(bounds, bounds[1:], strict=False):
        assert rmax >= r >= 1 and dmax >= d >= 0 and rmin == 1 / rmax


@schedules
def test_a_schedule_survives_copies_and_is_plain_to_read(schedule, tmp_path):
    check_clipping(schedule)
    layer = nn.Identity()
    layer.renorm_clipping = schedule
    torch.save(layer, tmp_path / "layer.pt")
    saved = torch.load(tmp_path / "layer.pt", weights_only=False).renorm_clipping
    for twin in (saved, copy.deepcopy(layer).renorm_clipping, pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule and clipping_at(twin, 15) == clipping_at(schedule, 15)
    assert set(schedule) == {"rmax", "rmin", "dmax"}
    assert "0x" not in repr(schedule)


def test_the_repr_of_a_schedule():
    assert repr(linear(10, 20)["rmax"]) == "_Ramp(first=1.0, last=3.0, start_step=10.0, end_step=20.0)"
    assert repr(crossq(7)["rmin"]) == "_Inverse(of=_Jump(first=1.0, last=3.0, at_step=7.0))"


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: paper(0), ValueError, "paper: scale must be > 0, got 0"),
        (lambda: paper(-1), ValueError, "paper: scale must be finite and >= 0, got -1"),
        (lambda: paper(INFINITE), ValueError, "paper: scale must be finite and >= 0, got inf"),
        (lambda: paper("1"), TypeError, "paper: scale must be a number, got '1'"),
        (lambda: crossq(-1), ValueError, "crossq: warmup_steps must be finite and >= 0, got -1"),
        (lambda: crossq(None), TypeError, "crossq: warmup_steps must be a number, got None"),
        (lambda: linear(-1, 5), ValueError, "linear: start_step must be finite and >= 0, got -1"),
        (lambda: linear(True, 5), TypeError, "linear: start_step must be a number, got True"),
        (lambda: linear(0, INFINITE), ValueError, "linear: end_step must be finite and >= 0, got inf"),
        (lambda: linear(0, [5]), TypeError, "linear: end_step must be a number, got [5]"),
        (lambda: linear(5, 5), ValueError, "linear: end_step must be > start_step, 5, got 5"),
        (lambda: linear(5, 4), ValueError, "linear: end_step must be > start_step, 5, got 4"),
        (lambda: linear(0, 5, 0.5), ValueError, "linear: rmax must be finite and >= 1, got 0.5"),
        (lambda: linear(0, 5, float("nan")), ValueError, "linear: rmax must be finite and >= 1, got nan"),
        (lambda: linear(0, 5, "3"), TypeError, "linear: rmax must be a number, got '3'"),
        (lambda: linear(0, 5, 3, -1), ValueError, "linear: dmax must be finite and >= 0, got -1"),
        (lambda: linear(0, 5, 3, {}), TypeError, "linear: dmax must be a number, got {}"),
    ],
)
def test_bad_arguments_of_a_schedule(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


def test_clipping_at_converts_every_kind_of_value(device):
    clipping = {
        "rmin": torch.tensor(0.5, device=device, requires_grad=True),
        "rmax": lambda step: torch.tensor([step], device=device),
        "dmax": 5,
    }
    bounds = clipping_at(clipping, 3)
    assert bounds == (0.5, 3, 5) and all(type(bound) is float for bound in bounds)
    assert clipping_at({"rmin": 0.25}, 0) == (0.25, None, None)
    assert clipping_at({"rmax": None, "dmax": lambda step: None if step < 2 else float("inf")}, 1) == (None,) * 3
    assert clipping_at({"dmax": lambda step: None if step < 2 else float("inf")}, 2) == (None, None, float("inf"))
    assert clipping_at({}, 0) == clipping_at(None, 0) == (None, None, None)


def test_numpy_scalars_are_numbers():
    clipping = {"rmin": np.float32(0.5), "rmax": lambda step: np.int64(step)}
    check_clipping(clipping)
    bounds = clipping_at(clipping, 3)
    assert bounds == (0.5, 3, None) and type(bounds[0]) is type(bounds[1]) is float


@pytest.mark.parametrize(
    ("value", "got"),
    [("3", "str"), (True, "bool"), (torch.ones(2), "a tensor of shape [2]"), ([3], "list")],
    ids=["str", "bool", "vector", "list"],
)
def test_a_value_or_result_of_another_kind(value, got):
    message = "renorm_clipping['rmax'] must be a number, a tensor of one element, or None, got " + got
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        clipping_at({"rmax": value}, 0)
    message = message.replace("]", "](7)", 1)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        clipping_at({"rmax": lambda step: value}, 7)
    message = "renorm_clipping['dmax'] must be a number, a tensor of one element, a function of the step, or None, got "
    with pytest.raises(TypeError, match=f"^{re.escape(message + got)}$"):
        check_clipping({"rmax": 3, "dmax": value})


def test_check_clipping_lets_through_what_a_layer_can_take():
    for good in (None, {}, {"rmax": 3}, {"rmin": 0.0, "rmax": torch.tensor([3.0]), "dmax": None}, {"dmax": float}):
        assert check_clipping(good) is None


def test_check_clipping_refuses_anything_but_a_dict():
    for bad, got in (([3], "list"), ("rmax", "str"), (3.0, "float")):
        message = f"^renorm_clipping must be a dict with keys among rmax, rmin, dmax, or None, got {got}$"
        with pytest.raises(TypeError, match=message):
            check_clipping(bad)


def test_check_clipping_names_the_unknown_keys():
    with pytest.raises(ValueError, match="^renorm_clipping: keys must be among rmax, rmin, dmax, got 'r_max', 3$"):
        check_clipping({"rmax": 1, "r_max": 1, 3: 2})
