"""The audit as a figure: exponents found against exponents expected, a panel for each quantity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crystal.mup.coord_panels import FAILS, OPEN, tally
from crystal.mup.verdict import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ORDER = ("init", "lr", "weight decay", "eps", "forward", "attention")
_STYLES = {  # of a dot, the worst drawn last
    "PASS": {"color": "#0072B2", "marker": "o", "s": 30},
    "INCONCLUSIVE": {"edgecolors": OPEN, "facecolors": "white", "marker": "o", "s": 30},
    "FAIL": {"color": FAILS, "marker": "x", "s": 42},
}
_COLUMNS, _LABELS, _LETTERS = 3, 6, 30  # of panels; named in one panel; of one name


def figure(report: Report) -> Figure:
    """A dot is all tensors of one verdict whose exponents are the same, with their number; on the dashed line found
    is as expected. What fails is vermilion and named, above the panel if it has no two numbers to draw."""
    from matplotlib.figure import Figure

    drawn: dict[str, list[Row]] = {}
    for row in report.rows:
        drawn.setdefault(row.quantity, []).append(row)
    drawn = {quantity: rows for quantity, rows in drawn.items() if any(map(_has_dot, rows))}
    names = sorted(drawn, key=lambda q: (_ORDER.index(q) if q in _ORDER else len(_ORDER), q))
    columns, lines = min(len(names), _COLUMNS) or 1, math.ceil(len(names) / _COLUMNS) or 1
    fig = Figure(figsize=(max(2.9 * columns, 4.2), 0.5 + 2.9 * lines), layout="constrained")
    fig.suptitle(f"muP audit: {report.verdict}", fontsize=10)
    if not names:
        fig.text(0.5, 0.5, "no row has an exponent", ha="center", fontsize=9)
        return fig
    exponents = [x for rows in drawn.values() for row in rows if _has_dot(row) for x in _place(row)]
    low, high = min(exponents) - 0.4, max(exponents) + 0.4
    axes = fig.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, names, strict=False):
        ax.plot([low, high], [low, high], color="0.35", ls=(0, (4, 3)), lw=1, zorder=1)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        ax.grid(alpha=0.25, lw=0.6)
        ax.tick_params(labelsize=7)
        ax.set_xlabel("expected exponent", fontsize=8)
        ax.set_title(f"{name}: {_count(drawn[name])}", fontsize=8.5, parse_math=False)
        _dots(ax, drawn[name])
    for ax in axes[::columns]:
        ax.set_ylabel("exponent found", fontsize=8)
    return fig


def _dots(ax: Axes, rows: Sequence[Row]) -> None:
    labels = 0
    for verdict, style in _STYLES.items():
        places: dict[tuple[float, float], list[str]] = {}
        for row in rows:
            if row.verdict == verdict and _has_dot(row):
                places.setdefault(_place(row), []).append(row.name)
        for place, names in sorted(places.items()):
            ax.scatter(*place, zorder=3, **style)
            label = f"{len(names)}"
            if verdict == "FAIL" and labels < _LABELS:
                labels += 1
                label = _named(names)
            left = place[0] > sum(ax.get_xlim()) / 2  # there is room at the left only
            shift = (-6 if left else 6, 5 if left or verdict == "FAIL" else -10)  # beside the dashed line
            ax.annotate(
                label, place, shift, textcoords="offset points", ha="right" if left else "left",
                fontsize=6.5, color="#B34700" if verdict == "FAIL" else "0.25", parse_math=False,
            )  # fmt: skip


def _has_dot(row: Row) -> bool:
    return row.expected is not None and row.slope is not None and math.isfinite(row.slope)


def _place(row: Row) -> tuple[float, float]:
    return round(row.expected, 2), round(row.slope, 2)


def _named(names: Sequence[str]) -> str:
    name = names[0] if len(names[0]) <= _LETTERS else "…" + names[0][1 - _LETTERS :]
    return name + (f" +{len(names) - 1}" if len(names) > 1 else "")


def _count(rows: Sequence[Row]) -> str:
    missing = [row.name for row in rows if row.verdict == "FAIL" and not _has_dot(row)]
    return tally([row.verdict for row in rows]) + (f"\nnot drawn: {_named(missing)}" if missing else "")
