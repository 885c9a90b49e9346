"""The benchmarks: that they count, compare, refuse and write correctly. How long anything takes is not tested."""

import csv
import gc
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torch_bn
from benchmarks import __main__ as command
from benchmarks import machine
from benchmarks.cases import DIRECTIONS, LARGEST_TENSOR, Case, all_cases, quick_cases
from benchmarks.gate import slower_than_torch
from benchmarks.harness import Contender, Quantiles, measure, quantiles, rotation
from benchmarks.means import means, series
from benchmarks.providers import COPY, OURS, REFERENCE, TORCH, Provider, find
from benchmarks.report import details, markdown, summary
from benchmarks.rows import Row, RowFile, Setting, failed_row, read_rows, timed_rows
from benchmarks.run import Effort, measure_cases
from benchmarks.traffic import copy_bytes, least_bytes
from benchmarks.verification import check, reference_results

REPOSITORY = Path(__file__).resolve().parent.parent
SETTING = Setting("cpu", 2, "a machine, 2 cores", "abcdef0", "2000-01-31", "2.13.0")
ODD = Case("odd", (3, 5, 7, 11), torch.float32)
NAMED_COLUMNS = (
    "op,direction,provider,device,dtype,layout,shape,threads,median_ms,p20_ms,p80_ms,bytes,GB_per_s,of_copy,"
    "versus_torch,machine,commit"
)


def rows_of(case: Case = ODD, direction: str = "forward", **medians: float) -> list[Row]:
    """Rows with the given medians, each 10 % to either side; `ours` and `theirs` stand for the two layers."""
    names = {"ours": "torch_bn[avx2]", "theirs": TORCH, "copy": COPY}
    times = {names[key]: Quantiles(m, 0.9 * m, 1.1 * m, 100) for key, m in medians.items()}
    return timed_rows(case, direction, times, SETTING)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


class TestTraffic:
    @pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
    @pytest.mark.parametrize(
        "direction, tensors", [("forward", 2), ("backward", 3), ("forward+backward", 5), ("inference", 2)]
    )
    def test_bytes_are_the_tensors_read_and_written_once(self, dtype, size, direction, tensors):
        assert least_bytes(replace(ODD, dtype=dtype), direction) == tensors * size * 3 * 5 * 7 * 11

    def test_a_copy_reads_one_and_writes_one(self):
        assert copy_bytes(ODD) == 2 * 4 * 1155

    def test_every_direction_has_a_count(self):
        assert all(least_bytes(ODD, direction) > 0 for direction in DIRECTIONS)


class TestCases:
    def test_names_are_unique(self):
        names = [case.name for case in all_cases()]
        assert len(names) == len(set(names))

    def test_tensors_are_small_enough_and_channels_as_in_the_network(self):
        cases = [case for case in all_cases() if case.group == "ResNet-50" and case.dtype == torch.float32]
        assert len({case.shape for case in cases}) == 12
        assert {case.channels for case in cases} == {64, 128, 256, 512, 1024, 2048}
        assert max(case.tensor_bytes for case in all_cases()) <= LARGEST_TENSOR

    @pytest.mark.parametrize("case", quick_cases(), ids=lambda case: case.name)
    def test_tensors_are_as_the_case_says(self, case):
        tensors, again = case.tensors(), case.tensors()
        memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        for tensor in (tensors.x, tensors.dy, tensors.clone().x):
            assert tensor.shape == case.shape and tensor.dtype == case.dtype
            assert tensor.is_contiguous(memory_format=memory_format)
        assert tensors.x.requires_grad and tensors.x.is_leaf
        assert torch.equal(tensors.x, again.x) and not torch.equal(tensors.x, tensors.dy)
        assert tensors.clone().x.data_ptr() != tensors.x.data_ptr()


class TestHarness:
    def test_quantiles_of_a_known_sample(self):
        samples = [1e6 * value for value in (5, 1, 4, 2, 3, 6)]  # an even number: the median lies between two
        assert quantiles(samples) == Quantiles(3.5, 2.0, 5.0, 6)

    def test_quantiles_of_a_uniform_sample(self):
        found = quantiles(np.random.default_rng(0).permutation(10_001) * 1e6)
        assert (found.median, found.p20, found.p80) == (5000.0, 2000.0, 8000.0)

    @pytest.mark.parametrize("tensor, cache", [(1, 1), (7, 100), (30 << 20, 32 << 20)])
    def test_rotation_lets_a_cache_full_pass_by_between_two_uses_of_a_set(self, tensor, cache):
        sets = rotation(tensor, cache)
        assert (sets - 1) * tensor >= cache > (sets - 2) * tensor

    def test_every_contender_runs_equally_often_on_its_sets_in_turn(self):
        used: dict[str, list[int]] = {"a": [], "b": []}
        contenders = [Contender(name, lambda s: s, used[name].append, sets=range(3)) for name in used]
        found = measure(contenders, seconds=0.0, least_rounds=5)
        assert found["a"].rounds == found["b"].rounds == 5
        assert len(used["a"]) == len(used["b"])
        for calls in used.values():
            changes = [now for before, now in zip(calls, calls[1:], strict=False) if before != now]
            assert all((now - before) % 3 == 1 for before, now in zip(changes, changes[1:], strict=False))

    def test_what_is_prepared_is_used_once(self):
        prepared: list[object] = []
        spent: list[object] = []

        def prepare(_: int) -> object:
            prepared.append(object())
            return prepared[-1]

        measure([Contender("one", prepare, spent.append, sets=range(2))], seconds=0.0, least_rounds=4)
        assert len(spent) == len(set(map(id, spent)))
        assert set(map(id, spent)) <= set(map(id, prepared))

    def test_the_collector_is_back_after_an_error(self):
        def fail(_: object) -> None:
            raise RuntimeError("as planned")

        with pytest.raises(RuntimeError, match="as planned"):
            measure([Contender("one", lambda s: s, fail, sets=[0])], seconds=0.0, least_rounds=1)
        assert gc.isenabled()

    def test_a_measurement_takes_the_least_seconds_though_no_time_is_left(self):
        few, many = (
            [row.rounds for new in measure_cases([ODD], find([TORCH]), False, effort, SETTING) for row in new]
            for effort in (Effort(0.0, least_rounds=1), Effort(0.0, least_rounds=1, least_seconds=0.15))
        )
        assert set(few) == {3}  # one in each placement
        assert min(many) > 9


class TestRows:
    def test_the_columns_are_the_agreed_ones_in_order(self, tmp_path):
        with RowFile(tmp_path / "deeper" / "rows.csv") as file:
            file.write([])
        assert (tmp_path / "deeper" / "rows.csv").read_text().startswith(NAMED_COLUMNS + ",")

    def test_the_numbers_follow_from_the_medians(self):
        theirs, ours, copy = rows_of(direction="backward", theirs=6.0, ours=2.0, copy=1.0)
        size = 4 * 1155
        assert (ours.bytes, copy.bytes) == (3 * size, 2 * size)
        assert ours.GB_per_s == pytest.approx(3 * size / 2e-3 / 1e9)
        assert ours.of_copy == pytest.approx((3 * size / 2.0) / (2 * size / 1.0))
        assert (theirs.versus_torch, ours.versus_torch) == (1.0, 3.0)
        assert copy.of_copy == 1.0
        assert (ours.dtype, ours.layout, ours.shape, ours.threads) == ("float32", "contiguous", "3x5x7x11", 2)

    def test_nothing_is_compared_with_what_was_not_measured(self):
        (ours,) = rows_of(ours=2.0)
        assert ours.of_copy is None and ours.versus_torch is None

    def test_rows_survive_the_file(self, tmp_path):
        rows = [*rows_of(theirs=6.0, ours=2.0, copy=1.0), failed_row(ODD, "inference", TORCH, 'a "b", c', SETTING)]
        with RowFile(tmp_path / "rows.csv") as file:
            file.write(rows[:1])
            assert len(read_rows(tmp_path / "rows.csv")) == 1  # flushed before the file is closed
            file.write(rows[1:])
        for written, read in zip(rows, read_rows(tmp_path / "rows.csv"), strict=True):
            rounded = {
                name: value if value is None or not isinstance(value, float) else pytest.approx(value, rel=1e-4)
                for name, value in vars(written).items()
            }
            assert vars(read) == rounded


class TestGate:
    def test_a_faster_row_passes(self):
        assert slower_than_torch(rows_of(ours=1.0, theirs=1.001)) == []

    def test_a_slower_row_is_found_and_named(self):
        (found,) = slower_than_torch(rows_of(ours=1.5, theirs=1.0))
        assert found.beyond_noise
        assert re.search(
            r"slower: torch_bn\[avx2\] forward odd float32/float32 contiguous 3x5x7x11.*0\.667", str(found)
        )

    def test_a_difference_within_the_noise_is_shown_but_passes(self):
        (found,) = slower_than_torch(rows_of(ours=1.01, theirs=1.0))
        assert not found.beyond_noise and str(found).startswith("within noise")

    def test_more_rounds_make_it_sharper(self):
        rows = [replace(row, rounds=10_000) for row in rows_of(ours=1.01, theirs=1.0)]
        assert slower_than_torch(rows)[0].beyond_noise

    def test_the_noise_is_three_standard_errors_of_the_median(self):
        errors = np.median(np.random.default_rng(0).normal(1.0, 0.1, (4000, 100)), axis=1).std()
        normal = {"p20_ms": 1 - 0.0842, "p80_ms": 1 + 0.0842, "rounds": 100}
        for factor, expected in ((0.9, False), (1.1, True)):
            theirs, ours = (replace(row, **normal) for row in rows_of(theirs=1.0, ours=1.0))
            ours = replace(ours, median_ms=1.0 + factor * 3 * math.sqrt(2) * errors)
            assert slower_than_torch([theirs, ours])[0].beyond_noise == expected

    def test_inference_does_not_count(self):
        assert slower_than_torch(rows_of(direction="inference", ours=2.0, theirs=1.0)) == []

    def test_rows_are_compared_within_their_case(self):
        other = replace(ODD, layout="channels_last")
        assert slower_than_torch(rows_of(ours=2.0) + rows_of(case=other, theirs=1.0)) == []


class TestReport:
    ROWS = (
        rows_of(theirs=4.0, ours=2.0, copy=1.0)
        + rows_of(case=replace(ODD, shape=(13, 3)), theirs=8.0, ours=1.0, copy=1.0)
        + [failed_row(ODD, "inference", "torch_bn[avx2]", "wrong", SETTING)]
    )

    def test_means_are_geometric_and_leave_failures_out(self):
        averages = means(self.ROWS)
        group = series(self.ROWS[0])
        assert averages[group, "forward", "torch_bn[avx2]"].versus_torch == pytest.approx(4.0)
        assert (group, "inference", "torch_bn[avx2]") not in averages

    def test_warm_tensors_have_no_share_of_the_bandwidth(self):
        cold = [replace(row, cache="cold") for row in self.ROWS[:3]]
        key = (series(cold[0]), "forward", "torch_bn[avx2]")
        assert means(self.ROWS)[key].of_copy is None
        assert means(cold + self.ROWS[3:])[key].of_copy == pytest.approx(0.5)

    def test_tables_show_means_rows_and_failures(self):
        assert "| odd | float32 | float32 | contiguous | torch_bn[avx2] | 4.00x | - | - | - |" in summary(self.ROWS)
        assert "| 3x5x7x11 | 4 → 2, 2.00x | - | - | FAILED |" in details(self.ROWS)
        assert "a machine, 2 cores, 2 threads, torch 2.13.0, commit abcdef0, 2000-01-31" in markdown(self.ROWS)


class TestMachine:
    def test_facts_are_facts(self):
        assert re.fullmatch(r".+, \d+ cores?", machine.description())
        assert machine.last_level_cache() >= 1 << 16
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", machine.commit())

    def test_each_instruction_set_has_its_folder(self):
        table = torch_bn.build_info()["cpu_table"]
        assert machine.cpu_results() == machine.REPOSITORY / "benchmarks" / "results" / (table or "reference")

    def test_a_folder_outside_git_has_no_commit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
        assert machine.commit() == "unknown"


def broken(change: Callable[[nn.Module], Any]) -> Provider:
    """torch's layer with something wrong in it."""

    def make(case: Case) -> nn.Module:
        layer = nn.BatchNorm2d(case.channels)
        change(layer)
        return layer

    return Provider("broken", make)


def scale_output(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, y: y * 1.001)


def scale_gradient(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, y: 1.001 * y - 0.001 * y.detach())


def change_layout(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, y: y.contiguous(memory_format=torch.channels_last))


def spoil_with_nan(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, y: y * float("nan"))


def set_eps(layer: nn.Module) -> None:
    layer.eps = 1e-2


def set_momentum(layer: nn.Module) -> None:
    layer.momentum = 0.2


class TestVerification:
    effort = Effort(seconds=0.0, least_rounds=1)

    @pytest.mark.parametrize(
        "change, result",
        [
            (scale_output, "inference"),
            (scale_gradient, "dx"),
            (change_layout, "inference"),
            (spoil_with_nan, "inference"),
            (set_eps, "inference"),
            (set_momentum, "running_mean"),
        ],
    )
    def test_a_wrong_provider_gets_error_rows_and_no_times(self, change, result):
        providers = [broken(change), *find([TORCH])]
        rows = [row for new in measure_cases([ODD], providers, True, self.effort, SETTING) for row in new]
        failed = [row for row in rows if row.provider == "broken"]
        assert [row.direction for row in failed] == list(DIRECTIONS)
        assert all(row.median_ms is None and row.rounds == 0 for row in failed)
        assert all(row.error.startswith(f"broken on {ODD.name}: {result} must") for row in failed)
        assert all(row.median_ms > 0 and not row.error for row in rows if row.provider != "broken")

    def test_without_a_copy_rows_have_no_share_of_its_bandwidth(self):
        rows = [row for new in measure_cases([ODD], find([TORCH]), False, self.effort, SETTING) for row in new]
        assert [row.direction for row in rows] == list(DIRECTIONS)
        assert all(row.median_ms > 0 and row.of_copy is None for row in rows)

    def test_every_placement_has_new_tensors(self, monkeypatch):
        places: list[int] = []

        class Watched(nn.BatchNorm2d):
            def forward(self, input):
                places.append(input.data_ptr())
                return super().forward(input)

        def moves(placements: int) -> int:
            monkeypatch.setattr("benchmarks.run.PLACEMENTS", placements)
            places.clear()
            provider = Provider("watched", lambda case: Watched(case.channels))
            rows = [row for new in measure_cases([ODD], [provider], False, self.effort, SETTING) for row in new]
            assert [row.direction for row in rows] == list(DIRECTIONS)
            return sum(here != there for here, there in itertools.pairwise(places))

        assert moves(3) == moves(1) + 2

    def test_an_exception_is_an_error_row(self):
        def fail(case: Case) -> nn.Module:
            raise RuntimeError("cannot be built")

        rows = list(measure_cases([ODD], [Provider("failing", fail)], False, self.effort, SETTING))
        assert {row.error for new in rows for row in new} == {f"failing on {ODD.name}: cannot be built"}

    @pytest.mark.kernels
    @pytest.mark.on_cpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "shape, layout",
        [
            ((13, 3), "contiguous"),
            ((5, 3, 7), "contiguous"),
            ((3, 5, 7, 11), "contiguous"),
            ((3, 5, 7, 11), "channels_last"),
            ((1, 3, 5, 1), "channels_last"),
        ],
    )
    def test_right_providers_pass(self, dtype, shape, layout):
        case = Case("odd", shape, dtype, layout)
        tensors = case.tensors()
        expected = reference_results(case, tensors)
        for provider in find([TORCH, OURS, REFERENCE]):
            check(provider.layer(case), case, tensors, expected)

    def test_the_command_fails_loudly(self, monkeypatch, capsys):
        monkeypatch.setattr(command, "find", lambda names: [broken(scale_output)])
        threads = torch.get_num_threads()
        try:
            assert command.main(["--quick", "--only", "ResNet.*float32/", "--seconds", "0", "--threads", "1"]) == 1
        finally:
            torch.set_num_threads(threads)
        assert "FAILED: broken on ResNet-50 float32/float32 contiguous" in capsys.readouterr().err


class TestCommand:
    def test_quick_end_to_end(self, tmp_path):
        done = run("--quick", "--seconds", "0.5", "--threads", "1", "--output", str(tmp_path))
        assert done.returncode == 0, done.stderr
        with (tmp_path / "cpu.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(quick_cases()) * len(DIRECTIONS) * 3
        assert all(float(line["p20_ms"]) <= float(line["median_ms"]) <= float(line["p80_ms"]) for line in lines)
        assert all(int(line["rounds"]) >= 5 and float(line["GB_per_s"]) > 0 for line in lines)
        assert {line["provider"] for line in lines} >= {TORCH, COPY}
        table = json.loads((tmp_path / "cpu.json").read_text())
        assert table["columns"] == list(lines[0]) and len(table["data"]) == len(lines)
        assert [row[table["columns"].index("provider")] for row in table["data"]] == [
            line["provider"] for line in lines
        ]
        assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
        assert summary(read_rows(tmp_path / "cpu.csv")) in (tmp_path / "cpu.md").read_text()

        (tmp_path / "cpu.png").unlink()
        before = (tmp_path / "cpu.csv").read_bytes()
        rendered = run("--render", "--output", str(tmp_path))
        assert rendered.returncode == 0, rendered.stderr
        assert (tmp_path / "cpu.png").is_file() and (tmp_path / "cpu.csv").read_bytes() == before

    def test_a_slower_row_fails_the_gate_only_if_asked(self, tmp_path):
        with RowFile(tmp_path / "cpu.csv") as file:
            file.write(rows_of(ours=1.5, theirs=1.0))
        assert command.main(["--render", "--output", str(tmp_path)]) == 0
        assert command.main(["--render", "--output", str(tmp_path), "--require-not-slower"]) == 1

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--threads", "0"], "--threads must be at least 1, got 0"),
            (["--only", "no such case"], "--only must match a case such as .* got 'no such case'"),
            (["--only", "("], r"--only: must be a regular expression, got '\(': missing"),
            (["--providers", "nobody"], "invalid choice: 'nobody'"),
            (
                ["--render", "--quick"],
                "--render needs the rows of an earlier run, cpu.csv in the folder of --output, None",
            ),
        ],
    )
    def test_a_wrong_option_is_refused(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert re.search(message, capsys.readouterr().err)
