"""Draws the speed of each provider relative to torch's own layer, and where the bandwidth of a copy would put it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import DIRECTIONS
from .means import NOTHING, Mean, Series, means, series
from .providers import COPY, TORCH
from .rows import Row

COLOURS = ("#9aa5b1", "#2f6fb0", "#c2803d")
LIMIT = "the least bytes at the speed of a copy"
BARS_WIDTH = 0.8

Averages = Mapping[tuple[Series, str, str], Mean]


def draw(rows: Sequence[Row], path: Path) -> None:
    """One row of panels for each group of layers, one column for each direction; higher bars are better."""
    groups = list(dict.fromkeys(row.group for row in rows))
    figure = Figure(figsize=(15, 2.9 * len(groups) + 0.9), layout="constrained")
    panels = figure.subplots(len(groups), len(DIRECTIONS), sharey="row", squeeze=False)
    averages = means(rows)
    for line, group in zip(panels, groups, strict=True):
        members = list(dict.fromkeys(series(row) for row in rows if row.group == group))
        for panel, direction in zip(line, DIRECTIONS, strict=True):
            _panel(panel, members, direction, averages, _contenders(rows))
            panel.set_title(f"{group}, {direction}", fontsize=10)
        line[0].set_ylabel(f"times {TORCH}'s speed")
    entries = [entry for panel in panels.flat for entry in zip(*panel.get_legend_handles_labels(), strict=True)]
    legend = {label: handle for handle, label in entries}
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=len(legend), frameon=False)
    first = rows[0]
    conditions = f"{first.machine}, {first.threads} threads, torch {first.torch}, commit {first.commit}, {first.date}"
    figure.supxlabel(conditions, fontsize=9)
    figure.savefig(path, dpi=110)


def _contenders(rows: Sequence[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row.provider for row in rows) if name not in (TORCH, COPY)]


def _panel(
    panel: Axes, members: Sequence[Series], direction: str, averages: Averages, contenders: Sequence[str]
) -> None:
    width = BARS_WIDTH / max(1, len(contenders))
    for index, provider in enumerate(contenders):
        offset = (index - (len(contenders) - 1) / 2) * width
        heights = [averages.get((member, direction, provider), NOTHING).versus_torch for member in members]
        known = {place + offset: height for place, height in enumerate(heights) if height}
        bars = panel.bar(list(known), list(known.values()), 0.92 * width, color=COLOURS[index], label=provider)
        panel.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    panel.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label=f"{TORCH}, eager")
    shares = [averages.get((member, direction, TORCH), NOTHING).of_copy for member in members]
    limits = {place: 1 / share for place, share in enumerate(shares) if share}
    if limits:
        left, right = ([place + side * BARS_WIDTH / 2 for place in limits] for side in (-1, 1))
        panel.hlines(list(limits.values()), left, right, color="black", linewidth=1.6, label=LIMIT)
    panel.set_xticks(range(len(members)), [f"{m.dtype}\n{m.layout}" for m in members], fontsize=8)
    panel.margins(y=0.15)
    panel.spines[["top", "right"]].set_visible(False)
