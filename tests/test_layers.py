"""BatchNormalization beyond TensorFlow's recorded numbers: its variables, what acts on them, and its modes."""

import copy
import functools
import pickle
import re

import numpy as np
import pytest
import torch
from faces import built, trained
from layer_pairs import assert_same_state, both_paths
from torch import nn

import torch_bn
from torch_bn import BatchNormalization, schedules
from torch_bn.constraints import Clip, MaxNorm, NonNegative
from torch_bn.functional import batch_norm
from torch_bn.layers import VariableStore, batch_normalization
from torch_bn.modules import RENORM_STATE
from torch_bn.regularizers import l1, l2

PLAIN_STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


# ---------------------------------------------------------------------------------------------------------------------
# Variables come with the first input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["training", "evaluation", "build", "build from meta"])
def test_variables_are_made_for_the_first_input(how):
    layer = BatchNormalization(renorm=True)
    assert not layer.built and not list(layer.parameters()) and not layer.state_dict()
    assert layer.gamma is layer.beta is layer.moving_mean is layer.moving_variance is None
    x = torch.randn(5, 4, 3)
    if how.startswith("build"):
        layer.build(x if how == "build" else x.to("meta"))
    else:
        layer(x, training=how == "training")
    assert layer.built and list(layer.state_dict()) == [*PLAIN_STATE, *RENORM_STATE]
    assert [tuple(value.shape) for value in layer.state_dict().values()] == [(3,)] * 4 + [()] + [(3,)] * 2 + [()] * 2
    assert all(value.device.type == "cpu" for value in layer.state_dict().values())
    assert (layer.gamma, layer.beta) == (layer.weight, layer.bias)
    assert layer.num_batches_tracked == (how == "training")


def test_build_does_nothing_the_second_time():
    layer = built()
    before = list(layer.parameters())
    layer.build(torch.empty(2, 7))
    assert all(a is b for a, b in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("axis", "shape"),
    [
        (-1, (3,)),
        (1, (4,)),
        ([1], (4,)),
        ((-1, 1), (1, 4, 1, 3)),
        ([2, 1], (1, 4, 2, 1)),
        ([0, 1, 2, 3], (5, 4, 2, 3)),
        (np.int64(2), (2,)),
    ],
    ids=str,
)
@both_paths
def test_the_shape_of_variables(axis, shape, fused):
    layer, x = BatchNormalization(axis, renorm=True, fused=fused), torch.randn(5, 4, 2, 3)
    y = layer(x, training=True)
    assert y.shape == x.shape and y.dtype == x.dtype
    for name, value in layer.state_dict().items():
        assert tuple(value.shape) == (() if name.endswith(("weight", "tracked")) and name != "weight" else shape), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@both_paths
def test_the_dtype_of_variables(dtype, fused):
    x = torch.randn(5, 3).to(dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for layer, expected in (
        (BatchNormalization(renorm=True, fused=fused), kept),
        (BatchNormalization(renorm=True, dtype=torch.float64, fused=fused), torch.float64),
    ):
        assert layer(x, training=True).dtype == dtype
        assert {value.dtype for name, value in layer.state_dict().items() if name != "num_batches_tracked"} == {
            expected
        }


def test_a_device_of_its_own():
    layer = BatchNormalization(device="meta")
    layer.build(torch.randn(5, 3))
    assert all(value.is_meta for value in layer.state_dict().values())


@pytest.mark.parametrize(("center", "scale"), [(True, False), (False, True), (False, False)])
@both_paths
def test_without_center_or_scale(center, scale, fused):
    losses, layer = [l1(1.0), l2(1.0)], None
    layer = BatchNormalization(
        center=center,
        scale=scale,
        beta_regularizer=losses[0],
        gamma_regularizer=losses[1],
        beta_constraint=NonNegative(),
        gamma_constraint=NonNegative(),
        fused=fused,
    )
    y = layer(torch.randn(5, 3), training=True)
    assert [layer.beta is not None, layer.gamma is not None] == [center, scale]
    assert len(layer.regularization_losses()) == len(layer.layer_constraints()) == center + scale
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-6)


def test_the_defaults_are_tensorflows():
    layer = BatchNormalization()
    assert (layer.axis, layer.momentum, layer.epsilon, layer.renorm_momentum) == (-1, 0.99, 1e-3, 0.99)
    assert (layer.center, layer.scale, layer.renorm, layer.trainable, layer.training) == (True, True, False, True, True)
    assert repr(layer) == "BatchNormalization(axis=-1, momentum=0.99, epsilon=0.001)"
    odd = BatchNormalization([2, 1], center=False, renorm=True, virtual_batch_size=4)
    assert repr(odd).endswith("(axis=(2, 1), momentum=0.99, epsilon=0.001, center=False, renorm=True, "
                              "virtual_batch_size=4)")  # fmt: skip
    layer = BatchNormalization(momentum=torch.tensor(0.5), epsilon=torch.tensor(0.25), name="mine")
    assert (layer.momentum, layer.epsilon, layer.name) == (0.5, 0.25, "mine")


# ---------------------------------------------------------------------------------------------------------------------
# Initializers
# ---------------------------------------------------------------------------------------------------------------------


def test_initializers_of_torch_reach_their_variables():
    layer = built(
        channels=2000,
        beta_initializer=functools.partial(nn.init.normal_, mean=3.0, std=0.5),
        gamma_initializer=functools.partial(nn.init.constant_, val=7.0),
        moving_mean_initializer=nn.init.uniform_,
        moving_variance_initializer=functools.partial(nn.init.trunc_normal_, mean=2.0, std=0.1, a=1.5, b=2.5),
    )
    assert layer.beta.mean().item() == pytest.approx(3, abs=0.05) and layer.beta.std().item() == pytest.approx(0.5, 0.1)
    assert layer.gamma.eq(7).all()
    assert layer.moving_mean.mean().item() == pytest.approx(0.5, abs=0.05) and layer.moving_mean.max() <= 1
    assert 1.5 <= layer.moving_variance.min() and layer.moving_variance.max() <= 2.5
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in layer.parameters())


def test_initializers_by_name():
    layer = built(
        beta_initializer="ones",
        gamma_initializer="zeros",
        moving_mean_initializer="ones",
        moving_variance_initializer="zeros",
    )
    assert [value.mean().item() for value in layer.state_dict().values() if value.dim()] == [0, 1, 1, 0]


def test_initializers_meet_the_shape_of_several_axes():
    seen = []
    layer = BatchNormalization([1, 3], gamma_initializer=lambda variable: seen.append(variable.shape))
    layer.build(torch.empty(2, 3, 4, 5))
    assert seen == [(1, 3, 1, 5)]


# ---------------------------------------------------------------------------------------------------------------------
# Regularizers and constraints
# ---------------------------------------------------------------------------------------------------------------------


def test_regularization_losses_of_layer_model_and_store():
    layer = built(gamma_regularizer=l2(0.5), beta_regularizer=lambda beta: (beta + 1).sum(), gamma_initializer="ones")
    assert [loss.item() for loss in torch_bn.regularization_losses(layer)] == [1.5, 3]
    assert [loss.item() for loss in layer.regularization_losses()] == [1.5, 3]
    model = nn.Sequential(layer, nn.Linear(3, 3), built(beta_regularizer=l1(1.0)), built(), BatchNormalization())
    losses = torch_bn.regularization_losses(model)
    assert [loss.item() for loss in losses] == [1.5, 3, 0] and all(loss.shape == () for loss in losses)
    sum(losses).backward()
    assert layer.gamma.grad.tolist() == [1, 1, 1] and layer.beta.grad.tolist() == [1, 1, 1]

    store, x = VariableStore(), torch.randn(5, 3)
    with store:
        for reuse in (None, True):  # reported once, whoever shares the variables
            batch_normalization(x, name="bn", reuse=reuse, gamma_regularizer=l2(0.5), beta_regularizer=l1(1.0))
        batch_normalization(x, training=True, trainable=False, gamma_regularizer=l1(1.0))
    for losses in (store.regularization_losses(), torch_bn.regularization_losses(store)):
        assert [loss.item() for loss in losses] == [1.5, 0, 3]


def test_constraints_of_layer_model_and_store():
    layer = built(gamma_constraint=Clip(0, 0.5), beta_constraint=NonNegative())
    layer.beta.data.fill_(-1)
    layer(torch.randn(5, 3), training=True)
    assert layer.gamma.eq(1).all(), "not by a forward"
    torch_bn.apply_constraints(nn.Sequential(nn.Linear(3, 3), layer, BatchNormalization(gamma_constraint=Clip(0, 1))))
    assert layer.gamma.tolist() == [0.5] * 3 and layer.beta.tolist() == [0] * 3

    store = VariableStore()
    with store:
        batch_normalization(torch.randn(5, 3), name="bn", gamma_constraint=MaxNorm(1e-3))
    torch_bn.apply_constraints(store)
    assert store.variables()["bn/gamma"].norm().item() == pytest.approx(1e-3)


@both_paths
def test_constraints_attached_to_an_optimizer(fused):
    model = nn.Sequential(nn.Linear(4, 3), built(gamma_constraint=NonNegative(), beta_constraint=Clip(-0.1, 0.1)))
    model[1].fused = fused
    optimizer = torch.optim.SGD(model.parameters(), 100.0)
    torch_bn.attach_constraints(optimizer, model)
    for sign in (1, -1):
        optimizer.zero_grad()
        (sign * model(torch.randn(6, 4)).pow(3).sum()).backward()
        optimizer.step()
        assert model[1].gamma.min() >= 0 and model[1].beta.abs().max() <= 0.1 + 1e-7
        assert model[1].beta.abs().max() > 0.09, "the optimizer went beyond"


# ---------------------------------------------------------------------------------------------------------------------
# training and trainable
# ---------------------------------------------------------------------------------------------------------------------

YES = [True, 1, 1.0, np.True_, torch.tensor(True)]
NO = [False, 0, 0.0, np.False_, torch.tensor(False)]


@pytest.mark.parametrize("training", [*YES, *NO], ids=repr)
def test_what_training_may_be(training):
    layer, x = built(momentum=0.5), torch.randn(5, 3) + 2
    layer.eval() if training else layer.train()  # which counts only for None
    y = layer(x, training=training)
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt() if training else x / 1.001**0.5
    torch.testing.assert_close(y, expected)
    assert layer.num_batches_tracked == int(training)


@pytest.mark.parametrize("mode", [True, False])
def test_training_none_is_that_of_the_module(mode):
    layer, x = built().train(mode), torch.randn(5, 3)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x, training=mode))
    assert layer.num_batches_tracked == mode


TRAINING = "training must be a bool, 0 or 1, or a bool tensor, got "
BAD_TRAINING = [
    (2, TypeError, f"{TRAINING}2"),
    (0.5, TypeError, f"{TRAINING}0.5"),
    ("True", TypeError, f"{TRAINING}'True'"),
    ([], TypeError, f"{TRAINING}[]"),
    (np.array([True, False]), TypeError, f"{TRAINING}array([ True, False])"),
    (torch.tensor(1), TypeError, f"{TRAINING}a tensor of torch.int64"),
    (torch.tensor([True]), ValueError, "training must be a single value, got a tensor of shape [1]"),
]


@pytest.mark.parametrize(("training", "error", "text"), BAD_TRAINING, ids=[repr(row[0]) for row in BAD_TRAINING])
def test_what_training_may_not_be(training, error, text):
    layer, x = BatchNormalization(), torch.randn(5, 3)
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        layer(x, training=training)
    assert not layer.built
    with VariableStore() as store, pytest.raises(error, match=f"^{re.escape(text)}$"):
        batch_normalization(x, training=training)
    assert not store.variables()


def test_the_function_needs_to_be_told():
    with VariableStore(), pytest.raises(TypeError, match=f"^{TRAINING}None$"):
        batch_normalization(torch.randn(5, 3), training=None)


@pytest.mark.parametrize("renorm", [False, True])
@both_paths
def test_trainable_can_be_toggled(renorm, fused):
    layer, x = BatchNormalization(trainable=False, renorm=renorm, fused=fused), torch.randn(5, 3) + 2
    y = layer(x, training=True)
    assert not y.requires_grad and not any(parameter.requires_grad for parameter in layer.parameters())
    torch.testing.assert_close(y, batch_norm(x, None, None, training=True, eps=1e-3))
    assert not layer.moving_mean.any() and layer.num_batches_tracked == 0
    layer.trainable = True
    layer(x, training=True).sum().backward()
    assert layer.moving_mean.all() and layer.num_batches_tracked == 1 and layer.beta.grad is not None
    layer.trainable = 0
    before = copy.deepcopy(layer)
    x.requires_grad_()
    layer(x, training=True).pow(3).sum().backward()
    assert layer.trainable is False and x.grad.any()
    assert_same_state(layer, before, rtol=0, atol=0)


def test_trainable_may_be_set_before_there_are_variables():
    layer = BatchNormalization()
    layer.trainable = False
    layer.build(torch.empty(2, 3))
    assert [parameter.requires_grad for parameter in layer.parameters()] == [False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Edges that torch's face refuses
# ---------------------------------------------------------------------------------------------------------------------


@both_paths
def test_one_value_per_channel_gives_beta(fused):
    layer = built(fused=fused, momentum=0.5, beta_initializer="ones")
    assert torch.equal(layer(torch.randn(1, 3), training=True), torch.ones(1, 3))
    assert layer.moving_variance.tolist() == [0.5] * 3
    layer = BatchNormalization(0, fused=fused)
    assert not layer(torch.randn(4), training=True).any()
    layer = BatchNormalization(virtual_batch_size=1, fused=fused)
    assert not layer(torch.randn(6, 3), training=True).any()


@both_paths
def test_one_value_per_channel_with_renorm_shows_the_averages(fused):
    layer = BatchNormalization(renorm=True, renorm_momentum=0.0, fused=fused)
    first, second = torch.randn(2, 1, 3)
    assert not layer(first, training=True).any()
    torch.testing.assert_close(layer(second, training=True), (second - first) / 1e-3**0.5, rtol=1e-4, atol=1e-4)


@both_paths
def test_the_group_is_by_remainder(fused):
    layer = BatchNormalization(virtual_batch_size=2, epsilon=0.0, fused=fused)
    y = layer(torch.tensor([[0.0], [1.0], [2.0], [10.0], [20.0], [30.0]]), training=True)
    assert y.flatten().tolist() == [-1, -1, -1, 1, 1, 1]
    layer(torch.randn(5, 1), training=False)  # inference has no groups


@both_paths
def test_an_empty_batch(fused):
    layer = trained(built(fused=fused, renorm=True), (5, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.empty(0, 3, requires_grad=True)
    y = layer(x, training=True)
    y.sum().backward()
    assert y.shape == (0, 3) and not layer.gamma.grad.any()
    before["num_batches_tracked"] += 1
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Copies of a layer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_built", [True, False], ids=["built", "not built"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_layer_with_everything(copied, is_built):
    layer = BatchNormalization(
        [1, 2],
        gamma_initializer="ones",
        beta_initializer=functools.partial(nn.init.constant_, val=-0.5),
        gamma_regularizer=l2(0.5),
        beta_constraint=NonNegative(),
        gamma_constraint=Clip(0, 1),
        renorm=True,
        renorm_clipping=schedules.linear(0, 3, 2.0, 1.0),
        renorm_momentum=0.5,
        virtual_batch_size=2,
        name="mine",
        trainable=False,
    )
    x = [torch.randn(4, 3, 2) * factor for factor in (1.0, 2.0, 0.5)]
    layer.trainable = True
    if is_built:
        layer(x[0])
    twin = copied(layer)
    assert repr(twin) == repr(layer) and twin.name == "mine" and twin.built == is_built and twin.trainable
    for one in x:
        assert torch.equal(twin(one), layer(one))
    torch_bn.apply_constraints(twin)
    assert not twin.beta.any() and layer.beta.any() and twin.regularization_losses()[0] == 3
    torch_bn.apply_constraints(layer)
    assert_same_state(twin, layer, rtol=0, atol=0)
