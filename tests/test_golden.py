"""BatchNormalization against training sequences recorded from the real TensorFlow, see tests/golden/README.md."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import KERNELS
from torch import Tensor

import torch_bn

GOLDEN = Path(__file__).with_name("golden")
CASES = {case["case"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
STATE_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "renorm_mean": "renorm_mean",
    "renorm_mean_weight": "renorm_mean_weight",
    "renorm_stddev": "renorm_stddev",
    "renorm_stddev_weight": "renorm_stddev_weight",
}
# Of |recorded - ours| / (1 + |recorded|). TensorFlow's float32 is up to 1.6e-5 and, for variables, 1.5e-7 off float64.
TOLERANCE, TOLERANCE_OF_VARIABLES = 3e-5, 1e-6


@pytest.mark.parametrize("name", CASES)
def test_plain_operations_give_tensorflows_numbers(name, device, monkeypatch):
    # Not by the argument fused=False: that says more, namely that the moving variance is the biased one.
    monkeypatch.setattr(torch_bn._operators, "batch_norm", None)
    fused = False if CASES[name]["params"]["fused"] is False else None
    assert_agrees(Sequence(name, fused, device))


# fused=False means plain operations. All other recordings had None or True, which mean the same to TensorFlow.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=KERNELS.marks) for name in CASES if CASES[name]["params"]["fused"] is not False]
)
def test_kernels_give_tensorflows_numbers(name):
    assert_agrees(Sequence(name, True, torch.get_default_device()))


def test_every_recording_is_used():
    assert len(CASES) == 35
    assert {path.name for path in GOLDEN.glob("*.npz")} == {case["file"] for case in CASES.values()}


# ---------------------------------------------------------------------------------------------------------------------
# What we compute
# ---------------------------------------------------------------------------------------------------------------------


class Sequence:
    """A recorded sequence, run again."""

    def __init__(self, name: str, fused: bool | None, device: torch.device | str = "cpu"):
        self.case = CASES[name]
        self.params = self.case["params"]
        self.device = torch.device(device)
        with np.load(GOLDEN / self.case["file"]) as arrays:
            self.recorded = {key: torch.from_numpy(array).to(self.device) for key, array in arrays.items()}
        self.steps = len(self.case["step_training"])
        self.dtype = getattr(torch, self.case["dtype"])
        self.clipping = self._clipping()
        self.layer = torch_bn.BatchNormalization(**self._arguments(), fused=fused)

    def replay(self) -> Iterator[tuple[str, Tensor]]:
        """The recorded keys and what we have there, in order."""
        with torch.no_grad():
            self.layer(self.input("x.0"), training=False)  # the first call creates the variables
        yield from self.variables("var0")
        self._check_variables()
        optimizer = None
        if self.case["optimizer"] is not None:
            optimizer = torch.optim.SGD(self.layer.parameters(), lr=self.case["optimizer"]["lr"])
        for t in range(self.steps):
            for key, values in (self.case["clip_schedule"] or {}).items():
                self.clipping[key].fill_(values[t])
            before = {key: parameter.detach().clone() for key, parameter in self._parameters()}
            training = self.case["step_training"][t]
            if self.params["training"] == "tensor":
                training = torch.tensor(training, device=self.device)
            yield from self._gradients("", f".{t}", training)
            if self.params["renorm"] and self.case["step_training"][t]:
                yield from self._correction(t, before)
            yield from self._regularization(t)
            if optimizer is not None:
                optimizer.step()
                torch_bn.apply_constraints(self.layer)
            yield from self.variables(f"var.{t}")
        yield from self._gradients("inf.", "", False)

    def input(self, key: str) -> Tensor:
        return self.recorded[key].to(self.dtype)

    def variables(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        state = self.layer.state_dict()
        for variable in self._variable_names():
            yield f"{prefix}.{variable}", state[STATE_NAMES[variable]].clone()

    def _gradients(self, prefix: str, suffix: str, training: bool | Tensor) -> Iterator[tuple[str, Tensor]]:
        x = self.input(f"{prefix}x{suffix}").requires_grad_()
        y = self.layer(x, training=training)
        self.layer.zero_grad()
        y.backward(self.input(f"{prefix}dy{suffix}"))
        self.x, self.y = x.detach(), y.detach()
        yield f"{prefix}y{suffix}", self.y
        yield f"{prefix}dx{suffix}", x.grad
        for key, parameter in self._parameters():
            if parameter.requires_grad:
                yield f"{prefix}d{key}{suffix}", parameter.grad.clone()

    def _regularization(self, t: int) -> Iterator[tuple[str, Tensor]]:
        losses = self.layer.regularization_losses()
        assert len(losses) == self.case["result"]["n_regularization_losses"]
        if losses:
            yield f"reg_losses.{t}", torch.stack(losses).detach()
            parts = torch.autograd.grad(sum(losses), [parameter for _, parameter in self._parameters()])
            for (key, parameter), part in zip(self._parameters(), parts, strict=True):
                yield f"d{key}_reg.{t}", part
                parameter.grad += part

    def _correction(self, t: int, before: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """r and d as the output shows them: z = x_hat * r + d, where x_hat has mean 0."""

        def grouped(values: Tensor) -> Tensor:  # [v, groups, rest, C], example i in group i % groups
            return values.double().movedim(axis, -1).reshape(-1, groups, values[0].numel() // channels, channels)

        axis = self.params["axis"]
        channels = self.x.size(axis)
        groups = self.x.size(0) // (self.params["virtual_batch_size"] or self.x.size(0))
        x, z = grouped(self.x), (grouped(self.y) - before["beta"]) / before["gamma"]
        if self.params["adjustment"] is not None:
            z = (z - self.recorded["adj.bias"]) / self.recorded["adj.scale"]
        var, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
        x_hat = (x - mean) / (var + self.params["epsilon"]).sqrt()
        yield f"renorm_r.{t}", (z * x_hat).mean((0, 1, 2)) / x_hat.square().mean((0, 1, 2))
        yield f"renorm_d.{t}", z.mean((0, 1, 2))

    def _variable_names(self) -> list[str]:
        return [variable["name"].removeprefix("bn/").removesuffix(":0") for variable in self._recorded_variables()]

    def _recorded_variables(self) -> list[dict]:
        return self.case["result"]["variables"]

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        both = [("gamma", self.layer.gamma), ("beta", self.layer.beta)]
        return [(key, parameter) for key, parameter in both if parameter is not None]

    def _check_variables(self) -> None:
        """The same variables as TensorFlow's and no others, of its dtypes, and the same ones trainable."""
        state = self.layer.state_dict(keep_vars=True)
        assert set(state) == {STATE_NAMES[variable] for variable in self._variable_names()} | {"num_batches_tracked"}
        for name, variable in zip(self._variable_names(), self._recorded_variables(), strict=True):
            assert state[STATE_NAMES[name]].dtype == getattr(torch, variable["dtype"]), name
            assert state[STATE_NAMES[name]].requires_grad == variable["trainable"], name
            assert name.startswith("renorm") or getattr(self.layer, name) is state[STATE_NAMES[name]], name

    def _arguments(self) -> dict[str, object]:
        """The recorded parameters as our constructor takes them, but for fused."""
        arguments = {key: value for key, value in self.params.items() if key not in ("fused", "reuse", "training")}
        for key, value in arguments.items():
            if key.endswith("initializer") and isinstance(value, dict):
                values = self.recorded[value["key"]]
                arguments[key] = lambda variable, values=values: variable.data.copy_(values.reshape(variable.shape))
            if key.endswith(("regularizer", "constraint")) and value is not None:
                arguments[key] = FUNCTIONS[value["kind"]](value)
        if self.params["adjustment"] is not None:
            scale, bias = self.recorded["adj.scale"], self.recorded["adj.bias"]
            arguments["adjustment"] = lambda shape: (scale, bias)
        return arguments | {"renorm_clipping": self.clipping}

    def _clipping(self) -> dict[str, float | Tensor] | None:
        """Bounds that change from step to step are tensors, which the layer has to read each time."""
        bounds = {key: torch.tensor(values[0]) for key, values in (self.case["clip_schedule"] or {}).items()}
        return ((self.params["renorm_clipping"] or {}) | bounds) or None


FUNCTIONS = {
    "l1": lambda value: lambda variable: value["factor"] * variable.abs().sum(),
    "l2": lambda value: lambda variable: value["factor"] * variable.square().sum(),
    "clip": lambda value: lambda variable: variable.clamp(value["min"], value["max"]),
    "maxnorm": lambda value: lambda variable: variable * (value["max"] / variable.norm()).clamp(max=1),
}


# ---------------------------------------------------------------------------------------------------------------------
# Against what TensorFlow computed
# ---------------------------------------------------------------------------------------------------------------------


def assert_agrees(sequence: Sequence) -> None:
    """Compares all that is recorded, but for what has no meaning here."""
    case = sequence.case
    results = {key for key in sequence.recorded if kind_of(key) not in ("x", "dy", "init", "adj")}
    if not case["params"]["trainable"]:  # TensorFlow differentiates with respect to any variable, torch does not
        results = {key for key in results if kind_of(key) not in ("dgamma", "dbeta")}
    for t, training in enumerate(case["step_training"]):  # inference has no corrections; the recorded ones are 1 and 0
        results -= set() if training else {f"renorm_r.{t}", f"renorm_d.{t}"}
    compared, wrong = set(), []
    for key, ours in sequence.replay():
        compared.add(key)
        wrong += differences(key, ours, sequence.recorded[key], case)
    assert not wrong, "\n".join([f"{case['case']} differs from {case['implementation']}", *wrong])
    assert compared == results


def kind_of(key: str) -> str:
    """Of 'dx.2', 'inf.dx': 'dx'."""
    return key.removeprefix("inf.").split(".")[0]


def differences(key: str, ours: Tensor, recorded: Tensor, case: dict) -> list[str]:
    """What is wrong with one result, in no or one line."""
    kind = kind_of(key)
    if case["params"]["virtual_batch_size"] is not None and kind not in ("y", "dx") and recorded.dim() > 0:
        recorded = recorded.reshape(-1)  # TensorFlow's variables then have axes of size 1, ours do not
    if ours.shape != recorded.shape:
        return [f"{key}: shape {list(ours.shape)}, recorded {list(recorded.shape)}"]
    if kind in ("y", "dx"):
        if ours.dtype != getattr(torch, case["dtype"]):
            return [f"{key}: {ours.dtype}, recorded {case['dtype']}"]
        allowed = step_of_half(recorded, ours.dtype) if ours.dtype.itemsize == 2 else TOLERANCE * (1 + recorded.abs())
    else:
        tolerance = TOLERANCE_OF_VARIABLES if kind in ("var0", "var", "reg_losses") else TOLERANCE
        allowed = tolerance * (1 + recorded.abs())
    error = (ours.double() - recorded.double()).abs() / allowed
    if error.numel() == 0 or bool((error <= 1).all()):
        return []
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    index = [int(i) for i in np.unravel_index(worst, ours.shape)]
    return [
        f"{key}: {int((~(error <= 1)).sum())} of {error.numel()} are off; worst is {key}{index}, "
        f"{ours.flatten()[worst]:.9g}, recorded {recorded.flatten()[worst]:.9g}: "
        f"{error.flatten()[worst]:.3g} times the allowed error"
    ]


def step_of_half(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each value to the next one of a half type."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().double().clamp(min=info.tiny))
    return info.eps * torch.exp2(exponent.double() - 1)  # frexp's fraction is in [0.5, 1)
