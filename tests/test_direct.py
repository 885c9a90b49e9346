"""The short way from Python to the operator: what takes it, what it leaves to the general one, and that it changes
nothing."""

import pytest
import torch
from paths import needs_kernels
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_bn
from torch_bn import _operators
from torch_bn.functional import Ending, Extras, Renorm, batch_norm

pytestmark = [needs_kernels, pytest.mark.kernels]

NAMES = (
    *("input", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    *("training", "momentum", "eps", "axis", "extras", "ending"),
)


def arguments(**others):
    torch.manual_seed(0)
    usual = (
        torch.randn(6, 5, 3), torch.rand(5).requires_grad_(), torch.nn.Parameter(torch.rand(5)),
        torch.zeros(5), torch.ones(5), torch.tensor(0), True, 0.1, 1e-3, 1, None, None,
    )  # fmt: skip
    return {**dict(zip(NAMES, usual, strict=True)), **others}


def averages(**others):
    return Renorm(torch.zeros(5), torch.zeros(5), torch.zeros(()), torch.zeros(()), 0.01)._replace(**others)


def directly(**given):
    return _operators.direct(*given.values())


def by_torch_ops(*, extras, ending, **given):
    extras, ending = extras or Extras(), ending or Ending()
    renorm = extras.renorm or [*[None] * 4, 0.01, *[None] * 3]
    return torch.ops.torch_bn.batch_norm(*given.values(), *extras[:3], *renorm, None, *ending)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"weight": None, "bias": None, "running_mean": None, "running_var": None, "num_batches_tracked": None},
        {"training": False},
        {"momentum": None, "axis": -2, "eps": 0.25},
        {"extras": Extras(groups=3)},
        {"extras": Extras(unbiased=False, strict=False)},
        {"ending": Ending(torch.randn(6, 5, 3), "relu")},
        {"ending": Ending(None, "leaky_relu", 0.3)},
    ],
    ids=str,
)
def test_it_does_what_the_operator_does(others):
    ours, theirs = arguments(**others), arguments(**others)
    y, expected = directly(**ours), by_torch_ops(**theirs)
    assert torch.equal(y, expected) and type(y.grad_fn) is type(expected.grad_fn)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert ours[name] is None or torch.equal(ours[name], theirs[name])
        assert ours[name] is None or ours[name]._version == theirs[name]._version


@pytest.mark.parametrize("bounds", [{}, {"rmin": 0.5, "rmax": 3.0, "dmax": 5.0}], ids=["unbounded", "bounded"])
def test_it_does_renorm_as_the_operator_does(bounds):
    ours, theirs = (averages(momentum=0.25, **bounds) for _ in range(2))
    for _ in range(2):
        y = directly(**arguments(extras=Extras(groups=2, renorm=ours)))
        assert torch.equal(y, by_torch_ops(**arguments(extras=Extras(groups=2, renorm=theirs))))
    assert all(torch.equal(*pair) for pair in zip(ours[:4], theirs[:4], strict=True))
    assert ours.mean_weight == 1 - 0.75**2


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (torch_bn.BatchNorm1d(5), torch.randn(6, 5, 3)),
        (torch_bn.BatchNorm1d(5).eval(), torch.randn(6, 5)),
        (torch_bn.BatchNorm2d(5, activation="silu"), torch.randn(6, 5, 3, 2)),
        (torch_bn.BatchNorm2d(5, virtual_batch_size=2, fused=True), torch.randn(6, 5, 3, 2)),
        (torch_bn.BatchNorm2d(5, renorm=True, renorm_clipping={"rmax": 3}), torch.randn(6, 5, 3, 2)),
        (torch_bn.BatchNorm3d(5, affine=False, track_running_stats=False), torch.randn(6, 5, 3, 2, 2)),
        (torch_bn.layers.BatchNormalization(), torch.randn(6, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_take_it(layer, x, monkeypatch):
    layer(x)  # builds
    monkeypatch.setattr(_operators, "batch_norm", lambda *_: pytest.fail("must not be called"))
    assert layer(x).shape == x.shape


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "others",
    [
        {"input": torch.randn(6, 5, 3).as_subclass(Subclass)},
        {"input": None},
        {"input": [1.0]},
        {"input": torch.empty(6, 5, 3, device="meta")},
        {"bias": torch.rand(5).as_subclass(Subclass)},
        {"running_mean": 0.0},
        {"training": 1},
        {"momentum": 1},
        {"eps": torch.tensor(1e-3)},
        {"axis": True},
        {"axis": 2**63},
        {"extras": Extras(renorm=averages(rmax=3))},
        {"extras": Extras(renorm=averages(mean=torch.zeros(5).as_subclass(Subclass)))},
        {"extras": Extras(renorm=averages()[:4])},
        {"extras": Extras(frozen=True)},
        {"extras": Extras(inplace=True)},
        {"extras": Extras(groups=2.0)},
        {"extras": (1, True, True)},
        {"ending": Ending("residual")},
        {"ending": Ending(None, b"relu")},
        {"ending": Ending(None, "\ud800")},
        {"ending": Ending(None, "leaky_relu", 1)},
        {"ending": []},
    ],
    ids=str,
)
def test_it_leaves_what_is_unusual_alone(others):
    given = arguments(**others)
    assert directly(**given) is None
    assert given["num_batches_tracked"] == 0


def test_it_takes_all_arguments_or_none():
    assert _operators.direct() is None
    assert _operators.direct(*list(arguments().values())[:-1]) is None


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_a_mode(run):
    with Watching():
        return run()


def in_forward_mode(run):
    with forward_ad.dual_level():
        return run()


def in_a_transform(run):
    outputs = []
    torch.func.vmap(lambda x: outputs.append(run()) or x)(torch.zeros(2))
    return outputs[0]


def in_a_trace(run):
    outputs = []
    torch.jit.trace(lambda x: outputs.append(run()) or x + 1, torch.zeros(2), check_trace=False)
    return outputs[0]


def in_a_backward(run):
    outputs = []
    x = torch.zeros(2, requires_grad=True)
    x.register_hook(lambda _: outputs.append(run()))
    x.sum().backward()
    return outputs[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("around", [in_a_mode, in_forward_mode, in_a_transform, in_a_trace, in_a_backward])
def test_it_leaves_what_others_watch_alone(around):
    given = arguments()
    assert around(lambda: directly(**given)) is None
    assert given["num_batches_tracked"] == 0
    assert directly(**given) is not None, "and serves again afterwards"


@pytest.mark.parametrize(
    "others",
    [
        {"axis": 3},
        {"weight": torch.rand(4)},
        {"input": torch.randn(1, 5)},
        {"input": torch.ones(6, 5, 3, dtype=torch.long)},
        {"running_var": None},
        {"num_batches_tracked": torch.tensor(0.0)},
        {"extras": Extras(groups=7)},
        {"ending": Ending(None, "tanh")},
    ],
    ids=str,
)
def test_its_errors_are_the_operators(others):
    with pytest.raises(Exception, match=".") as expected:
        by_torch_ops(**arguments(**others))
    with pytest.raises(expected.type) as error:
        directly(**arguments(**others))
    assert str(error.value) == str(expected.value)


def test_dispatch_modes_and_the_profiler_see_it():
    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    recorded = []
    for run in (directly, by_torch_ops):
        seen: list = []
        with Recording():
            run(**arguments(extras=None))
        recorded.append(seen)
    assert recorded[0] == recorded[1] and recorded[0]
    with torch.profiler.profile() as profile:
        directly(**arguments())
    assert "torch_bn::batch_norm" in {event.name for event in profile.events()}


def test_the_functional_form_takes_it_too(monkeypatch):
    monkeypatch.setattr(_operators, "batch_norm", lambda *_: pytest.fail("must not be called"))
    batch_norm(torch.randn(6, 5), None, None, training=True)
