"""The ready-made constraints, apply_constraints and attach_constraints, with small stand-ins for the layers."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from torch_bn.constraints import Clip, MaxNorm, NonNegative, apply_constraints, attach_constraints

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMULAS = [
    (NonNegative(), lambda w: w * (w >= 0)),
    (MaxNorm(), lambda w: w * min(1.0, 2 / w.square().sum().sqrt().item())),
    (MaxNorm(1e3), lambda w: w),
    (Clip(-0.5, 0.25), lambda w: w.clamp(-0.5, 0.25)),
    (Clip(0, float("inf")), lambda w: w.clamp(min=0)),
]


class Layer(nn.Module):
    """A layer with a gamma and a beta of which each may have a constraint."""

    def __init__(self, gamma, beta=(0.0,), gamma_constraint=None, beta_constraint=None, dtype=torch.float32):
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(gamma, dtype=dtype))
        self.beta = nn.Parameter(torch.tensor(beta, dtype=dtype))
        self.gamma_constraint, self.beta_constraint = gamma_constraint, beta_constraint

    def layer_constraints(self):
        pairs = [(self.gamma, self.gamma_constraint), (self.beta, self.beta_constraint)]
        return [(variable, constraint) for variable, constraint in pairs if constraint is not None]


def halved(w):
    return w / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (17,), (1, 5, 3)])
@pytest.mark.parametrize(("constraint", "formula"), FORMULAS, ids=[repr(constraint) for constraint, _ in FORMULAS])
def test_a_constraint_is_its_formula(constraint, formula, shape, dtype, device, tolerances):
    w = torch.randn(shape, dtype=dtype, device=device)
    projected = constraint(w)
    assert projected.shape == w.shape and projected.dtype == dtype and projected.device == w.device
    torch.testing.assert_close(projected.double(), formula(w.double()), **tolerances[dtype])
    torch.testing.assert_close(constraint(projected), projected, **tolerances[dtype])


def test_max_norm_is_of_all_values_and_safe_at_zero():
    w = torch.full((3, 4), 10.0)
    assert MaxNorm(3.0)(w).norm().item() == pytest.approx(3.0)
    zeros = torch.zeros(3)
    for bound in (0.0, 2.0):
        assert MaxNorm(bound)(zeros).tolist() == [0, 0, 0]
    assert MaxNorm(0)(torch.ones(2)).tolist() == [0, 0]
    assert MaxNorm(5.0)(torch.empty(0)).shape == (0,)


def test_max_norm_leaves_a_variable_on_the_bound_bit_for_bit():
    w = torch.tensor([3.0, 4.0])
    assert MaxNorm(5.0)(w).tolist() == [3, 4]


def test_max_norm_of_a_half_variable_sums_in_float32():
    w = torch.full((4,), 300.0, dtype=torch.float16)
    assert MaxNorm(600.0)(w).tolist() == [300.0] * 4
    assert MaxNorm(60.0)(w).tolist() == [30.0] * 4


def test_infinite_values_and_nan():
    w = torch.tensor([float("nan"), float("-inf"), float("inf")])
    torch.testing.assert_close(NonNegative()(w), torch.tensor([float("nan"), 0, float("inf")]), equal_nan=True)
    torch.testing.assert_close(Clip(-1, 2)(w), torch.tensor([float("nan"), -1, 2]), equal_nan=True)


def test_clip_takes_bounds_beyond_the_range_of_a_half_type():
    assert Clip(-1, 1e6)(torch.tensor([-2.0, 3.0], dtype=torch.float16)).tolist() == [-1, 3]


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (NonNegative(), "NonNegative()"),
        (MaxNorm(), "MaxNorm(max_value=2.0)"),
        (Clip(0, 1), "Clip(minimum=0, maximum=1)"),
    ],
)
def test_a_constraint_reads_well_and_survives_copies(constraint, text):
    assert repr(constraint) == text
    assert pickle.loads(pickle.dumps(constraint)) == copy.deepcopy(constraint) == constraint == eval(text)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MaxNorm(-1), ValueError, "MaxNorm: max_value must be >= 0, got -1"),
        (lambda: MaxNorm(float("nan")), ValueError, "MaxNorm: max_value must be >= 0, got nan"),
        (lambda: MaxNorm("2"), TypeError, "MaxNorm: max_value must be a number, got '2'"),
        (lambda: MaxNorm(True), TypeError, "MaxNorm: max_value must be a number, got True"),
        (lambda: Clip(1, 0.5), ValueError, "Clip: minimum must be <= maximum, got 1 and 0.5"),
        (lambda: Clip(0, float("nan")), ValueError, "Clip: minimum must be <= maximum, got 0 and nan"),
        (lambda: Clip(None, 1), TypeError, "Clip: minimum must be a number, got None"),
        (lambda: Clip(0, [1]), TypeError, r"Clip: maximum must be a number, got [1]"),
    ],
)
def test_bad_bounds(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_to_a_model_projects_in_place_and_nothing_else(dtype, device):
    layer = Layer([-1.0, 2.0], [-3.0], NonNegative(), dtype=dtype)
    net = nn.Sequential(nn.Sequential(layer), Layer([5.0], [5.0], beta_constraint=Clip(0, 1), dtype=dtype)).to(device)
    before = list(net.parameters())
    assert apply_constraints(net) is None
    assert [value for parameter in net.parameters() for value in parameter.tolist()] == [0, 2, -3, 5, 1]
    for old, new in zip(before, net.parameters(), strict=True):
        assert old is new and new.requires_grad and new.dtype == dtype and new.device.type == device.type
    apply_constraints(nn.Linear(2, 2))  # has none


def test_a_result_of_another_dtype_becomes_the_parameters():
    layer = Layer([1.0], gamma_constraint=lambda w: w.double() / 3)
    apply_constraints(layer)
    assert layer.gamma.dtype == torch.float32 and layer.gamma.item() == torch.tensor(1 / 3).item()


def test_apply_to_pairs():
    first, second = nn.Parameter(torch.tensor([-1.0])), torch.tensor([4.0])
    apply_constraints(pair for pair in [(first, NonNegative()), [second, MaxNorm(3)]])
    assert (first.item(), second.item()) == (0, 3)
    apply_constraints([])


def test_no_gradient_is_recorded_and_earlier_graphs_notice():
    layer = Layer([2.0], gamma_constraint=halved)
    loss = layer.gamma.square().sum()
    apply_constraints(layer)
    assert layer.gamma.is_leaf and layer.gamma.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_layer_with_two_names_and_a_shared_parameter_count_once():
    first, second = Layer([8.0], gamma_constraint=halved), Layer([0.0], gamma_constraint=halved)
    second.gamma = first.gamma
    net = nn.Sequential(first, second)
    net.again = first
    apply_constraints(net)
    assert first.gamma.item() == 4


def test_several_constraints_of_one_parameter_apply_in_turn():
    w = torch.tensor([-8.0, 8.0])
    apply_constraints([(w, halved), (w, Clip(-3, 1)), (w, lambda w: w + 1)])
    assert w.tolist() == [-2, 2]


def test_a_constraint_may_work_in_place():
    layer = Layer([-1.0], gamma_constraint=lambda w: w.clamp_(min=0))
    apply_constraints(layer)
    assert layer.gamma.item() == 0


def failing(w):
    raise ArithmeticError("mine")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda w: w[:1], ValueError, r"must return a tensor of shape \[2\], got shape \[1\]$"),
        (lambda w: w.sum(), ValueError, r"must return a tensor of shape \[2\], got shape \[\]$"),
        (lambda w: 1.0, ValueError, r"must return a tensor of shape \[2\], got float$"),
        (lambda w: None, ValueError, r"must return a tensor of shape \[2\], got NoneType$"),
        (failing, ArithmeticError, "^mine$"),
    ],
    ids=["vector", "scalar", "number", "none", "raises"],
)
@pytest.mark.parametrize("good", [NonNegative(), lambda w: w.zero_()], ids=["copies", "in-place"])
def test_when_one_constraint_fails_no_parameter_changes(bad, error, message, good):
    net = nn.Sequential(Layer([-1.0], gamma_constraint=good), Layer([-2.0, 3.0], gamma_constraint=bad))
    with pytest.raises(error, match=message):
        apply_constraints(net)
    assert [value for layer in net for value in layer.gamma.tolist()] == [-1, -2, 3]


def test_the_message_names_the_constraint():
    class Mine:
        def __call__(self, w):
            return w[0]

        def __repr__(self):
            return "Mine()"

    with pytest.raises(
        ValueError, match=r"^apply_constraints: Mine\(\) must return a tensor of shape \[1\], got shape"
    ):
        apply_constraints(Layer([1.0], gamma_constraint=Mine()))


def test_bad_sources():
    w = nn.Parameter(torch.ones(2, 2))
    message = "^apply_constraints: source must be an nn.Module or pairs of a tensor and its constraint, got "
    for source, got in ((3, "int"), (w, "Parameter"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"{message}{got}$"):
            apply_constraints(source)
    for pair in (w, "ab", (w,), (w, None), (1.0, NonNegative()), (w, NonNegative(), 1)):
        with pytest.raises(TypeError, match="^apply_constraints: each pair must be a tensor and its constraint, got "):
            apply_constraints([(w, torch.zeros_like), pair])
    assert w.sum().item() == 4


def test_wrappers_that_pass_attributes_on_do_not_count_a_layer_twice():
    layer = Layer([8.0], gamma_constraint=halved)
    apply_constraints(nn.DataParallel(torch.compile(layer)))
    assert layer.gamma.item() == 4


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1.0, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, 1.0, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 1.0, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1.0, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, 1.0, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 1.0, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1.0),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 1.0),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def down(optimizer, *variables, scale=1.0):
    """One step with a gradient that makes every value smaller."""

    def closure():
        optimizer.zero_grad()
        loss = scale * sum(variable.sum() for variable in variables)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)


@optimizers
def test_a_step_ends_with_the_projection(make, device):
    net = nn.Sequential(Layer([0.5, 3.0], [0.5], NonNegative())).to(device)
    (layer,) = net
    optimizer = make(net.parameters())
    handle = attach_constraints(optimizer, net)
    down(optimizer, layer.gamma, layer.beta)
    gamma, beta = layer.gamma.tolist(), layer.beta.item()
    assert gamma[0] == 0 and gamma[1] < 3 and beta < 0
    handle.remove()
    down(optimizer, layer.gamma, layer.beta)
    assert layer.gamma[0].item() < 0


def test_nothing_happens_before_a_step():
    layer = Layer([3.0], gamma_constraint=Clip(0.95, 1))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    attach_constraints(optimizer, layer)
    layer.gamma.sum().backward()
    assert layer.gamma.item() == 3
    optimizer.step()
    assert layer.gamma.item() == 1


def test_only_parameters_of_the_optimizer_are_projected():
    mine, other = Layer([-1.0], gamma_constraint=NonNegative()), Layer([-1.0], gamma_constraint=NonNegative())
    optimizer = torch.optim.SGD([{"params": [mine.beta]}, {"params": [mine.gamma], "lr": 0.0}], 0.1)
    attach_constraints(optimizer, nn.Sequential(mine, other))
    down(optimizer, mine.gamma, other.gamma)
    assert (mine.gamma.item(), other.gamma.item()) == (0, -1)
    optimizer.add_param_group({"params": [other.gamma]})
    down(optimizer, mine.gamma, other.gamma)
    assert other.gamma.item() == 0


def test_a_constraint_that_changes_after_attaching_counts():
    layer = Layer([0.5], [0.5], NonNegative())
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    attach_constraints(optimizer, layer)
    layer.gamma_constraint, layer.beta_constraint = Clip(0.25, 1), Clip(0.125, 1)
    down(optimizer, layer.gamma, layer.beta)
    assert (layer.gamma.item(), layer.beta.item()) == (0.25, 0.125)
    layer.gamma_constraint = layer.beta_constraint = None
    down(optimizer, layer.gamma, layer.beta)
    assert (layer.gamma.item(), layer.beta.item()) == (-0.75, -0.875)


def test_attaching_twice_is_harmless():
    layer = Layer([0.5, 3.0], gamma_constraint=MaxNorm(1.0))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    once = copy.deepcopy(layer)
    twice = [attach_constraints(optimizer, layer) for _ in range(2)]
    down(optimizer, layer.gamma)
    alone = torch.optim.SGD(once.parameters(), 0.1)
    attach_constraints(alone, once)
    down(alone, once.gamma)
    torch.testing.assert_close(layer.gamma, once.gamma)
    for handle in twice:
        handle.remove()
    down(optimizer, layer.gamma, scale=-10.0)
    assert layer.gamma.norm().item() > 1


@pytest.mark.parametrize("make", [OPTIMIZERS["adam"], OPTIMIZERS["adam-foreach"], OPTIMIZERS["adam-fused"]])
def test_under_a_grad_scaler_that_skips_a_step(make, device):
    layer = Layer([0.5, 3.0], [2.0], NonNegative()).to(device)
    optimizer = make(layer.parameters())
    attach_constraints(optimizer, layer)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(factor * (layer.gamma.sum() + layer.beta.sum())).backward()
        scaler.step(optimizer)
        scaler.update()
        return layer.gamma.tolist(), layer.beta.item()

    first = step(1.0)
    assert first == ([0, pytest.approx(2.0)], pytest.approx(1.0))
    assert step(float("inf")) == first and scaler.get_scale() == 2.0
    (zero, gamma), beta = step(1.0)
    assert zero == 0 and gamma < first[0][1] and beta < first[1]


def test_a_learning_rate_scheduler_in_between_changes_nothing():
    layer = Layer([0.5], gamma_constraint=NonNegative())
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    attach_constraints(optimizer, layer)
    down(optimizer, layer.gamma)
    scheduler.step()
    assert layer.gamma.item() == 0


def test_a_copied_optimizer_has_no_hook_and_can_be_attached():
    layer = Layer([0.5], gamma_constraint=NonNegative())
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    attach_constraints(optimizer, layer)
    twin, twin_layer = copy.deepcopy((optimizer, layer))
    down(twin, twin_layer.gamma)
    assert twin_layer.gamma.item() == -0.5
    attach_constraints(twin, twin_layer)
    down(twin, twin_layer.gamma)
    assert twin_layer.gamma.item() == 0


def test_bad_arguments_of_attach():
    layer = Layer([1.0], gamma_constraint=NonNegative())
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    with pytest.raises(TypeError, match="^attach_constraints: optimizer must be a torch.optim.Optimizer, got list$"):
        attach_constraints([], layer)
    with pytest.raises(TypeError, match="^attach_constraints: model must be an nn.Module, got generator$"):
        attach_constraints(optimizer, layer.parameters())


def test_attaching_where_nothing_can_be_projected_is_a_mistake():
    layer = Layer([1.0], gamma_constraint=NonNegative())
    message = "^attach_constraints: model must have a constraint on at least one parameter of the optimizer, got none$"
    for optimizer, model in (
        (torch.optim.SGD(layer.parameters(), 1.0), Layer([1.0])),
        (torch.optim.SGD([layer.beta], 1.0), layer),
        (torch.optim.SGD(layer.parameters(), 1.0), nn.Linear(2, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            attach_constraints(optimizer, model)
