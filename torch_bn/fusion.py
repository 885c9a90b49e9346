"""Gives batch normalizations of a model the addition and the activation that follow them, so that one pass does all."""

import importlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import surgery
from ._checks import Activation, activation_and_number

_GELUS: dict[str, str] = {"none": "gelu", "tanh": "gelu_tanh"}  # by their approximation
_MODULES: dict[type, Callable[[Any], Activation]] = {
    nn.ReLU: lambda module: "relu",
    nn.LeakyReLU: lambda module: ("leaky_relu", module.negative_slope),
    nn.ELU: lambda module: ("elu", module.alpha),
    nn.SiLU: lambda module: "silu",
    nn.GELU: lambda module: _GELUS.get(module.approximate),
    nn.Hardswish: lambda module: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_), "relu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((F.elu, F.elu_), "elu"),
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
}
_METHODS = {"relu", "relu_"}
_NUMBERS = {"leaky_relu": "negative_slope", "elu": "alpha"}  # how torch's functions call them
_ADDITIONS = {operator.add, operator.iadd, torch.add}


@dataclass
class FusionReport:
    """What :func:`fuse` has done, by the names of the layers in the model; printed, one line each."""

    fused: dict[str, str] = field(default_factory=dict)
    """What the layer does now: "add", the name of an activation, or both, as in "add, relu"."""
    left: dict[str, str] = field(default_factory=dict)
    """Why the layer does no more than before."""

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.fused.items()]
        lines += [f"{name}: left as it is, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no batch normalization"


def fuse(model: nn.Module) -> FusionReport:
    """Lets every batch normalization do the addition and the activation that follow it, where the model's code shows
    them.

    Activations are ReLU, LeakyReLU, ELU, SiLU, GELU (by erf and by tanh) and Hardswish: the modules of torch.nn, the
    functions of torch.nn.functional, and the others that torch has for relu.

    Looks into each module that has an nn.BatchNorm1d, 2d, 3d or one of ours as its child. In an nn.Sequential an
    activation after a batch normalization becomes the layer's `activation`, and an nn.Identity takes its place. Of
    other modules torch.fx records the `forward`: where the output of a batch normalization goes nowhere but into an
    activation, into a sum, or into a sum that goes into an activation, the steps become one call, such as layer(x,
    residual, "relu"), and the module runs the recorded code from now on. Layers that take part become torch_bn's
    (:func:`torch_bn.convert`). Nothing else changes: the modules stay the objects and the classes that they are, with
    their state, `state_dict` keys, hooks and optimizers, and copies and pickles of the model are fused, too. Outputs
    and gradients are those of the model before, but for rounding.

    Args:
        model: any module; changed in place.

    Returns:
        A :class:`FusionReport`: what was fused, and why the other layers were left: where torch.fx cannot record the
        `forward` (its steps depend on values) or it depends on self.training, layers with hooks, layers used twice.

    A sum must be of two tensors of one shape: one that broadcasts raises ValueError in the next forward.
    """
    report = FusionReport()
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    for prefix, parent in list(model.named_modules()):
        layers: dict[str, nn.Module] = {}
        for name, child in parent.named_children():
            if not _is_batch_norm(child):
                continue
            name = f"{prefix}.{name}" if prefix else name
            reason = _unfit(child, places[child])
            if reason is None:
                layers[name] = child
            else:
                report.left[name] = reason
        if layers:
            runs_in_order = isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward
            (_fuse_sequence if runs_in_order else _fuse_recorded)(parent, layers, report)
    return report


def _is_batch_norm(module: nn.Module) -> bool:
    return surgery._class(module) in surgery._OURS or surgery._class(module) in surgery._TORCHS


def _unfit(layer: nn.Module, places: int) -> str | None:
    """Why a layer is left whatever follows it."""
    if places > 1:
        return "it is used in several places"
    if getattr(layer, "activation", None) is not None:
        return "it has an activation of its own"
    return "it has hooks" if _has_hooks(layer) else None


def _has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks") and "state_dict" not in name)


def _activation_of_module(module: nn.Module | None) -> Activation:
    """The activation that the module is and a layer can do instead, or None."""
    found = _MODULES.get(type(module))
    return _known(found(module)) if found and module is not None and not _has_hooks(module) else None


def _known(activation: Any) -> Activation:
    try:
        activation_and_number(activation)
    except ValueError:  # a number that is none, as it comes from another step
        return None
    return activation  # type: ignore[no-any-return]


def _name(activation: Activation) -> str | None:
    return activation_and_number(activation)[0]


def _fuse_sequence(parent: nn.Module, layers: dict[str, nn.Module], report: FusionReport) -> None:
    following = dict(zip(parent._modules.values(), list(parent._modules.items())[1:], strict=False))
    for name, layer in layers.items():
        key, after = following.get(layer, ("", None))
        activation = _activation_of_module(after)
        if activation is None:
            report.left[name] = "no activation that can be fused follows it"
            continue
        surgery.convert(layer).activation = activation  # type: ignore[assignment]
        parent._modules[key] = nn.Identity()
        report.fused[name] = str(_name(activation))


def _fuse_recorded(parent: nn.Module, layers: dict[str, nn.Module], report: FusionReport) -> None:
    graph = _recorded(parent)
    if isinstance(graph, str):
        report.left.update(dict.fromkeys(layers, graph))
        return
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(parent.get_submodule(node.target), []).append(node)
    changed = False
    for name, layer in layers.items():
        found = _ending(parent, calls.get(layer, []))
        if isinstance(found, str):
            report.left[name] = found
            continue
        changed = True
        report.fused[name] = ", ".join(filter(None, ("add" if found.residual else None, _name(found.activation))))
        _replace(graph, found)
        surgery.convert(layer)
    if changed:
        graph.lint()
        parent.__class__ = _class_with(type(parent), _Code.of(graph))


@dataclass
class _Ending:
    """A call of a batch normalization and the steps that follow it: a sum, an activation, or both."""

    call: fx.Node
    steps: list[fx.Node]
    residual: fx.Node | None
    activation: Activation


class _Tracer(fx.Tracer):
    """Records the forward of one module alone: its children are single steps."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _recorded(module: nn.Module) -> fx.Graph | str:
    """The steps of the module's forward, or why there are none."""
    training, before = module.training, set(vars(module))
    graphs = []
    try:
        for mode in (True, False):
            module.training = mode
            graphs.append(_Tracer().trace(module))
    except Exception as error:  # whatever the model's own code raises at what is no tensor
        lines = str(error).splitlines() or [type(error).__name__]
        return f"torch.fx cannot record {type(module).__name__}.forward: {lines[0]}"
    finally:
        module.training = training
        for name in set(vars(module)) - before:  # constants that torch.fx has put there
            delattr(module, name)
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graphs[0].nodes):
        return f"{type(module).__name__}.forward makes tensors of its own"
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        return f"{type(module).__name__}.forward depends on self.training"
    return graphs[0]


def _ending(parent: nn.Module, calls: list[fx.Node]) -> _Ending | str:
    """What follows the call of a layer and can be fused, or why nothing can."""
    if len(calls) != 1:
        return "it is called more than once" if calls else "its parent does not call it"
    (call,) = calls
    if len(call.args) != 1 or call.kwargs:
        return "it is called with more than an input"
    following = _only_user(call)
    if following is None:
        return "its output is used more than once" if call.users else "its output is not used"
    activation = _activation(parent, following)
    if activation is not None:
        return _Ending(call, [following], None, activation)
    residual = _added_to(call, following)
    if residual is None:
        return "neither a sum nor an activation that can be fused follows it"
    if any(_changes(parent, node, call.args[0]) for node in _between(call, following)):
        return "its input is changed in place before the sum"
    if any(_changes(parent, node, residual) for node in _between(following, call.graph.output_node())):
        return "the other summand is changed in place after the sum"  # which backward may read again
    after = _only_user(following)
    activation = None if after is None else _activation(parent, after)
    steps = [following] if after is None or activation is None else [following, after]
    return _Ending(call, steps, residual, activation)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(parent: nn.Module, node: fx.Node) -> Activation:
    """The activation that the step is and a layer can do instead, or None."""
    if node.op == "call_module":
        return _activation_of_module(parent.get_submodule(str(node.target)))
    if node.op == "call_method":
        return "relu" if node.target in _METHODS else None
    name = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name in _NUMBERS and (len(node.args) > 1 or _NUMBERS[name] in node.kwargs):
        return _known((name, node.args[1] if len(node.args) > 1 else node.kwargs[_NUMBERS[name]]))
    if name == "gelu":
        approximate: Any = node.kwargs.get("approximate", "none")
        return _GELUS.get(approximate) if set(node.kwargs) <= {"approximate", "input"} else None
    return name


def _added_to(call: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other summand, if the node is a plain sum of the call's result and another, which it leaves alone."""
    is_function = node.op == "call_function" and node.target in _ADDITIONS
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    if not (is_function or is_method) or len(node.args) != 2 or node.kwargs:
        return None
    one, other = node.args
    if one is not call and (node.target is operator.iadd or node.target == "add_"):
        return None
    summand = other if one is call else one
    return summand if isinstance(summand, fx.Node) and summand is not call else None


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _changes(parent: nn.Module, node: fx.Node, value: Any) -> bool:
    """Whether the node may write to the value in place."""
    if not node.args or node.args[0] is not value:
        return False
    if node.op == "call_module":
        return bool(getattr(parent.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace = bool(node.kwargs.get("inplace")) or True in node.args[1:]
    return name.endswith("_") or name in vars(operator) and name.startswith("i") or inplace


def _replace(graph: fx.Graph, ending: _Ending) -> None:
    """Makes one call of it, where the first of its steps stands: later the residual may have been changed."""
    arguments = (ending.call.args[0], ending.residual, ending.activation)
    with graph.inserting_before(ending.steps[0]):
        fused = graph.call_module(str(ending.call.target), arguments)
    ending.steps[-1].replace_all_uses_with(fused)
    for node in reversed([ending.call, *ending.steps]):
        graph.erase_node(node)


@dataclass
class _Code:
    """A recorded forward: its source, and what the names in it mean. It can be copied and pickled."""

    source: str
    values: dict[str, Any]
    modules: dict[str, str]

    @classmethod
    def of(cls, graph: fx.Graph) -> "_Code":
        code = graph.python_code("self")
        names = {name: value.__name__ for name, value in code.globals.items() if isinstance(value, ModuleType)}
        return cls(code.src, {name: value for name, value in code.globals.items() if name not in names}, names)

    def forward(self, name: str) -> Any:
        space = self.values | {name: importlib.import_module(path) for name, path in self.modules.items()}
        exec(compile(self.source, f"<{name}.forward as torch_bn.fuse has recorded it>", "exec"), space)
        return space["forward"]


def _class_with(base: type[nn.Module], code: _Code) -> type[nn.Module]:
    """A class like `base` whose forward is the code."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _instance, (base, code), vars(self).copy()

    own = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**own, "forward": code.forward(base.__name__), "__reduce_ex__": __reduce_ex__})


def _instance(base: type[nn.Module], code: _Code) -> nn.Module:
    """What a copy or an unpickled module starts from."""
    kind = _class_with(base, code)
    return kind.__new__(kind)
