"""LLM360's pictures of memorization: figure 7 (scores), figure 8 (chunks) and figure 9 (correlation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crystal.analysis.sequences import Chunk
from crystal.output.pictures import colors, literal, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 10  # checkpoints in a picture: the paper's ten
_MARKS = "osD^vPX*"


def plot_scores(
    matches: Mapping[int, Sequence[int]], held_out: Mapping[int, Sequence[int]], asked: int, title: str, path: Path
) -> None:
    """A histogram of asked + 1 bins for every checkpoint, of what it had seen, and held-out sequences as a line.

    matches: equal positions by step. Raises ConfigError where it cannot be written.
    """
    save(lambda: _scores(_some(matches), held_out, asked, title), path)


def plot_chunks(
    by_chunk: Mapping[int, Sequence[Sequence[int]]],
    chunks: Sequence[Chunk],
    held_out: Mapping[int, Sequence[int]],
    asked: int,
    title: str,
    path: Path,
) -> None:
    """Mean score of every chunk, a line a checkpoint; what it had not seen yet is hollow. Raises as `plot_scores`."""
    save(lambda: _chunks(_some(by_chunk), chunks, held_out, asked, title), path)


def plot_correlation(matches: Mapping[int, Sequence[int | None]], title: str, path: Path) -> None:
    """Pearson's correlation of scores between checkpoints, over sequences that both had seen (None: not yet)."""
    save(lambda: _correlation(_some(matches), title), path)


def _some(by_step: Mapping) -> dict:
    """At most ten checkpoints, evenly, the first and the last among them."""
    steps = sorted(by_step)
    if len(steps) > _MOST:
        steps = [steps[round(i * (len(steps) - 1) / (_MOST - 1))] for i in range(_MOST)]
    return {step: by_step[step] for step in steps}


def _scores(matches: dict, held_out: Mapping, asked: int, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.1 + 0.85 * len(matches)), layout="constrained")
    axes = figure.subplots(len(matches), 1, sharex=True, squeeze=False)[:, 0]
    bars, line = colors(2)
    edges = (np.arange(asked + 2) - 0.5) / asked
    for ax, (step, own) in zip(axes, matches.items(), strict=True):
        shares = np.bincount(np.array(own, int), minlength=asked + 1) / max(len(own), 1)
        ax.bar(np.arange(asked + 1) / asked, shares, width=0.9 / asked, color=bars)
        if others := held_out.get(step):
            shares = np.bincount(others, minlength=asked + 1) / len(others)
            ax.stairs(shares, edges, color=line, lw=1.1)
        share_axis(ax, max(map(len, matches.values())))
        ax.grid(alpha=0.25, lw=0.6)
        ax.tick_params(labelsize=8)
        whole = sum(n == asked for n in own)
        told = f"step {step:,}: {whole / max(len(own), 1):.2%} of {len(own):,} extractible"
        ax.annotate(told, (0.99, 0.9), xycoords="axes fraction", ha="right", va="top", fontsize=8)
    axes[-1].set_xlabel("score: share of tokens that greedy decoding gives as trained on")
    figure.supylabel("share of sequences", fontsize=9)
    said = "; line: held-out rows" if any(held_out.values()) else ""
    figure.suptitle(literal(f"{title}: trained on before the checkpoint{said}"), fontsize=9.5)
    return figure


def _chunks(by_chunk: dict, chunks: Sequence[Chunk], held_out: Mapping, asked: int, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    ax = figure.subplots()
    x = np.arange(len(chunks))
    for i, ((step, own), color) in enumerate(zip(by_chunk.items(), colors(len(by_chunk)), strict=True)):
        y = np.array([np.mean(one) / asked if len(one) else np.nan for one in own])
        ax.plot(x, y, color=color, lw=1.2, label=f"step {step:,}")
        seen = np.array([chunk.last is None or chunk.last <= step for chunk in chunks])
        mark = _MARKS[i % len(_MARKS)]
        ax.plot(x[seen], y[seen], mark, color=color, ms=4.5)
        ax.plot(x[~seen], y[~seen], mark, color=color, ms=4.5, mfc="white")
        if others := held_out.get(step):
            ax.axhline(np.mean(others) / asked, color=color, lw=0.7, ls=":", zorder=1)
    ax.set_xticks(x[:: -(-len(x) // 12)])
    if chunks[0].last is None:
        ax.set_xticklabels([literal(chunk.name) for chunk in chunks][:: -(-len(x) // 12)])
        ax.set_xlabel("file")
    else:
        ax.set_xticklabels([short(chunk.last) for chunk in chunks][:: -(-len(x) // 12)])
        ax.set_xlabel("chunk of the run, by its last step")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.1 if len(x) < 5 else 0.03)
    ax.set_ylabel("mean score")
    ax.grid(alpha=0.25, lw=0.6)
    hollow = "" if chunks[0].last is None else ": hollow: not seen whole yet"
    dotted = "; dotted: held-out rows" if any(held_out.values()) else ""
    ax.set_title(literal(f"{title}{hollow}{dotted}"), fontsize=10)
    figure.legend(fontsize=8, ncols=min(5, len(by_chunk)), frameon=False, loc="outside lower center")
    return figure


def _correlation(matches: dict, title: str) -> Figure:
    from matplotlib.figure import Figure

    steps = list(matches)
    values = np.array([[correlation(matches[a], matches[b]) for b in steps] for a in steps])
    figure = Figure(figsize=(1.6 + 0.62 * len(steps), 1.4 + 0.55 * len(steps)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(steps)):
        for j in range(len(steps)):
            dark = np.isfinite(values[i, j]) and values[i, j] > 0.6
            told = "-" if np.isnan(values[i, j]) else f"{values[i, j]:.2f}"
            ax.annotate(told, (j, i), ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    ax.set_xticks(range(len(steps)), [short(s) for s in steps], fontsize=8)
    ax.set_yticks(range(len(steps)), [short(s) for s in steps], fontsize=8)
    ax.set_xlabel("step")
    ax.set_ylabel("step")
    figure.suptitle(literal(f"{title}: correlation of scores"), fontsize=9.5)
    figure.colorbar(image, shrink=0.8)
    return figure


def share_axis(ax: Axes, most: int) -> None:
    """A log axis of shares, from half of one sequence of `most` to all."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.set_ylim(0.5 / max(most, 2), 1.5)
    ax.yaxis.set_major_locator(LogLocator(numticks=4))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    ax.yaxis.set_minor_locator(NullLocator())


def correlation(a: Sequence[int | None], b: Sequence[int | None]) -> float:
    """Pearson's, over places where both have a number; nan where there are under two, or one does not vary."""
    pairs = np.array([(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None], float)
    if len(pairs) < 2 or not pairs.std(0).all():
        return float("nan")
    return float(np.corrcoef(pairs.T)[0, 1])
