"""VariableStore and batch_normalization: names, who shares what, and what a store is as a module."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from layer_pairs import assert_same_state
from torch import Tensor, nn

from torch_bn.functional import batch_norm
from torch_bn.layers import VariableStore, batch_normalization
from torch_bn.modules import RENORM_STATE
from torch_bn.regularizers import l2

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def names(store: VariableStore) -> list[str]:
    """Of the layers in the store."""
    return [name for name, _ in store.named_children()]


def test_calls_are_numbered_anew_in_each_run():
    store, x = VariableStore(), torch.randn(5, 3)
    for _ in range(3):
        with store:
            for _ in range(3):
                batch_normalization(x, training=True)
            batch_normalization(x, name="mine", training=True)
    base = "batch_normalization"
    assert names(store) == [base, f"{base}_1", f"{base}_2", "mine"]
    assert [int(layer.num_batches_tracked) for layer in store.children()] == [3] * 4
    assert list(store.variables())[:5] == [
        f"{base}/gamma",
        f"{base}/beta",
        f"{base}/moving_mean",
        f"{base}/moving_variance",
        f"{base}_1/gamma",
    ]


def test_variables_have_tensorflows_names_and_are_the_layers():
    store = VariableStore()
    with store:
        batch_normalization(torch.randn(5, 3), name="bn", renorm=True)
    layer, variables = store.get_submodule("bn"), store.variables()
    assert layer.name == "bn"
    assert list(variables) == [f"bn/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")] + [
        f"bn/{name}" for name in RENORM_STATE
    ]
    assert variables["bn/gamma"] is layer.gamma and variables["bn/moving_mean"] is layer.moving_mean


def test_scopes():
    store, x = VariableStore(), torch.randn(5, 3)
    with store:
        batch_normalization(x)
        with store.scope("outer"):
            batch_normalization(x)
            batch_normalization(x)
            batch_normalization(x, name="bn")
            with store.scope("inner"):
                batch_normalization(x, name="bn")
        batch_normalization(x, name="bn")
    base = "batch_normalization"
    assert names(store) == [base, f"outer/{base}", f"outer/{base}_1", "outer/bn", "outer/inner/bn", "bn"]
    assert "outer/inner/bn/gamma" in store.variables() and "outer/inner/bn.weight" in store.state_dict()


def test_reuse_of_scopes_is_inherited_and_may_be_overruled():
    store, x = VariableStore(), torch.randn(5, 3)
    with store:
        with store.scope("s"):
            batch_normalization(x, name="bn")
        with store.scope("s", reuse=True):
            batch_normalization(x, name="bn")
            with store.scope("t", reuse="auto"):
                batch_normalization(x, name="bn")
                batch_normalization(x, name="bn")
            with pytest.raises(ValueError, match="^batch_normalization: variable s/bn/gamma already exists"):
                batch_normalization(x, name="bn", reuse=False)
            with pytest.raises(ValueError, match="^batch_normalization: variable s/other/gamma does not exist"):
                batch_normalization(x, name="other")
        with pytest.raises(ArithmeticError), store.scope("u", reuse=True):
            raise ArithmeticError
        batch_normalization(x, name="after")
    assert names(store) == ["s/bn", "s/t/bn", "after"]


def test_reuse():
    store, x = VariableStore(), torch.randn(5, 3) + 1
    with store:
        batch_normalization(x, name="bn", reuse="auto", training=True)
        batch_normalization(x, name="bn", reuse="auto", training=True)
        y = batch_normalization(x, name="bn", reuse=True, training=True, epsilon=9.0, momentum=0.0)
        with pytest.raises(ValueError, match="^batch_normalization: variable bn/gamma already exists; reuse must be "):
            batch_normalization(x, name="bn")
        with pytest.raises(ValueError, match="^batch_normalization: variable bn/gamma already exists; reuse must be "):
            batch_normalization(x, name="bn", reuse=False)
        with pytest.raises(ValueError, match="^batch_normalization: variable no/gamma does not exist, but reuse is Tr"):
            batch_normalization(x, name="no", reuse=True)
    layer = store.get_submodule("bn")
    assert layer.num_batches_tracked == 3 and names(store) == ["bn"]
    torch.testing.assert_close(layer.moving_mean, x.mean(0))  # the last one had a momentum of its own
    torch.testing.assert_close(y, batch_norm(x, None, None, training=True, eps=9.0))


def test_reuse_without_a_name_takes_the_first():
    """TensorFlow does, silently."""
    store, x = VariableStore(), torch.randn(5, 3)
    with store:
        with pytest.raises(ValueError, match="^batch_normalization: variable batch_normalization/gamma does not exist"):
            batch_normalization(x, reuse=True)
        for reuse in (None, None, True, "auto"):
            batch_normalization(x, reuse=reuse, training=True)
    assert [int(layer.num_batches_tracked) for layer in store.children()] == [3, 1]


def test_gradients_of_all_who_share_add_up():
    store, x = VariableStore(), torch.randn(5, 3)
    with store:
        first = batch_normalization(x, name="bn", training=True)
        second = batch_normalization(2 * x, name="bn", reuse=True, training=True)
    (first.sum() + second.sum()).backward()
    assert store.variables()["bn/beta"].grad.tolist() == [10, 10, 10]


SHARED = "batch_normalization: variable bn/"
CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "renorm after plain": ({}, {"renorm": True}, f"{SHARED}renorm_mean does not exist, but bn is shared"),
    "center after none": ({"center": False}, {}, f"{SHARED}beta does not exist, but bn is shared"),
    "scale after none": ({"scale": False}, {}, f"{SHARED}gamma does not exist, but bn is shared"),
    "channels": ({}, {"axis": 1}, f"{SHARED}gamma must have the shape [3] of what it shares, got [4]"),
    "axes": ({}, {"axis": [1, 2]}, f"{SHARED}gamma must have the shape [3] of what it shares, got [1, 4, 3]"),
    "only one has groups": (
        {},
        {"virtual_batch_size": 2},
        f"{SHARED}gamma has another shape in TensorFlow with virtual_batch_size; all who share it must have one, "
        "or none",
    ),
}


@pytest.mark.parametrize(("first", "second", "text"), CONFLICTS.values(), ids=CONFLICTS)
def test_conflicts_between_those_who_share(first, second, text):
    store, x = VariableStore(), torch.randn(6, 4, 3)
    with store:
        batch_normalization(x, name="bn", training=True, **first)
        before = {name: value.clone() for name, value in store.state_dict().items()}
        for reuse in (True, "auto"):
            with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
                batch_normalization(x, name="bn", training=True, reuse=reuse, **second)
    with store, pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        batch_normalization(x, name="bn", training=True, **second)
    torch.testing.assert_close(dict(store.state_dict()), before, rtol=0, atol=0)
    assert store.get_submodule("bn").num_batches_tracked == 1


def test_what_may_be_shared():
    store, x = VariableStore(), torch.randn(6, 4, 3)
    with store:
        batch_normalization(x, name="bn", renorm=True, virtual_batch_size=2, training=True)
        batch_normalization(x, name="bn", reuse=True, virtual_batch_size=3, training=True)
        batch_normalization(x[:, 0], name="bn", reuse=True, virtual_batch_size=3, center=False, training=True)
    layer = store.get_submodule("bn")
    assert layer.num_batches_tracked == 3 and layer.renorm_mean_weight.item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    "bad",
    [{"training": 2}, {"axis": 5}, {"virtual_batch_size": 4}, {"adjustment": 3}, {"gamma_initializer": 1}],
    ids=str,
)
def test_a_refused_call_leaves_no_trace(bad):
    store, x = VariableStore(), torch.randn(6, 3)
    with store:
        with pytest.raises((TypeError, ValueError)):
            batch_normalization(x, **({"training": True} | bad))
        assert not list(store.children())
        batch_normalization(x, training=True)
        with pytest.raises((TypeError, ValueError)):
            batch_normalization(x, **({"training": True} | bad))
        batch_normalization(x, training=True)
    assert names(store) == ["batch_normalization", "batch_normalization_1"]


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------


def test_the_innermost_store_serves():
    outer, inner, x = VariableStore(), VariableStore(), torch.randn(5, 3)
    with outer:
        batch_normalization(x)
        with inner:
            batch_normalization(x)
        batch_normalization(x)
    assert (len(names(outer)), len(names(inner))) == (2, 1)


def test_a_store_is_left_by_an_exception_and_can_be_entered_again():
    store, x = VariableStore(), torch.randn(5, 3)
    with pytest.raises(ArithmeticError), store:
        batch_normalization(x)
        raise ArithmeticError
    with pytest.raises(RuntimeError, match="^batch_normalization: must be called inside `with torch_bn.layers.Variabl"):
        batch_normalization(x)
    with store:
        batch_normalization(x)
        with pytest.raises(RuntimeError, match="^VariableStore: a store must not be entered again before it is left$"):
            store.__enter__()
    assert names(store) == ["batch_normalization"]


@pytest.mark.parametrize("defer_updates", [False, True])
def test_an_optimizer_trains_what_the_store_holds(defer_updates):
    store, linear = VariableStore(defer_updates), nn.Linear(4, 3)
    x, target = torch.randn(16, 4), torch.randn(16, 3)

    def loss() -> Tensor:
        with store:
            y = batch_normalization(linear(x), training=True, momentum=0.5, gamma_regularizer=l2(1e-3))
            y = batch_normalization(y, name="last", training=True, momentum=0.5, renorm=True)
        return (y - target).square().mean() + sum(store.regularization_losses())

    loss()
    optimizer = torch.optim.Adam([*linear.parameters(), *store.parameters()], 0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
        store.update_ops.apply()
    assert losses[-1] < 0.8 * losses[0]
    assert not store.get_submodule("last").gamma.eq(1).any() and len(store.update_ops) == 0
    assert store.get_submodule("last").num_batches_tracked == 41
    with store:
        y = batch_normalization(linear(x), training=False)
        y = batch_normalization(y, name="last")
    assert (y - target).square().mean() < losses[0]


def test_trainable_variables_of_a_store():
    store, x = VariableStore(), torch.randn(5, 3)
    for _ in range(2):
        with store:
            y = batch_normalization(x, name="a", training=True)
            y = batch_normalization(y, name="b", training=True, trainable=False)
    variables = store.variables()
    found = store.trainable_variables()
    assert len(found) == 2 and found[0] is variables["a/gamma"] and found[1] is variables["a/beta"]
    assert not variables["b/moving_mean"].any() and len(list(store.parameters())) == 4


def run(store: VariableStore, x: Tensor, training: bool = True) -> Tensor:
    with store:
        y = batch_normalization(x, training=training, renorm=True)
        with store.scope("s"):
            return batch_normalization(y, training=training)


def test_a_state_dict_waits_for_variables_that_are_not_yet_made():
    store, x = VariableStore(), torch.randn(5, 3)
    run(store, x + 1)
    run(store, x + 2)
    fresh = VariableStore()
    fresh.load_state_dict(store.state_dict())
    assert not fresh.state_dict()
    assert torch.equal(run(fresh, x, training=False), run(store, x, training=False))
    assert_same_state(fresh, store, rtol=0, atol=0)
    fresh.load_state_dict(store.state_dict())  # now there are variables
    assert torch.equal(run(fresh, x), run(store, x))
    assert_same_state(fresh, store, rtol=0, atol=0)


def test_a_state_dict_of_a_model_around_waits_as_well():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.store = nn.Linear(3, 3), VariableStore()

        def forward(self, x: Tensor) -> Tensor:
            return run(self.store, self.linear(x))

    model, fresh, x = Model(), nn.ModuleDict({"inner": Model()}), torch.randn(5, 3)
    model(x)
    fresh.load_state_dict({f"inner.{name}": value for name, value in model.state_dict().items()}, strict=True)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model(x + 1)  # which changes the tensors that were loaded
    run(fresh["inner"].store, x, training=False)
    torch.testing.assert_close(dict(fresh["inner"].state_dict()), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "another"'):
        model.load_state_dict(expected | {"another": x})


def test_a_state_dict_that_does_not_fit_what_is_made():
    store, x = VariableStore(), torch.randn(5, 3)
    run(store, x)
    state = store.state_dict()
    del state["s/batch_normalization.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "s/batch_normalization.weight"'):
        store.load_state_dict(state)
    fresh = VariableStore()
    fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        run(fresh, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
@pytest.mark.parametrize("defer_updates", [False, True])
def test_copies_of_a_store(copied, defer_updates):
    store, x = VariableStore(defer_updates), torch.randn(5, 3)
    run(store, x)
    twin = copied(store)
    assert len(twin.update_ops) == len(store.update_ops) == 2 * defer_updates
    twin.update_ops.apply()
    assert twin.get_submodule("batch_normalization").num_batches_tracked == 1
    assert store.get_submodule("batch_normalization").num_batches_tracked == (0 if defer_updates else 1)
    store.update_ops.apply()
    assert torch.equal(run(twin, x), run(store, x))
    assert_same_state(twin, store, rtol=0, atol=0)


def test_a_store_moves_like_a_module():
    store, x = VariableStore(), torch.randn(5, 3)
    run(store, x)
    store.double()
    assert run(store, x.double()).dtype == torch.float64
    assert {value.dtype for value in store.variables().values()} == {torch.float64}
    model = nn.ModuleDict({"bn": store, "linear": nn.Linear(3, 3)})
    assert "bn.s/batch_normalization.running_mean" in model.state_dict() and len(list(model.parameters())) == 6
