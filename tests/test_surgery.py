"""convert and revert: which layers change their class, and that nothing else of them changes."""

import copy

import pytest
import torch
from paths import PATHS
from torch import nn
from torch.nn.utils import parametrize

import torch_bn
from torch_bn import convert, revert

PAIRS = [
    (nn.BatchNorm1d, torch_bn.BatchNorm1d),
    (nn.BatchNorm2d, torch_bn.BatchNorm2d),
    (nn.BatchNorm3d, torch_bn.BatchNorm3d),
]
both_paths = pytest.mark.parametrize("fused", PATHS)


class Own(nn.BatchNorm2d):
    """Somebody's subclass."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-3, momentum=None), nn.ReLU())
        self.branches = nn.ModuleList([nn.BatchNorm2d(6, affine=False), Own(6)])
        self.again = self.branches[0]
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5, track_running_stats=False))

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.branches[0](x) + self.branches[1](x) + self.again(x))


def net() -> Net:
    model = Net()
    model(torch.randn(4, 3, 5, 5))
    return model


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def plain_state(module: nn.Module) -> dict:
    """Everything that belongs to the object itself, tensors and hooks by identity."""
    state = {}
    for name, value in vars(module).items():
        state[name] = {key: id(item) for key, item in value.items()} if isinstance(value, dict) else value
    return state


@both_paths
def test_a_model_computes_the_same_after_convert_and_after_revert(fused):
    model, expected = net(), None
    model.eval()
    x = torch.randn(4, 3, 5, 5)
    expected = model(x)
    assert convert(model, fused=fused) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert revert(model) is model
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@both_paths
def test_training_goes_the_same_way(fused):
    plain = net()
    ours = convert(copy.deepcopy(plain), fused=fused)
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(1)
        for _ in range(3):
            model(torch.randn(4, 3, 5, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)


def test_exactly_torchs_three_classes_are_exchanged_and_restored():
    model = nn.Sequential(net(), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(2))
    before = classes(model)
    table = dict(PAIRS)
    convert(model)
    assert classes(model) == [table.get(kind, kind) for kind in before]
    assert sum(kind in table for kind in before) == 4
    convert(model)  # changes nothing any more
    assert classes(model) == [table.get(kind, kind) for kind in before]
    revert(model)
    assert classes(model) == before


@pytest.mark.parametrize(("torchs", "ours"), PAIRS)
def test_everything_of_a_layer_stays(torchs, ours):
    layer = torchs(5, momentum=None).double().eval()
    layer.weight.requires_grad_(False)
    layer.my_attribute = object()
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_state_dict_pre_hook(lambda *_: None)
    layer.register_load_state_dict_post_hook(lambda *_: None)
    before = plain_state(layer)

    assert convert(layer) is layer and type(layer) is ours
    assert plain_state(layer) == before
    assert repr(layer) == repr(torchs(5, momentum=None))
    assert revert(layer) is layer and type(layer) is torchs
    assert plain_state(layer) == before


def test_a_layer_with_two_names_stays_one_layer():
    model = convert(net())
    assert model.again is model.branches[0]
    assert type(model.again) is torch_bn.BatchNorm2d


@pytest.mark.parametrize("fused", [None, True, False])
def test_fused_reaches_every_exchanged_layer(fused):
    model = convert(net(), fused=fused)
    assert [m.fused for m in model.modules() if isinstance(m, tuple(ours for _, ours in PAIRS))] == [fused] * 3


@pytest.mark.parametrize(
    ("options", "text"),
    [({"fused": "always"}, "fused must be None, True or False, got 'always'"), ({"renormalise": True}, "renormalise")],
)
def test_a_bad_option_changes_no_layer(options, text):
    model = net()
    before = classes(model)
    with pytest.raises(TypeError, match=text):
        convert(model, **options)
    assert classes(model) == before


def test_revert_refuses_an_axis_that_torch_has_not_and_changes_no_layer():
    model = nn.Sequential(torch_bn.BatchNorm2d(3), nn.Sequential(torch_bn.BatchNorm1d(3, axis=-1)))
    before = classes(model)
    with pytest.raises(ValueError, match=r"^revert: axis must be 1 for nn.BatchNorm, got -1 in '1.0'$"):
        revert(model)
    with pytest.raises(ValueError, match=r"got 0 in 'the model'$"):
        revert(torch_bn.BatchNorm2d(3, axis=0))
    assert classes(model) == before


def test_revert_takes_another_name_of_axis_1():
    layer = torch_bn.BatchNorm2d(3, axis=-3)
    assert type(revert(layer)) is nn.BatchNorm2d and "axis" not in vars(layer)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_layer_keeps_its_parametrization():
    layer = nn.BatchNorm2d(5)
    parametrize.register_parametrization(layer, "weight", Doubled())
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 5, 2, 2)
    expected = layer.eval()(x)

    convert(layer)
    assert isinstance(layer, torch_bn.BatchNorm2d) and not isinstance(twin, torch_bn.BatchNorm2d)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=1e-4, atol=1e-5)
    revert(layer)
    assert not isinstance(layer, torch_bn.BatchNorm2d)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    convert(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is torch_bn.BatchNorm2d
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_notices():
    graphs = []
    model = nn.Sequential(nn.BatchNorm1d(5)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    x = torch.randn(3, 5)
    expected = compiled(x)
    convert(model, fused=False)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
