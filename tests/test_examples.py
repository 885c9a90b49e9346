"""The training example: its command line, its checkpoints, and how it ends."""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import data
import options
import pytest
import report
import torch
import train_cnn
import training
from example_setup import QUICK, write_cifar10, write_mnist
from torch import nn

import torch_bn

BOTH_NORMS = pytest.mark.parametrize(
    "norm", ["torch", pytest.param("torch_bn", marks=[pytest.mark.kernels, pytest.mark.on_cpu])]
)


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


def test_ctrl_c_while_saving_is_not_hidden_by_torch(tmp_path, monkeypatch):
    def end_archive():
        raise RuntimeError("unexpected pos")

    def interrupted(*_):
        with contextlib.ExitStack() as stack:
            stack.callback(end_archive)
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.ones(2)})
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"weights": torch.zeros(2)})
    assert checkpoint.load(path)["weights"].eq(1).all()


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
