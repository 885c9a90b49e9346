"""The benchmark of whole training steps: its networks, what it verifies, how it counts memory, and what it writes."""

from collections import Counter

import pytest
import torch
from torch import nn

import torch_bn
from benchmarks import fused, network, steps
from benchmarks.gpu.network import ADD_RELU, NETWORK, PLAIN, RELU
from benchmarks.memory import Memory, memory_of
from benchmarks.providers import COMPILED, OURS, TORCH
from benchmarks.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet50
from benchmarks.rows import Setting, read_rows

SETTING = Setting("cpu", 2, "a machine, 2 cores", "abcdef0", "2000-01-31", "2.13.0")
PROVIDERS = (*steps.EAGER, *steps.BY_COMPILER)
LAYOUTS = tuple(steps.LAYOUTS)


def tiny() -> ResNet:
    return ResNet(Bottleneck, (2, 1), width=4, classes=network.CLASSES)


def tiny_step(provider: str = TORCH, layout: str = "contiguous") -> steps.Step:
    return steps.Step(steps.network(tiny, provider, layout), steps.Batch.random(4, 32, layout, network.CLASSES))


@pytest.fixture
def small(monkeypatch):
    """The tiny network alone, on small images, and what torch.compile has compiled, which it leaves as it is."""
    compiled = []
    monkeypatch.setattr(network, "NETWORKS", {"tiny": tiny})
    monkeypatch.setattr(network, "SIDE", 32)
    monkeypatch.setattr(network, "LAYER_SHAPE", (4, 8, 5, 5))
    monkeypatch.setattr(torch, "compile", lambda net, **options: compiled.append(net) or net)
    return compiled


class TestResNets:
    """The networks."""

    @pytest.mark.parametrize(("make", "parameters"), [(resnet18, 11_689_512), (resnet50, 25_557_032)])
    def test_they_are_as_large_as_torchvisions(self, make, parameters):
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in make().parameters()) == parameters

    def test_resnet50_has_the_layers_that_the_benchmark_of_layers_counts(self):
        with torch.device("meta"):
            model, fused_model = resnet50(), resnet50()
            images = torch.empty(2, 3, 224, 224)
        report = torch_bn.fuse(fused_model)
        kinds = {"relu": RELU, "add, relu": ADD_RELU}
        found: Counter[tuple[str, int, int]] = Counter()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                kind = kinds[report.fused[name]] if name in report.fused else PLAIN
                count = lambda _, inputs, y, kind=kind: found.update([(kind, *y.shape[1:3])])  # noqa: E731
                layer.register_forward_hook(count)
        model(images)
        assert found == {(layer.kind, layer.channels, layer.side): layer.count for layer in NETWORK}

    @pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
    def test_each_stage_but_the_first_halves_the_side(self, block):
        model = ResNet(block, (1, 1, 1), width=4, classes=5)
        sides = []
        for stage in (model.layer1, model.layer2, model.layer3):
            stage.register_forward_hook(lambda _, inputs, y: sides.append(tuple(y.shape[1:])))
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
        assert sides == [(width * block.expansion, side, side) for width, side in ((4, 16), (8, 8), (16, 4))]


class TestMemory:
    """What a call takes."""

    def test_peak_and_kept(self):
        present = torch.zeros(1000)
        assert memory_of(lambda: present.neg_()) == Memory(0, 0)
        assert memory_of(lambda: present.neg()) == Memory(4000, 4000)
        assert memory_of(lambda: present.neg().neg()) == Memory(8000, 4000)
        assert memory_of(lambda: present.neg().neg().shape) == Memory(8000, 0)

    def test_what_the_call_frees_of_what_was_there_does_not_count(self):
        present = [torch.zeros(1000)]
        assert memory_of(lambda: (present.pop(), torch.zeros(10))[1]) == Memory(40, 40)

    @pytest.mark.parametrize("provider", steps.EAGER)
    def test_a_step_takes_the_same_every_time(self, provider):
        first, second = (tiny_step(provider) for _ in range(2))
        memory = first.memory()
        assert memory == first.memory() == second.memory()
        gradients = sum(parameter.nbytes for parameter in first.net.parameters())
        assert memory.peak > gradients and memory.peak >= memory.kept > 0

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_fused_layer_keeps_statistics_alone(self, layout, small):
        for kind in fused.KINDS:
            kept = {row.provider: row.kept_MB for row in network.layer_rows(network.Subject(kind, layout), SETTING)}
            x, statistics = 4 * 8 * 5 * 5 * 4 / 1e6, 8 * 4 / 1e6
            assert kept[TORCH] == pytest.approx(x + 2 * statistics)
            assert kept[OURS] <= 8 * statistics and kept[fused.UNFUSED] <= x + 8 * statistics


class TestVerification:
    """What is checked before a step is timed."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("provider", steps.EAGER)
    def test_every_provider_passes(self, provider, layout):
        batch = steps.Batch.random(4, 32, layout, network.CLASSES)
        step = tiny_step(provider, layout)
        steps.check(provider, step.results(), steps.expected_results(tiny, layout, batch))
        norms = [layer for name, layer in step.net.named_modules() if name.endswith(("bn1", "bn2", "bn3"))]
        assert {type(layer) for layer in norms} == {nn.BatchNorm2d if provider == TORCH else torch_bn.BatchNorm2d}
        assert bool(torch_bn.fuse(step.net).fused) == (provider != OURS)  # else nothing is left to fuse

    @pytest.mark.parametrize(
        ("key", "by"),
        [(("output", ""), 1.001), (("gradient", "bn1.weight"), 1.2), (("buffer", "bn1.running_var"), float("nan"))],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_a_wrong_result_is_refused_by_name(self, key, by):
        expected = tiny_step().results()
        found = {**expected, key: expected[key] * by}
        with pytest.raises(ValueError, match=f"^ours: {' '.join(key).strip()} must be within .* of torch.nn, got "):
            steps.check("ours", found, expected)

    def test_a_missing_result_is_refused(self):
        expected = tiny_step().results()
        found = {key: value for key, value in expected.items() if key[1] != "bn1.weight"}
        with pytest.raises(ValueError, match="results must be those of torch.nn, got .*bn1.weight"):
            steps.check("ours", found, expected)

    def test_nothing_is_timed_of_a_network_that_is_wrong(self, small, monkeypatch, tmp_path):
        monkeypatch.setattr(torch_bn, "fuse", lambda net: nn.init.zeros_(net.bn1.bias))
        monkeypatch.setattr(network, "measure", lambda *arguments: pytest.fail("it is wrong"))
        with pytest.raises(ValueError, match="^torch_bn in tiny contiguous: output must be within "):
            network.main(["--seconds", "0", "--output", str(tmp_path)])

    def test_a_compiled_network_that_is_wrong_ends_it_too(self, small, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda net, **options: lambda x: net(x) * 2)
        with pytest.raises(ValueError, match="^torch.compile in tiny contiguous: output must be within "):
            network.step_rows(network.ALWAYS, network.Subject("tiny", "contiguous"), 0.0, SETTING)


class TestCommand:
    """Rows and pages."""

    def test_it_writes_rows_and_a_page(self, small, tmp_path, capsys):
        assert network.main(["--seconds", "0", "--compile", "always", "--output", str(tmp_path)]) == 0
        rows = read_rows(tmp_path / "network.csv", network.StepRow)
        timed = [row for row in rows if row.network == "tiny"]
        assert [(row.layout, row.provider) for row in timed] == [(form, name) for form in LAYOUTS for name in PROVIDERS]
        assert len(small) == 4 and len(rows) == len(timed) + len(fused.KINDS) * len(LAYOUTS) * 3
        for row in timed:
            assert row.median_ms and row.rounds >= network.LEAST_ROUNDS and not row.note
            assert row.peak_MB >= row.kept_MB > 0 and row.shape == f"{network.BATCH}x3x32x32"
            assert (row.versus_torch == 1.0) == (row.provider == TORCH)
            assert (row.versus_compiled == 1.0) == (row.provider == COMPILED)
        text = (tmp_path / "network.md").read_text()
        assert network.table(rows) in text and rows[0].commit in text and "tiny" in capsys.readouterr().out

    def test_it_compiles_only_while_there_is_time(self, small):
        rows = network.step_rows(network.AUTO, network.Subject("tiny", "contiguous"), 0.0, SETTING)
        assert [row.provider for row in rows] == list(PROVIDERS) and not small
        assert all(row.note == "not compiled: no time left" and row.median_ms is None for row in rows[3:])
        assert all(row.versus_compiled is None for row in rows)
        assert "| torch.compile | not compiled: no time left | - | - | - | - |" in network.table(rows)

    def test_it_does_not_compile_if_told_so(self, small):
        rows = network.step_rows(network.NEVER, network.Subject("tiny", "contiguous"), 0.0, SETTING)
        assert [row.provider for row in rows] == list(steps.EAGER) and not small

    def test_what_cannot_be_compiled_is_noted(self, small, monkeypatch):
        def refuse(net: nn.Module, **options: object) -> None:
            raise RuntimeError("no | compiler\nand more")

        monkeypatch.setattr(torch, "compile", refuse)
        rows = network.step_rows(network.ALWAYS, network.Subject("tiny", "contiguous"), 0.0, SETTING)
        assert [row.note for row in rows] == [""] * 3 + ["RuntimeError: no / compiler"] * 2
        assert all(row.median_ms for row in rows[:3])
