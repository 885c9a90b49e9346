"""convert with renorm, ghost batches and adjustment, and revert from them: what reaches which layer, and what stays."""

import copy
import re
from typing import Any

import pytest
import torch
from faces import same, state
from layer_pairs import both_paths
from torch import nn
from torch.nn.utils import parametrize

import torch_bn
from torch_bn import convert, revert, schedules
from torch_bn.modules import OPTIONS, RENORM_STATE

KINDS = (torch_bn.BatchNorm1d, torch_bn.BatchNorm2d, torch_bn.BatchNorm3d)
RENORM = {"renorm": True, "renorm_clipping": {"rmax": 2.0, "dmax": 0.5}, "renorm_momentum": 0.2}


def net() -> nn.Sequential:
    """With statistics that are not those of the beginning."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5), nn.BatchNorm1d(5)
    )
    for factor in (1.0, 2.0):
        model(batch() * factor)
    return model


def batch() -> torch.Tensor:
    return torch.randn(6, 3, 5, 5) + 0.5


def ours(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, KINDS)]


def shift(shape: torch.Size) -> tuple[float, float]:
    return 1.25, 0.5


@pytest.mark.parametrize(
    "options",
    [RENORM, {"virtual_batch_size": 2}, {"adjustment": shift}, RENORM | {"virtual_batch_size": 3, "fused": False}],
    ids=["renorm", "groups", "adjustment", "all"],
)
def test_options_reach_every_layer(options):
    model = net()
    before = state(model)
    assert convert(model, **options) is model
    layers = ours(model)
    assert len(layers) == 2
    defaults = {name: getattr(torch_bn.BatchNorm2d, name) for name in OPTIONS}
    for layer in layers:
        assert {name: getattr(layer, name) for name in OPTIONS} == defaults | options
        assert [name in layer.state_dict() for name in RENORM_STATE] == [bool(options.get("renorm"))] * 4
    after = state(model)
    assert not any(after.pop(name).any() for name in list(after) if "renorm" in name)
    assert same(after, before)


@both_paths
def test_a_converted_model_trains_like_one_made_with_the_options(fused):
    options = RENORM | {"virtual_batch_size": 3, "fused": fused}
    converted = net()
    made = copy.deepcopy(converted)
    made[1] = torch_bn.BatchNorm2d(6, **options)
    made[5] = torch_bn.BatchNorm1d(5, **options)
    made.load_state_dict(converted.state_dict(), strict=True)
    convert(converted, **options)
    for factor in (1.0, 3.0, 0.5):
        x, found = batch() * factor, []
        for model in (converted, made):
            model.zero_grad()
            y = model(x)
            y.pow(3).sum().backward()
            found.append([y, *(p.grad for p in model.parameters()), *state(model).values()])
        assert same(*found)


def test_layers_of_ours_take_new_options_and_keep_their_averages():
    model = convert(net(), **RENORM)
    model(batch())
    before = state(model)
    convert(model, virtual_batch_size=2, renorm_momentum=0.5)
    assert [(layer.renorm, layer.renorm_momentum, layer.virtual_batch_size) for layer in ours(model)] == [
        (True, 0.5, 2)
    ] * 2
    convert(model, renorm=True)
    assert same(state(model), before) and ours(model)[0].renorm_mean.any()
    convert(model, renorm=False)
    assert not any("renorm" in name for name in model.state_dict())
    convert(model, renorm=True)
    assert not ours(model)[0].renorm_mean.any(), "anew"


def test_averages_of_renorm_have_the_layers_dtype_and_device():
    model = net().double()
    assert {value.dtype for name, value in convert(model, renorm=True).state_dict().items() if "renorm" in name} == {
        torch.float64
    }
    model = convert(nn.Sequential(nn.BatchNorm2d(3, device="meta")), renorm=True)
    assert model[0].renorm_mean.is_meta and model[0].renorm_mean_weight.is_meta


def test_options_of_the_class_do_not_change():
    convert(net(), **RENORM, virtual_batch_size=2)
    fresh = torch_bn.BatchNorm2d(3)
    assert not fresh.renorm and fresh.virtual_batch_size is None and "renorm_mean" not in fresh.state_dict()


BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"renorm": True, "renorm_clipping": {"max": 1}}, ValueError, "renorm_clipping: keys must be among rmax, rmin, dm"),
    ({"renorm": True, "renorm_clipping": 3}, TypeError, "renorm_clipping must be a dict with keys among rmax, rmin, d"),
    ({"renorm": True, "renorm_momentum": 0}, ValueError, "batch_norm: renorm_momentum must not be 0, which lets nothi"),
    ({"renorm": True, "renorm_momentum": "1"}, TypeError, "batch_norm: renorm_momentum must be a number, got str"),
    ({"virtual_batch_size": 0}, ValueError, "batch_norm: virtual_batch_size must be a positive int or None, got 0"),
    ({"virtual_batch_size": 1.5}, TypeError, "batch_norm: virtual_batch_size must be a positive int or None, got 1.5"),
    ({"adjustment": 1}, TypeError, "batch_norm: adjustment must be callable or None, got 1"),
    ({"renorm": True, "momentum": 0.1}, TypeError, "convert: options must be among renorm, renorm_clipping, renorm_mo"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=[str(row[0]) for row in BAD])
@pytest.mark.parametrize("before", ["torch's", "ours"])
def test_bad_values_change_nothing(before, options, error, text):
    model = net() if before == "torch's" else convert(net(), **RENORM)
    kinds, expected, kept = [type(layer) for layer in model], state(model), [vars(layer).copy() for layer in model]
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        convert(model, **options)
    assert [type(layer) for layer in model] == kinds and same(state(model), expected)
    assert [vars(layer) for layer in model] == kept


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"renorm_momentum": 0}, "renorm_momentum must not be 0"),
        ({"renorm_clipping": {"max": 1}}, "keys must be among"),
        ({"renorm_momentum": None}, "renorm_momentum must be a number"),
    ],
    ids=str,
)
def test_values_that_only_renorm_minds_are_checked_for_layers_that_have_it(options, text):
    model = convert(net(), **RENORM)
    with pytest.raises((TypeError, ValueError), match=text):
        convert(model, **options)
    assert all(getattr(layer, name) == value for layer in ours(model) for name, value in RENORM.items())
    layer = torch_bn.BatchNorm2d(3, **options)  # without renorm, it does not mind, but it will
    with pytest.raises((TypeError, ValueError), match=text):
        convert(layer, renorm=True)
    assert not layer.renorm


def test_renorm_needs_running_statistics_in_every_layer():
    model = net()
    model.append(nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(
        ValueError, match="^batch_norm: renorm needs running statistics, got track_running_stats=False$"
    ):
        convert(model, **RENORM)
    assert not ours(model) and not any("renorm" in name for name in model.state_dict())
    convert(model, virtual_batch_size=2)
    assert len(ours(model)) == 3


def test_revert_drops_what_torch_has_not():
    plain = net()
    model = convert(copy.deepcopy(plain), **RENORM, virtual_batch_size=2, adjustment=shift, fused=False)
    model(batch())
    model.eval()
    x = batch()
    expected, kept = model(x), state(model)
    assert revert(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert same(state(model), {name: value for name, value in kept.items() if "renorm" not in name})
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(name in vars(layer) for layer in model for name in OPTIONS)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert [repr(layer) for layer in model] == [repr(layer) for layer in plain]


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)], ids=["Adam", "SGD"]
)
def test_the_state_of_an_optimizer_stays_valid(make):
    model = net()
    optimizer = make(model.parameters())

    def step() -> list[torch.Tensor]:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(batch()).pow(3).sum().backward()
        optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return list(model.parameters())

    first = step()
    for change in (lambda: convert(model, **RENORM, virtual_batch_size=2), lambda: revert(model)):
        saved = copy.deepcopy(optimizer.state_dict())
        change()
        assert all(a is b for a, b in zip(step(), first, strict=True))
        assert len(optimizer.state) == len(first)
        optimizer.load_state_dict(saved)
        step()


def test_a_parametrized_layer_takes_options_too():
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    convert(layer, renorm=True, virtual_batch_size=2)
    plain, x = torch_bn.BatchNorm2d(3, renorm=True, virtual_batch_size=2), batch()
    torch.testing.assert_close(layer(x), 2 * plain(x))
    assert torch.equal(layer.renorm_mean, plain.renorm_mean) and layer.renorm_mean.any()
    revert(layer)
    assert "renorm_mean" not in layer.state_dict() and parametrize.is_parametrized(layer, "weight")


@both_paths
def test_recalibration_forgets_the_averages_of_renorm(fused):
    model = convert(net(), renorm=True, fused=fused)
    model(batch())
    batches = [batch() for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    assert all(layer.num_batches_tracked == 3 and layer.momentum == 0.1 for layer in ours(model))
    assert ours(model)[0].renorm_mean_weight.item() == pytest.approx(1 - 0.99**3)
    convolved = [model[0](x) for x in batches]
    # With equal weights, an average of the averages so far.
    means, average, entered = [x.mean((0, 2, 3)) for x in convolved], torch.zeros(6), []
    for step, mean in enumerate(means):
        average = 0.99 * average + 0.01 * mean
        entered.append(average / (1 - 0.99 ** (step + 1)))
    torch.testing.assert_close(ours(model)[0].running_mean, torch.stack(entered).mean(0), rtol=1e-4, atol=1e-5)
    ours(model)[0].reset_parameters()
    assert not any(ours(model)[0].state_dict()[name].any() for name in RENORM_STATE)


def test_repr_and_copies_show_the_options():
    layer = convert(nn.BatchNorm2d(3), renorm=True, renorm_clipping=schedules.linear(0, 3), virtual_batch_size=4)
    assert repr(layer).endswith(f"renorm=True, renorm_clipping={schedules.linear(0, 3)}, virtual_batch_size=4)")
    twin = copy.deepcopy(layer)
    layer(batch())
    assert twin.renorm_clipping == layer.renorm_clipping and not twin.renorm_mean.any()
