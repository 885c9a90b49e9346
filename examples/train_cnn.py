"""Trains a small residual CNN to recognize images, with nn.BatchNorm2d or with torch_bn in its place.

python examples/train_cnn.py --norm torch_bn
python examples/train_cnn.py --norm torch_bn --data cifar10 --root DIR --epochs 30 --amp --channels-last
python examples/train_cnn.py --norm torch_bn --resume runs/digits-torch_bn/checkpoint.pt

Writes checkpoint.pt and metrics.jsonl after every epoch, and curves.png at the end, into the folder --output.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import checkpoint
import data
import options
import report
import torch
from network import ResidualNetwork
from tqdm import tqdm
from training import DivergedError, Settings, Training

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a checkout in which torch_bn is not installed
import torch_bn

# What shapes the model, the schedule or the split: a run cannot go on from a checkpoint with another value of these.
RESUME_MUST_AGREE = ("data", "limit", "seed", "epochs", "batch_size", "learning_rate", "width")
INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    chosen = options.parse(__doc__, arguments)
    try:
        training = prepare(chosen)
        print(f"{len(training.dataset.train)} images to train with, {len(training.dataset.held_out)} held out")
        print(f"normalization: {normalization(chosen)}")
        run(training, chosen)
    except KeyboardInterrupt:
        last = chosen.output / "checkpoint.pt"
        print("interrupted" + (f"; to go on, add --resume {last}" if last.exists() else ""), file=sys.stderr)
        return INTERRUPTED
    except (data.DataError, checkpoint.CheckpointError, DivergedError, OSError) as error:
        print(f"train_cnn.py: {error}", file=sys.stderr)
        return 1
    print(f"checkpoint.pt, metrics.jsonl and curves.png are in {chosen.output}")
    return 0


def prepare(chosen: argparse.Namespace) -> Training:
    """The training that the options ask for, at its start or where the checkpoint left it.

    Raises:    data.DataError or checkpoint.CheckpointError for files that cannot be used.
    """
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    saved = checkpoint.load(chosen.resume) if chosen.resume else None
    if saved:
        require_agreement(chosen, saved["options"])
    dataset = data.load(chosen.data, chosen.root, chosen.seed).with_first(chosen.limit)
    torch.manual_seed(chosen.seed)
    model = ResidualNetwork(dataset.channels, data.CLASSES, chosen.width)
    if chosen.norm == "torch_bn":
        torch_bn.convert(model)
    settings = Settings(chosen.batch_size, chosen.epochs, chosen.learning_rate, chosen.amp, chosen.channels_last)
    training = Training(model, dataset, settings, chosen.device)
    if saved:
        training.load_state_dict(saved["training"])
        if len(training.history) == chosen.epochs:
            raise checkpoint.CheckpointError(f"{chosen.resume}: all {chosen.epochs} epochs are trained already")
    return training


def run(training: Training, chosen: argparse.Namespace) -> None:
    """Trains the epochs that are left; each ends with a line in the table, the checkpoint and the metrics."""
    chosen.output.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(chosen, name) for name in RESUME_MUST_AGREE}

    def progress(batches: Iterator) -> Iterator:
        title = f"epoch {len(training.history) + 1}"
        # disable=None: no bar where nobody watches, as in a log file
        return tqdm(batches, title, training.batches, leave=False, disable=None, unit="batch")

    print(report.HEADER)
    try:
        while len(training.history) < chosen.epochs:
            print(report.table_line(training.epoch(progress)), flush=True)
            checkpoint.save(chosen.output / "checkpoint.pt", {"options": kept, "training": training.state_dict()})
            report.write_json_lines(chosen.output / "metrics.jsonl", training.history)
    finally:
        if training.history:
            report.write_curves(chosen.output / "curves.png", {chosen.norm: training.history})


def require_agreement(chosen: argparse.Namespace, saved: dict[str, object]) -> None:
    """Raises CheckpointError unless the options agree with those of the checkpoint where they must."""
    for name in RESUME_MUST_AGREE:
        here, there = getattr(chosen, name), saved[name]
        if here != there:
            flag = "--" + name.replace("_", "-")
            raise checkpoint.CheckpointError(
                f"{chosen.resume}: to resume, {flag} must be {there} as in the checkpoint, got {here}"
            )


def normalization(chosen: argparse.Namespace) -> str:
    """What computes the normalization layers of the run, in words."""
    if chosen.norm == "torch":
        return "nn.BatchNorm2d"
    facts = torch_bn.build_info()
    if facts["extension"] is None:
        return f"torch_bn on plain torch operations ({facts['reason']})"
    if chosen.device.type == "cuda":
        return "torch_bn on " + ("compiled CUDA kernels" if facts["cuda"] else "plain torch operations, built for CPUs")
    return f"torch_bn on compiled kernels ({facts['cpu_table']})"


if __name__ == "__main__":
    sys.exit(main())
