"""Pictures of how a run learned: losses, norms, tokens and gradient noise over steps; perplexity over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.curriculum.stages import Curriculum
from crystal.output.pictures import colors, literal, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osD^vPX*"


def plot_loss(record: Mapping, curriculum: Curriculum, name: str, path: Path) -> None:
    """Training loss and, by source, training (thin) and held-out loss. Raises ConfigError where it cannot be
    written."""
    save(lambda: _loss(record, curriculum, name), path)


def plot_norms(record: Mapping, checkpoints: Sequence[dict], curriculum: Curriculum, name: str, path: Path) -> None:
    """Gradient norm, weights by role, and how far they moved between checkpoints. Raises as `plot_loss`."""
    save(lambda: _norms(record, checkpoints, curriculum, name), path)


def plot_tokens(learned: Mapping, curriculum: Curriculum, name: str, path: Path) -> None:
    """Token learning curves by frequency and by source, with the steps of acquisition. Raises as `plot_loss`."""
    save(lambda: _tokens(learned, curriculum, name), path)


def plot_noise(checkpoints: Sequence[dict], curriculum: Curriculum, name: str, path: Path) -> None:
    """The noise scale with its interval beside the run's batch. Raises as `plot_loss`."""
    save(lambda: _noise(checkpoints, curriculum, name), path)


def plot_perplexity(checkpoints: Sequence[dict], curriculum: Curriculum | None, path: Path) -> None:
    """Perplexity of every source over steps, with its 95 % interval over documents. Raises as `plot_loss`."""
    save(lambda: _perplexity(checkpoints, curriculum), path)


def _loss(record: Mapping, curriculum: Curriculum, name: str) -> Figure:
    figure, (ax,) = _figure(1)
    ax.plot(record["loss"]["steps"], record["loss"]["values"], color="0.75", lw=0.8, label="training")
    names = sorted({*record["source_loss"], *record["val_loss"]})
    for i, (source, color) in enumerate(zip(names, colors(len(names)), strict=True)):
        if own := record["source_loss"].get(source):
            ax.plot(*_smooth(own), color=color, lw=0.8, alpha=0.6)
        if own := record["val_loss"].get(source):
            mark = {"marker": _MARKS[i % 8], "ms": 4}
            ax.plot(own["steps"], own["values"], color=color, lw=1.4, label=literal(source), **mark)
    ax.set_yscale("log")
    _plain(ax)
    ax.set_ylabel("loss, nats per token")
    _steps(ax, curriculum)
    figure.legend(fontsize=8, ncols=min(6, len(names) + 1), frameon=False, loc="outside lower center")
    ax.set_title(literal(f"{name}: marks held out, thin lines training"), fontsize=10, pad=16)
    return figure


def _norms(record: Mapping, checkpoints: Sequence[dict], curriculum: Curriculum, name: str) -> Figure:
    figure, axes = _figure(3)
    axes[0].plot(record["grad_norm"]["steps"], record["grad_norm"]["values"], color="0.75", lw=0.7)
    axes[0].plot(*_smooth(record["grad_norm"]), color="0.35", lw=1.3)
    axes[0].set_ylabel("gradient norm")
    roles = sorted({role for c in checkpoints for role in c["weights"]})
    for i, (role, color) in enumerate(zip(roles, colors(len(roles)), strict=True)):
        for ax, key in ((axes[1], "rms"), (axes[2], "moved")):
            points = [(c["step"], c["weights"][role][key]) for c in checkpoints if c["weights"][role][key]]
            if points:
                style = {"color": color, "marker": _MARKS[i % 8], "ms": 4, "lw": 1.2}
                ax.plot(*zip(*points, strict=True), label=literal(role) if key == "rms" else None, **style)
    axes[1].set_ylabel("weights, rms")
    axes[2].set_ylabel("moved, relative")
    for ax in axes:
        ax.set_yscale("log")
        _plain(ax)
        _steps(ax, curriculum, named=ax is axes[0])
    figure.legend(fontsize=8, ncols=min(5, len(roles)), frameon=False, loc="outside lower center")
    axes[0].set_title(literal(f"{name}: norms"), fontsize=10, pad=16)
    return figure


def _tokens(learned: Mapping, curriculum: Curriculum, name: str) -> Figure:
    figure, axes = _figure(2)
    for ax, key, what in ((axes[0], "ranks", "frequency rank"), (axes[1], "sources", "source")):
        for i, ((label, own), color) in enumerate(zip(learned[key].items(), colors(len(learned[key])), strict=True)):
            style = {"color": color, "marker": _MARKS[i % 8], "ms": 4}
            ax.plot(own["steps"], own["nats"], lw=0, alpha=0.5, **style)
            ax.plot(own["steps"], own["smoothed"], lw=1.3, color=color, label=literal(f"{label} (n {own['n']:,})"))
            middle = (own["acquired"] or {}).get("0.5")
            if middle and middle["bound"] == "at":
                height = learned["chance"] + 0.5 * (own["least"] - learned["chance"])
                ax.plot(middle["step"], height, "|", color=color, ms=14, mew=2)
        ax.axhline(learned["chance"], color="0.4", lw=0.8, ls=":")
        ax.set_ylabel("surprisal, nats")
        _steps(ax, curriculum, named=ax is axes[0])
        ax.legend(fontsize=7.5, frameon=False, title=what, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    told = "dotted: chance, upright strokes: half-way from chance to least"
    axes[0].set_title(literal(f"{name}: held-out tokens; {told}"), fontsize=10, pad=16)
    return figure


def _noise(checkpoints: Sequence[dict], curriculum: Curriculum, name: str) -> Figure:
    figure, (ax,) = _figure(1)
    (color,) = colors(1)
    points = [(c["step"], c["noise"]) for c in checkpoints if (c["noise"] or {}).get("sequences")]
    ax.plot([s for s, _ in points], [n["sequences"] for _, n in points], "o-", color=color, ms=4.5, lw=1.2)
    for step, noise in points:
        if noise["interval"]:
            ax.plot([step, step], noise["interval"], color=color, lw=1)
    batch = curriculum.global_batch_size
    ax.axhline(batch, color="0.4", lw=0.9, ls=":")
    ax.annotate(f"the run's batch, {batch:,}", (0.99, batch), (0, 2), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", va="bottom", fontsize=8, color="0.35")  # fmt: skip
    ax.set_yscale("log")
    _plain(ax)
    ax.set_ylabel("noise scale, sequences")
    _steps(ax, curriculum)
    told = f"of {curriculum.seq_len:,} tokens, raw gradients"
    ax.set_title(literal(f"{name}: simple gradient noise scale, sequences {told}"), fontsize=10, pad=16)
    return figure


def _perplexity(checkpoints: Sequence[dict], curriculum: Curriculum | None) -> Figure:
    figure, (ax,) = _figure(1)
    names = list(dict.fromkeys(name for c in checkpoints for name in c["sources"]))
    for i, (name, color) in enumerate(zip(names, colors(len(names)), strict=True)):
        points = [(c["step"], c["sources"][name]) for c in checkpoints if name in c["sources"]]
        style = {"color": color, "marker": _MARKS[i % 8], "ms": 4.5, "lw": 1.3, "label": literal(name)}
        ax.plot([s for s, _ in points], [f["perplexity"] for _, f in points], **style)
        if all(f["interval"] for _, f in points):
            low, high = zip(*(f["interval"] for _, f in points), strict=True)
            ax.fill_between([s for s, _ in points], low, high, color=color, alpha=0.13, lw=0)
    ax.set_yscale("log")
    _plain(ax)
    ax.set_ylabel("perplexity, per token")
    _steps(ax, curriculum)
    figure.legend(fontsize=8, ncols=min(6, len(names)), frameon=False, loc="outside lower center")
    return figure


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.8, 1.6 + 2.6 * panels if panels > 1 else 4.4), layout="constrained")
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def _smooth(curve: Mapping) -> tuple[list[int], list[float]]:
    """A fiftieth of a curve's points together."""
    values, reach = curve["values"], max(len(curve["values"]) // 100, 1)
    smooth = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        smooth.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return curve["steps"], smooth


def _plain(ax: Axes) -> None:
    """Numbers on a log axis as they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))


def _steps(ax: Axes, curriculum: Curriculum | None, named: bool = True) -> None:
    """Steps below, and a line where each stage begins."""
    ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.set_xlabel("step" if ax.get_subplotspec().is_last_row() else "")
    ax.grid(alpha=0.25, lw=0.6)
    for stage in curriculum.stages if curriculum else ():
        if stage.first_step < ax.get_xlim()[1]:
            ax.axvline(stage.first_step, color="0.6", lw=1, zorder=1)
            if named:
                ax.annotate(literal(stage.name), (stage.first_step, 1), (2, 3), xycoords=("data", "axes fraction"),
                            textcoords="offset points", fontsize=8, color="0.35")  # fmt: skip
