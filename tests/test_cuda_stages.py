"""The stages of the benchmark of the CUDA kernels, once on the CPU, with a timer in place of the GPU's."""

import math
import os
import weakref
from dataclasses import replace
from functools import partial
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
import torch
from cuda_benchmark import CPU, SMALL, HostTimer, a_run, flat, small_model
from torch import nn

import torch_bn
from benchmarks.cases import Case
from benchmarks.gpu import contenders, correctness, facts, features, layers, training
from benchmarks.gpu.contenders import COMPILED, COPY, DIRECTIONS, EAGER, NATIVE, OURS, Inputs
from benchmarks.gpu.correctness import Configuration, Finding
from benchmarks.gpu.network import ADD_RELU, NETWORK, PLAIN, RELU
from benchmarks.gpu.summary import Results
from benchmarks.gpu.timer import (
    GRAPH,
    HOST,
    LEAST_CALLS,
    LEAST_ROUNDS,
    MOST_ROUNDS,
    CudaTimer,
    host_time,
    in_turn,
    measure,
    sets_for,
    timing,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other make small tensors slow where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestTimer:
    @pytest.mark.parametrize("set_bytes, rotation", [(1, 7), (100, 250), (10**9, 256 << 20)])
    def test_a_rotation_passes_by_before_a_set_is_used_again(self, set_bytes, rotation):
        sets = sets_for(set_bytes, rotation)
        assert sets >= 2 and sets * set_bytes >= rotation
        assert sets == 2 or (sets - 1) * set_bytes < rotation

    def test_results_stay_alive_until_all_others_were_made_once(self):
        class Result:
            pass

        alive: weakref.WeakSet[Result] = weakref.WeakSet()
        counts = []

        def make() -> Result:
            result = Result()
            alive.add(result)
            counts.append(len(alive))
            return result

        in_turn([make] * 3, repeat=3)()
        assert max(counts) == 4 and not alive  # three, and the one being made

    def test_all_calls_are_made_in_turn(self):
        made = []
        in_turn([partial(made.append, index) for index in range(3)], repeat=2)()
        assert made == [0, 1, 2, 0, 1, 2]

    def test_contenders_are_timed_side_by_side_per_call(self):
        timer = HostTimer()
        times, errors = measure(timer, {"slow": [partial(sleep, 2e-3)] * 3, "fast": [lambda: None] * 3}, end=0.0)
        assert not errors and timer.recorded == 2
        assert times["slow"].samples == times["fast"].samples == LEAST_ROUNDS
        assert 2000 <= times["slow"].median < 12_000 and times["fast"].median < 200
        assert times["slow"].p20 <= times["slow"].median <= times["slow"].p80

    def test_enough_calls_are_recorded_and_rounds_end(self):
        calls = []
        measure(HostTimer(), {"one": [partial(calls.append, 0)] * 3}, end=monotonic() + 100)
        assert len(calls) == 2 * MOST_ROUNDS * 9 and LEAST_CALLS <= 9  # three sets in three turns, each behind itself

    def test_a_contender_that_fails_is_an_error_and_the_others_are_timed(self):
        class Failing(HostTimer):
            def record(self, calls, repeat):
                if calls[0] is None:
                    raise RuntimeError("out of memory")
                return super().record(calls, repeat)

        times, errors = measure(Failing(), {"bad": [None], "good": [lambda: None]}, end=0.0)
        assert errors == {"bad": "out of memory"} and list(times) == ["good"]

    def test_the_host_is_timed_until_the_call_returns(self):
        found = host_time(HostTimer(), partial(sleep, 1e-4))
        assert found.how == HOST and 100 <= found.median < 1500

    def test_quantiles(self):
        found = timing([5.0, 1.0, 4.0, 2.0, 3.0, 6.0], GRAPH)
        assert (found.median, found.p20, found.p80, found.samples) == (3.5, 2.0, 5.0, 6)

    @pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TORCH_BN_REQUIRE_CUDA") != "1",
        reason="torch sees no CUDA device",
    )
    def test_a_gpu_captures_every_contender_and_direction(self):
        with CudaTimer().running() as timer:
            sets = contenders.make_inputs(timer, SMALL, PLAIN)[:3]
            for make in (contenders.eager, contenders.native, contenders.ours):
                contender = make(SMALL, PLAIN, timer.device)
                for direction in DIRECTIONS:
                    times, errors = measure(timer, {"one": contender.calls(direction, sets)}, end=0.0)
                    assert not errors and times["one"].how == GRAPH and times["one"].median > 0, times


class TestContenders:
    @pytest.mark.parametrize("kind", [PLAIN, RELU, ADD_RELU])
    @pytest.mark.parametrize("make", [contenders.eager, contenders.native], ids=lambda make: make.__name__)
    def test_what_follows_the_layer_is_computed(self, make, kind):
        (inputs,) = contenders.make_inputs(HostTimer(), SMALL, kind)[:1]
        contender = make(SMALL, kind, CPU)
        layer = nn.BatchNorm2d(6)
        layer.load_state_dict(SMALL.state())
        wanted = layer(inputs.x)
        wanted = wanted + inputs.residual if kind == ADD_RELU else wanted
        wanted = wanted if kind == PLAIN else wanted.relu()
        gradients = torch.autograd.grad(wanted, (*inputs.arguments, *layer.parameters()), inputs.dy)
        (forward,), (backward,) = (contender.calls(direction, [inputs]) for direction in DIRECTIONS[:2])
        assert torch.equal(forward(), wanted)
        for _ in range(2):  # as often as it is replayed
            for actual, right in zip(backward(), gradients, strict=True):
                torch.testing.assert_close(actual, right)

    def test_each_direction_has_its_mode(self):
        (inputs,) = contenders.make_inputs(HostTimer(), SMALL, PLAIN)[:1]
        contender = contenders.ours(SMALL, PLAIN, CPU)
        (forward,) = contender.calls("forward", [inputs])
        assert forward().requires_grad and contender.module.layer.num_batches_tracked == 1
        (inference,) = contender.calls("inference", [inputs])
        assert not inference().requires_grad and contender.module.layer.num_batches_tracked == 1

    def test_ours_insists_on_the_kernels(self):
        assert contenders.ours(SMALL, PLAIN, CPU).module.layer.fused is True
        assert contenders.ours(SMALL, PLAIN, CPU, fused=False).module.layer.fused is False

    def test_inputs_are_as_the_case_says(self):
        for kind in (PLAIN, ADD_RELU):
            sets = contenders.make_inputs(SimpleNamespace(device=CPU, rotation_bytes=5 * 4800), SMALL, kind)
            assert len(sets) == 5 and len({inputs.x.data_ptr() for inputs in sets}) == 5
            tensors = [t for inputs in sets for t in (*inputs.arguments, inputs.dy)]
            assert len(tensors) == (15 if kind == ADD_RELU else 10)
            assert all(t.shape == SMALL.shape and t.dtype == SMALL.dtype for t in tensors)
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
            assert abs(float(torch.cat([inputs.x.detach().flatten() for inputs in sets]).mean()) - 0.5) < 0.1

    def test_copies_copy(self):
        x = torch.randn(3, requires_grad=True)
        (call,) = contenders.copies([Inputs(x, x)])
        assert torch.equal(call(), x) and call().data_ptr() != x.data_ptr()

    def test_fused_kinds_appear_once_the_layer_takes_them(self, monkeypatch):
        class Fused(torch_bn.BatchNorm2d):
            def __init__(self, *arguments, activation=None, **options):
                super().__init__(*arguments, **options)

            def forward(self, input, residual=None):
                return super().forward(input) + (0 if residual is None else residual)

        class OnlyActivation(Fused):
            def forward(self, input):
                return super().forward(input)

        known = [kind for kind in (PLAIN, RELU, ADD_RELU) if contenders.fuses(kind)]
        assert known[0] == PLAIN
        monkeypatch.setattr(torch_bn, "BatchNorm2d", OnlyActivation)
        assert contenders.fuses(RELU) and not contenders.fuses(ADD_RELU)
        assert {layer.kind for layer in layers.measured_layers()} == {PLAIN, RELU}
        monkeypatch.setattr(torch_bn, "BatchNorm2d", Fused)
        assert sum(layer.count for layer in layers.measured_layers()) == 53 + 49
        (inputs,) = contenders.make_inputs(HostTimer(), SMALL, ADD_RELU)[:1]
        (call,) = contenders.ours(SMALL, ADD_RELU, CPU).calls("inference", [inputs])
        (plain,) = contenders.ours(SMALL, PLAIN, CPU).calls("inference", [Inputs(inputs.x, inputs.dy)])
        assert torch.equal(call(), plain() + inputs.residual)


class TestCorrectness:
    def test_configurations_cover_what_they_should(self):
        found = correctness.configurations()
        assert len({(c.name, c.case.name) for c in found}) == len(found) > 50
        assert {c.case.dtype for c in found} == {torch.float32, torch.bfloat16, torch.float16}
        assert {c.case.channels for c in found} >= {1, 3, 30, 64, 100, 2048}
        assert {math.prod(c.case.shape[2:]) for c in found} >= {1, 13, 31, 49, 196, 211}
        assert {c.case.shape[0] for c in found} >= {1, 32} and {len(c.case.shape) for c in found} == {2, 4}
        assert {c.option for c in found} == {"", *correctness.OPTIONS} and any(c.far for c in found)

    @pytest.mark.kernels
    @pytest.mark.on_cpu
    @pytest.mark.parametrize("dtype", list(correctness.OUTPUT), ids=str)
    def test_the_kernels_of_this_machine_pass(self, dtype):
        chosen = [c for c in correctness.configurations() if c.case.dtype == dtype and c.case.shape[0] < 32]
        rows = flat(correctness.stage(a_run(), chosen))
        assert len(rows) == len(chosen) and not [found for found in rows if found.error]
        assert all(found.note.startswith("worst: ") for found in rows)

    @pytest.mark.parametrize(
        "change, result",
        [
            (lambda y: y * (1 + 1e-5), "inference, y 1, y 2"),
            (lambda y: y + 3e-5 * (y - y.detach()), "dx 1, dweight 1, dbias 1, dx 2, dweight 2, dbias 2"),
            (lambda y: y * math.nan, "inference, y 1"),
        ],
    )
    def test_a_wrong_layer_is_found(self, change, result, monkeypatch):
        right = torch_bn.BatchNorm2d.forward
        monkeypatch.setattr(
            torch_bn.BatchNorm2d, "forward", lambda self, x: change(right(self, x)) if self.fused else right(self, x)
        )
        finding = correctness.check(Configuration(Case("odd", (5, 3, 4, 4), torch.float32)), CPU)
        wrong = [error.split(" is off")[0] for error in finding.errors]
        assert set(result.split(", ")) <= set(wrong), finding

    def test_wrong_statistics_are_found(self, monkeypatch):
        right = torch_bn.BatchNorm2d.__init__
        monkeypatch.setattr(
            torch_bn.BatchNorm2d,
            "__init__",
            lambda self, *sizes, **options: right(self, *sizes, momentum=0.1 + 0.01 * options["fused"], **options),
        )
        finding = correctness.check(Configuration(Case("odd", (5, 3, 4, 4), torch.bfloat16)), CPU)
        assert any(error.startswith("running_mean 1 is off float64") for error in finding.errors), finding

    def test_runs_that_differ_are_found(self):
        one = {"y": torch.ones(3), "dx": torch.zeros(3)}
        assert correctness.differences([one, dict(one), dict(one)]) == []
        other = one | {"y": torch.tensor([1, 1, 1 + 1e-6])}
        assert correctness.differences([one, one, other]) == ["y changed between runs on the same values"]

    def test_the_worst_result_is_that_nearest_to_its_tolerance(self):
        finding, right = Finding(), torch.tensor([3.0, 4.0], dtype=torch.float64)
        finding.compare("a", right + torch.tensor([0.0, 0.05]), right, 0.1)
        finding.compare("b", right, right, 0.1)
        finding.compare("c", right + torch.tensor([0.05, 0.0]), right, 0.005)
        assert finding.worst == pytest.approx(2.0) and finding.result == "c"
        assert finding.errors == ["c is off float64 by 1.0e-02, and may be by 0.005"]

    def test_an_exception_is_an_error_row(self, monkeypatch):
        monkeypatch.setattr(correctness, "check", lambda *arguments: 1 / 0)
        (found,) = flat(correctness.stage(a_run(), correctness.configurations()[:1]))
        assert found.error == "ZeroDivisionError: division by zero"


class TestStages:
    def test_facts(self):
        rows = flat(facts.stage(a_run(), megabytes=(1,), profiled=(2, 3, 4, 4)))
        assert not [found for found in rows if found.error]
        named = {found.name: found for found in rows}
        assert named["torch"].note == torch.__version__
        assert named[facts.BANDWIDTH].GB_per_s > 0 and named[facts.BANDWIDTH].bytes == 2_000_000
        kernels = [found for found in rows if found.name == "kernels"]
        assert len(kernels) == 3 * 2 * 2 * 2
        assert kernels[0].note == "backend Native; the profiler saw no launches"

    def test_a_machine_without_nvidia_smi_says_nothing(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert facts.nvidia_smi() == {}

    def test_layers(self, monkeypatch):
        few = [replace(NETWORK[1], channels=6, side=5, kind=PLAIN)]
        monkeypatch.setattr(layers, "measured_layers", lambda: few)
        monkeypatch.setattr(layers, "COMPILED_BATCH", 4)
        monkeypatch.setattr(layers, "COMPILE_GUESS", 0.0)
        monkeypatch.setattr(layers, "compiled", contenders.eager)
        batches = [(4, torch.float32, "contiguous"), (3, torch.bfloat16, "channels_last")]
        rows = flat(layers.stage(a_run(30.0), batches))
        assert not [found for found in rows if found.error]
        host, timed = rows[:4], rows[4:]
        assert [found.provider for found in host] == [EAGER, OURS] * 2 and {found.timing for found in host} == {HOST}
        first = [found for found in timed if found.shape == "4x6x5x5"]
        assert [found.direction for found in first] == [d for d in DIRECTIONS for _ in range(5)]
        assert {found.provider for found in first} == {OURS, EAGER, NATIVE, COMPILED, COPY}
        assert COMPILED not in {found.provider for found in timed if found.shape == "3x6x5x5"}
        for found in timed:
            assert found.GB_per_s == pytest.approx(found.bytes / found.median_us / 1e3)
        ours = next(found for found in first if found.provider == OURS and found.direction == "backward")
        theirs, copy = (
            next(found for found in first if found.provider == name and found.direction == "backward")
            for name in (EAGER, COPY)
        )
        assert (ours.bytes, copy.bytes) == (5 * 2400, 2 * 2400)
        assert ours.versus_torch == pytest.approx(theirs.median_us / ours.median_us)
        assert ours.of_copy == pytest.approx((5 / ours.median_us) / (2 / copy.median_us)) and copy.of_copy == 1.0

    def test_a_layer_that_cannot_be_built_is_an_error_row(self, monkeypatch):
        def fail(*arguments):
            raise RuntimeError("no such layer")

        monkeypatch.setattr(layers, "native", fail)
        monkeypatch.setattr(layers, "measured_layers", lambda: [replace(NETWORK[1], channels=6, side=5, kind=PLAIN)])
        rows = flat(layers.stage(a_run(30.0, only="^BN "), [(3, torch.float32, "contiguous")]))
        assert [found.error for found in rows if found.provider == NATIVE] == ["RuntimeError: no such layer"] * 3
        assert {found.provider for found in rows if found.median_us} == {OURS, EAGER, COPY}

    def test_layers_that_have_no_time_left_are_left_out(self, capsys):
        assert flat(layers.stage(a_run(-1.0, only="^BN "), layers.BATCHES[:1])) == []
        assert "12 of 12 cases are left out" in capsys.readouterr().out

    def test_features(self):
        chosen = [Case("ResNet-50", (66, 6, 4, 4), torch.bfloat16, "channels_last")]
        rows = flat(features.stage(a_run(30.0), chosen))
        assert not [found for found in rows if found.error]
        assert [found.provider for found in rows] == list(features.OPTIONS) * 2
        costs = Results(rows).feature("renorm", "backward")
        assert len(costs) == 1 and costs[0] > 0

    def test_ghost_batches_have_the_size_that_is_said(self):
        layer = contenders.ours(SMALL, PLAIN, CPU, **features.OPTIONS["renorm+ghost"]).module.layer
        assert layer.virtual_batch_size == 32 and layer.renorm and layer.fused
        assert not contenders.ours(SMALL, PLAIN, CPU, **features.OPTIONS[features.COMPOSITE]).module.layer.fused

    def test_training(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda model, **options: model)
        arguments = {"batches": (3, 2), "side": 8, "warm_up": 1, "steps": 4, "guess": 0.0}
        before = torch.backends.cudnn.benchmark
        rows = flat(training.stage(a_run(60.0), small_model, **arguments))
        assert torch.backends.cudnn.benchmark == before and not [found for found in rows if found.error]
        assert [found.provider for found in rows] == [EAGER, OURS] * 2 + [COMPILED, training.OURS_COMPILED] * 2
        assert all(found.samples == 4 and found.peak_MB == 7.0 for found in rows)
        assert rows[0].versus_torch == 1.0
        assert rows[4].versus_torch == pytest.approx(rows[0].median_us / rows[4].median_us)

    def test_training_compiles_only_while_there_is_time(self, monkeypatch, capsys):
        monkeypatch.setattr(torch, "compile", lambda model, **options: pytest.fail("there is no time"))
        arguments = {"batches": (2,), "side": 8, "warm_up": 1, "steps": 2, "guess": 1000.0}
        rows = flat(training.stage(a_run(60.0), small_model, **arguments))
        assert [found.provider for found in rows] == [EAGER, OURS]
        assert f"no time for {COMPILED} with a batch of 2" in capsys.readouterr().out

    def test_training_takes_our_layers_for_ours(self):
        ours, theirs = (training.Step(name, small_model, 2, 8, CPU) for name in (OURS, EAGER))
        assert isinstance(ours._net[1], torch_bn.BatchNorm2d) and ours._net[1].fused
        assert type(theirs._net[1]) is nn.BatchNorm2d
        losses = []
        for step in (ours, theirs):
            for _ in range(3):
                step()
            losses.append(float(step.loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)

    def test_a_loss_that_is_not_finite_fails(self):
        def infinite() -> nn.Module:
            model = small_model()
            nn.init.constant_(model[5].weight, math.inf)
            return model

        rows = flat(training.stage(a_run(60.0), infinite, batches=(2,), side=8, warm_up=1, steps=2, guess=1e9))
        assert all("the loss must stay finite, got nan" in found.error and found.median_us is None for found in rows)

    def test_steps_are_timed_from_mark_to_mark(self):
        found = training.timed_steps(HostTimer(), partial(sleep, 2e-3), warm_up=1, steps=3)
        assert len(found) == 3 and all(2000 <= us < 50_000 for us in found)
