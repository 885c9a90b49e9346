"""The state_dict of both faces and of torch's layer: strict in every direction, and before there are variables."""

import io
from collections.abc import Callable

import pytest
import torch
from faces import built, trained
from layer_pairs import assert_same_state
from torch import Tensor, nn

import torch_bn
from torch_bn import BatchNormalization
from torch_bn.modules import RENORM_STATE

PLAIN_STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "BatchNormalization": lambda **options: built(axis=1, **options),
    "BatchNorm2d": lambda **options: torch_bn.BatchNorm2d(3, **options),
    "nn.BatchNorm2d": lambda: nn.BatchNorm2d(3),
}
OURS = ["BatchNormalization", "BatchNorm2d"]


def saved(layer: nn.Module) -> dict[str, Tensor]:
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("target", LAYERS)
@pytest.mark.parametrize("source", LAYERS)
def test_a_state_dict_moves_strictly_in_every_direction(source, target):
    layer, other = trained(LAYERS[source]()), LAYERS[target]()
    other.load_state_dict(saved(layer), strict=True)
    assert_same_state(other, layer, rtol=0, atol=0)
    x = torch.randn(4, 3, 2, 2)
    for module in (layer, other):
        module.eval()
        if isinstance(module, BatchNormalization):
            module.epsilon = 1e-5
    torch.testing.assert_close(other(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", OURS)
def test_the_averages_of_renorm_move_along(source, target):
    layer, other = trained(LAYERS[source](renorm=True)), LAYERS[target](renorm=True)
    other.load_state_dict(saved(layer), strict=True)
    assert_same_state(other, layer, rtol=0, atol=0)
    assert other.renorm_mean_weight > 0


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", LAYERS)
def test_a_plain_checkpoint_starts_renorm_anew(source, target):
    layer, other = trained(LAYERS[source]()), trained(LAYERS[target](renorm=True))
    assert other.renorm_mean.any()
    other.load_state_dict(saved(layer), strict=True)
    state = other.state_dict()
    assert not any(state.pop(name).any() for name in RENORM_STATE)
    torch.testing.assert_close(dict(state), dict(layer.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", OURS)
def test_a_plain_layer_ignores_the_averages_of_renorm(source, target):
    layer, other = trained(LAYERS[source](renorm=True)), LAYERS[target]()
    other.load_state_dict(saved(layer), strict=True)
    torch.testing.assert_close(
        dict(other.state_dict()), {name: layer.state_dict()[name] for name in PLAIN_STATE}, rtol=0, atol=0
    )


@pytest.mark.parametrize("target", OURS)
def test_other_keys_are_still_missing_or_unexpected(target):
    layer = LAYERS[target](renorm=True)
    state = trained(LAYERS[target](renorm=True)).state_dict()
    del state["renorm_stddev"], state["bias"]
    state["another"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r'(?s)Missing .*"bias", "renorm_stddev".*Unexpected .*"another"\.'):
        layer.load_state_dict(state)
    result = layer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["bias", "renorm_stddev"] and result.unexpected_keys == ["another"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", LAYERS)
def test_a_state_dict_makes_the_variables(source, assign):
    layer = trained(LAYERS[source]())
    model = nn.Sequential(nn.Identity(), BatchNormalization(1, renorm=True))
    state = {f"1.{name}": value for name, value in saved(layer).items()}
    model.load_state_dict(state, strict=True, assign=assign)
    assert model[1].built and not model[1].renorm_mean.any()
    torch.testing.assert_close(dict(model[1].state_dict()) | dict(layer.state_dict()), dict(model[1].state_dict()))
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(4, 3, 2, 2))
    assert model[1].num_batches_tracked == 4


def test_a_state_dict_of_several_axes_makes_the_variables():
    layer = trained(BatchNormalization([1, 3], renorm=True), (8, 3, 4, 2))
    other = BatchNormalization([1, -1], renorm=True)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert_same_state(other, layer, rtol=0, atol=0)
    x = torch.randn(2, 3, 5, 2)
    torch.testing.assert_close(other(x, training=False), layer(x, training=False), rtol=0, atol=0)


def test_a_state_dict_keeps_what_the_layer_wants_to_be():
    state = trained(LAYERS["nn.BatchNorm2d"]()).state_dict()
    layer = BatchNormalization(1, dtype=torch.float64, trainable=False)
    layer.load_state_dict(state)
    assert layer.gamma.dtype == layer.moving_mean.dtype == torch.float64 and not layer.gamma.requires_grad
    torch.testing.assert_close(layer.gamma, state["weight"].double(), rtol=0, atol=0)


def test_a_state_dict_for_other_channels_is_noticed_at_the_input():
    layer = BatchNormalization(1)
    layer.load_state_dict(trained(LAYERS["nn.BatchNorm2d"]()).state_dict())
    with pytest.raises(ValueError, match=r"must have the channels of the variables, \[3\], got \[4\]$"):
        layer(torch.randn(2, 4, 2, 2))


def test_half_leaves_the_statistics_in_float32():
    layer = torch_bn.BatchNormalization(axis=1, renorm=True, momentum=0.0)
    layer(torch.randn(7, 3), training=True)
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert {layer.running_mean.dtype, layer.running_var.dtype, layer.renorm_stddev.dtype} == {torch.float32}
    layer(torch.randn(7, 3).mul(2000).half(), training=True)
    assert layer.running_var.isfinite().all()
