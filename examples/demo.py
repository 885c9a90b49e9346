"""Trains the same network twice from the same seed, with nn.BatchNorm2d and with torch_bn, and compares (make demo).

Ends with status 1 and a sentence if compiled kernels cannot do the work, or if a network fails on too many of the
digits it has not seen. Runs on the CPU and takes well under three minutes on two cores.
"""

import os
import sys
from pathlib import Path
from statistics import median

# How long threads of GNU OpenMP wait awake for more work; read when torch is imported. At its default of 300000 turns
# they keep the cores of a busy machine from threads that have work. On two cores shared with compilers an epoch took
# 3 to 30 s in place of 1 to 2 s; on the same cores nearly idle the default is a little faster, 0.3 s against 0.4 s.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import options
import report
import train_cnn
from norm_time import NormSeconds, norm_seconds
from train_cnn import torch_bn
from training import Training

OUTPUT = Path("runs/demo")
NORMS = {"nn.BatchNorm2d": "torch", "torch_bn": "torch_bn"}  # name in the table: value of --norm
REQUIRED_ACCURACY = 0.97
CLOCKED_EPOCHS = 5


def main() -> int:
    """Runs the comparison and returns the exit status."""
    try:
        torch_bn.load(verbose=True)
    except RuntimeError as error:
        return fail(f"torch_bn has no compiled kernels here: {error}")
    trainings = {name: train(name, norm) for name, norm in NORMS.items()}
    spent = clock_norm_layers(trainings)
    picture = OUTPUT / "curves.png"
    report.write_curves(picture, {name: training.history for name, training in trainings.items()})

    print("                  held-out    time per    inside the normalization layers, per epoch")
    print("layers            accuracy       epoch       forward      backward      together")
    for name, training in trainings.items():
        print(table_line(name, training, spent[name]))
    print(f"\nLoss and accuracy, epoch by epoch: {picture.resolve()}")

    for name, training in trainings.items():
        if accuracy(training) < REQUIRED_ACCURACY:
            return fail(f"{name}: accuracy must be at least {REQUIRED_ACCURACY}, got {accuracy(training):.4f}")
    return 0


def train(name: str, norm: str) -> Training:
    """One whole training on the digits, its files in a folder of its own."""
    chosen = options.parse(None, ["--norm", norm, "--device", "cpu", "--output", str(OUTPUT / norm)])
    training = train_cnn.prepare(chosen)
    for layer in training.model.modules():
        if isinstance(layer, torch_bn.BatchNorm2d):
            layer.fused = True  # compiled kernels or an error: no other way through this demo
    print(f"{name}: {train_cnn.normalization(chosen)}")
    train_cnn.run(training, chosen)
    print()
    return training


def clock_norm_layers(trainings: dict[str, Training]) -> dict[str, NormSeconds]:
    """The median over further epochs, the networks taking turns so that a busy machine slows both alike."""
    epochs: dict[str, list[NormSeconds]] = {name: [] for name in trainings}
    for _ in range(CLOCKED_EPOCHS):
        for name, training in trainings.items():
            with norm_seconds(training.model) as spent:
                for images in training.shuffled_batches():
                    training.gradients(images)  # no optimizer step: the schedule is at its end
            epochs[name].append(spent)
    return {
        name: NormSeconds(median(one.forward for one in spent), median(one.backward for one in spent))
        for name, spent in epochs.items()
    }


def accuracy(training: Training) -> float:
    return training.history[-1]["held_out_accuracy"]


def table_line(name: str, training: Training, spent: NormSeconds) -> str:
    """One training under the heading that main prints."""
    epoch = median(row["seconds"] for row in training.history)
    forward, backward = 1000 * spent.forward, 1000 * spent.backward
    return (
        f"{name:17}{accuracy(training):9.4f}{epoch:10.2f} s"
        f"{forward:11.0f} ms{backward:11.0f} ms{forward + backward:11.0f} ms"
    )


def fail(sentence: str) -> int:
    print(f"demo.py: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
