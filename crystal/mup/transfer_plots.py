"""Loss against learning rate, a curve a width, a panel a parametrization: does the minimum stay where it is?"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crystal.mup.transfer import Optimum, Transfer, Trial, curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_transfer(results: Mapping[str, tuple[Transfer, Sequence[Trial]]], path: Path) -> None:
    """Write a picture in the format that the path's suffix names, else as PNG. results: parametrization → (verdict,
    trials). Raises OSError where the path cannot be written."""
    form = path.suffix.removeprefix(".")
    content = io.BytesIO()
    figure(results).savefig(content, format=form if form in ("png", "pdf", "svg") else "png", dpi=120)
    path.write_bytes(content.getvalue())


def figure(results: Mapping[str, tuple[Transfer, Sequence[Trial]]]) -> Figure:
    """Points are seeds, a thin line their mean, a thick one the parabola that was fitted, over the points it was
    fitted to; a diamond is its minimum. Widths run dark to light in cividis, which stays readable in gray."""
    import matplotlib
    from matplotlib.figure import Figure

    fig = Figure(figsize=(max(5.2 * len(results), 6.5), 5.2), layout="constrained")
    axes = fig.subplots(1, len(results), squeeze=False, sharey=True, sharex=True)[0]
    widths = sorted({width for transfer, _ in results.values() for width in transfer.widths})
    shades = dict(zip(widths, matplotlib.colormaps["cividis"](np.linspace(0, 0.85, len(widths))), strict=True))
    optima = [o for transfer, _ in results.values() for o in transfer.widths.values()]
    least, worst = min(o.loss for o in optima), max(o.loss for o in optima)
    axes[0].set_ylim(least - 0.1, worst + 2 * (worst - least) + 0.3)
    for ax, (name, (transfer, trials)) in zip(axes, results.items(), strict=True):
        for row, (width, curve) in enumerate(curves(trials).items()):
            _curve(ax, curve, shades[width])
            _diverged(ax, curve, len({t.seed for t in trials}), shades[width], row)
            _optimum(ax, transfer.widths[width], shades[width])
        first = transfer.widths[min(transfer.widths)].log2_lr_optimum
        ax.axvline(first, color="0.35", lw=1, ls=(0, (4, 3)), zorder=1)
        ax.set_title(_title(name, transfer), fontsize=8.5, parse_math=False)
        ax.set_xlabel("log2 of the base learning rate")
        ax.grid(alpha=0.25, lw=0.6)
    axes[0].set_ylabel("held-out loss, nats per token")
    columns = 5 if len(results) > 1 else 3
    fig.legend(handles=_keys(shades), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return fig


def _title(name: str, transfer: Transfer) -> str:
    """The verdict, the numbers of the window that is drawn, and what each window says."""
    windows = ", ".join(f"±{octaves:g} {w.verdict or 'too few points'}" for octaves, w in transfer.windows.items())
    return (
        f"{name}: {transfer.verdict}\nshift {transfer.shift_octaves:+.2f} octaves, regret {transfer.regret:.2%}, "
        f"fitted within ±{transfer.window_octaves:g} octaves\nby window: {windows}"
    )


def _curve(ax: Axes, curve: dict[float, dict[int, float]], color) -> None:
    """Every seed, and the mean where none of them diverged."""
    seeds = [(x, loss) for x, losses in curve.items() for loss in losses.values()]
    ax.plot(*zip(*seeds, strict=True), color=color, ls="none", marker="o", ms=3, mew=0, alpha=0.55)
    most = max(map(len, curve.values()))
    mean = [(x, np.mean(list(losses.values()))) for x, losses in sorted(curve.items()) if len(losses) == most]
    ax.plot(*zip(*mean, strict=True), color=color, lw=0.9, alpha=0.8)


def _diverged(ax: Axes, curve: dict[float, dict[int, float]], seeds: int, color, row: int) -> None:
    """A cross at the top for every learning rate at which a seed was lost, each width in a row of its own."""
    lost = [x for x, losses in curve.items() if len(losses) < seeds]
    style = {"ls": "none", "marker": "x", "ms": 5, "mew": 1.4, "transform": ax.get_xaxis_transform()}
    ax.plot(lost, [0.975 - 0.03 * row] * len(lost), color=color, **style)


def _optimum(ax: Axes, best: Optimum, color) -> None:
    if best.parabola is not None:
        x = np.linspace(*best.window, 60)
        ax.plot(x, np.polyval(best.parabola, x), color=color, lw=2.6, alpha=0.9, solid_capstyle="round", zorder=4)
    ends = np.clip([[best.log2_lr_optimum - best.ci[0]], [best.ci[1] - best.log2_lr_optimum]], 0, None)
    ax.errorbar(
        [best.log2_lr_optimum], [best.loss], xerr=ends, color=color, ecolor="0.15", elinewidth=1, marker="D",
        markersize=6, markeredgecolor="black", capsize=3, zorder=5,
    )  # fmt: skip


def _keys(shades: Mapping[int, Sequence[float]]) -> list:
    from matplotlib.lines import Line2D

    gray = "0.35"
    return [
        *(Line2D([], [], color=shade, lw=2.6, label=f"width {width}") for width, shade in shades.items()),
        Line2D([], [], color=gray, ls="none", marker="o", ms=3, label="a seed"),
        Line2D([], [], color=gray, lw=0.9, label="mean of the seeds"),
        Line2D([], [], color=gray, lw=2.6, label="fitted parabola"),
        Line2D([], [], color=gray, ls="none", marker="D", mec="black", label="its minimum, with 95% interval"),
        Line2D([], [], color=gray, ls=(0, (4, 3)), lw=1, label="the narrowest width's minimum"),
        Line2D([], [], color=gray, ls="none", marker="x", ms=5, mew=1.4, label="a seed diverged: not in mean or fit"),
    ]
