"""Plots of a run and of a curriculum."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crystal.curriculum.config import split_entry
from crystal.curriculum.stages import Curriculum
from crystal.files import from_json, regular_bytes
from crystal.output.pictures import colors, legible_on, literal, save, short
from crystal.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osD^vPX*"


def plot_losses(run_dir: Path, curriculum: Curriculum) -> Path:
    """run_dir/loss.png: held-out loss of every source, training loss and base LR, over steps and tokens.

    Raises ConfigError where it cannot be written.
    """
    records = list(read_metrics(run_dir))
    tokens = max((r.get("tokens") or 0 for r in records), default=0)
    save(lambda: _losses(records, curriculum, _title(run_dir, tokens)), run_dir / "loss.png")
    return run_dir / "loss.png"


def _losses(records: list[dict], curriculum: Curriculum, title: str) -> Figure:
    trained = [r for r in records if r.get("loss") is not None]
    validated = [r for r in records if r.get("val_loss")]
    last = max((r["step"] for r in records), default=0)
    smooth = _smooth(trained, curriculum)
    held_out = _by_source(validated)
    cut, top = _cut([loss for _, loss in smooth], validated, trained)
    figure, (*losses, rates) = _rows((0.8, 3.2, 1) if top > cut else (3.2, 1))
    for ax in losses:
        ax.plot([r["step"] for r in trained], [r["loss"] for r in trained], color="0.82", lw=0.7)
        for stage in curriculum.stages:  # each smoothed by itself, for the loss jumps between them
            inside = [(s, v) for s, v in smooth if stage.first_step < s <= stage.first_step + stage.steps]
            if inside:
                ax.plot(*zip(*inside, strict=True), color="0.35", lw=1.4)
        for i, (points, color) in enumerate(zip(held_out.values(), colors(len(held_out)), strict=True)):
            ax.plot(*zip(*points, strict=True), color=color, marker=_MARKS[i % 8], ms=4.5, lw=1.3, zorder=3)
        _loss_axis(ax)
    main = losses[-1]
    low = min([v for r in validated for v in r["val_loss"].values() if v] + [v for _, v in smooth if v], default=1.0)
    main.set_ylim(low * 0.97, cut * 1.03)
    if top > cut:
        losses[0].set_ylim(cut * 1.15, top * 1.08)
        _broken(losses[0], main)
    main.set_ylabel("loss, nats per token")
    _legend(main, held_out, bool(trained))
    rates.plot([r["step"] for r in trained], [r["lr"] for r in trained], color="0.35", lw=1.4)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("base lr")
    rates.set_xlim(-0.015 * max(last, 1), 1.015 * max(last, 1))
    _step_axes(rates, curriculum)
    _mark_stages((*losses, rates), curriculum, max(last, 1))
    losses[0].set_title(literal(title), fontsize=11, pad=18)
    return figure


def _title(run_dir: Path, tokens: int) -> str:
    """`demo: 1.3M parameters, 3.3M tokens, cpu, bf16`, of what the run directory says."""
    try:
        manifest = from_json(regular_bytes(run_dir / "manifest.json"))
        parameters = sum(math.prod(t["shape"]) for t in manifest["plan"]["tensors"])
        where = [manifest["backend"]["name"], manifest["backend"]["compute_dtype"]]
        facts = [f"{short(parameters)} parameters", f"{short(tokens)} tokens", *map(str, where)]
        return f"{manifest['name']}: {', '.join(facts)}"
    except (OSError, ValueError, KeyError, TypeError):
        return run_dir.name


def _smooth(trained: list[dict], curriculum: Curriculum) -> list[tuple[int, float]]:
    """(step, mean of the losses around it): a fiftieth of the steps, fewer where a stage begins or ends."""
    reach = max(1, len(trained) // 100)
    found = []
    for stage in curriculum.stages:
        inside = [r for r in trained if stage.first_step < r["step"] <= stage.first_step + stage.steps]
        values = [r["loss"] for r in inside]
        for i, record in enumerate(inside):
            near = min(reach, i)  # as many before as behind, or the loss that falls as a stage begins would be shifted
            found.append((record["step"], float(np.mean(values[i - near : i + near + 1]))))
    return found


def _by_source(validated: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """source → its held-out losses (step, nats), the source that ends highest first, as the legend stands."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in validated:
        for source, loss in record["val_loss"].items():
            if loss is not None:
                points.setdefault(source, []).append((record["step"], loss))
    return dict(sorted(points.items(), key=lambda item: -item[1][-1][1]))


def _cut(smooth: Sequence[float], validated: list[dict], trained: list[dict]) -> tuple[float, float]:
    """(where the main panel ends, the greatest loss). The first steps fall from ten nats and more; unless that is
    close to the rest, it gets a strip of its own, for it would flatten everything else."""
    first = [v for r in validated[:1] for v in r["val_loss"].values() if v]
    later = [v for r in validated[1:] for v in r["val_loss"].values() if v]
    settled = list(smooth[len(smooth) // 20 :]) or list(smooth)
    rest = max([*later, *settled], default=max(first, default=1.0))
    top = max([rest, *first, *(r["loss"] for r in trained)])
    return (rest, top) if top > 1.5 * rest else (top, top)


def _loss_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.25, lw=0.6)


def _broken(above: Axes, below: Axes) -> None:
    """Show that an axis goes on above with a gap."""
    from matplotlib.ticker import MaxNLocator

    above.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    above.spines.bottom.set_visible(False)
    below.spines.top.set_visible(False)
    above.tick_params(bottom=False)
    slash = {"marker": [(-1, -0.5), (1, 0.5)], "ms": 9, "ls": "none", "color": "k", "mew": 1, "clip_on": False}
    above.plot([0, 1], [0, 0], transform=above.transAxes, **slash)
    below.plot([0, 1], [1, 1], transform=below.transAxes, **slash)


def _legend(ax: Axes, held_out: dict, trained: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=_MARKS[i % 8], ms=4.5, label=literal(f"{source}, held out"))
        for i, (source, color) in enumerate(zip(held_out, colors(len(held_out)), strict=True))
    ]
    if trained:
        handles += [Line2D([], [], color="0.35", lw=1.4, label="training, smoothed")]
        handles += [Line2D([], [], color="0.82", label="training, each step")]
    if handles:
        ax.legend(handles=handles, fontsize=8, ncols=2 if len(handles) > 4 else 1, frameon=False)


def plot_curriculum(curriculum: Curriculum, path: Path) -> None:
    """LR over the whole curriculum, and for each stage the mix of the sources that the run trains on.

    Raises ConfigError where it cannot be written.
    """
    save(lambda: _curriculum(curriculum), path)


def _curriculum(curriculum: Curriculum) -> Figure:
    figure, (rates, mix) = _rows((1, 1.2))
    shares = _shares(curriculum)
    names = list(dict.fromkeys(name for stage in shares for name in stage))
    color = dict(zip(names, colors(len(names)), strict=True))
    for stage, share in zip(curriculum.stages, shares, strict=True):
        steps = sorted({int(stage.steps * i / 400) for i in range(401)} | set(stage.schedule.knots))
        rates.plot([stage.first_step + t for t in steps], [stage.lr_at(t) for t in steps], color="0.35", lw=1.4)
        bottom = 0.0
        for name, weight in share.items():
            mix.bar(stage.first_step, weight, stage.steps, bottom, align="edge", color=color[name], edgecolor="white")
            if weight > 0.05 and stage.steps > 0.06 * curriculum.steps:
                middle = (stage.first_step + stage.steps / 2, bottom + weight / 2)
                style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": legible_on(color[name])}
                mix.annotate(f"{weight:.0%}", middle, **style)
            bottom += weight
    rates.set_ylim(bottom=0)
    rates.set_ylabel("base lr")
    rates.grid(alpha=0.25, lw=0.6)
    mix.set_ylabel("share of sequences")
    mix.set_ylim(0, 1)
    mix.set_xlim(-0.015 * curriculum.steps, 1.015 * curriculum.steps)
    from matplotlib.patches import Patch

    handles = [Patch(color=color[name], label=literal(name)) for name in names]
    figure.legend(handles=handles, fontsize=8, ncols=min(5, len(names)), frameon=False, loc="outside lower center")
    _step_axes(mix, curriculum)
    _mark_stages((rates, mix), curriculum, curriculum.steps)
    title = f"{curriculum.name}: {curriculum.steps:,} steps, {short(curriculum.tokens)} tokens"
    rates.set_title(literal(title), fontsize=11, pad=18)
    return figure


# What LLM360's file names say of how a source was packed, rather than of what it is.
_PACKING = re.compile(
    r"(?:_(?:train|packed|shuffled|fim(?:_[\d.]+)?|part\d+of\d+))+(?=/|$)|/train_shuffled_correct_ratio"
)


def _shares(curriculum: Curriculum) -> list[dict[str, float]]:
    """For each stage, source → share of its sequences, of the sources that the run trains on. Parts of one source are
    one; published names are shortened, unless a stage then had one name for two."""
    bound = []
    for stage in curriculum.stages:
        shares: dict[str, float] = {}
        for entry, weight in stage.bound.items():
            source = split_entry(entry)[0]
            shares[source] = shares.get(source, 0.0) + weight
        bound.append(shares)
    brief = {source: _PACKING.sub("", source) or source for shares in bound for source in shares}
    for shares in bound:
        names = [brief[source] for source in shares]
        brief |= {source: source for source in shares if names.count(brief[source]) > 1}
    return [{brief[source]: weight for source, weight in shares.items()} for shares in bound]


def _rows(heights: Sequence[float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure of axes over one another that share their steps; taller for a higher row."""
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure it made

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    figure.get_layout_engine().set(hspace=0.02)
    return figure, figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)


def _step_axes(ax: Axes, curriculum: Curriculum) -> None:
    """Steps, and under them the tokens that they come to."""
    each = curriculum.global_batch_size * curriculum.seq_len
    ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.set_xlabel("step")
    tokens = ax.secondary_xaxis("bottom", functions=(lambda s: s * each, lambda t: t / each))
    tokens.spines.bottom.set_position(("outward", 36))
    tokens.xaxis.set_major_formatter(lambda x, _: short(x))
    tokens.set_xlabel("tokens")


def _mark_stages(axes: Sequence[Axes], curriculum: Curriculum, steps: int) -> None:
    """A dotted line where each stage of the first `steps` begins, and its name above; in two rows where it is short."""
    end, high = -1.0, False
    for stage in curriculum.stages:
        if stage.first_step >= steps:
            break
        for ax in axes:
            ax.axvline(stage.first_step, color="0.35", lw=0.8, ls=":")
        begin, name = stage.first_step / steps, literal(stage.name)
        high = begin < end and not high
        end = begin + 0.009 * (len(name) + 1)
        place = (stage.first_step, 1.0)
        axes[0].annotate(
            name, place, (0, 13 if high else 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip
