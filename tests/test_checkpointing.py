"""Forwards that activation checkpointing repeats or that are differentiated twice give the numbers and the state of a
plain forward."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faces import (
    CHANNELS,
    FACES,
    Face,
    batch,
    both_faces,
    one_thread,
    same,
    state,
    tensorflows_face,
    torchs_face,
)
from layer_pairs import both_paths
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from torch_bn import deferred_updates, schedules
from torch_bn.layers import VariableStore, batch_normalization

_one_thread = pytest.fixture(autouse=True)(one_thread)

BOUNDS = {"rmax": 1.5, "rmin": 0.5, "dmax": 0.4}
CHECKPOINTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "cumulative": {"momentum": None},
    "renorm": {"renorm": True, "renorm_momentum": 0.3},
    "bounded renorm": {"renorm": True, "renorm_momentum": 0.3, "renorm_clipping": BOUNDS},
    "scheduled renorm": {"renorm": True, "renorm_momentum": 0.3, "renorm_clipping": schedules.linear(0, 4, 4.0, 3.0)},
    "groups": {"virtual_batch_size": 2},
    "groups and renorm": {"virtual_batch_size": 3, "renorm": True, "renorm_momentum": 0.3},
    "adjusted renorm": {
        "renorm": True,
        "renorm_momentum": 0.3,
        "adjustment": lambda shape: (torch.full((shape[0], 1, 1, 1), 1.5), 0.25),
    },
}
every_layer = pytest.mark.parametrize(
    ("face", "options"),
    [
        pytest.param(FACES[face], options, id=f"{face}-{name}")
        for face, (name, options) in itertools.product(FACES, CHECKPOINTED.items())
        if face == "BatchNorm2d" or options.get("momentum", 0) is not None
    ],
)
both_kinds = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])


class Net(nn.Module):
    """Segments of several layers, each of which may be checkpointed."""

    def __init__(self, face: Face, fused: bool | None, segments: int = 2, **options: Any):
        super().__init__()

        def segment() -> nn.Module:
            convolutions = [nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(2)]
            layers = [face(fused, **options) for _ in range(2)]
            return nn.Sequential(convolutions[0], layers[0], nn.Tanh(), convolutions[1], layers[1])

        self.segments = nn.Sequential(*[segment() for _ in range(segments)])

    def forward(self, x: Tensor, use_reentrant: bool | None = None) -> Tensor:
        for segment in self.segments:
            x = segment(x) if use_reentrant is None else checkpoint(segment, x, use_reentrant=use_reentrant)
        return x


def trained(model: nn.Module, steps: list[list[Tensor]], use_reentrant: bool | None, backward: str = "sum") -> list:
    """Trains with one or more micro-batches per step; outputs, gradients and state of all steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for micro_batches in steps:
        optimizer.zero_grad()
        leaves = [x.clone().requires_grad_() for x in micro_batches]
        outputs = [model(x, use_reentrant) for x in leaves]
        losses = [y.pow(3).mean() for y in outputs]
        if backward == "sum":
            sum(losses).backward()
        for loss in {"sum": [], "in order": losses, "reversed": losses[::-1]}[backward]:
            loss.backward()
        found += [*outputs, *(x.grad for x in leaves), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        found += state(model).values()
    return found


def assert_checkpointing_changes_nothing(model: nn.Module, steps: list, use_reentrant: bool, **how: Any) -> None:
    twin = copy.deepcopy(model)
    expected = trained(model, steps, None, **how)
    torch.testing.assert_close(trained(twin, steps, use_reentrant, **how), expected, rtol=0, atol=0)


@every_layer
@both_kinds
@both_paths
def test_checkpointing_changes_nothing(fused, use_reentrant, face, options):
    steps = [[batch(factor)] for factor in (1.0, 2.0, 0.5, 1.5)]
    assert_checkpointing_changes_nothing(Net(face, fused, **options), steps, use_reentrant)


@pytest.mark.parametrize("backward", ["sum", "in order", "reversed"])
@both_kinds
@both_faces
@both_paths
def test_several_forwards_before_their_backwards(fused, face, use_reentrant, backward):
    options = CHECKPOINTED["scheduled renorm"]
    steps = [[batch(factor), batch(2 * factor), batch(factor / 2)] for factor in (1.0, 2.0, 0.5)]
    assert_checkpointing_changes_nothing(Net(face, fused, **options), steps, use_reentrant, backward=backward)


@both_kinds
@both_paths
def test_the_same_batch_in_every_step(fused, use_reentrant):
    """Its statistics do not tell the steps apart, but each time it is the last forward that is repeated."""
    layer = torchs_face(fused, **CHECKPOINTED["scheduled renorm"])
    layer(batch(3.0))
    twin, x = copy.deepcopy(layer), batch()
    for _ in range(3):
        found = []
        for module, repeated in ((layer, False), (twin, True)):
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            y = checkpoint(module, leaf, use_reentrant=use_reentrant) if repeated else module(leaf)
            y.pow(3).sum().backward()
            found.append([y, leaf.grad, module.weight.grad, module.bias.grad, *state(module).values()])
        assert same(*found)


@both_kinds
@both_paths
def test_a_channel_of_nan_does_not_spoil_the_others(fused, use_reentrant):
    layer = torchs_face(fused, renorm=True, renorm_momentum=0.3)
    layer(batch(3.0))
    twin = copy.deepcopy(layer)
    batches = [batch(), batch(2.0)]
    for x in batches:
        x[0, 1] = torch.nan
    found = []
    for module, repeated in ((layer, False), (twin, True)):
        leaves = [x.clone().requires_grad_() for x in batches]
        outputs = [checkpoint(module, x, use_reentrant=use_reentrant) if repeated else module(x) for x in leaves]
        for y in outputs:
            y.pow(3).sum().backward()
        found.append([*(x.grad[:, [0, 2, 3]] for x in leaves), module.weight.grad[[0, 2, 3]]])
    assert same(*found) and all(gradient.isfinite().all() for gradient in found[0])


@both_kinds
@both_faces
@both_paths
def test_segments_cut_by_torch(fused, face, use_reentrant):
    plain = Net(face, fused, renorm=True, renorm_momentum=0.3)
    twin = copy.deepcopy(plain)
    for factor in (1.0, 2.0, 0.5):
        found, x = [], batch(factor)
        for model, segments in ((plain, None), (twin, 2)):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            layers = [layer for segment in model.segments for layer in segment]
            y = (
                model(leaf)
                if segments is None
                else checkpoint_sequential(layers, segments, leaf, use_reentrant=use_reentrant)
            )
            y.pow(3).mean().backward()
            found.append([y, leaf.grad, *(p.grad for p in model.parameters()), *state(model).values()])
        assert same(*found)


class Twice(nn.Module):
    """A layer that one segment uses twice, and a checkpoint inside of another."""

    def __init__(self, face: Face, fused: bool | None):
        super().__init__()
        self.layer = face(fused, renorm=True, renorm_momentum=0.3)
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor, use_reentrant: bool | None) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.layer(self.convolution(x).tanh())

        def outer(x: Tensor) -> Tensor:
            y = self.layer(x)
            return inner(y) if use_reentrant is None else checkpoint(inner, y, use_reentrant=use_reentrant)

        return outer(x) if use_reentrant is None else checkpoint(outer, x, use_reentrant=use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the first time, the inner segment's
@pytest.mark.parametrize("early_stop", [True, False], ids=["early stop", "to the end"])
@both_kinds
@both_faces
@both_paths
def test_a_layer_used_twice_and_nested_segments(fused, face, use_reentrant, early_stop):
    with set_checkpoint_early_stop(early_stop):
        steps = [[batch(factor)] for factor in (1.0, 2.0, 0.5)]
        assert_checkpointing_changes_nothing(Twice(face, fused), steps, use_reentrant)


@both_kinds
@both_paths
def test_dropout_in_front_of_a_layer(fused, use_reentrant):
    """The recomputed batch is the same one only because torch restores the random state."""
    model = nn.Sequential(nn.Dropout(0.5), torchs_face(fused, renorm=True, renorm_momentum=0.3))
    twin, x = copy.deepcopy(model), [batch(factor) for factor in (1.0, 2.0, 0.5)]
    found = []
    for module, repeated in ((model, False), (twin, True)):
        torch.manual_seed(3)
        for one in x:
            leaf = one.clone().requires_grad_()
            y = checkpoint(module, leaf, use_reentrant=use_reentrant) if repeated else module(leaf)
            y.pow(3).mean().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters()), *state(module).values()])
    assert same(*found)


@both_paths
def test_a_second_backward_through_the_same_segment(fused):
    layer = torchs_face(fused, renorm=True, renorm_momentum=0.3)
    layer(batch(2.0))
    twin = copy.deepcopy(layer)
    x = batch()
    found = []
    for module, repeated in ((layer, False), (twin, True)):
        leaf = x.clone().requires_grad_()
        with set_checkpoint_early_stop(False):
            y = checkpoint(module, leaf, use_reentrant=False) if repeated else module(leaf)
        for retain in (True, False):
            y.pow(3).sum().backward(retain_graph=retain)
        found.append([leaf.grad, module.weight.grad, *state(module).values()])
    assert same(*found)


@pytest.mark.parametrize("when", ["before backward", "after backward", "never"])
@both_kinds
@both_faces
@both_paths
def test_checkpointing_with_deferred_updates(fused, face, use_reentrant, when):
    plain = Net(face, fused, renorm=True, renorm_momentum=0.3, renorm_clipping=schedules.linear(0, 4))
    plain(batch(2.0))
    twin = copy.deepcopy(plain)
    for factor in (1.0, 2.0, 0.5):
        found, x = [], batch(factor)
        for model, kind in ((plain, None), (twin, use_reentrant)):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            with deferred_updates() as updates:
                y = model(leaf, kind)
            assert len(updates) == 4
            if when == "before backward":
                updates.apply()
            y.pow(3).mean().backward()
            if when == "after backward":
                updates.apply()
            found.append([y, leaf.grad, *(p.grad for p in model.parameters()), *state(model).values()])
        assert same(*found)


@both_kinds
@both_paths
def test_backward_inside_the_block_collects_nothing_more(fused, use_reentrant):
    model = Net(torchs_face, fused, renorm=True)
    with deferred_updates() as updates:
        model(batch().requires_grad_(), use_reentrant).sum().backward()
        assert len(updates) == 4


@both_kinds
@both_paths
def test_checkpointing_a_layer_that_is_not_trainable(fused, use_reentrant):
    def frozen(fused: bool | None, **options: Any) -> nn.Module:
        layer = tensorflows_face(fused, **options)
        layer(batch(2.0), training=True)
        layer.trainable = False
        return layer

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), frozen(fused, renorm=True))

        def forward(self, x: Tensor, use_reentrant: bool | None) -> Tensor:
            return self.net(x) if use_reentrant is None else checkpoint(self.net, x, use_reentrant=use_reentrant)

    model = Frozen()
    before = state(model)
    twin = copy.deepcopy(model)
    found = []
    for module, kind in ((model, None), (twin, use_reentrant)):
        torch.manual_seed(2)
        for _ in range(2):
            module(batch().requires_grad_(), kind).pow(3).sum().backward()
        found.append([p.grad for p in module.net[0].parameters()])
        assert same(state(module), before)
    assert same(*found)


@both_kinds
@both_paths
def test_checkpointing_in_evaluation(fused, use_reentrant):
    model = Net(torchs_face, fused, renorm=True)
    model(batch(2.0))
    model.eval()
    before, x = state(model), batch()
    found = []
    for kind in (None, use_reentrant):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        model(leaf, kind).pow(3).sum().backward()
        found.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert same(*found) and same(state(model), before)


def test_checkpointing_the_function_of_a_store():
    """A repeated call finds its variables by name."""
    store, twin = VariableStore(), VariableStore()
    x = [torch.randn(6, 3) * factor for factor in (1.0, 2.0, 0.5)]

    def call(x: Tensor) -> Tensor:
        return batch_normalization(x, name="bn", reuse="auto", training=True, renorm=True, renorm_momentum=0.7)

    found = []
    for variables, repeated in ((store, False), (twin, True)):
        for one in x:
            leaf = one.clone().requires_grad_()
            with variables:
                y = checkpoint(call, leaf, use_reentrant=False) if repeated else call(leaf)
                y.pow(3).sum().backward()
        found.append([leaf.grad, *variables.variables().values()])
    assert same(*found)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of derivatives
# ---------------------------------------------------------------------------------------------------------------------


def penalized(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The gradients of a gradient penalty."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    (dx,) = torch.autograd.grad(run(leaf).sin().sum(), leaf, create_graph=True)
    dx.square().sum().backward()
    zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [dx.detach(), leaf.grad, *zero, *state(model).values()]


@pytest.mark.parametrize("options", [CHECKPOINTED["renorm"], CHECKPOINTED["groups and renorm"]], ids=["", "groups"])
@both_faces
@both_paths
def test_double_backward_holds_the_correction_constant(fused, face, options):
    """Against the formula, in which r and d are numbers that the output shows."""
    layer = face(fused, dtype=torch.float64, **options)
    groups = 2 if "virtual_batch_size" in options else 1
    eps = getattr(layer, "eps", None) or layer.epsilon
    for factor in (1.0, 2.0):
        layer(batch(factor).double())
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_()
    x = batch(0.5).double()
    with deferred_updates():
        y = layer(x).detach()

    def normalized(x: Tensor) -> Tensor:
        z = torch.empty_like(x)
        for group in range(groups):
            var, mean = torch.var_mean(x[group::groups], (0, 2, 3), correction=0, keepdim=True)
            z[group::groups] = (x[group::groups] - mean) / (var + eps).sqrt()
        return z

    def per_channel(value: Tensor) -> Tensor:
        return value.detach().view(1, -1, 1, 1)

    z = (y - per_channel(layer.bias)) / per_channel(layer.weight)
    x_hat = normalized(x)
    r = per_channel((z * x_hat).mean((0, 2, 3)) / x_hat.square().mean((0, 2, 3)))
    d = per_channel(z.mean((0, 2, 3)))
    assert (r - 1).abs().max() > 0.05 and d.abs().max() > 0.05

    def formula(x: Tensor) -> Tensor:
        return (normalized(x) * r + d) * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    expected = penalized(layer, x, formula)[:4]
    torch.testing.assert_close(penalized(layer, x, layer)[:4], expected)


@both_faces
@both_paths
def test_double_backward_through_a_checkpoint(fused, face):
    plain = Net(face, fused, segments=1, renorm=True, renorm_momentum=0.3)
    for factor in (1.0, 2.0):
        plain(batch(factor))
    twin, x = copy.deepcopy(plain), batch(0.5)
    expected = penalized(plain, x, plain)
    assert same(penalized(twin, x, lambda x: twin(x, False)), expected)
