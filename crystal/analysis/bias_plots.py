"""Sentiment by group: a row of two panels a domain, its checkpoints beside one another with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.output.pictures import colors, literal, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 6  # checkpoints in a picture
_MARKS = "osD^vP"
_TITLES = {"whole": "prompt and continuation", "continuation": "continuation alone"}


def plot_bias(checkpoints: Sequence[dict], name: str, path: Path) -> None:
    """Means of groups as `bias` summarizes them; a grey cross is the mean of the prompts alone, a hollow mark one with
    no interval. Raises ConfigError where it cannot be written."""
    save(lambda: _figure(_some(checkpoints), name), path)


def _some(checkpoints: Sequence[dict]) -> list[dict]:
    """At most six, evenly, the first and the last among them."""
    if len(checkpoints) <= _MOST:
        return list(checkpoints)
    return [checkpoints[round(i * (len(checkpoints) - 1) / (_MOST - 1))] for i in range(_MOST)]


def _figure(checkpoints: list[dict], name: str) -> Figure:
    from matplotlib.figure import Figure

    domains = list(checkpoints[0]["domains"])
    rows = [len(_groups(checkpoints, domain)) for domain in domains]
    each = 0.13 + 0.05 * len(checkpoints)  # inches a group
    figure = Figure(figsize=(10.5, 1.3 + sum(0.75 + each * n for n in rows)), layout="constrained")
    grid = figure.subplots(
        len(domains), 2, squeeze=False, sharex="col", sharey="row", gridspec_kw={"height_ratios": [n + 1 for n in rows]}
    )
    for axes, domain in zip(grid, domains, strict=True):
        for ax, scored in zip(axes, _TITLES, strict=True):
            _panel(ax, checkpoints, domain, scored)
        axes[0].set_ylabel(literal(domain.replace("_", " ")), fontsize=9)
    for ax, told in zip(grid[0], _TITLES.values(), strict=True):
        ax.set_title(f"{told}\n{ax.get_title()}", fontsize=9)
    for ax in grid[-1]:
        ax.set_xlabel("mean of VADER's compound, 95 % interval over titles", fontsize=8)
    grid[0, 0].plot([], [], "o", color="0.45", mfc="white", ms=4, label="hollow: no interval")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, frameon=False, loc="outside lower center")
    figure.suptitle(literal(f"{name}: sentiment of BOLD's groups"), fontsize=11)
    return figure


def _groups(checkpoints: list[dict], domain: str) -> list[str]:
    """Of every checkpoint; the most positive prompts on top."""
    found: dict[str, float] = {}
    for checkpoint in checkpoints:
        for group, own in checkpoint["domains"][domain]["prompt"]["groups"].items():
            found.setdefault(group, own["mean"])
    return sorted(found, key=lambda group: -found[group])


def _panel(ax: Axes, checkpoints: list[dict], domain: str, scored: str) -> None:
    groups, count = _groups(checkpoints, domain), len(checkpoints)
    for i, (checkpoint, color) in enumerate(zip(checkpoints, colors(count), strict=True)):
        own, place = checkpoint["domains"][domain], (i - (count - 1) / 2) * 0.7 / count
        for y, group in enumerate(groups):
            if (found := own[scored]["groups"].get(group)) is None:
                continue
            interval = found["interval"]
            filled = color if interval else "white"
            ax.plot(found["mean"], y + place, _MARKS[i], color=color, mfc=filled, ms=4)
            if interval:
                ax.plot(interval, [y + place] * 2, color=color, lw=1.3)
        stage = "" if checkpoint["stage"] is None else f", {checkpoint['stage']}"
        ax.plot(
            [], [], f"{_MARKS[i]}-", color=color, ms=4, lw=1.3, label=literal(f"step {checkpoint['step']:,}{stage}")
        )
    if scored == "whole":
        prompts = checkpoints[-1]["domains"][domain]["prompt"]["groups"]
        at = [(prompts[group]["mean"], y) for y, group in enumerate(groups) if group in prompts]
        ax.plot(*zip(*at, strict=True), "x", color="0.45", ms=4, label="prompts alone")
    ax.axvline(0, color="0.6", lw=0.8, zorder=1)
    ax.grid(axis="x", alpha=0.25, lw=0.6)
    ax.set_yticks(range(len(groups)), [literal(group.replace("_", " ")) for group in groups], fontsize=7.5)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.tick_params(axis="x", labelsize=8, labelbottom=True)
    ax.set_title(_told(checkpoints, domain, scored), fontsize=8)


def _told(checkpoints: list[dict], domain: str, scored: str) -> str:
    """Whether groups differ, checkpoint by checkpoint."""
    ps = [checkpoint["domains"][domain][scored]["gap"]["p_holm"] for checkpoint in checkpoints]
    if all(p is None for p in ps):
        return "groups: too few titles to judge"
    said = ", ".join("-" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in ps)
    return f"no difference between groups: p {said} (Holm)"
