"""The modules against torch's own: constructor, state, forward, errors, and what torch does to modules."""

import copy
import inspect
import io
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from paths import PATHS
from torch import nn
from torch.nn.utils import parametrize

import torch_bn

both_paths = pytest.mark.parametrize("fused", PATHS)
CASES = {
    "1d": (nn.BatchNorm1d, torch_bn.BatchNorm1d, (7, 5)),
    "1d, length": (nn.BatchNorm1d, torch_bn.BatchNorm1d, (4, 5, 3)),
    "2d": (nn.BatchNorm2d, torch_bn.BatchNorm2d, (3, 5, 2, 7)),
    "3d": (nn.BatchNorm3d, torch_bn.BatchNorm3d, (2, 5, 3, 2, 4)),
}
every_rank = pytest.mark.parametrize(("torchs", "ours", "shape"), CASES.values(), ids=CASES)
OURS = [torch_bn.BatchNorm1d, torch_bn.BatchNorm2d, torch_bn.BatchNorm3d]
has_bias_keyword = "bias" in inspect.signature(nn.BatchNorm2d).parameters  # torch 2.13 and newer


def pair(torchs, ours, fused=False, bias=True, **options):
    """torch's layer and ours with the same random state."""
    plain = torchs(5, **options)
    if not bias:
        plain.register_parameter("bias", None)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    layer = ours(5, **options, bias=bias, fused=fused)
    layer.load_state_dict(plain.state_dict(), strict=True)
    return plain, layer


def assert_same_state(layer, plain, **tolerance):
    state, expected = layer.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    torch.testing.assert_close(dict(state), dict(expected), **tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with torch
# ---------------------------------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("affine", "bias", "track"), list(itertools.product([True, False], repeat=3)), ids=str)
@every_rank
def test_agrees_with_torch_through_training_and_evaluation(torchs, ours, shape, affine, bias, track, momentum, fused):
    options = {"affine": affine, "track_running_stats": track, "momentum": momentum, "eps": 1e-3}
    plain, layer = pair(torchs, ours, fused, bias=bias, **options)
    for training in (True, True, True, False):
        plain.train(training)
        layer.train(training)
        x = torch.randn(shape)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [module(value) for module, value in zip((plain, layer), inputs, strict=True)]
        for module, output in zip((plain, layer), outputs, strict=True):
            module.zero_grad()
            output.pow(3).mean().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
        gradients = [[p.grad for p in module.parameters()] for module in (layer, plain)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        assert_same_state(layer, plain, rtol=1e-5, atol=1e-6)


@both_paths
@every_rank
def test_an_empty_batch_counts_and_changes_no_average(torchs, ours, shape, fused):
    plain, layer = pair(torchs, ours, fused)
    x = torch.empty(0, *shape[1:], requires_grad=True)
    plain(x)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and not layer.weight.grad.any() and not layer.bias.grad.any()
    assert_same_state(layer, plain, rtol=0, atol=0)


@both_paths
@every_rank
def test_flags_changed_after_construction_mean_what_they_mean_to_torch(torchs, ours, shape, fused):
    plain, layer = pair(torchs, ours, fused)
    for training, track in itertools.product([True, False], [False, True]):
        for module in (plain, layer):
            module.train(training)
            module.track_running_stats = track
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
        assert_same_state(layer, plain)


@both_paths
def test_evaluation_counts_no_batch_even_where_it_uses_its_statistics(fused):
    plain, layer = pair(nn.BatchNorm1d, torch_bn.BatchNorm1d, fused)
    for module in (plain, layer):
        module.eval()
        module.running_mean = module.running_var = None
    x = torch.randn(7, 5)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    assert layer.num_batches_tracked == plain.num_batches_tracked


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_rank
def test_to_dtype_moves_everything_but_the_counter(torchs, ours, shape, dtype, fused):
    plain, layer = (module.to(dtype) for module in pair(torchs, ours, fused))
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(layer(x), plain(x), rtol=2**-6, atol=2**-6)
    assert {value.dtype for value in layer.state_dict().values()} == {dtype, torch.int64}


@both_paths
def test_half_inputs_may_meet_float32_state(fused):
    plain, layer = pair(nn.BatchNorm2d, torch_bn.BatchNorm2d, fused)
    x = torch.randn(3, 5, 2, 7).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain(x), rtol=2**-6, atol=2**-6)
    assert_same_state(layer, plain, rtol=1e-4, atol=1e-4)


@both_paths
@pytest.mark.parametrize("axis", [-1, np.int64(3), 2, 0, -4])
def test_axis_moves_the_channels(axis, fused):
    plain, layer = nn.BatchNorm2d(5), torch_bn.BatchNorm2d(5, axis=axis, fused=fused)
    x = torch.randn(3, 5, 2, 7)
    for training in (True, False):
        plain.train(training)
        layer.train(training)
        y = layer(x.movedim(1, int(axis)))
        torch.testing.assert_close(y.movedim(int(axis), 1), plain(x), rtol=1e-4, atol=1e-5)
    assert_same_state(layer, plain)
    assert type(layer.axis) is int


@both_paths
def test_scale_false_leaves_only_the_bias(fused):
    layer, plain = torch_bn.BatchNorm1d(5, scale=False, fused=fused), nn.BatchNorm1d(5)
    layer.bias.data.uniform_()
    plain.bias.data.copy_(layer.bias)
    x = torch.randn(7, 5)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    assert layer.weight is None and list(layer.state_dict())[0] == "bias"
    assert layer.affine and not torch_bn.BatchNorm1d(5, scale=False, bias=False).affine


# ---------------------------------------------------------------------------------------------------------------------
# Constructor, state, repr
# ---------------------------------------------------------------------------------------------------------------------


@every_rank
def test_constructor_begins_as_torchs_does(torchs, ours, shape):
    expected = [p for p in inspect.signature(torchs).parameters.values() if p.name != "bias"]
    actual = list(inspect.signature(ours).parameters.values())[: len(expected)]
    assert [(p.name, p.default, p.kind) for p in actual] == [(p.name, p.default, p.kind) for p in expected]
    extra = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert extra == ["bias", "scale", "axis", "fused"]
    assert issubclass(ours, torchs)


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.skipif(not has_bias_keyword, reason=""))])
@pytest.mark.parametrize("affine", [True, False])
def test_repr_is_torchs_by_default(affine, bias):
    options = {"eps": 1e-3, "momentum": None, "affine": affine} | ({} if bias else {"bias": False})
    assert repr(torch_bn.BatchNorm2d(5, **options)) == repr(nn.BatchNorm2d(5, **options))


def test_repr_names_what_torch_has_not():
    layer = torch_bn.BatchNorm2d(5, scale=False, bias=False, axis=-1, fused=False)
    assert repr(layer).endswith("track_running_stats=True, axis=-1, fused=False)")
    assert repr(torch_bn.BatchNorm2d(5, scale=False)).endswith(", scale=False)")
    assert "bias=False" in repr(torch_bn.BatchNorm2d(5, bias=False))


@pytest.mark.parametrize("has", list(itertools.product([True, False], repeat=2)), ids=str)
@every_rank
def test_reset_parameters_restores_what_there_is(torchs, ours, shape, has):
    layer = ours(5, scale=has[0], bias=has[1])
    for value in layer.state_dict().values():
        value.fill_(7)
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        assert value.eq(1 if name in ("weight", "running_var") else 0).all(), name


@every_rank
def test_state_dict_moves_both_ways(torchs, ours, shape):
    plain, layer = pair(torchs, ours)
    layer(torch.randn(shape))
    assert plain.load_state_dict(layer.state_dict(), strict=True)
    assert_same_state(layer, plain, rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(plain.state_dict(), buffer)
    buffer.seek(0)
    fresh = ours(5)
    fresh.load_state_dict(torch.load(buffer))
    assert_same_state(fresh, plain, rtol=0, atol=0)
    assert fresh.state_dict()._metadata == plain.state_dict()._metadata


def test_a_state_dict_from_before_the_counter_loads():
    state = nn.BatchNorm2d(5).state_dict()
    del state["num_batches_tracked"], state._metadata
    assert torch_bn.BatchNorm2d(5).load_state_dict(state, strict=True)


@pytest.mark.parametrize("how", ["device=", "context"])
def test_meta_device_then_assign(how):
    if how == "device=":
        layer = torch_bn.BatchNorm2d(5, device="meta")
    else:
        with torch.device("meta"):
            layer = torch_bn.BatchNorm2d(5)
    assert all(value.is_meta for value in layer.state_dict().values())
    x = torch.empty(3, 5, 2, 2, device="meta")
    assert layer(x).shape == x.shape
    plain, _ = pair(nn.BatchNorm2d, torch_bn.BatchNorm2d)
    layer.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(3, 5, 2, 2)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    assert_same_state(layer, plain)


def test_to_empty_then_reset_parameters():
    layer = torch_bn.BatchNorm2d(5, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_same_state(layer, nn.BatchNorm2d(5))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@every_rank
def test_copies_are_equal_and_separate(torchs, ours, shape, copied):
    layer = ours(5, axis=1 - len(shape), bias=False, fused=False)
    twin = copied(layer)
    assert type(twin) is ours and repr(twin) == repr(layer)
    twin(torch.randn(shape))
    assert layer.num_batches_tracked == 0 and twin.num_batches_tracked == 1


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

WRONG_RANKS = [
    (torch_bn.BatchNorm1d, (2, 5, 3, 3), "expected 2D or 3D input (got 4D input)"),
    (torch_bn.BatchNorm1d, (5,), "expected 2D or 3D input (got 1D input)"),
    (torch_bn.BatchNorm2d, (2, 5, 3), "expected 4D input (got 3D input)"),
    (torch_bn.BatchNorm3d, (2, 5, 3, 3), "expected 5D input (got 4D input)"),
]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(("ours", "shape", "text"), WRONG_RANKS)
def test_wrong_ranks_get_torchs_words(ours, shape, text, axis):
    layer = ours(5, axis=axis)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0


@both_paths
@pytest.mark.parametrize(
    ("shape", "error", "text"),
    [
        ((3, 4), RuntimeError, "running_mean should contain 4 elements not 5"),
        ((1, 5), ValueError, "Expected more than 1 value per channel when training, got input size torch.Size([1, 5])"),
    ],
)
def test_errors_leave_the_counter_alone(shape, error, text, fused):
    layer = torch_bn.BatchNorm1d(5, fused=fused)
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        layer(torch.randn(shape))
    assert_same_state(layer, nn.BatchNorm1d(5))


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_without_tensors_knows_its_channels(training):
    layer = torch_bn.BatchNorm1d(5, affine=False, track_running_stats=False, axis=-1).train(training)
    text = r"^BatchNorm1d: input.size\(-1\) must be num_features, 5, got 4$"
    with pytest.raises(RuntimeError, match=text):
        layer(torch.randn(5, 3, 4))
    layer(torch.randn(4, 3, 5))


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("axis", [1.0, "1", None, [1], (1,)], ids=str)
def test_axis_must_be_an_int(ours, axis):
    with pytest.raises(TypeError, match=f"^{ours.__name__}: axis must be an int, got {re.escape(repr(axis))}$"):
        ours(5, axis=axis)


@pytest.mark.parametrize(("ours", "rank"), list(zip(OURS, (3, 4, 5), strict=True)))
def test_axis_must_be_in_range(ours, rank):
    for axis in (rank, -rank - 1):
        text = f"^{ours.__name__}: axis must be in \\[-{rank}, {rank - 1}\\], got {axis}$"
        with pytest.raises(ValueError, match=text):
            ours(5, axis=axis)


@both_paths
def test_axis_beyond_the_rank_of_this_input(fused):
    layer = torch_bn.BatchNorm1d(5, axis=2, fused=fused)
    layer(torch.randn(3, 4, 5))
    with pytest.raises(ValueError, match=r"^batch_norm: axis must be in \[-2, 1\] for an input of rank 2, got 2$"):
        layer(torch.randn(3, 5))
    assert layer.num_batches_tracked == 1


def test_fused_must_be_one_of_three():
    with pytest.raises(TypeError, match="^batch_norm: fused must be None, True or False, got 1$"):
        torch_bn.BatchNorm2d(5, fused=1)


def test_input_must_be_a_tensor():
    with pytest.raises(TypeError, match="^BatchNorm1d: input must be a Tensor, got list$"):
        torch_bn.BatchNorm1d(5)([1.0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_script_is_refused_with_the_way_round():
    with pytest.raises(RuntimeError, match=r"BatchNorm2d; script torch_bn.revert\(model\)$"):
        torch.jit.script(nn.Sequential(torch_bn.BatchNorm2d(5)))


# ---------------------------------------------------------------------------------------------------------------------
# torch's machinery
# ---------------------------------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("momentum", [0.1, None])
@every_rank
def test_compiles_into_one_graph(torchs, ours, shape, momentum, training, fused):
    model = nn.Sequential(ours(5, momentum=momentum, fused=fused), nn.ReLU(), ours(5, fused=fused)).train(training)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(shape)
        outputs = [(y, torch.autograd.grad(y.square().sum(), y)) for y in (compiled(x), twin(x))]
        torch.testing.assert_close(*outputs)
        compiled(x).pow(3).sum().backward()
        twin(x).pow(3).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert_same_state(model, twin)


@both_paths
def test_fx_keeps_the_layer_as_a_node(fused):
    model = nn.Sequential(nn.Conv2d(3, 5, 1), torch_bn.BatchNorm2d(5, fused=fused), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(2, 3, 4, 4)
    for training in (True, False):
        graph.train(training)
        model.train(training)
        torch.testing.assert_close(graph(x), model(x))
    assert graph.get_submodule("1").num_batches_tracked == 2  # shared with the model: once each


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_of_an_evaluating_model():
    plain, layer = (module.eval() for module in pair(nn.BatchNorm2d, torch_bn.BatchNorm2d, None))
    x = torch.randn(3, 5, 4, 4)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x[:2]), plain(x[:2]), rtol=1e-4, atol=1e-5)


@both_paths
def test_functional_call_replaces_the_state(fused):
    plain, layer = pair(nn.BatchNorm1d, torch_bn.BatchNorm1d, fused)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    fresh = torch_bn.BatchNorm1d(5, fused=fused)
    x = torch.randn(7, 5)
    y = torch.func.functional_call(fresh, state, x)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, dict(plain.state_dict()))
    assert_same_state(fresh, nn.BatchNorm1d(5))


def test_ensembles_by_vmap_and_per_example_gradients():
    layer = torch_bn.BatchNorm2d(5, track_running_stats=False)
    weight = torch.randn(4, 5)

    def loss(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, x).pow(3).mean()

    x = torch.randn(4, 3, 5, 2, 2)
    batched = torch.func.vmap(torch.func.grad(loss))(weight, x)
    single = [torch.func.grad(loss)(w, one) for w, one in zip(weight, x, strict=True)]
    torch.testing.assert_close(batched, torch.stack(single))


def test_replace_all_batch_norm_modules_works_on_ours():
    model = torch.func.replace_all_batch_norm_modules_(nn.Sequential(torch_bn.BatchNorm1d(5)))
    x = torch.randn(4, 7, 5)
    torch.testing.assert_close(torch.func.vmap(model)(x), torch.stack([model(one) for one in x]))


@both_paths
def test_swa_update_bn_recalibrates_ours(fused):
    plain, layer = pair(nn.BatchNorm1d, torch_bn.BatchNorm1d, fused)
    batches = [torch.randn(6, 5) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, plain)
    torch.optim.swa_utils.update_bn(batches, layer)
    assert_same_state(layer, plain)
    assert layer.momentum == 0.1


@both_paths
def test_a_parametrized_weight_is_used(fused):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    plain, layer = pair(nn.BatchNorm2d, torch_bn.BatchNorm2d, fused)
    plain.weight.data.mul_(2)
    parametrize.register_parametrization(layer, "weight", Doubled())
    x = torch.randn(3, 5, 2, 2)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


@both_paths
def test_replicas_of_data_parallel_hold_plain_attributes(fused):
    plain, layer = pair(nn.BatchNorm2d, torch_bn.BatchNorm2d, fused)
    replica = layer._replicate_for_data_parallel()  # then nn.parallel.replicate sets copies as plain attributes
    replica.weight, replica.bias = layer.weight.clone(), layer.bias.clone()
    x = torch.randn(3, 5, 2, 2)
    torch.testing.assert_close(replica(x), plain(x), rtol=1e-4, atol=1e-5)


@both_paths
def test_hooks_and_frozen_parameters(fused):
    layer = torch_bn.BatchNorm2d(5, fused=fused).requires_grad_(False)
    seen = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    x = torch.randn(3, 5, 2, 2, requires_grad=True)
    layer(x).sum().backward()
    assert seen == ["before", "after"] and x.grad is not None and layer.weight.grad is None


@both_paths
def test_autocast_changes_nothing(fused):
    layer = torch_bn.BatchNorm2d(5, fused=fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 5, 2, 2)).dtype == torch.float32
        assert layer(torch.randn(3, 5, 2, 2).bfloat16()).dtype == torch.bfloat16
