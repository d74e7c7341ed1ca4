"""The picture of `crystal compare`: losses of several runs over one another, against tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.output.pictures import colors, literal, save
from crystal.workspace.curves import Curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3  # of the small pictures, one a source


def draw(runs: list[Curves], out: Path, sources: list[str]) -> None:
    """Write the picture: training loss above, each source's validation loss below. Raises ConfigError.

    A run's training loss is a pale line, and a line of running means over it.
    """
    save(lambda: figure_of(runs, sources), out)


def figure_of(runs: list[Curves], sources: list[str]) -> Figure:
    """The figure that `draw` writes."""
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure it made
    from matplotlib.ticker import EngFormatter

    colored = list(zip(runs, colors(len(runs)), strict=True))
    columns = min(len(sources), _COLUMNS) or 1
    rows = math.ceil(len(sources) / columns)
    figure = Figure(figsize=(9, 4.2 + 2.4 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.7] + [1] * rows)
    above = figure.add_subplot(grid[0, :])
    lines = [_training(above, run, color) for run, color in colored]
    above.set_title("training loss, smoothed over pale raw", loc="left", fontsize=10)
    _limit(above, [run.loss for run in runs])
    for number, source in enumerate(sources):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns], sharex=above)
        points = [_validation(axes, run, color, source) for run, color in colored]
        axes.set_title(f"validation, {literal(source)}", loc="left", fontsize=10)
        _limit(axes, points)
    for axes in figure.axes:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#e5e5e5", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if axes.get_subplotspec().rowspan.stop == 1 + rows or axes is above:
            axes.set_xlabel("tokens", fontsize=9)
        if axes.get_subplotspec().colspan.start == 0:
            axes.set_ylabel("nats per token", fontsize=9)
    labels = [literal(run.label) + ("" if run.loss else " (no steps recorded)") for run in runs]
    figure.legend(lines, labels, loc="outside upper left", ncols=min(len(runs), 4), fontsize=9, frameon=False)
    return figure


def _training(axes, run: Curves, color: str):
    """Draw a run's training loss; its line, for the legend."""
    axes.plot(run.tokens, run.loss, color=color, alpha=0.22, lw=0.8)
    (line,) = axes.plot(run.tokens, smoothed(run.loss), color=color, lw=1.6)
    return line


def _validation(axes, run: Curves, color: str, source: str) -> list[float]:
    points = [
        (t, by_source[source]) for t, by_source in zip(run.val_tokens, run.val_loss, strict=True) if source in by_source
    ]
    tokens, values = zip(*points, strict=True) if points else ((), ())
    axes.plot(tokens, values, color=color, marker="o", ms=3, lw=1.2)
    return list(values)


def smoothed(values: list[float]) -> list[float]:
    """Means over a window centred on each value, a fortieth of them all wide.

    At the start, where losses fall steeply, it is narrower; at the end it looks back only.
    """
    half = len(values) // 80
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        first, stop = i - min(half, i), min(i + min(half, i) + 1, len(values))
        means.append((sums[stop] - sums[first]) / (stop - first))
    return means


def _limit(axes, curves: list[list[float]]) -> None:
    """Leave the fall of the first steps out of sight, where it would flatten the rest."""
    later = [value for curve in curves for value in curve[len(curve) // 20 :]]
    if later:
        low, high = min(later), max(later)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(low - room, high + room)
