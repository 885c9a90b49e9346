"""What torch does to modules, done to ours: compile, fx, functional calls, averaging, hooks, autocast."""

import copy

import pytest
import torch
from layer_pairs import assert_same_state, both_paths, every_rank, pair
from torch import nn
from torch.nn.utils import parametrize

import torch_bn


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


class Stop(torch.autograd.Function):
    """The identity, which lets no gradient through: not zeros, none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@both_paths
def test_without_a_gradient_there_are_none(fused):
    layers = pair(nn.BatchNorm1d, torch_bn.BatchNorm1d, fused)
    for layer in layers:
        x = torch.randn(7, 5, requires_grad=True)
        Stop.apply(layer(x)).sum().backward()
        assert x.grad is layer.weight.grad is layer.bias.grad is None


@both_paths
def test_autocast_changes_nothing(fused):
    layer = torch_bn.BatchNorm2d(5, fused=fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 5, 2, 2)).dtype == torch.float32
        assert layer(torch.randn(3, 5, 2, 2).bfloat16()).dtype == torch.bfloat16
