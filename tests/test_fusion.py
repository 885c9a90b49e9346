"""fuse(model): the fused model computes what the model did, and says what it fused and what it left."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from network import ResidualNetwork
from torch import Tensor, nn

import torch_bn

NONE = "no activation that can be fused follows it"


class Block(nn.Module):
    """As torchvision's Bottleneck: one ReLU in place for all, a sum in place, a shortcut that ends in a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Norms(nn.Module):
    """A forward of one's own over two norms."""

    def __init__(self, forward: Callable[["Norms", Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.relu, self.drop = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0)
        self.steps = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def assert_same_model(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and state, in training and in evaluation."""
    assert list(fused.state_dict()) == list(model.state_dict())
    for training in (True, True, False):
        results = []
        for one in (model, fused):
            one.train(training)
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            gradients = torch.autograd.grad(y.square().sum(), (leaf, *one.parameters()), allow_unused=True)
            results.append([y, *(g for g in gradients if g is not None), *one.state_dict().values()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def fused_copy(model: nn.Module) -> tuple[nn.Module, torch_bn.fusion.FusionReport]:
    fused = copy.deepcopy(model)
    return fused, torch_bn.fuse(fused)


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return model.double()


@pytest.mark.parametrize("convert", [False, True], ids=["of torch", "of torch_bn"])
def test_a_residual_network(convert):
    model = randomized(ResidualNetwork(3, 10, 8))
    if convert:
        torch_bn.convert(model)
    fused, report = fused_copy(model)
    assert_same_model(model, fused, torch.randn(4, 3, 9, 9, dtype=torch.float64))
    assert report.fused == {
        "stem.1": "relu",
        **{f"blocks.{i}.norm1": "relu" for i in range(3)},
        **{f"blocks.{i}.norm2": "add, relu" for i in range(3)},
    }
    assert report.left == {f"blocks.{i}.shortcut.1": NONE for i in (1, 2)}
    assert str(report).splitlines()[0] == "stem.1: relu"
    assert str(report).splitlines()[-1] == f"blocks.2.shortcut.1: left as it is, {NONE}"


def test_a_bottleneck_keeps_its_class_and_can_be_copied_and_pickled():
    model = randomized(Block())
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    fused, report = fused_copy(model)
    assert report.fused == {"bn1": "relu", "bn2": "add, relu"}
    assert isinstance(fused, Block) and type(fused).__name__ == "Block" and repr(fused).startswith("Block(")
    for again in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(again, Block)
        assert saved_tensors(again, x) < saved_tensors(model, x), "it is not fused"
        again.load_state_dict(model.state_dict())
        assert_same_model(copy.deepcopy(model), again, x)


def saved_tensors(model: nn.Module, x: Tensor) -> int:
    """How many tensors autograd keeps of a forward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x.clone().requires_grad_())
    return len(kept)


WHOLE = {
    "F.relu": (lambda m, x: F.relu(m.one(x)), {"one": "relu"}),
    "F.relu in place": (lambda m, x: F.relu(m.one(x), inplace=True), {"one": "relu"}),
    "torch.relu": (lambda m, x: torch.relu(m.one(x)), {"one": "relu"}),
    "method": (lambda m, x: m.one(x).relu(), {"one": "relu"}),
    "method in place": (lambda m, x: m.one(x).relu_(), {"one": "relu"}),
    "module": (lambda m, x: m.relu(m.one(x)), {"one": "relu"}),
    "sum": (lambda m, x: m.one(x) + x, {"one": "add"}),
    "sum on the right": (lambda m, x: x + m.one(x), {"one": "add"}),
    "torch.add": (lambda m, x: torch.add(x, m.one(x)), {"one": "add"}),
    "sum in place": (lambda m, x: m.one(x).add_(x).relu_(), {"one": "add, relu"}),
    "sum then something else": (lambda m, x: (m.one(x) + x).sigmoid(), {"one": "add"}),
    "F.leaky_relu": (lambda m, x: F.leaky_relu(m.one(x)), {"one": "leaky_relu"}),
    "F.leaky_relu of a slope": (lambda m, x: F.leaky_relu(m.one(x) + x, 0.3, True), {"one": "add, leaky_relu"}),
    "F.leaky_relu of a named slope": (lambda m, x: F.leaky_relu(m.one(x), negative_slope=2), {"one": "leaky_relu"}),
    "F.leaky_relu_": (lambda m, x: F.leaky_relu_(m.one(x), 0.3), {"one": "leaky_relu"}),
    "F.elu": (lambda m, x: F.elu(m.one(x)), {"one": "elu"}),
    "F.elu of an alpha": (lambda m, x: F.elu(m.one(x), alpha=1.7, inplace=True), {"one": "elu"}),
    "F.silu": (lambda m, x: F.silu(x + m.one(x), inplace=True), {"one": "add, silu"}),
    "F.gelu": (lambda m, x: F.gelu(m.one(x)), {"one": "gelu"}),
    "F.gelu by tanh": (lambda m, x: F.gelu(m.one(x) + x, approximate="tanh"), {"one": "add, gelu_tanh"}),
    "F.hardswish": (lambda m, x: F.hardswish(m.one(x)), {"one": "hardswish"}),
    "two norms": (lambda m, x: F.relu(m.one(x) + m.two(x)), {"one": "add, relu"}),
    "one after another": (lambda m, x: m.two(m.one(x).relu()) + x, {"one": "relu", "two": "add"}),
}


@pytest.mark.parametrize(("steps", "expected"), WHOLE.values(), ids=WHOLE)
def test_what_is_fused(steps, expected):
    model = randomized(Norms(steps))
    fused, report = fused_copy(model)
    assert report.fused == expected and set(report.left) == {"one", "two"} - set(expected)
    assert_same_model(model, fused, torch.randn(3, 4, 5, 2, dtype=torch.float64))


def several_places(m: Norms, x: Tensor) -> Tensor:
    return m.relu(m.one(m.relu(m.one(x))))


NEITHER = "neither a sum nor an activation that can be fused follows it"
LEFT = {
    "used twice": (lambda m, x: (y := m.one(x)).relu() + y, "its output is used more than once"),
    "not used": (lambda m, x: [m.one(x), x][-1], "its output is not used"),
    "called twice": (several_places, "it is called more than once"),
    "not called": (lambda m, x: x, "its parent does not call it"),
    "sigmoid": (lambda m, x: m.one(x).sigmoid(), NEITHER),
    "slope of a tensor": (
        lambda m, x: F.leaky_relu(m.one(x), x.mean()),
        NEITHER,
    ),
    "summand changed in place": (
        lambda m, x: [r := x * 1, s := m.one(x) + r, F.leaky_relu(r, 0.3, True), F.relu(s) + r][-1],
        "the other summand is changed in place after the sum",
    ),
    "sum with a number": (lambda m, x: (m.one(x) + 1).relu(), NEITHER),
    "sum with a factor": (lambda m, x: torch.add(m.one(x), x, alpha=2), NEITHER),
    "sum into the other": (lambda m, x: [z := x * 1, z.add_(m.one(x)), z][-1], NEITHER),
    "twice itself": (lambda m, x: (y := m.one(x)) + y, NEITHER),
    "input changed": (
        lambda m, x: [z := x * 1, y := m.one(z), z.mul_(2), y + x][-1],
        "its input is changed in place before the sum",
    ),
    "summand changed": (
        lambda m, x: [r := x * 1, s := m.one(x) + r, r.mul_(0.5), F.relu(s) + r][-1],
        "the other summand is changed in place after the sum",
    ),
    "depends on values": (
        lambda m, x: m.one(x).relu() if x.sum() > 0 else x,
        "torch.fx cannot record Norms.forward: symbolically traced variables cannot be used as inputs to control flow",
    ),
    "depends on training": (
        lambda m, x: m.one(x).relu() if m.training else m.one(x),
        "Norms.forward depends on self.training",
    ),
    "makes a tensor": (lambda m, x: m.one(x).relu() + torch.ones(1), "Norms.forward makes tensors of its own"),
}


@pytest.mark.parametrize(("steps", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left_and_why(steps, reason):
    model = Norms(steps)
    before, attributes = type(model), set(vars(model))
    report = torch_bn.fuse(model)
    assert report.fused == {} and report.left["one"] == reason
    assert type(model) is before and type(model.one) is nn.BatchNorm2d and set(vars(model)) == attributes


@pytest.mark.parametrize("hooked", ["one", "relu"])
def test_layers_with_hooks_are_left(hooked):
    model = Norms(lambda m, x: m.relu(m.one(x)))
    getattr(model, hooked).register_forward_hook(lambda *_: None)
    report = torch_bn.fuse(model)
    expected = {"one": "it has hooks", "relu": NEITHER}[hooked]
    assert report.left["one"] == expected


def test_a_layer_of_two_owners_and_one_with_an_activation_are_left():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.ReLU()))
    assert torch_bn.fuse(model).left == dict.fromkeys(("0.0", "1.0"), "it is used in several places")
    assert torch_bn.fuse(nn.Sequential(shared, nn.ReLU(), shared)).left == {"0": "it is used in several places"}
    own = nn.Sequential(torch_bn.BatchNorm2d(4, activation="relu"), nn.ReLU())
    assert torch_bn.fuse(own).left == {"0": "it has an activation of its own"}
    assert torch_bn.fuse(model).fused == {} and torch_bn.fuse(nn.Linear(2, 2)).left == {}
    assert str(torch_bn.fuse(nn.Linear(2, 2))) == "no batch normalization"


def test_sequences_stay_sequences():
    model = randomized(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid()))
    fused, report = fused_copy(model)
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    assert report.fused == {"1": "relu"} and report.left == {"3": NONE}
    assert type(fused) is nn.Sequential and type(fused[2]) is nn.Identity and type(fused[3]) is nn.BatchNorm2d
    assert_same_model(model, fused, x)
    torch.testing.assert_close(fused[:3](x), model[:3](x))
    assert_same_model(copy.deepcopy(model), pickle.loads(pickle.dumps(fused)), x)


MODULES = {
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu of a slope": nn.LeakyReLU(0.3, inplace=True),
    "elu": nn.ELU(),
    "elu of an alpha": nn.ELU(1.7),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_modules_of_every_activation(module, request):
    """In a sequence, and after a sum in code of one's own."""
    name = request.node.callspec.id.split()[0]
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    model = randomized(nn.Sequential(nn.BatchNorm2d(4), module))
    fused, report = fused_copy(model)
    assert report.fused == {"0": name} and type(fused[1]) is nn.Identity
    assert_same_model(model, fused, x)
    block = Norms(lambda m, x: m.relu(m.one(x) + x))
    block.relu = module
    fused, report = fused_copy(randomized(block))
    assert report.fused == {"one": f"add, {name}"}
    assert_same_model(block, fused, x)


def test_modules_of_other_classes_are_left():
    class Own(nn.LeakyReLU):
        pass

    for module in (Own(), nn.Hardtanh(), nn.ReLU6(), nn.LeakyReLU(torch.nan)):
        report = torch_bn.fuse(nn.Sequential(nn.BatchNorm2d(4), module))
        assert report.left == {"0": NONE}, module


class Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(list(self)):
            x = layer(x)
        return x


def test_a_sequence_with_a_forward_of_its_own_is_recorded():
    model = randomized(Reversed(nn.ReLU(), nn.BatchNorm2d(4)))
    fused, report = fused_copy(model)
    assert report.fused == {"1": "relu"} and type(fused[0]) is nn.ReLU
    assert_same_model(model, fused, torch.randn(3, 4, 5, 2, dtype=torch.float64))


def test_a_sum_that_broadcasts_says_so():
    model = Norms(lambda m, x: F.relu(m.one(x) + x.mean((2, 3), keepdim=True)))
    assert torch_bn.fuse(model).fused == {"one": "add, relu"}
    with pytest.raises(ValueError, match=r"residual must have the input's shape \[3, 4, 5, 2\], got \[3, 4, 1, 1\]"):
        model(torch.randn(3, 4, 5, 2))


def test_optimizers_and_hooks_of_the_model_stay():
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    parameters = list(model.parameters())
    torch_bn.fuse(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    before = model.bn2.bias.clone()
    model(torch.randn(2, 4, 3, 3)).sum().backward()
    optimizer.step()
    assert seen == [1] and not torch.equal(before, model.bn2.bias)


def test_a_fused_model_compiles():
    model = ResidualNetwork(3, 10, 8)
    fused, _ = fused_copy(model)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(compiled(x), fused(x))
