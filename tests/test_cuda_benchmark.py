"""The benchmark of the CUDA kernels, as far as it goes without a GPU: its arithmetic, its page, and every stage once on
the CPU, with a timer in place of the GPU's."""

import math
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter_ns, sleep
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torch_bn
from benchmarks import cuda as command
from benchmarks.cases import RESNET50, Case
from benchmarks.gpu import contenders, correctness, facts, features, layers, training
from benchmarks.gpu.contenders import COMPILED, COPY, DIRECTIONS, EAGER, NATIVE, OURS, Inputs
from benchmarks.gpu.correctness import Configuration, Finding
from benchmarks.gpu.network import ADD_RELU, NETWORK, PLAIN, RELU, network_mean, without_activation
from benchmarks.gpu.page import line, page
from benchmarks.gpu.plan import SHARES, STAGES, Allowance, Run, stage_end
from benchmarks.gpu.rows import Measurement, Place, row
from benchmarks.gpu.summary import Results, tensor_bytes
from benchmarks.gpu.targets import HALF, NOT_MEASURED, SINGLE, TARGETS, Target
from benchmarks.gpu.timer import (
    GRAPH,
    HOST,
    LEAST_CALLS,
    LEAST_ROUNDS,
    MOST_ROUNDS,
    CudaTimer,
    Recording,
    Timing,
    host_time,
    in_turn,
    measure,
    sets_for,
    timing,
)
from benchmarks.gpu.traffic import TENSORS, copied_bytes, moved_bytes
from benchmarks.rows import RowFile, read_rows

REPOSITORY = Path(__file__).resolve().parent.parent
PLACE = Place("a GPU", "abcdef0", "2000-01-31", "2.13.0")
CPU = torch.device("cpu")
SMALL = Case("ResNet-50", (4, 6, 5, 5), torch.float32, "channels_last")


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other make small tensors slow where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class HostTimer:
    """Keeps the promises of a timer on the CPU, and counts what it is asked for."""

    device = CPU
    rotation_bytes = 1

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, calls, repeat):
        self.recorded += 1
        return Recording(in_turn(calls, repeat), len(calls) * repeat, GRAPH)

    def mark(self):
        return perf_counter_ns()

    def microseconds(self, start, end):
        return (end - start) / 1e3

    def synchronize(self):
        pass

    free = reset_peak = synchronize

    def peak_bytes(self):
        return 7_000_000


def a_run(seconds: float = 0.0, only: str | None = None) -> Run:
    return Run(HostTimer(), PLACE, monotonic() + seconds, re.compile(only) if only else None)


def flat(stage) -> list[Measurement]:
    return [found for rows in stage for found in rows]


def layer_rows(us, batch: int = 128, form: tuple[str, str] = HALF, group=NETWORK, **columns) -> list[Measurement]:
    """A row for every layer of the network and direction; `us` gives the times by provider."""
    return [
        row(
            PLACE, layers.LAYERS, layer.kind,
            Case("ResNet-50", (batch, layer.channels, layer.side, layer.side), getattr(torch, form[0]), form[1]),
            Timing(found, found, found, 15, GRAPH), direction=direction, provider=provider, **columns,
        )
        for layer in group for direction in DIRECTIONS for provider, found in us.items()
    ]  # fmt: skip


class TestNetwork:
    def test_it_has_the_layers_of_the_network(self):
        assert sum(layer.count for layer in NETWORK) == 53
        for kind, count, elements in ((RELU, 33, 4.089), (ADD_RELU, 16, 5.519), (PLAIN, 4, 1.505)):
            chosen = [layer for layer in NETWORK if layer.kind == kind]
            assert sum(layer.count for layer in chosen) == count
            # Millions for one image, as counted elsewhere from the model itself.
            found = sum(layer.count * layer.channels * layer.side**2 for layer in chosen) / 1e6
            assert found == pytest.approx(elements, abs=6e-4)

    def test_without_activations_it_has_the_same_layers(self):
        plain = without_activation()
        assert {(layer.channels, layer.side) for layer in plain} == set(RESNET50) and len(plain) == len(RESNET50)
        assert sum(layer.count for layer in plain) == 53 and {layer.kind for layer in plain} == {PLAIN}
        assert next(layer.count for layer in plain if (layer.channels, layer.side) == (1024, 14)) == 7

    def test_a_mean_counts_each_shape_as_often_as_it_occurs(self):
        few = [replace(NETWORK[0], count=1), replace(NETWORK[1], count=3)]
        found = network_mean(few, lambda layer: 16.0 if layer.count == 1 else 2.0)
        assert found.value == pytest.approx((16 * 2**3) ** 0.25) and found.whole == found.value

    def test_a_mean_says_what_it_lacks(self):
        few = [replace(NETWORK[0], count=1), replace(NETWORK[1], count=3)]
        found = network_mean(few, lambda layer: 5.0 if layer.count == 3 else None)
        assert (found.value, found.covered, found.total, found.whole) == (pytest.approx(5.0), 3, 4, None)
        assert network_mean(few, lambda layer: None).value is None


class TestTraffic:
    @pytest.mark.parametrize("direction, tensors", [("forward", 3), ("backward", 5), ("inference", 2)])
    def test_a_batch_norm_walks_twice_in_training(self, direction, tensors):
        assert moved_bytes(PLAIN, direction, SMALL) == tensors * 4 * 600
        assert moved_bytes(RELU, direction, replace(SMALL, dtype=torch.bfloat16)) == tensors * 2 * 600

    def test_every_kind_and_direction_has_a_count_and_a_residual_costs_more(self):
        assert set(TENSORS) == {(kind, direction) for kind in (PLAIN, RELU, ADD_RELU) for direction in DIRECTIONS}
        assert all(TENSORS[ADD_RELU, direction] > TENSORS[RELU, direction] for direction in DIRECTIONS)
        assert copied_bytes(SMALL) == 2 * 4 * 600


class TestPlan:
    def test_every_stage_has_its_part(self):
        now, ends = 100.0, []
        for index in range(len(STAGES)):
            now = stage_end(now, 1100.0, STAGES[index:])
            ends.append(now)
        parts = [end - start for start, end in zip([100.0, *ends], ends, strict=False)]
        total = sum(SHARES.values())
        assert parts == pytest.approx([1000.0 * SHARES[stage] / total for stage in STAGES])
        assert ends[-1] == pytest.approx(1100.0)

    def test_what_a_stage_leaves_goes_to_the_others(self):
        assert stage_end(100.0, 200.0, ["training"]) == 200.0
        late, early = (stage_end(now, 200.0, ["layers", "training"]) - now for now in (180.0, 100.0))
        assert 0 < late < early < 100.0

    def test_a_stage_that_is_late_has_nothing(self):
        assert stage_end(300.0, 200.0, ["layers", "training"]) == 300.0

    def test_an_allowance_lets_nothing_begin_that_it_could_not_pay(self):
        allowance = Allowance(10.0, guess=2.0)
        assert allowance.may_begin()
        allowance.spend(6.0)
        assert not allowance.may_begin()  # 4 seconds are left, and the last took 6
        assert not Allowance(1.0, guess=2.0).may_begin()

    def test_a_pattern_chooses(self):
        assert a_run(only="b.d").wants("abcd") and not a_run(only="b.d").wants("abd") and a_run().wants("")


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

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
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
            (lambda y: y + 1e-5 * (y - y.detach()), "dx 1, dweight 1, dbias 1, dx 2, dweight 2, dbias 2"),
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

    @staticmethod
    def small_model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
        )

    def test_training(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda model, **options: model)
        arguments = {"batches": (3, 2), "side": 8, "warm_up": 1, "steps": 4, "guess": 0.0}
        before = torch.backends.cudnn.benchmark
        rows = flat(training.stage(a_run(60.0), self.small_model, **arguments))
        assert torch.backends.cudnn.benchmark == before and not [found for found in rows if found.error]
        assert [found.provider for found in rows] == [EAGER, OURS] * 2 + [COMPILED, training.OURS_COMPILED] * 2
        assert all(found.samples == 4 and found.peak_MB == 7.0 for found in rows)
        assert rows[0].versus_torch == 1.0
        assert rows[4].versus_torch == pytest.approx(rows[0].median_us / rows[4].median_us)

    def test_training_compiles_only_while_there_is_time(self, monkeypatch, capsys):
        monkeypatch.setattr(torch, "compile", lambda model, **options: pytest.fail("there is no time"))
        arguments = {"batches": (2,), "side": 8, "warm_up": 1, "steps": 2, "guess": 1000.0}
        rows = flat(training.stage(a_run(60.0), self.small_model, **arguments))
        assert [found.provider for found in rows] == [EAGER, OURS]
        assert f"no time for {COMPILED} with a batch of 2" in capsys.readouterr().out

    def test_training_takes_our_layers_for_ours(self):
        ours, theirs = (training.Step(name, self.small_model, 2, 8, CPU) for name in (OURS, EAGER))
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
            model = self.small_model()
            nn.init.constant_(model[5].weight, math.inf)
            return model

        rows = flat(training.stage(a_run(60.0), infinite, batches=(2,), side=8, warm_up=1, steps=2, guess=1e9))
        assert all("the loss must stay finite, got nan" in found.error and found.median_us is None for found in rows)

    def test_training_without_torchvision_is_left_out(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
        assert flat(training.stage(a_run(60.0))) == []
        assert "training is left out: " in capsys.readouterr().out

    def test_steps_are_timed_from_mark_to_mark(self):
        found = training.timed_steps(HostTimer(), partial(sleep, 2e-3), warm_up=1, steps=3)
        assert len(found) == 3 and all(2000 <= us < 50_000 for us in found)


class TestTargets:
    def verdicts(self, rows):
        results = Results(rows)
        return {target.name: target.verdict(target.value(results)) for target in TARGETS}

    def test_a_verdict_needs_the_number(self):
        up, down = (Target("t", must, aim, "x", lambda results: None) for must, aim in ((2.0, 3.0), (1.1, 1.0)))
        for target, values in ((up, (1.99, 2.0, 2.99, 3.0)), (down, (1.11, 1.1, 1.01, 1.0))):
            assert [target.verdict(value) for value in values] == ["not met", "met", "met", "met, and the aim"]
            assert target.verdict(None) == NOT_MEASURED

    def test_without_rows_nothing_is_measured(self):
        assert set(self.verdicts([]).values()) == {NOT_MEASURED}

    def test_names_are_unique(self):
        assert len({target.name for target in TARGETS}) == len(TARGETS) == 17

    def test_the_network_is_compared_layer_by_layer(self):
        found = self.verdicts(layer_rows({OURS: 1.0, EAGER: 1.7, COMPILED: 1.4}))
        name = "53 layers with their ReLU and addition, bfloat16 channels_last, batch 128: times eager"
        assert found[f"{name}, forward"] == "not met" and found[f"{name}, backward"] == "met"
        assert found["the same: times torch.compile, forward"] == "met"
        assert found["the same: times torch.compile, backward"] == "met"
        alone = "53 layers as BN alone, bfloat16 channels_last, batch 128: times eager"
        assert found[f"{alone}, forward"] == NOT_MEASURED  # 20 of the 53 have a shape that was

    def test_a_mean_without_all_layers_is_not_measured(self):
        rows = layer_rows({OURS: 1.0, EAGER: 9.0}, form=SINGLE, group=without_activation())
        name = "53 layers as BN alone, float32 contiguous, batch 128: times eager, forward"
        assert self.verdicts(rows)[name] == "met, and the aim"
        assert self.verdicts([found for found in rows if found.shape != "128x64x56x56"])[name] == NOT_MEASURED
        other_batch = layer_rows({OURS: 1.0, EAGER: 9.0}, batch=32, form=SINGLE, group=without_activation())
        assert self.verdicts(other_batch)[name] == NOT_MEASURED

    def test_the_bandwidth_counts_large_tensors_only(self):
        rows = layer_rows({OURS: 1.0}, group=without_activation(), of_copy=0.5)
        large = [replace(found, of_copy=0.9) if tensor_bytes(found) >= 10**8 else found for found in rows]
        assert sum(found.of_copy == 0.9 for found in large) == 4 * len(DIRECTIONS)
        name = "share of the copy bandwidth, tensors of 100 MB and more, forward"
        assert self.verdicts(large)[name] == "met" and self.verdicts(rows)[name] == "not met"

    def test_the_cost_of_features_is_that_over_plain(self):
        rows = [
            row(PLACE, features.FEATURES, PLAIN, case, Timing(us, us, us, 5, GRAPH), direction="forward", provider=name)
            for case in features.cases()
            for name, us in ((features.BASE, 10.0), ("renorm", 10.4), ("ghost", 11.2))
        ]
        found = self.verdicts(rows)
        assert found["renorm over plain, forward"] == "met" and found["ghost over plain, forward"] == "not met"
        assert found["renorm over plain, backward"] == NOT_MEASURED
        assert self.verdicts(rows[3:])["renorm over plain, forward"] == NOT_MEASURED

    def test_training_and_host(self):
        def step(provider: str, us: float, batch: int = 256) -> Measurement:
            time = Timing(us, us, us, 30, "stream")
            return row(PLACE, "training", "resnet50", timing=time, provider=provider, shape=f"{batch}x3x224x224")

        rows = [step(EAGER, 115.0), step(OURS, 100.0), step(COMPILED, 101.0), step(training.OURS_COMPILED, 100.0)]
        found = self.verdicts([*rows, step(EAGER, 900.0, batch=32)])
        assert found["ResNet-50, mixed precision, step with batch 256: times eager"] == "met"
        assert found["the same, both compiled"] == "not met"
        host = [
            row(PLACE, "layers", "host time", timing=Timing(us, us, us, 9, HOST), provider=OURS) for us in (7.0, 12.5)
        ]
        assert self.verdicts(host)["the host's time for one forward call"] == "not met"
        assert self.verdicts(host[:1])["the host's time for one forward call"] == "met, and the aim"


class TestRowsAndPage:
    ROWS = (
        layer_rows({OURS: 2.0, EAGER: 5.0, COPY: 1.0}, of_copy=0.8)
        + [row(PLACE, "facts", "GPU", note="a|b")]
        + [row(PLACE, "facts", facts.BANDWIDTH, shape="8 MB", error="no memory")]
        + [row(PLACE, "correctness", "plain", SMALL, error="y is off"), row(PLACE, "correctness", "ghost", SMALL)]
    )

    def test_rows_survive_the_file_and_are_there_before_it_is_closed(self, tmp_path):
        path = tmp_path / "deeper" / "cuda.csv"
        with RowFile(path, Measurement) as file:
            file.write(self.ROWS[:1])
            assert read_rows(path, Measurement) == self.ROWS[:1]
            file.write(self.ROWS[1:])
        assert read_rows(path, Measurement) == self.ROWS

    def test_the_rate_follows_from_the_bytes(self):
        assert row(PLACE, "s", "n", timing=Timing(2.0, 1.0, 3.0, 5, GRAPH), bytes=6000).GB_per_s == pytest.approx(3.0)
        assert row(PLACE, "s", "n", bytes=6000).GB_per_s is None

    def test_the_page_has_every_part(self):
        text = page(self.ROWS)
        assert "a GPU, torch 2.13.0, commit abcdef0, 2000-01-31" in text
        assert "| as in the network | 128 | bfloat16 | channels_last | forward | 2.50x | - | - | 80% |" in text
        few = "| BN alone | 128 | bfloat16 | channels_last | forward | 2.50x (20 of 53) | - | - | 80% (20 of 53) |"
        assert few in text
        assert "| BN | bfloat16 | channels_last | 128x256x56x56 | forward | 2.0 (80%) | 5.0 | - | - | 1.0 |" in text
        assert "2 configurations checked against float64, 1 failed." in text and "- GPU: a|b" in text
        assert "copy bandwidth, 8 MB: no memory" in text and "## Failures\n\n- no memory\n- y is off" in text
        assert re.search(r"times eager, forward \| 2.00x \| 3.00x \| 2.50x \| met \|", text)

    def test_a_page_of_nothing_but_a_fact(self):
        text = page([row(PLACE, "facts", "GPU", note="x")])
        assert text.count(NOT_MEASURED) > len(TARGETS) and "Not measured." in text and "## Failures" not in text

    def test_a_layer_that_was_not_captured_is_marked(self):
        rows = [replace(found, timing="stream", note="not captured: why") for found in self.ROWS[:1]]
        assert "2.0 (80%) uncaptured" in page(rows) and line(rows[0]).endswith("not captured: why")

    def test_bars_do_not_break_tables(self):
        rows = [row(PLACE, "training", "resnet50", provider=OURS, shape="2x3x8x8", error="a | b")]
        assert "a \\| b |" in page(rows)


class TestCommand:
    def test_without_a_gpu_it_says_so_and_writes_nothing(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cuda", "--output", str(tmp_path / "results")],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == "benchmarks.cuda needs a GPU, and torch sees none.\n"
        assert not (tmp_path / "results").exists()

    def stages(self, monkeypatch, **rows_of):
        calls = []

        def runner(name):
            def stage(run):
                calls.append((name, run))
                yield from rows_of.get(name, [])

            return stage

        monkeypatch.setattr(command, "RUNNERS", {name: runner(name) for name in STAGES})
        return calls

    def measured(self, tmp_path, *arguments: str):
        options = command._options([*arguments, "--output", str(tmp_path)])
        return command.measure(HostTimer(), PLACE, options, monotonic() + options.seconds)

    def test_stages_run_in_order_each_until_its_end(self, monkeypatch, tmp_path):
        calls = self.stages(monkeypatch, facts=[[row(PLACE, "facts", "GPU", note="x")]])
        begin = monotonic()
        rows = self.measured(tmp_path, "--seconds", "100", "--stages", "layers,facts,training")
        assert [name for name, _ in calls] == ["facts", "layers", "training"] and len(rows) == 1
        ends = [run.end - begin for _, run in calls]
        assert ends == pytest.approx([100 * 4 / 86, 100 * 42 / 82, 100], abs=1.0)
        assert read_rows(tmp_path / "cuda.csv", Measurement) == rows
        assert (tmp_path / "cuda.md").read_text() == page(rows)

    def test_a_wrong_result_stops_it(self, monkeypatch, tmp_path, capsys):
        calls = self.stages(monkeypatch, correctness=[[row(PLACE, "correctness", "plain", SMALL, error="y is off")]])
        rows = self.measured(tmp_path)
        assert [name for name, _ in calls] == ["facts", "correctness"] and rows[-1].error == "y is off"
        assert "Results are wrong, so nothing is timed." in capsys.readouterr().err
        assert "y is off" in (tmp_path / "cuda.md").read_text()

    def test_rows_are_on_the_disk_as_they_come_and_a_broken_stage_is_not_the_end(self, monkeypatch, tmp_path):
        def broken(run):
            yield [row(PLACE, "facts", "GPU", note="x")]
            assert len(read_rows(tmp_path / "cuda.csv", Measurement)) == 1
            raise ValueError("as planned")

        calls = self.stages(monkeypatch)
        monkeypatch.setitem(command.RUNNERS, "facts", broken)
        rows = self.measured(tmp_path)
        assert [found.error for found in rows] == ["", "facts: ValueError: as planned"]
        assert [name for name, _ in calls] == list(STAGES[1:])

    def test_it_runs_end_to_end(self, monkeypatch, tmp_path):
        """With the stages themselves, on cases small enough for a CPU."""
        few = [Configuration(replace(SMALL, group="correctness"))]
        for name, stage in {
            "facts": partial(facts.stage, megabytes=(1,), profiled=(2, 3, 4, 4)),
            "correctness": partial(correctness.stage, chosen=few),
            "layers": partial(layers.stage, batches=[(2, torch.float32, "contiguous")]),
            "features": partial(features.stage, chosen=[replace(SMALL, dtype=torch.bfloat16)]),
            "training": partial(training.stage, model=TestStages.small_model, batches=(2,), side=8, guess=1e9),
        }.items():
            monkeypatch.setitem(command.RUNNERS, name, stage)
        rows = self.measured(tmp_path, "--seconds", "30", "--only", "2x512x7x7|^GPU|torch|4x6x5x5")
        assert not [found.error for found in rows if found.error]
        assert {found.stage for found in rows} == set(STAGES)
        text = (tmp_path / "cuda.md").read_text()
        assert "1 configurations checked against float64, 0 failed." in text
        assert "| BN | float32 | contiguous | 2x512x7x7 | backward |" in text
        assert "| resnet50 | 2x3x8x8 | torch_bn |" in text

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--stages", "facts,nothing"], "--stages: must be among facts,.*training, got 'nothing'"),
            (["--only", "("], r"--only: must be a regular expression, got '\(': missing"),
        ],
    )
    def test_a_wrong_option_is_refused(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            command._options(arguments)
        assert re.search(message, capsys.readouterr().err)

    def test_a_part_is_not_written_over_a_full_run(self):
        assert command._options([]).output == REPOSITORY / "benchmarks" / "results"
        assert command._options(["--only", "x"]).output is None
        assert command._options(["--stages", "facts"]).output is None
        assert command._options(["--stages", ",".join(reversed(STAGES))]).output is not None


def test_every_result_file_is_listed():
    folder = REPOSITORY / "benchmarks" / "results"
    text = (folder / "README.md").read_text()
    files = [path.name for path in folder.iterdir() if path.name != "README.md"]
    assert files and all(f"`{name}`" in text for name in files)
