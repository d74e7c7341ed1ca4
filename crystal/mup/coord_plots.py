"""The coordinate check as a figure for a paper: a column for each check, a row for each quantity, both axes in log2."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crystal.mup.coord_check import CoordCheck
from crystal.mup.coord_panels import (
    COLORS,
    FAILS,
    OPEN,
    Panel,
    bundles,
    caption,
    exponent,
    heading,
    limits,
    panels,
    quantities,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Format = Literal["png", "pdf", "svg"]
FORMATS: tuple[Format, ...] = ("png", "pdf", "svg")
_LABELS, _LETTERS = 15, 30  # beside a panel, and of one of them


def figure(checks: Sequence[CoordCheck]) -> Figure:
    """The first check is the one asked about; the others, of the same sizes, stand beside it for comparison.

    The y axis is shared along a row. Lines are named at their right end, expected slopes are dashed, and what fails is
    vermilion, thicker and on top.
    """
    shown = quantities(checks[0])
    drawn = [panels(check, shown) for check in checks]
    said = textwrap.wrap(caption(checks[0]), 78 * len(checks))
    keys = _keys(checks, {line.kind for column in drawn for panel in column for line in panel.lines})
    lines_below = len(said) + math.ceil(len(keys) / (4 * len(checks)))
    fig, axes = _grid(len(shown), len(checks), 0.65 + 0.15 * lines_below)
    for line in range(len(shown)):
        row = [column[line] for column in drawn]
        axes[line][0].set_ylabel(row[0].statistic, fontsize=8)
        low, high = limits(row, checks[0].sizes[-1] / checks[0].sizes[0])
        for ax, check, panel in zip(axes[line], checks, row, strict=True):
            _draw(ax, check, panel)
            _name(ax, panel, low, high)
        axes[line][0].set_ylim(low, high)
    for ax, check in zip(axes[0], checks, strict=True):
        title = heading(check, checks[0])
        ax.annotate(title, (0.5, 1.2), xycoords="axes fraction", ha="center", fontsize=10, parse_math=False)
    for ax, check in zip(axes[-1], checks, strict=True):
        ax.set_xlabel(check.along, fontsize=8)
    below = fig.legend(
        handles=keys, loc="lower center", ncols=4 * len(checks), fontsize=7.5, frameon=False,
        title="\n".join(said), title_fontsize=7.5,
    )  # fmt: skip
    below.get_title().set_parse_math(False)
    return fig


def _grid(rows: int, columns: int, below: float) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """Axes with room for names at their right and `below` inches for what stands under them. Places are set, not found
    by a layout engine, which takes as long as the drawing."""
    from matplotlib.figure import Figure

    width, height = 0.8 + (3.1 + 1.7) * columns, 0.5 + 1.75 * rows - 0.35 + below
    fig = Figure(figsize=(width, height))
    spaces = {"left": 0.8 / width, "right": 1 - 1.7 / width, "wspace": 1.7 / 3.1}
    spaces |= {"top": 1 - 0.5 / height, "bottom": below / height, "hspace": 0.35 / 1.4}
    return fig, fig.subplots(rows, columns, squeeze=False, sharey="row", sharex=True, gridspec_kw=spaces)


def _keys(checks: Sequence[CoordCheck], kinds: set[str]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=color, marker=".", label=kind) for kind, color in COLORS.items() if kind in kinds]
    keys.append(Line2D([], [], color=FAILS, marker="x", lw=1.8, label="fails"))
    if any(row.verdict == "INCONCLUSIVE" for check in checks for row in check.rows):
        keys.append(Line2D([], [], color=OPEN, marker="o", mfc="white", label="inconclusive"))
    return [*keys, Line2D([], [], color="0.35", ls="--", lw=1, label="expected slope")]


def render(checks: Sequence[CoordCheck], form: Format) -> bytes:
    """The figure as a file's content. PDF embeds TrueType fonts, which journals ask for."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in letters that the font lacks
        figure(checks).savefig(buffer, format=form, dpi=130, metadata={"Title": "coordinate check"})
    return buffer.getvalue()


def draw(checks: Sequence[CoordCheck], path: Path) -> None:
    """Write the figure in the format that the path's suffix names."""
    path.write_bytes(render(checks, path.suffix.removeprefix(".")))


def _draw(ax: Axes, check: CoordCheck, panel: Panel) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(check.sizes, [str(size) for size in check.sizes])
    ax.minorticks_off()
    ax.grid(alpha=0.25, lw=0.6)
    ax.tick_params(labelsize=7)
    first, last = check.sizes[0], check.sizes[-1]
    for z, line in enumerate(panel.lines):
        style = {
            "PASS": {"color": COLORS[line.kind], "lw": 1, "marker": ".", "ms": 4},
            "INCONCLUSIVE": {"color": OPEN, "lw": 1.3, "marker": "o", "ms": 4, "mfc": "white"},
            "FAIL": {"color": FAILS, "lw": 1.6, "marker": "x", "ms": 5},
        }[line.row.verdict]
        ax.plot(check.sizes, line.values, zorder=3 + z / 1000, **style)
    for power in panel.expected:
        begin = panel.guide(power)
        ends = [begin, begin * (last / first) ** power]
        ax.plot([first, last], ends, color="0.35", ls=(0, (4, 3)), lw=1, zorder=5)
    expected = ", ".join(map(exponent, panel.expected))
    note = f"expected slope {expected}; {panel.count()}" if panel.lines else panel.count()
    if panel.left_out:
        note += f"; zero or not finite, so not drawn: {', '.join(panel.left_out[:2])}"
        note += f" +{len(panel.left_out) - 2}" if len(panel.left_out) > 2 else ""
    ax.set_title(note, loc="left", fontsize=7, color="0.25", parse_math=False)


def _name(ax: Axes, panel: Panel, low: float, high: float) -> None:
    """Names at the right ends of the lines, pushed apart where they would touch."""
    from matplotlib.collections import LineCollection

    bottom, top = math.log2(low), math.log2(high)
    found = bundles(panel, top - bottom, _LABELS, _LETTERS)
    places = spread([bundle.end for bundle in found], (top - bottom) / _LABELS, bottom)
    colors = [{"FAIL": FAILS, "INCONCLUSIVE": OPEN}.get(b.verdict, COLORS[b.kind]) for b in found]
    beside = {"transform": ax.get_yaxis_transform(), "clip_on": False}  # x of the axes, y of the data
    leaders = [[(1.0, 2.0**bundle.end), (1.035, 2.0**place)] for bundle, place in zip(found, places, strict=True)]
    ax.add_collection(LineCollection(leaders, colors=colors, linewidths=0.9, **beside), autolim=False)
    for bundle, place in zip(found, places, strict=True):
        dark = "#B34700" if bundle.verdict == "FAIL" else "0.15"  # a line's own color is too pale for small text
        ax.text(1.045, 2.0**place, bundle.label, fontsize=6, va="center", color=dark, parse_math=False, **beside)
