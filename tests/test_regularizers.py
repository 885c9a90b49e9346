"""l1, l2, l1_l2 and how losses are collected, with small stand-ins for the layers."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from torch_bn.regularizers import l1, l1_l2, l2, losses_of, regularization_losses

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ALL = [(l1(0.25), 0.25, 0.0), (l2(0.5), 0.0, 0.5), (l1_l2(0.25, 0.5), 0.25, 0.5)]


class Layer(nn.Module):
    """A layer with gamma and beta, of which each may be missing or have no regularizer."""

    def __init__(self, gamma=None, beta=None, gamma_regularizer=None, beta_regularizer=None):
        super().__init__()
        self.gamma = None if gamma is None else nn.Parameter(torch.tensor(gamma))
        self.beta = None if beta is None else nn.Parameter(torch.tensor(beta))
        self.gamma_regularizer, self.beta_regularizer = gamma_regularizer, beta_regularizer

    def layer_losses(self):
        return losses_of([(self.gamma, self.gamma_regularizer), (self.beta, self.beta_regularizer)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 5, 3), (0,)])
@pytest.mark.parametrize(("regularizer", "first", "second"), ALL, ids=lambda value: repr(value))
def test_the_value_and_the_gradient_are_those_of_the_formula(
    regularizer, first, second, shape, dtype, device, tolerances
):
    w = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    exact = w.detach().double()
    loss = regularizer(w)
    loss.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide and loss.shape == () and loss.device == w.device
    torch.testing.assert_close(
        loss.double(), first * exact.abs().sum() + second * exact.square().sum(), **tolerances[wide]
    )
    expected = first * exact.sign() + 2 * second * exact
    torch.testing.assert_close(w.grad.double(), expected, **tolerances[dtype])


def test_a_half_variable_may_have_a_sum_beyond_its_range():
    w = torch.full((300,), 300.0, dtype=torch.float16)
    assert l2(1.0)(w).item() == 300 * 300**2


def test_a_factor_of_zero_is_no_nan_where_the_sum_overflows():
    w = torch.full((2,), 1e30)
    torch.testing.assert_close(l1_l2(1.0, 0.0)(w).item(), 2e30)
    assert l2(0.0)(w).item() == 0


@pytest.mark.parametrize(
    ("regularizer", "text"),
    [(l1(0.1), "l1(0.1)"), (l2(2), "l2(2.0)"), (l1_l2(0.1, 0.2), "l1_l2(0.1, 0.2)"), (l1_l2(0, 0.2), "l2(0.2)")],
)
def test_a_regularizer_reads_well_and_survives_copies(regularizer, text):
    assert repr(regularizer) == text
    assert pickle.loads(pickle.dumps(regularizer)) == copy.deepcopy(regularizer) == regularizer
    assert eval(text) == regularizer and hash(eval(text)) == hash(regularizer)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (l1, "l1: factor"),
        (l2, "l2: factor"),
        (lambda x: l1_l2(x, 1), "l1_l2: l1"),
        (lambda x: l1_l2(1, x), "l1_l2: l2"),
    ],
    ids=["l1", "l2", "l1_l2-first", "l1_l2-second"],
)
def test_a_factor_must_be_a_finite_number_that_is_not_negative(make, what):
    for bad in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^{what} must be finite and >= 0, got {bad}$"):
            make(bad)
    for bad in ("0.1", None, True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=f"^{what} must be a number, got {re.escape(repr(bad))}$"):
            make(bad)


def test_a_numpy_factor_becomes_a_plain_float():
    assert repr(l1(np.float32(0.5))) == "l1(0.5)"


def test_losses_of_leaves_out_what_is_missing_and_keeps_the_order():
    w, v = torch.tensor([1.0, -2.0]), torch.tensor([3.0])
    pairs = [(w, l1(1.0)), (None, l1(1.0)), (w, None), (w, lambda w: None), (None, None), (v, l2(1.0))]
    assert [loss.item() for loss in losses_of(iter(pairs))] == [3.0, 9.0]


def test_a_regularizer_may_return_any_single_value(device):
    w = torch.tensor([1.0, -2.0], dtype=torch.float16, device=device, requires_grad=True)
    losses = losses_of(
        [(w, lambda w: w.sum()), (w, lambda w: w[:1].reshape(1, 1)), (w, lambda w: 3), (w, lambda w: 0.5)]
    )
    assert [loss.item() for loss in losses] == [-1, 1, 3, 0.5]
    assert {(loss.shape, loss.dtype, loss.device) for loss in losses} == {(torch.Size([]), torch.float32, w.device)}
    sum(losses).backward()
    assert w.grad.tolist() == [2, 1] and w.grad.dtype == torch.float16


def test_a_regularizer_of_your_own_sees_float32_for_a_half_variable():
    w = torch.full((300,), 300.0, dtype=torch.float16)
    assert losses_of([(w, lambda w: w.square().sum())])[0].item() == 300 * 300**2


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.ones(3), r"shape \[3\]"),
        (torch.ones(0, 2), r"shape \[0, 2\]"),
        ("1", "str"),
        (True, "bool"),
        ([1], "list"),
    ],
    ids=["vector", "empty", "str", "bool", "list"],
)
def test_a_regularizer_may_not_return_anything_else(result, got):
    class Mine:
        def __call__(self, w):
            return result

        def __repr__(self):
            return "Mine()"

    with pytest.raises(ValueError, match=rf"^Mine\(\) must return a number or a tensor of one element, got {got}$"):
        losses_of([(torch.ones(3), Mine())])


def model() -> nn.Module:
    first = Layer([1.0, -2.0], [3.0], l1(1.0), l2(1.0))
    second = Layer(gamma=[5.0], gamma_regularizer=l1(2.0), beta_regularizer=l1(1.0))
    net = nn.Sequential(first, nn.Linear(2, 2), nn.Sequential(second, nn.ReLU()), Layer([7.0]))
    net.again = first
    return net


def test_a_model_gives_the_losses_of_its_layers_each_once():
    net = model()
    losses = regularization_losses(net)
    assert [loss.item() for loss in losses] == [3.0, 9.0, 10.0]
    sum(losses).backward()
    assert net[0].gamma.grad.tolist() == [1, -1] and net[0].beta.grad.tolist() == [6] and net[3].gamma.grad is None


def test_a_single_layer_and_a_model_without_any_are_sources_too():
    assert [loss.item() for loss in regularization_losses(model()[0])] == [3.0, 9.0]
    assert regularization_losses(nn.Linear(2, 2)) == []


def test_copies_and_saved_models_have_the_same_losses(tmp_path):
    torch.save(model(), tmp_path / "model.pt")
    for twin in (copy.deepcopy(model()), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert [loss.item() for loss in regularization_losses(twin)] == [3.0, 9.0, 10.0]


def test_wrappers_that_pass_attributes_on_do_not_count_a_layer_twice():
    assert len(regularization_losses(torch.compile(model()[0]))) == 2
    assert len(regularization_losses(nn.DataParallel(model()))) == 3


def test_a_module_may_call_its_own_method_regularization_losses():
    class Net(nn.Sequential):
        def regularization_losses(self):
            return regularization_losses(self)

    assert [loss.item() for loss in regularization_losses(Net(model()))] == [3.0, 9.0, 10.0]


def test_a_submodule_named_layer_losses_is_not_called():
    net = nn.Sequential(model())
    net.layer_losses = nn.Linear(2, 2)
    assert len(regularization_losses(net)) == 3


def test_any_other_object_is_asked_itself():
    class Store:
        def regularization_losses(self):
            return (torch.tensor(4.0),)

    assert regularization_losses(Store()) == [torch.tensor(4.0)]


def test_a_source_must_have_losses():
    for bad, got in ((3, "int"), ([model()], "list")):
        message = f"^regularization_losses: source must be an nn.Module or have a method .*, got {got}$"
        with pytest.raises(TypeError, match=message):
            regularization_losses(bad)
