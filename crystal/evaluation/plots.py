"""Scores over tokens: one picture a task, as the paper's Figure 4, and one of a suite's tasks, as its Figure 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.curriculum.stages import Curriculum
from crystal.evaluation.results import Result
from crystal.output.pictures import colors, literal, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osD^vPX*"
_WIDTH = 1.96  # standard errors on each side: 95 %


def plot_suite(found: Sequence[Result], name: str, curriculum: Curriculum, path: Path) -> None:
    """The first metric of every task against tokens, a grey line where a stage begins. Raises ConfigError where it
    cannot be written."""
    save(lambda: _suite(found, name, curriculum), path)


def plot_task(found: Sequence[Result], curriculum: Curriculum, path: Path) -> None:
    """One task's first metric with its 95 % interval, and chance, against tokens. Raises as `plot_suite`."""
    save(lambda: _task(found, curriculum), path)


def _suite(found: Sequence[Result], name: str, curriculum: Curriculum) -> Figure:
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result.task for result in found))
    bits = [r for r in found if "bits_per_byte" in r.metrics and r.first[0] != "bits_per_byte"]
    figure = Figure(figsize=(8.5, 7.2 if bits else 4.8), layout="constrained")
    axes = figure.subplots(2 if bits else 1, 1, sharex=True, squeeze=False)[:, 0]
    for i, (task, color) in enumerate(zip(tasks, colors(len(tasks)), strict=True)):
        points = [r for r in found if r.task == task]
        style = {"color": color, "marker": _MARKS[i % 8], "ms": 4.5, "lw": 1.3}
        x, (metric, first) = [_tokens(r, curriculum) for r in points], points[0].first
        label = literal(f"{task} ({metric})")
        axes[0].plot(x, [r.first[1].value for r in points], label=label, **style)
        if first.chance is not None:
            axes[0].axhline(first.chance, color=color, lw=0.7, ls=":", zorder=1)
        if mine := [r for r in bits if r.task == task]:
            axes[1].plot(x, [r.metrics["bits_per_byte"].value for r in mine], **style)
    for ax in axes:
        _axes(ax, found, curriculum)
    _name_stages(axes[0], found, curriculum)
    axes[0].set_ylabel("score; dotted: chance")
    if bits:
        axes[0].set_xlabel("")
        axes[1].set_ylabel("bits per byte of right answers")
    axes[0].set_title(literal(name), fontsize=11, pad=18)
    figure.legend(fontsize=8, ncols=min(3, len(tasks)), frameon=False, loc="outside lower center")
    return figure


def _task(found: Sequence[Result], curriculum: Curriculum) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    metric, first = found[0].first
    x, y = [_tokens(r, curriculum) for r in found], [r.first[1].value for r in found]
    (color,) = colors(1)
    ax.plot(x, y, color=color, marker="o", ms=4.5, lw=1.3)
    errors = [(r.first[1].stderr or 0.0) * _WIDTH for r in found]
    if any(errors):
        ax.fill_between(x, [a - e for a, e in zip(y, errors, strict=True)],
                        [a + e for a, e in zip(y, errors, strict=True)], color=color, alpha=0.15, lw=0)  # fmt: skip
    if first.chance is not None:
        ax.axhline(first.chance, color="0.35", lw=0.9, ls=":")
        ax.annotate("chance", (1.0, first.chance), (-2, 2), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="bottom", fontsize=8, color="0.35")  # fmt: skip
    _axes(ax, found, curriculum)
    _name_stages(ax, found, curriculum)
    ax.set_ylabel(metric)
    ax.set_title(literal(f"{found[0].task}, {max(r.n for r in found):,} items"), fontsize=11, pad=18)
    return figure


def _tokens(result: Result, curriculum: Curriculum) -> int:
    return result.step * curriculum.global_batch_size * curriculum.seq_len


def _axes(ax: Axes, found: Sequence[Result], curriculum: Curriculum) -> None:
    """Tokens below, and a grey line where each stage begins."""
    last = max(_tokens(result, curriculum) for result in found)
    ax.set_xlim(-0.02 * max(last, 1), 1.03 * max(last, 1))
    ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.set_xlabel("tokens")
    ax.grid(alpha=0.25, lw=0.6)
    for begin, _ in _begun(found, curriculum):
        ax.axvline(begin, color="0.6", lw=1.0, zorder=1)


def _begun(found: Sequence[Result], curriculum: Curriculum) -> list[tuple[int, str]]:
    """(tokens, name) of the stages that begin before the last result."""
    each, last = curriculum.global_batch_size * curriculum.seq_len, max(_tokens(r, curriculum) for r in found)
    begins = [(stage.first_step * each, stage.name) for stage in curriculum.stages]
    return [(begin, name) for begin, name in begins if begin < max(last, 1)]


def _name_stages(ax: Axes, found: Sequence[Result], curriculum: Curriculum) -> None:
    for begin, name in _begun(found, curriculum):
        ax.annotate(literal(name), (begin, 1.0), (2, 3), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize=8, color="0.35")  # fmt: skip
