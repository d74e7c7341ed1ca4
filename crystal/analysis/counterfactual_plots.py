"""A run beside its twin: how far their scores are apart, sequence by sequence, in each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crystal.analysis.memorization_plots import share_axis
from crystal.output.pictures import colors, literal, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_differences(differences: Mapping[str, Sequence[float]], result: dict, path: Path) -> None:
    """A histogram of score differences for every group, its mean with the 95 % interval. Raises ConfigError where it
    cannot be written."""
    save(lambda: _drawn(differences, result), path)


def _drawn(differences: Mapping[str, Sequence[float]], result: dict) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.3 + 1.1 * len(differences)), layout="constrained")
    axes = figure.subplots(len(differences), 1, sharex=True, squeeze=False)[:, 0]
    edges = (np.arange(2 * result["l"] + 2) - result["l"] - 0.5) / result["l"]
    for ax, (name, own), color in zip(axes, differences.items(), colors(len(differences)), strict=True):
        ax.hist(own, edges, weights=np.full(len(own), 1 / max(len(own), 1)), color=color)
        told = f"{name.replace('_', ' ')}, n {len(own):,}"
        mean = result["groups"][name]["score"]
        if mean is not None:
            ax.axvline(mean["mean"], color="black", lw=1)
            if mean["interval"]:
                ax.axvspan(*mean["interval"], color="black", alpha=0.15, lw=0)
            told += f", mean {mean['mean']:+.3f}"
        share_axis(ax, max(map(len, differences.values())))
        ax.annotate(told, (0.99, 0.92), xycoords="axes fraction", ha="right", va="top", fontsize=8)
        ax.grid(alpha=0.25, lw=0.6)
        ax.tick_params(labelsize=8)
    axes[-1].set_xlabel(f"score of the run less score of its twin, k = {result['k']}, l = {result['l']}")
    figure.supylabel("share of sequences", fontsize=9)
    axes[0].set_title(literal(f"step {result['step']:,}, with and without {result['without']}"), fontsize=10)
    return figure
