"""deferred_updates() and the update_ops of a store: when a batch enters the running statistics."""

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from faces import (
    CHANNELS,
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
from torch import nn

import torch_bn
from torch_bn import deferred_updates
from torch_bn.functional import RenormState, batch_norm
from torch_bn.layers import VariableStore, batch_normalization

_one_thread = pytest.fixture(autouse=True)(one_thread)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_momentum": 0.3},
    "groups": {"virtual_batch_size": 2},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
@both_faces
@both_paths
def test_updates_wait_until_they_are_applied_and_run_once(fused, face, options):
    layer = face(fused, **options)
    twin = copy.deepcopy(layer)
    x = batch()
    with deferred_updates() as updates:
        assert len(updates) == 0
        y = layer(x)
        assert len(updates) == 1
    assert same(state(layer), state(face(fused, **options)))
    assert torch.equal(y, twin(x))
    updates.apply()
    assert len(updates) == 0 and same(state(layer), state(twin))
    updates.apply()
    assert same(state(layer), state(twin))


@both_faces
@both_paths
def test_gradients_are_those_of_the_same_forward_outside(fused, face):
    layer = face(fused, renorm=True)
    layer(batch(3.0))
    twin = copy.deepcopy(layer)
    x, dy = batch(), batch()
    found = []
    for module, block in ((layer, deferred_updates), (twin, nullcontext)):
        leaf = x.clone().requires_grad_()
        with block():
            y = module(leaf)
        found.append(torch.autograd.grad(y, [leaf, module.weight, module.bias], dy))
    assert same(*found)


@pytest.mark.parametrize("momentum", [0.3, None])
@both_paths
def test_updates_run_in_the_order_of_their_forwards(fused, momentum):
    layer = torchs_face(fused, renorm=True, momentum=momentum, renorm_momentum=0.4)
    twin = copy.deepcopy(layer)
    with deferred_updates() as updates:
        for factor in (1.0, 5.0, 2.0):
            torch.manual_seed(int(factor))
            layer(batch(factor))
    assert len(updates) == 3
    updates.apply()
    for factor in (1.0, 5.0, 2.0):
        torch.manual_seed(int(factor))
        # The renorm of the deferred forwards is another one, but what enters the statistics is not.
        twin(batch(factor))
    assert same(state(layer), state(twin))


@both_faces
@both_paths
def test_discarded_updates_never_happened(fused, face):
    layer = face(fused, renorm=True)
    before = state(layer)
    with deferred_updates() as updates:
        layer(batch())
    updates.discard()
    assert len(updates) == 0
    updates.apply()
    assert same(state(layer), before)


@both_paths
def test_updates_may_be_applied_inside_the_block(fused):
    layer, twin = torchs_face(fused), torchs_face(fused)
    first, second = batch(), batch(2.0)
    with deferred_updates() as updates:
        layer(first)
        updates.apply()
        twin(first)  # deferred, too
        assert layer.num_batches_tracked == 1 and len(updates) == 1
        layer(second)
        updates.discard()
    twin(first)
    assert same(state(layer), state(twin))


@both_paths
def test_the_innermost_block_collects(fused):
    layer = torchs_face(fused)
    with deferred_updates() as outer:
        layer(batch())
        with deferred_updates() as inner:
            layer(batch())
            layer(batch())
        layer(batch())
    assert (len(outer), len(inner)) == (2, 2)
    layer(batch())
    assert layer.num_batches_tracked == 1
    inner.apply()
    outer.apply()
    assert layer.num_batches_tracked == 5


@both_paths
def test_blocks_may_end_in_any_order(fused):
    layer = torchs_face(fused)
    first, second = deferred_updates(), deferred_updates()
    outer, inner = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    layer(batch())
    second.__exit__(None, None, None)
    layer(batch())
    assert (len(outer), len(inner), int(layer.num_batches_tracked)) == (0, 1, 1)


@both_paths
def test_forwards_of_several_layers_are_collected(fused):
    model = nn.Sequential(torchs_face(fused), nn.ReLU(), tensorflows_face(fused), torchs_face(fused, renorm=True))
    twin, before = copy.deepcopy(model), state(model)
    x = batch()
    with deferred_updates() as updates:
        model(x)
    assert len(updates) == 3 and same(state(model), before)
    twin(x)
    updates.apply()
    assert same(state(model), state(twin))


@both_paths
def test_the_function_is_collected_as_well(fused):
    mean, var, averages = torch.zeros(CHANNELS), torch.ones(CHANNELS), [torch.zeros(CHANNELS) for _ in range(2)]
    renorm = RenormState(*averages, torch.zeros(()), torch.zeros(()))
    x = batch()
    with deferred_updates() as updates:
        batch_norm(x, mean, var, training=True, renorm=renorm, fused=fused)
    assert not mean.any() and not renorm.mean_weight.any() and len(updates) == 1
    updates.apply()
    torch.testing.assert_close(mean, 0.1 * x.mean((0, 2, 3)))
    assert renorm.mean_weight.item() == pytest.approx(0.01)


@both_paths
def test_an_exception_leaves_the_block(fused):
    layer = torchs_face(fused)
    with pytest.raises(ArithmeticError), deferred_updates() as updates:
        layer(batch())
        raise ArithmeticError
    layer(batch())
    assert layer.num_batches_tracked == 1 and len(updates) == 1
    updates.apply()
    assert layer.num_batches_tracked == 2


@both_paths
def test_a_refused_forward_is_not_collected(fused):
    layer = torch_bn.BatchNorm1d(3, fused=fused)
    with deferred_updates() as updates:
        with pytest.raises(ValueError, match="^Expected more than 1 value per channel"):
            layer(torch.randn(1, 3))
        with pytest.raises(RuntimeError, match="should contain 4 elements not 3$"):
            layer(torch.randn(5, 4))
        with pytest.raises(ValueError, match="^batch_norm: axis must be in .* for an input of rank 4, got 7$"):
            batch_norm(batch(), torch.zeros(4), torch.ones(4), training=True, axis=7, fused=fused)
    assert len(updates) == 0


@both_paths
@pytest.mark.on_cpu  # a thread has a default device of its own
def test_threads_do_not_see_each_other(fused):
    layers = [torchs_face(fused) for _ in range(2)]
    lengths = []

    def other_thread() -> None:
        layers[1](batch())
        with deferred_updates() as updates:
            layers[1](batch())
            lengths.append(len(updates))

    with deferred_updates() as updates:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        layers[0](batch())
        lengths.append(len(updates))
    assert lengths == [1, 1]
    assert [int(layer.num_batches_tracked) for layer in layers] == [0, 1]


@both_faces
@both_paths
def test_evaluation_collects_nothing(fused, face):
    layer = face(fused, renorm=True).eval()
    stateless = torch_bn.BatchNorm2d(CHANNELS, track_running_stats=False, fused=fused)
    with deferred_updates() as updates:
        layer(batch())
        stateless(batch())
        stateless.eval()(batch())
        batch_norm(batch(), None, None, training=True, fused=fused)
    assert len(updates) == 0


@both_paths
def test_a_layer_that_is_not_trainable_collects_nothing(fused):
    layer = tensorflows_face(fused, renorm=True)
    layer.trainable = False
    before = state(layer)
    with deferred_updates() as updates:
        layer(batch(), training=True)
    layer(batch(), training=True)
    assert len(updates) == 0 and same(state(layer), before)


@both_faces
@both_paths
def test_an_empty_batch_is_counted_when_it_is_applied(fused, face):
    layer = face(fused, renorm=True)
    before = state(layer)
    with deferred_updates() as updates:
        layer(batch()[:0])
    assert same(state(layer), before)
    updates.apply()
    assert layer.num_batches_tracked == 1
    assert same(state(layer) | {"num_batches_tracked": before["num_batches_tracked"]}, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both_paths
def test_forwards_that_record_no_gradient_are_collected(fused, mode):
    layer, twin = torchs_face(fused, renorm=True), torchs_face(fused, renorm=True)
    x = batch()
    with mode(), deferred_updates() as updates:
        layer(x)
    updates.apply()
    twin(x)
    assert same(state(layer), state(twin))


@both_paths
def test_updates_see_what_has_been_loaded_since(fused):
    layer, other, twin = (torchs_face(fused) for _ in range(3))
    other(batch(4.0))
    x = batch()
    with deferred_updates() as updates:
        layer(x)
    for module in (layer, twin):
        module.load_state_dict(other.state_dict())
    updates.apply()
    twin(x)
    assert same(state(layer), state(twin))


# ---------------------------------------------------------------------------------------------------------------------
# What deferring is for
# ---------------------------------------------------------------------------------------------------------------------


def network(face: Face, fused: bool | None, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), face(fused, **options), nn.ReLU(), nn.Conv2d(CHANNELS, 1, 1))


@both_faces
@both_paths
def test_gradient_accumulation(fused, face):
    """All micro-batches see the statistics of before the step, and enter them after it."""
    model = network(face, fused, renorm=True)
    model(batch(2.0))
    before = state(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    entered = []
    with deferred_updates() as updates:
        for factor in (1.0, 2.0, 3.0):
            x = batch(factor)
            model(x).square().mean().backward()
            entered.append(model[0](x).detach())
            assert same(state(model), before)
    optimizer.step()
    assert len(updates) == 3
    twin = copy.deepcopy(model)
    updates.apply()
    for x in entered:
        twin[1](x)
    assert same(state(model), state(twin))


@both_faces
@both_paths
def test_a_discriminator_that_counts_only_real_images(fused, face):
    generator, discriminator = nn.Conv2d(CHANNELS, CHANNELS, 1), network(face, fused)
    twin = copy.deepcopy(discriminator)
    for _ in range(2):
        real, fake = batch(), generator(batch())
        with deferred_updates() as of_real:
            loss = discriminator(real).mean()
        with deferred_updates() as of_fake:
            loss = loss - discriminator(fake).mean()
        loss.backward()
        assert generator.weight.grad is not None
        of_fake.discard()
        of_real.apply()
        twin(real)
    assert discriminator[1].num_batches_tracked == 2 and same(state(discriminator), state(twin))


@both_faces
@both_paths
def test_a_step_that_loss_scaling_skips(fused, face):
    model = network(face, fused, renorm=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, taken in ((1.0, True), (float("inf"), False), (1.0, True)):
        before, scale = state(model), scaler.get_scale()
        optimizer.zero_grad()
        with deferred_updates() as updates:
            loss = model(batch()).mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        was_taken = scaler.get_scale() >= scale
        updates.apply() if was_taken else updates.discard()
        assert was_taken == taken == (not same(state(model), before))
    assert model[1].num_batches_tracked == 2


# ---------------------------------------------------------------------------------------------------------------------
# VariableStore.update_ops
# ---------------------------------------------------------------------------------------------------------------------


def test_update_ops_of_a_store_run_when_the_user_says_so():
    store, twin = VariableStore(defer_updates=True), VariableStore()
    batches = [torch.randn(5, 3), torch.randn(5, 3)]
    for x in batches:
        for variables in (store, twin):
            with variables:
                y = batch_normalization(x, name="first", training=True)
                batch_normalization(y, name="second", training=True, renorm=True)
                batch_normalization(y, name="third", training=False)
        assert len(store.update_ops) == 2 and len(twin.update_ops) == 0
        assert store.get_submodule("first").num_batches_tracked == twin.get_submodule("first").num_batches_tracked - 1
        store.update_ops.apply()
    assert same(dict(store.variables()), dict(twin.variables()))


def test_update_ops_that_are_forgotten_leave_the_moving_statistics():
    store = VariableStore(defer_updates=True)
    for count in (1, 2):
        with store:
            batch_normalization(torch.randn(5, 3), training=True)
        assert len(store.update_ops) == count
        assert not store.variables()["batch_normalization/moving_mean"].any()
    store.update_ops.discard()
    assert len(store.update_ops) == 0


def test_shared_variables_are_updated_by_each_call():
    store, x = VariableStore(defer_updates=True), torch.randn(5, 3) + 1
    with store:
        for reuse in (None, True):
            batch_normalization(x, momentum=0.5, name="bn", reuse=reuse, training=True)
    assert len(store.update_ops) == 2
    store.update_ops.apply()
    torch.testing.assert_close(store.variables()["bn/moving_mean"], 0.75 * x.mean(0))


def test_blocks_and_stores_may_be_nested():
    store, x = VariableStore(defer_updates=True), torch.randn(5, 3)
    with deferred_updates() as outer, store:
        batch_normalization(x, training=True)
        with deferred_updates() as inner:
            batch_normalization(x, training=True)
    assert (len(outer), len(store.update_ops), len(inner)) == (0, 1, 1)
    with VariableStore() as at_once, deferred_updates() as updates:
        batch_normalization(x, training=True)
    assert len(updates) == 1 and not at_once.variables()["batch_normalization/moving_mean"].any()


def test_an_exception_leaves_the_store():
    store, x = VariableStore(defer_updates=True), torch.randn(5, 3)
    with pytest.raises(ArithmeticError), store:
        batch_normalization(x, training=True)
        raise ArithmeticError
    layer = torch_bn.BatchNorm1d(3)
    layer(x)
    assert layer.num_batches_tracked == 1 and len(store.update_ops) == 1
    with store:
        batch_normalization(x, training=True)
    assert len(store.update_ops) == 2
