"""What a run tells: a table of its epochs, its rows as JSON lines, and its curves as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from files import replacing
from matplotlib.figure import Figure

Row = Mapping[str, float]
HEADER = "epoch      loss   train accuracy   held-out accuracy   seconds"


def table_line(row: Row) -> str:
    """``row`` as one line under :data:`HEADER`."""
    return (
        f"{row['epoch']:5d}{row['loss']:10.4f}{row['train_accuracy']:17.4f}"
        f"{row['held_out_accuracy']:20.4f}{row['seconds']:10.2f}"
    )


def write_json_lines(path: Path, history: Sequence[Row]) -> None:
    """One JSON object per epoch and line."""
    with replacing(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in history)


def write_curves(path: Path, histories: Mapping[str, Sequence[Row]]) -> None:
    """A PNG with the loss at the left and the accuracies at the right; one colour per run, named by its key.

    Lines get thinner from run to run, so that runs that coincide can still be told apart.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for number, (name, history) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in history]
        style = {
            "color": f"C{number}",
            "linewidth": 1.5 + 2.5 * (len(histories) - 1 - number),
            "marker": "o" if len(epochs) == 1 else None,  # a line through one point is invisible
        }
        losses.plot(epochs, [row["loss"] for row in history], label=name, **style)
        for images, line in (("train", ":"), ("held_out", "-")):
            values = [row[f"{images}_accuracy"] for row in history]
            accuracies.plot(epochs, values, line, label=f"{name}, {images.replace('_', '-')}", **style)
    losses.set(xlabel="epoch", ylabel="training loss", yscale="log")
    accuracies.set(xlabel="epoch", ylabel="accuracy")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
