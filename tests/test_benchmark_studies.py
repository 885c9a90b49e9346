"""The measurements beside the main benchmark: what options cost, and what fusing saves."""

import re

import pytest
import torch
from torch import nn

import torch_bn
from benchmarks import features, fused, inplace
from benchmarks.cases import DIRECTIONS, Case
from benchmarks.harness import Quantiles
from benchmarks.network import StepRow
from benchmarks.rows import Setting, read_rows, timed_rows

SETTING = Setting("cpu", 2, "a machine, 2 cores", "abcdef0", "2000-01-31", "2.13.0")

# So large that a few sets of tensors fill the cache.
COLD = Case("odd", (64, 64, 17, 16), torch.float32, "channels_last")


class TestFeatures:
    """What renorm and ghost batches cost."""

    CASE = Case("odd", (9, 5, 4, 3), torch.float32, "channels_last")

    @pytest.mark.parametrize("variant", features.VARIANTS, ids=lambda variant: variant.name)
    def test_every_variant_is_verified_and_a_wrong_one_is_refused(self, variant, monkeypatch):
        tensors = self.CASE.tensors()
        assert isinstance(variant.verified(self.CASE, tensors).module, torch_bn.BatchNorm2d)
        monkeypatch.setattr(nn.Module, "state_dict", lambda self: {"running_mean": torch.ones(5)})
        with pytest.raises((ValueError, KeyError)):
            variant.verified(self.CASE, tensors)

    def test_groups_are_as_many_as_said(self):
        ghost = next(variant for variant in features.VARIANTS if variant.name == "8 ghosts")
        layer = ghost.module(Case("odd", (32, 5, 4, 3), torch.float32), torch.float32)
        assert 32 / layer.virtual_batch_size == features.MANY

    def test_the_table_compares_with_the_plain_layer(self):
        times = dict(zip(features.OPTIONS, (2.0, 3.0, 2.0, 2.2, 4.0, 20.0), strict=True))
        quantiles_of = {name: Quantiles(median, median, median, 9) for name, median in times.items()}
        rows = [
            row for direction in features.MEASURED for row in timed_rows(self.CASE, direction, quantiles_of, SETTING)
        ]
        cells = " | ".join(f"{ratio} ({ratio})" for ratio in ("1.50", "1.00", "1.10", "2.00", "10.00"))
        line = f"| float32 | channels_last | forward | {cells} |"
        assert line in features.page(rows)
        assert SETTING.commit in features.page(rows)

    def test_the_command_writes_rows_and_a_page(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(features, "cases", lambda: [COLD])
        assert features.main(["--seconds", "0", "--output", str(tmp_path)]) == 0
        rows = read_rows(tmp_path / "features.csv")
        assert len(rows) == len(features.VARIANTS) * len(features.MEASURED)
        assert features.table(rows) in (tmp_path / "features.md").read_text() and "renorm" in capsys.readouterr().out


class TestFused:
    """What fusing saves."""

    CASE = Case("odd", (9, 5, 4, 3), torch.float32, "channels_last")

    @pytest.mark.parametrize("name", [fused.TORCH, fused.UNFUSED, fused.OURS])
    @pytest.mark.parametrize("kind", fused.KINDS)
    def test_every_contender_is_verified_and_a_wrong_one_is_refused(self, kind, name):
        ends = fused.contenders(self.CASE, kind)
        fused.verify(self.CASE, kind, ends, fused.make_inputs(self.CASE, kind))
        right = ends[name].call
        wrong = fused.End(ends[name].module, lambda *arguments: right(*arguments) * 1.01)
        with pytest.raises(ValueError, match=f"^{re.escape(name)} on .* result 0 is off float64 by "):
            fused.verify(self.CASE, kind, {name: wrong}, fused.make_inputs(self.CASE, kind))

    BYTES = [("BN+ReLU", (2, 3, 5)), ("BN+add+ReLU", (3, 4, 7)), ("BN+GELU", (2, 3, 5))]

    @pytest.mark.parametrize(("kind", "tensors"), BYTES)
    def test_bytes_are_those_of_the_kind(self, kind, tensors):
        for direction, passes in zip(DIRECTIONS[:3], tensors, strict=True):
            times = {name: Quantiles(2.0, 2.0, 2.0, 9) for name in (fused.TORCH, fused.OURS, fused.COPY)}
            rows = [fused.of_kind(row, kind) for row in timed_rows(self.CASE, direction, times, SETTING)]
            ours = next(row for row in rows if row.provider == fused.OURS)
            copy = next(row for row in rows if row.provider == fused.COPY)
            assert ours.op == copy.op == kind and copy.of_copy == 1.0
            assert ours.bytes == passes * self.CASE.tensor_bytes and copy.bytes == 2 * self.CASE.tensor_bytes
            assert ours.of_copy == pytest.approx(passes / 2)

    def test_the_command_writes_rows_and_a_page(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(fused, "cases", lambda: [COLD])
        assert fused.main(["--seconds", "0", "--output", str(tmp_path)]) == 0
        rows = read_rows(tmp_path / "fused.csv")
        assert len(rows) == len(fused.KINDS) * 3 * 4
        assert fused.table(rows) in (tmp_path / "fused.md").read_text() and "BN+add+ReLU" in capsys.readouterr().out

    def test_the_table_gives_means_and_the_worst(self):
        rows = []
        for shape, time in (((9, 5, 4, 3), 1.0), ((9, 6, 4, 3), 4.0)):
            times = {fused.TORCH: 4.0, fused.OURS: time, fused.COPY: 1.0}
            quantiles_of = {name: Quantiles(median, median, median, 9) for name, median in times.items()}
            for direction in DIRECTIONS[:3]:
                case = Case("odd", shape, torch.float32, "channels_last")
                rows += [fused.of_kind(row, "BN+ReLU") for row in timed_rows(case, direction, quantiles_of, SETTING)]
        assert "| BN+ReLU | float32 | channels_last | torch_bn | 2.00x (1.00), 50% |" in fused.table(rows)


class TestInPlace:
    """What layers in place save."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        monkeypatch.setattr(inplace, "WIDTHS", (4, "pool", 8, 4))
        monkeypatch.setattr(inplace, "SIDE", 16)

    def test_each_layer_is_what_its_row_says(self):
        for provider, kind in ((inplace.TORCH, nn.BatchNorm2d), (inplace.IN_PLACE, torch_bn.BatchNorm2d)):
            net = inplace.with_layers_of(provider, "contiguous")
            layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
            assert len(layers) == 3 and {type(layer) for layer in layers} == {kind}
            assert all(getattr(layer, "inplace", False) == (provider == inplace.IN_PLACE) for layer in layers)

    def test_the_command_writes_rows_and_a_page(self, tmp_path):
        assert inplace.main(["--seconds", "0", "--output", str(tmp_path)]) == 0
        rows = read_rows(tmp_path / "inplace.csv", StepRow)
        providers = [inplace.TORCH, inplace.OURS, inplace.IN_PLACE]
        assert [row.provider for row in rows] == providers * 4
        kept = {row.provider: row.kept_MB for row in rows if row.network == inplace.TRAINING}
        assert kept[inplace.IN_PLACE] < 0.8 * kept[inplace.OURS] <= 0.8 * kept[inplace.TORCH]
        assert inplace.table(rows) in (tmp_path / "inplace.md").read_text()

    def test_a_network_that_is_wrong_is_not_timed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch_bn, "fuse", lambda net: nn.init.zeros_(net[0][1].bias))
        with pytest.raises(ValueError, match="must be within"):
            inplace.main(["--seconds", "0", "--output", str(tmp_path)])
