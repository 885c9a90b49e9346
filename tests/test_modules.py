"""The modules against torch's own: constructor, state, forward and errors."""

import copy
import inspect
import io
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from layer_pairs import OURS, assert_same_state, both_paths, every_rank, has_bias_keyword, pair
from torch import nn

import torch_bn

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
    state = {name: value.dtype for name, value in layer.state_dict().items()}
    assert (state["weight"], state["bias"], state["num_batches_tracked"]) == (dtype, dtype, torch.int64)
    half = dtype in (torch.float16, torch.bfloat16)
    assert state["running_mean"] == state["running_var"] == (torch.float32 if half else dtype)


@both_paths
def test_half_does_not_make_a_large_variance_infinite(fused):
    layer, torchs = torch_bn.BatchNorm2d(5, momentum=1.0, renorm=True, fused=fused), nn.BatchNorm2d(5, momentum=1.0)
    for module in (layer, torchs):
        module.half()(torch.randn(7, 5, 4, 4).mul(2000).half())
    assert torchs.running_var.isinf().any()
    assert all(state.isfinite().all() and state.dtype != torch.float16 for state in layer.buffers())
    assert torch_bn.BatchNorm2d(5, dtype=torch.float16).running_var.dtype == torch.float16, "where it was asked for"


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
    *before, fused = torch_bn.modules.OPTIONS
    assert extra == ["bias", "scale", "axis", *before, "activation", "inplace", fused]
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
