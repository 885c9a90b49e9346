"""What runs tell: a table of the epochs, the rows as JSON lines, and the curves of one or of many runs as a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    _finish(path, figure, dpi=120)


@dataclass(frozen=True)
class Band:
    """Runs that differ in their seed alone, and how to draw them."""

    label: str
    histories: Sequence[Sequence[Row]]
    color: str
    line: str = "-"  # as matplotlib names them


def write_bands(path: Path, panels: Mapping[str, Sequence[Band]]) -> None:
    """A PNG of 1000 x 400 pixels with the held-out loss, a panel for each title: the mean of each band's runs as a
    line, and from the lowest to the highest run of each epoch the band.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (title, bands) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for band in bands:
            epochs = [row["epoch"] for row in band.histories[0]]
            runs_of_epochs = list(zip(*([row["held_out_loss"] for row in run] for run in band.histories), strict=True))
            means = [sum(runs) / len(runs) for runs in runs_of_epochs]
            marker = "o" if len(epochs) == 1 else None  # a line through one point is invisible
            axes.plot(epochs, means, band.line, color=band.color, marker=marker, label=band.label)
            lowest, highest = [min(runs) for runs in runs_of_epochs], [max(runs) for runs in runs_of_epochs]
            axes.fill_between(epochs, lowest, highest, color=band.color, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="epoch", ylabel="held-out loss", yscale="log")
    _finish(path, figure, dpi=100)


def _finish(path: Path, figure: Figure, dpi: int) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
