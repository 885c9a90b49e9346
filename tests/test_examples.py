"""The training example: its data files, its checkpoints, its command line, and the demo's verdict."""

import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import checkpoint
import data
import demo
import network
import norm_time
import options
import report
import train_cnn
import training

import torch_bn

# NB: torch 2.13's strided 1x1 convolution of fewer than 16 channels writes past its end on some batch sizes (oneDNN,
# channels_last, two threads).
QUICK = ["--limit", "200", "--epochs", "2", "--batch-size", "67", "--width", "16", "--device", "cpu"]
BOTH_NORMS = pytest.mark.parametrize("norm", ["torch", pytest.param("torch_bn", marks=pytest.mark.kernels)])


# Data files


def write_cifar10(root: Path, images_per_file: int = 3) -> dict[str, np.ndarray]:
    """The official layout with few images; returns the records written, by file name."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(5)
    written = {}
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = random.integers(0, 256, (images_per_file, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
        written[name] = records
    return written


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(root: Path, packed: bool = False, train: int = 7, held_out: int = 3) -> dict[str, np.ndarray]:
    """The official four files with few images; returns the arrays written, by file name."""
    random = np.random.default_rng(6)
    written = {}
    for name, count in (("train", train), ("t10k", held_out)):
        written[f"{name}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), np.uint8)
        written[f"{name}-labels-idx1-ubyte"] = random.integers(0, 10, count, np.uint8)
    for name, values in written.items():
        if packed:
            (root / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (root / name).write_bytes(idx(values))
    return written


def test_digits_are_split_by_the_seed():
    first, again, other = (data.load("digits", None, seed) for seed in (3, 3, 4))
    assert len(first.train) + len(first.held_out) == 1797
    assert first.train.pixels.shape[1:] == (1, 8, 8)
    assert torch.equal(first.held_out.pixels, again.held_out.pixels)
    assert not torch.equal(first.held_out.pixels, other.held_out.pixels)
    assert first.train.pixels.max() == 255
    assert sorted(first.train.labels.unique().tolist()) == list(range(10))


def test_cifar10_reads_what_the_files_hold(tmp_path):
    written = write_cifar10(tmp_path)
    dataset = data.load("cifar10", tmp_path, seed=0)
    assert dataset.train.pixels.shape == (15, 3, 32, 32)
    record = written["data_batch_4.bin"][1]  # image 3 * 3 + 1
    assert dataset.train.labels[10] == record[0]
    assert dataset.train.pixels[10, 2, 5, 31] == record[1 + 2 * 1024 + 5 * 32 + 31]
    assert dataset.held_out.labels.tolist() == written["test_batch.bin"][:, 0].tolist()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnist_reads_what_the_files_hold(tmp_path, name, packed):
    written = write_mnist(tmp_path, packed)
    dataset = data.load(name, tmp_path, seed=0)
    assert dataset.train.pixels.squeeze(1).tolist() == written["train-images-idx3-ubyte"].tolist()
    assert dataset.train.labels.tolist() == written["train-labels-idx1-ubyte"].tolist()
    assert dataset.held_out.pixels.squeeze(1).tolist() == written["t10k-images-idx3-ubyte"].tolist()
    assert dataset.held_out.labels.tolist() == written["t10k-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize(
    ("name", "file", "source"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", "https://www.cs.toronto.edu"),
        ("mnist", "train-images-idx3-ubyte", "https://ossci-datasets"),
        ("fashion-mnist", "train-images-idx3-ubyte", "https://github.com/zalandoresearch"),
    ],
)
def test_missing_file_is_named_with_its_source(tmp_path, name, file, source):
    with pytest.raises(data.DataError, match=f"^{re.escape(str(tmp_path / file))}: missing.*{source}"):
        data.load(name, tmp_path, seed=0)


def test_root_is_asked_for():
    with pytest.raises(data.DataError, match="--data mnist needs --root DIR"):
        data.load("mnist", None, seed=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "expected a positive multiple of 3073 bytes, got 9218"),
        (lambda content: b"", "expected a positive multiple of 3073 bytes, got 0"),
        (lambda content: b"\x0a" + content[1:], r"expected labels in \[0, 10\), got 10"),
    ],
    ids=["cut", "empty", "label"],
)
def test_damaged_cifar10_is_refused(tmp_path, damage, message):
    write_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_5.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(data.DataError, match=f"data_batch_5.bin: damaged, {message}"):
        data.load("cifar10", tmp_path, seed=0)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-images-idx3-ubyte", lambda c: b"\x00\x00\x08\x01" + c[4:], "magic number 00000803, got 00000801"),
        ("train-images-idx3-ubyte", lambda c: b"", "magic number 00000803, got none"),
        ("train-images-idx3-ubyte", lambda c: c[:9], "a header of 16 bytes, got 9 bytes in all"),
        ("train-images-idx3-ubyte", lambda c: c[:-1], r"expected 5504 bytes for \[7, 28, 28\] values, got 5503"),
        ("train-images-idx3-ubyte", lambda c: c + b"\0", r"expected 5504 bytes for \[7, 28, 28\] values, got 5505"),
        ("train-images-idx3-ubyte", lambda c: c[:4] + b"\xff" * 12, "bytes for .4294967295, 4294967295, 4294967295"),
        ("train-images-idx3-ubyte", lambda c: idx(np.zeros((7, 27, 28), np.uint8)), r"28 x 28 pixels, got \[27, 28\]"),
        ("train-images-idx3-ubyte", lambda c: idx(np.zeros((0, 28, 28), np.uint8)), r"for \[0, 28, 28\] values"),
        ("train-labels-idx1-ubyte", lambda c: c[:-1] + b"\x0b", r"expected labels in \[0, 10\), got 11"),
        ("train-labels-idx1-ubyte", lambda c: idx(np.zeros(6, np.uint8)), "expected 7 labels, one per image, got 6"),
        ("t10k-labels-idx1-ubyte", lambda c: c[:-1], r"expected 11 bytes for \[3\] values, got 10"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_damaged_mnist_is_refused(tmp_path, file, damage, message):
    write_mnist(tmp_path)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(data.DataError, match=f"{file}: damaged, .*{message}"):
        data.load("mnist", tmp_path, seed=0)


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-9], lambda c: b"no gzip", lambda c: c[:60] + bytes([c[60] ^ 255]) + c[61:]],
    ids=["cut", "foreign", "flipped"],
)
def test_damaged_gz_is_refused(tmp_path, damage):
    write_mnist(tmp_path, packed=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(data.DataError, match=r"t10k-images-idx3-ubyte\.gz: damaged, it cannot be unpacked"):
        data.load("mnist", tmp_path, seed=0)


@pytest.mark.parametrize("mirror", [False, True], ids=["shifted", "shifted and mirrored"])
def test_augment_shifts_within_its_bound(mirror):
    images, size = 300, 7
    pixels = torch.zeros(images, 2, size, size + 2, dtype=torch.uint8)
    pixels[:, 0, 3, 2] = 1  # one dot in the first channel, off the middle column 4
    pixels[:, 1] = 9
    moved = data.augment(pixels, shift=2, mirror=mirror)
    assert moved.shape == pixels.shape and moved.dtype == torch.uint8
    image, row, column = moved[:, 0].nonzero().T
    assert image.tolist() == list(range(images)), "each dot stays inside, once"
    assert row.unique().tolist() == [1, 2, 3, 4, 5]
    assert column.unique().tolist() == ([0, 1, 2, 3, 4, 5, 6, 7, 8] if mirror else [0, 1, 2, 3, 4])
    assert (moved[:, 1] == 0).any() and (moved[:, 1] <= 9).all(), "zeros move in"


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1 up, got 0"),
        (["--batch-size", "2.5"], "argument --batch-size: must be a whole number from 1 up, got 2.5"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be a finite number above 0, got nan"),
        (["--learning-rate", "fast"], "argument --learning-rate: must be a finite number above 0, got fast"),
        (["--seed", "-1"], r"argument --seed: must be a whole number in \[0, 2\*\*63\), got -1"),
        (["--device", "abacus"], "argument --device: cannot use abacus"),
        (["--device", "meta"], "argument --device: must be cpu or cuda, got meta"),
        (["--norm", "none"], "argument --norm: invalid choice: 'none'"),
        (["--nrom", "torch"], "unrecognized arguments: --nrom torch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option_ends_with_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        train_cnn.main(arguments)
    assert exit.value.code == 2
    assert re.fullmatch(rf"train_cnn\.py: {message}.*\n", capsys.readouterr().err)


def test_missing_data_ends_with_one_line(capsys, tmp_path):
    assert train_cnn.main(["--data", "cifar10", "--root", str(tmp_path)]) == 1
    assert re.fullmatch(r"train_cnn\.py: .*data_batch_1\.bin: missing.*\n", capsys.readouterr().err)


def test_unwritable_output_ends_with_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert train_cnn.main([*QUICK, "--norm", "torch", "--output", str(tmp_path / "file")]) == 1
    assert re.fullmatch(r"train_cnn\.py: .*file.*\n", capsys.readouterr().err)


@BOTH_NORMS
def test_training_writes_table_metrics_curves_and_checkpoint(capsys, tmp_path, norm):
    assert train_cnn.main([*QUICK, "--norm", norm, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert report.HEADER in printed
    assert re.search(r"\n    2 +\d\.\d{4} +[01]\.\d{4} +[01]\.\d{4} +\d+\.\d\d\n", printed)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert checkpoint.load(tmp_path / "checkpoint.pt")["training"]["history"] == rows

    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack_from(">II", picture, 16)
    assert width > 1000 and height > 400
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png", "metrics.jsonl"]


@BOTH_NORMS
@pytest.mark.parametrize("flags", [["--amp"], ["--channels-last"], ["--amp", "--channels-last"]], ids=" ".join)
def test_training_learns_in_mixed_precision_and_channels_last(norm, flags):
    prepared = train_cnn.prepare(options.parse(None, [*QUICK, "--norm", norm, *flags]))
    inputs, outputs = [], []
    norm_layer = prepared.model.get_submodule("blocks.1.norm1")
    norm_layer.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0]))
    norm_layer.register_forward_hook(lambda layer, arguments, output: outputs.append(output))
    first, second = prepared.epoch(), prepared.epoch()
    assert second["loss"] < first["loss"]
    for tensor in inputs + outputs:
        assert tensor.dtype == (torch.bfloat16 if "--amp" in flags else torch.float32)
        assert "--channels-last" not in flags or tensor.is_contiguous(memory_format=torch.channels_last)


def test_norms_start_from_the_same_weights_and_learn_alike():
    trainings = [train_cnn.prepare(options.parse(None, [*QUICK, "--norm", norm])) for norm in ("torch", "torch_bn")]
    ours = [layer for layer in trainings[1].model.modules() if isinstance(layer, torch_bn.BatchNorm2d)]
    assert len(ours) == 9 and not any(type(layer) is nn.BatchNorm2d for layer in trainings[1].model.modules())
    states = [training.model.state_dict() for training in trainings]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    losses = []
    for one in trainings:
        torch.manual_seed(1)
        losses.append(one.epoch()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_training_on_each_data_set_runs_through(tmp_path):
    write_cifar10(tmp_path)
    write_mnist(tmp_path)
    for name in ("cifar10", "mnist", "fashion-mnist"):
        arguments = ["--data", name, "--root", str(tmp_path), "--epochs", "1", "--width", "16", "--device", "cpu"]
        assert train_cnn.main([*arguments, "--output", str(tmp_path / name)]) == 0


def test_diverged_loss_stops_the_run_and_keeps_the_last_checkpoint(capsys, tmp_path, monkeypatch):
    epoch = training.Training.epoch

    def poisoned(self: training.Training, progress) -> dict[str, float]:
        if len(self.history) == 1:
            nn.init.constant_(self.model.classify.bias, torch.inf)
        return epoch(self, progress)

    monkeypatch.setattr(training.Training, "epoch", poisoned)
    assert train_cnn.main([*QUICK, "--norm", "torch", "--output", str(tmp_path)]) == 1
    assert re.fullmatch(r"train_cnn\.py: the loss became nan in epoch 2; .*\n", capsys.readouterr().err)
    assert len(checkpoint.load(tmp_path / "checkpoint.pt")["training"]["history"]) == 1


# Resuming


@BOTH_NORMS
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(capsys, tmp_path, monkeypatch, norm):
    arguments = [*QUICK, "--epochs", "3", "--norm", norm]
    assert train_cnn.main([*arguments, "--output", str(tmp_path / "whole")]) == 0

    gradients = training.Training.gradients

    def interrupted(self: training.Training, images: data.Images) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self.history) == 1 and len(images) < self.settings.batch_size:  # in the last batch of epoch 2
            raise KeyboardInterrupt
        return gradients(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "gradients", interrupted)
        assert train_cnn.main([*arguments, "--output", str(tmp_path / "parts")]) == train_cnn.INTERRUPTED
    path = tmp_path / "parts" / "checkpoint.pt"
    assert capsys.readouterr().err == f"interrupted; to go on, add --resume {path}\n"
    assert len(checkpoint.load(path)["training"]["history"]) == 1

    torch.manual_seed(987)  # nothing may hang on the state of the process
    assert train_cnn.main([*arguments, "--output", str(tmp_path / "parts"), "--resume", str(path)]) == 0

    whole, parts = (checkpoint.load(tmp_path / name / "checkpoint.pt")["training"] for name in ("whole", "parts"))
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    assert torch.equal(whole["generators"]["cpu"], parts["generators"]["cpu"])
    for row, other in zip(whole["history"], parts["history"], strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_checkpoint_moves_between_the_norms(tmp_path):
    started = train_cnn.prepare(options.parse(None, [*QUICK, "--norm", "torch"]))
    started.epoch()
    saved = {name: getattr(options.parse(None, QUICK), name) for name in train_cnn.RESUME_MUST_AGREE}
    checkpoint.save(tmp_path / "checkpoint.pt", {"options": saved, "training": started.state_dict()})

    arguments = [*QUICK, "--norm", "torch_bn", "--resume", str(tmp_path / "checkpoint.pt")]
    resumed = train_cnn.prepare(options.parse(None, arguments))
    assert isinstance(resumed.model.blocks[0].norm1, torch_bn.BatchNorm2d)
    assert resumed.accuracy(resumed.held_out) == pytest.approx(started.history[0]["held_out_accuracy"], abs=1 / 360)
    assert train_cnn.main([*arguments, "--output", str(tmp_path)]) == 0


def test_resume_with_other_options_or_of_a_finished_run_is_refused(capsys, tmp_path):
    assert train_cnn.main([*QUICK, "--norm", "torch", "--output", str(tmp_path)]) == 0
    resume = [*QUICK, "--norm", "torch", "--resume", str(tmp_path / "checkpoint.pt")]
    assert train_cnn.main([*resume, "--seed", "1"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"train_cnn\.py: .*: to resume, --seed must be 0 as in the checkpoint, got 1\n", error)
    assert train_cnn.main(resume) == 1
    assert capsys.readouterr().err.endswith("checkpoint.pt: all 2 epochs are trained already\n")


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.arange(10_000.0)})
    return path


def test_checkpoint_returns_what_was_saved(saved):
    assert torch.equal(checkpoint.load(saved)["weights"], torch.arange(10_000.0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "the checkpoint is damaged or is none"),
        (lambda content: b"", "the checkpoint is damaged or is none"),
        (lambda content: b"PNG", "the checkpoint is damaged or is none"),
        (lambda content: content[:20000] + bytes([content[20000] ^ 1]) + content[20001:], "the checkpoint is damaged"),
    ],
    ids=["cut", "empty", "foreign", "one bit flipped"],
)
def test_damaged_checkpoint_ends_with_one_line(capsys, saved, damage, message):
    saved.write_bytes(damage(saved.read_bytes()))
    assert train_cnn.main([*QUICK, "--norm", "torch", "--resume", str(saved)]) == 1
    assert re.fullmatch(rf"train_cnn\.py: .*checkpoint\.pt: {message}.*\n", capsys.readouterr().err)


def test_foreign_or_missing_checkpoint_is_refused(tmp_path):
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"other\.pt: the file is no checkpoint of train_cnn\.py"):
        checkpoint.load(tmp_path / "other.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"gone\.pt: there is no such checkpoint"):
        checkpoint.load(tmp_path / "gone.pt")


class Unpicklable:
    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["while writing", "before the bytes are on the disk", "before the move"])
def test_crash_while_saving_keeps_the_old_checkpoint(saved, monkeypatch, moment):
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    state = {"weights": torch.zeros(3)}
    if moment == "while writing":
        state["more"] = Unpicklable()
    else:
        monkeypatch.setattr(os, "fsync" if moment == "before the bytes are on the disk" else "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, state)
    assert torch.equal(checkpoint.load(saved)["weights"], torch.arange(10_000.0))
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_leftover_of_a_killed_run_does_not_disturb(saved):
    (saved.parent / "checkpoint.pt.part").write_bytes(b"half a checkp")
    checkpoint.save(saved, {"weights": torch.ones(2)})
    assert torch.equal(checkpoint.load(saved)["weights"], torch.ones(2))
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_ends_a_run_from_any_folder_and_leaves_its_checkpoint(tmp_path):
    command = [sys.executable, train_cnn.__file__, *QUICK, "--epochs", "9999", "--output", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "run" / "checkpoint.pt"
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == train_cnn.INTERRUPTED, error
    assert error.splitlines()[-1] == "interrupted; to go on, add --resume run/checkpoint.pt"
    assert checkpoint.load(path)["training"]["history"]
    assert not list(path.parent.glob("*.part"))


# Clocks and demo


def test_norm_seconds_clocks_forward_and_backward_of_each_layer():
    model = network.ResidualNetwork(channels=1, classes=10, width=4)
    x = torch.randn(5, 1, 9, 9)
    with norm_time.norm_seconds(model) as spent:
        started = time.perf_counter()
        model(x).sum().backward()
        elapsed = time.perf_counter() - started
    assert 0 < spent.forward < elapsed and 0 < spent.backward < elapsed - spent.forward
    before = (spent.forward, spent.backward)
    model(x).sum().backward()
    assert (spent.forward, spent.backward) == before, "the hooks are gone after the block"


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context, x, seconds):
        context.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(2 * context.seconds)
        return gradient.clone(), None


class SlowNorm(nn.BatchNorm2d):
    def forward(self, x):
        return Sleep.apply(x, 0.02)


class SlowOther(nn.Module):
    def forward(self, x):
        return Sleep.apply(x, 0.4)


def test_norm_seconds_clocks_slow_norms_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), SlowNorm(2), nn.ReLU(inplace=True), SlowOther(), SlowNorm(2))
    with norm_time.norm_seconds(model) as spent:
        model(torch.randn(3, 1, 4, 4)).sum().backward()
    assert 2 * 0.02 <= spent.forward < 0.4
    assert 2 * 0.04 <= spent.backward < 0.8


def test_norm_seconds_refuses_layers_of_plain_operations():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), torch_bn.BatchNorm2d(2, fused=False))
    with pytest.raises(RuntimeError, match="is a chain of operations"), norm_time.norm_seconds(model):
        model(torch.randn(3, 1, 4, 4))


@pytest.fixture
def short_demo(tmp_path, monkeypatch) -> Path:
    """The demo with a training of seconds, in a folder of its own."""
    parse = options.parse
    monkeypatch.setattr(options, "parse", lambda text, arguments: parse(text, [*arguments, *QUICK]))
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "CLOCKED_EPOCHS", 1)
    return tmp_path


@pytest.mark.kernels
def test_demo_prints_its_table_and_judges_the_accuracy(capsys, monkeypatch, short_demo):
    assert demo.main() == 1
    captured = capsys.readouterr()
    assert re.search(r"demo\.py: nn\.BatchNorm2d: accuracy must be at least 0\.97, got 0\.\d{4}\n$", captured.err)
    assert "torch_bn: torch_bn on compiled kernels" in captured.out
    for name in demo.NORMS:
        row = rf"^{re.escape(name)} +0\.\d{{4}} +\d+\.\d\d s +\d+ ms +\d+ ms +\d+ ms$"
        assert re.search(row, captured.out, re.MULTILINE)
    assert str(short_demo / "curves.png") in captured.out
    assert (short_demo / "curves.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(demo, "REQUIRED_ACCURACY", 0.05)
    assert demo.main() == 0


def test_demo_fails_without_compiled_kernels(capsys, monkeypatch, short_demo):
    def load(verbose: bool = False) -> None:
        raise RuntimeError("install ninja")

    monkeypatch.setattr(torch_bn, "load", load)
    assert demo.main() == 1
    assert capsys.readouterr().err == "demo.py: torch_bn has no compiled kernels here: install ninja\n"
