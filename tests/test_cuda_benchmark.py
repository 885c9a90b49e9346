"""The benchmark of the CUDA kernels, as far as it goes without a GPU: arithmetic, rows, page, command."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from time import monotonic

import pytest
import torch
from cuda_benchmark import PLACE, REPOSITORY, SMALL, HostTimer, a_run, layer_rows, small_model

from benchmarks import cuda as command
from benchmarks.cases import RESNET50
from benchmarks.gpu import correctness, facts, features, layers, training
from benchmarks.gpu.contenders import COMPILED, COPY, DIRECTIONS, EAGER, OURS
from benchmarks.gpu.correctness import Configuration
from benchmarks.gpu.network import ADD_RELU, NETWORK, PLAIN, RELU, network_mean, without_activation
from benchmarks.gpu.page import line, page
from benchmarks.gpu.plan import SHARES, STAGES, Allowance, stage_end
from benchmarks.gpu.rows import Measurement, row
from benchmarks.gpu.summary import Results, tensor_bytes
from benchmarks.gpu.targets import NOT_MEASURED, SINGLE, TARGETS, Target
from benchmarks.gpu.timer import (
    GRAPH,
    HOST,
    Timing,
)
from benchmarks.gpu.traffic import TENSORS, copied_bytes, moved_bytes
from benchmarks.rows import RowFile, read_rows


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other make small tensors slow where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
            "training": partial(training.stage, model=small_model, batches=(2,), side=8, guess=1e9),
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
    files = [path.name for path in folder.rglob("*.*") if path.name != "README.md"]
    assert files and all(f"`{name}`" in text for name in files)
