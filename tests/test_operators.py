"""The operators as torch sees them: schemas, fake kernels, derivatives of all orders, modes, versions, compilation."""

import pytest
import torch
from paths import KERNELS
from torch import Tensor

import torch_bn
from torch_bn import reference

pytestmark = KERNELS.marks

SHAPES = {"rows": (6, 3), "planes": (3, 2, 5), "images": (4, 3, 2, 3), "volumes": (2, 3, 2, 1, 4)}


@pytest.fixture
def ops():
    return torch.ops.torch_bn


def arguments(shape=(4, 3, 2, 5), dtype=torch.float32, training=True, momentum=0.1, axis=1, requires_grad=True):
    """Of torch_bn::batch_norm."""
    channels, kept = shape[axis], torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=dtype, requires_grad=requires_grad)
    weight = torch.randn(channels, dtype=kept, requires_grad=requires_grad)
    bias = torch.randn(channels, dtype=kept, requires_grad=requires_grad)
    mean, var = torch.randn(channels, dtype=kept), torch.rand(channels, dtype=kept) + 0.5
    return [x, weight, bias, mean, var, torch.tensor(3), training, momentum, 1e-5, axis]


CHECKED = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": False},
        {"momentum": None},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "shape": (5, 3)},
        {"axis": -1},
        {"requires_grad": False},
    ],
    ids=str,
)
def test_opcheck_of_the_operator(ops, changes):
    torch.library.opcheck(ops.batch_norm.default, arguments(**changes), test_utils=CHECKED)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("missing", [(), (1, 2), (3, 4, 5), (1, 2, 3, 4, 5)], ids=str)
def test_opcheck_without_some_tensors(ops, missing, layout):
    call = arguments()
    if layout == "channels_last":
        call[0] = call[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for place in missing:
        call[place] = None
    torch.library.opcheck(ops.batch_norm.default, call, test_utils=CHECKED)


def averages(channels=3):
    """renorm_mean, renorm_stddev, their weights, renorm_momentum, rmin, rmax, dmax."""
    return [torch.randn(channels), torch.rand(channels), torch.tensor(0.3), torch.tensor(0.4), 0.2, 0.8, 1.2, 0.5]


NO_AVERAGES = [None, None, None, None, 0.01, None, None, None]


@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("renorm", [False, True], ids=["", "renorm"])
@pytest.mark.parametrize("groups", [1, 3])
def test_opcheck_of_groups_and_renorm(ops, groups, renorm, keep):
    statistics = torch.zeros(2, 3, dtype=torch.float64) if keep else None
    call = [*arguments(), groups, False, True, *(averages() if renorm else NO_AVERAGES), statistics]
    torch.library.opcheck(ops.batch_norm.default, call, test_utils=CHECKED)


@pytest.mark.parametrize("activation", [None, "relu", "elu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_opcheck_of_residual_and_activation(ops, training, activation):
    call = arguments()
    call[6] = training
    residual = torch.randn_like(call[0], requires_grad=True)
    call = [*call, 1, True, True, *NO_AVERAGES, None, residual, activation, 1.5]
    torch.library.opcheck(ops.batch_norm.default, call, test_utils=CHECKED)


@pytest.mark.parametrize(("activation", "masked"), [(None, False), ("relu", False), ("relu", True), ("elu", False)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("renorm", [False, True], ids=["", "renorm"])
def test_opcheck_of_what_lies_below(ops, renorm, groups, activation, masked):
    x, weight, bias, mean, var, counter, _, momentum, eps, axis = arguments((4, 3, 4, 5), requires_grad=False)
    ending = (torch.randn_like(x) if activation else None, activation, 1.5)
    more = (groups, True, True, *(averages() if renorm else NO_AVERAGES), None, *ending, masked)
    forward = (x, weight, bias, mean, var, counter, momentum, eps, axis, *more)
    torch.library.opcheck(ops._batch_norm_forward.default, forward, test_utils=CHECKED)
    inference = (x, weight, bias, mean, var, eps, axis, True, *ending, masked)
    torch.library.opcheck(ops._batch_norm_inference.default, inference, test_utils=CHECKED)
    _, saved, mask = ops._batch_norm_forward(*forward)
    assert (mask is not None) == masked
    x.requires_grad_()
    weight.requires_grad_()
    dy = torch.randn_like(x, requires_grad=True)
    for training in (True, False):
        for needs_input_grad in (True, False):
            backward = (dy, x, weight, saved, training, eps, axis, groups, needs_input_grad)
            if masked:
                backward += (None, None, activation, not needs_input_grad, 0.0, mask)
            elif activation:
                backward += (bias, *ending[:2], not needs_input_grad, ending[2])
            torch.library.opcheck(ops._batch_norm_backward.default, backward, test_utils=CHECKED)


def test_opcheck_of_the_update(ops):
    statistics = torch.rand(2, 3, dtype=torch.float64)
    plain = (statistics, torch.randn(3), torch.rand(3), torch.tensor(3), None, 1e-5)
    torch.library.opcheck(ops.update_statistics.default, (*plain, *averages()[:5]), test_utils=CHECKED)


@pytest.mark.parametrize("groups", [1, 3], ids=["one group", "three groups"])
@pytest.mark.parametrize("renorm", [False, True], ids=["", "renorm"])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 2, 2)], ids=str)
def test_derivatives_with_groups_and_constant_corrections(ops, shape, renorm, groups):
    x, weight, bias, mean, var, *rest = arguments(shape, torch.float64)
    kept = [value.double() if isinstance(value, Tensor) else value for value in averages()] if renorm else NO_AVERAGES
    still = torch.zeros(2, 3, dtype=torch.float64)  # so that r and d come from the same averages each time
    more = (groups, True, True, *kept, still)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.batch_norm(x, weight, bias, mean, var, *rest, *more)

    y = run(x, weight, bias)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight, bias), dy)
    theirs = reference.batch_norm(
        *(x, weight, bias, mean, var, *rest, groups, True, True), reference.Renorm(*kept) if renorm else None, still
    )
    torch.testing.assert_close(y, theirs)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, (x, weight, bias), dy))
    assert renorm or torch.autograd.gradcheck(run, (x, weight, bias))  # with it r and d, of x, are held constant
    first = lambda *inputs: torch.autograd.grad(run(*inputs), inputs, dy, create_graph=True)  # noqa: E731
    again = lambda *inputs: torch.autograd.grad(  # noqa: E731
        reference.batch_norm(
            *(*inputs, mean, var, *rest, groups, True, True), reference.Renorm(*kept) if renorm else None, still
        ),
        *(inputs, dy),
        create_graph=True,
    )
    factors = [torch.randn_like(value) for value in (x, weight, bias)]
    second = [
        torch.autograd.grad(
            sum((g * f).sum() for g, f in zip(run_(x, weight, bias), factors, strict=True)), (x, weight)
        )
        for run_ in (first, again)
    ]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_first_second_and_third_derivatives(ops, shape, affine, training):
    x, weight, bias, mean, var, *rest = arguments(shape, torch.float64, training)
    inputs = (x, weight, bias) if affine else (x,)

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return ops.batch_norm(x, weight, bias, mean, var, *rest)

    mean_before = mean.clone()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert not training or not torch.equal(mean, mean_before)

    def gradient(x: Tensor, *others: Tensor) -> Tensor:
        return torch.autograd.grad(run(x, *others).pow(3).sum(), x, create_graph=True)[0]

    if training:  # torch's own third derivative is silently wrong there
        assert torch.autograd.gradgradcheck(gradient, inputs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_second_derivatives_in_half_precision_are_those_of_the_reference(ops, training):
    call = arguments(dtype=torch.bfloat16, training=training)
    factor = torch.randn(call[0].shape)
    found = []
    for run in (ops.batch_norm, reference.batch_norm):
        x = call[0].detach().clone().requires_grad_()
        y = run(x, *call[1:3], call[3].clone(), call[4].clone(), call[5].clone(), *call[6:])
        (dx,) = torch.autograd.grad((y.float().sin() * factor).sum(), x, create_graph=True)
        found.append(torch.autograd.grad((dx.float() * factor).sin().sum(), (x, call[1])))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.float(), expected.float(), rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_a_second_backward_without_a_graph_of_its_own(ops):
    """The gradient penalty of a GAN: the second backward has create_graph=False."""
    call = arguments(dtype=torch.float64)
    gradients = []
    for run in (ops.batch_norm, reference.batch_norm):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in call[:3]]
        y = run(*inputs, None, None, None, True, 0.1, 1e-5, 1)
        (dx,) = torch.autograd.grad(y.sin().sum(), inputs[0], create_graph=True)
        (dx.norm() - 1).pow(2).backward()
        gradients.append([tensor.grad for tensor in inputs])
    for ours, expected in zip(*gradients, strict=True):
        assert (ours is None and (expected is None or expected.abs().max() == 0)) or torch.allclose(ours, expected)


def test_evaluation_keeps_copies_of_what_backward_needs(ops):
    """Another forward or a broadcast may change the buffers between forward and backward."""
    call = arguments(training=False)
    y = ops.batch_norm(*call)
    expected = torch.autograd.grad(y, call[:3], torch.ones_like(y), retain_graph=True)
    call[3].add_(5)
    call[4].mul_(3)
    for ours, before in zip(torch.autograd.grad(y, call[:3], torch.ones_like(y)), expected, strict=True):
        assert torch.equal(ours, before)


def test_inference_mode_and_no_grad_check_and_update_alike(ops):
    results = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        torch.manual_seed(0)
        call = arguments()
        with mode():
            y = ops.batch_norm(*call)
            with pytest.raises(ValueError, match="eps must be positive during training, but got 0.0"):
                ops.batch_norm(*call[:8], 0.0, 1)
        results.append([y.detach().clone(), *call[3:6]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert results[0][3] == 4


def test_a_changed_buffer_is_a_new_version(ops):
    call = arguments()
    versions = [tensor._version for tensor in call[3:6]]
    ops.batch_norm(*call)
    assert all(tensor._version > before for tensor, before in zip(call[3:6], versions, strict=True))
    saved = call[3] * torch.ones(3, requires_grad=True)
    ops.batch_norm(*call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_autocast_leaves_dtypes_alone(ops):
    call = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.batch_norm(*call).dtype == torch.float32
        assert ops.batch_norm(call[0].bfloat16(), *call[1:]).dtype == torch.bfloat16


def test_meta_tensors_have_the_shapes_of_real_ones(ops):
    for layout in (torch.contiguous_format, torch.channels_last):
        call = arguments(requires_grad=False)
        call[0] = call[0].contiguous(memory_format=layout)
        real = ops.batch_norm(*call)
        meta = ops.batch_norm(*[value.to("meta") if isinstance(value, Tensor) else value for value in call])
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_layers_train_like_eager_ones(dynamic, momentum):
    torch._dynamo.reset()

    def layers() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch_bn.BatchNorm2d(4, momentum=momentum, fused=True), torch.nn.ReLU()
        )

    eager, compiled = layers(), layers()
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in (5, 7):
        x = torch.randn(2, 3, size, size)
        for model, call in ((eager, eager), (compiled, run)):
            model.zero_grad()
            call(x).square().sum().backward()
        for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(dict(eager.state_dict()), dict(compiled.state_dict()))
    eager.eval(), compiled.eval()
    torch.testing.assert_close(run(x), eager(x))


def test_the_backward_operator_names_what_does_not_fit(ops):
    x, weight, *_ = arguments(requires_grad=False)
    saved = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"grad_output must be .* the input's shape \[4, 3, 2, 5\], got Float with \[4, 3, 2\]"
    ):
        ops._batch_norm_backward(x[..., 0], x, weight, saved, True, 1e-5, 1, 1, True)
    with pytest.raises(RuntimeError, match=r"saved must be contiguous Double of \[2 or 4, 3\], got Float of \[2, 3\]"):
        ops._batch_norm_backward(x, x, weight, saved.float(), True, 1e-5, 1, 1, True)
    with pytest.raises(RuntimeError, match=r"saved must be contiguous Double of \[4 or 6, 3\], got Double of \[2, 3\]"):
        ops._batch_norm_backward(x, x, weight, saved, True, 1e-5, 1, 2, True)


def test_the_table_can_be_chosen_by_name():
    extension = torch_bn._operators._extension
    active = extension.cpu_table()
    assert active in extension.cpu_tables() and "baseline" in extension.cpu_tables()
    try:
        for name in extension.cpu_tables():
            extension.use_cpu_table(name)
            assert extension.cpu_table() == name == torch_bn.build_info()["cpu_table"]
        with pytest.raises(ValueError, match="name must be one of .*'baseline'.*, got 'mmx'"):
            extension.use_cpu_table("mmx")
    finally:
        extension.use_cpu_table(active)
