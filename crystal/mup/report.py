"""How reports of the audit and of the coordinate check are read: as text, as a page, in a notebook, as a picture.

`import crystal.mup` puts these behind `str(report)`, `report.to_html()` and `report.plot()`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crystal.mup.coord_check import CoordCheck
from crystal.mup.coord_panels import seeds_of, worst_first
from crystal.mup.verdict import EFFECTS, PRESENTATIONS, Presentation, Report, Row, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FAULTS = 20  # shown of one report


def report_text(report: Report, head: str | None = None) -> str:
    """Verdict, faults, what is not settled, notes, what was accepted. head: what stands behind the verdict."""
    lines = [f"{report.verdict}  {_head(report) if head is None else head}"]
    lines += [f"  {line}" for line in summary(report.failures, _FAULTS)] if report.failures else []
    open_ = [row for row in report.unsettled if not (report.failures and row.quantity.split()[0] in EFFECTS)]
    lines += [f"  inconclusive: {line}" for line in summary(open_, _FAULTS)] if open_ else []
    lines += [f"  note: {note}" for note in report.remarks()]
    return "\n".join(lines)


def rows_text(rows: Sequence[Row], limit: int = 60) -> str:
    """A table of rows, worst first."""
    shown = worst_first(rows)[:limit]
    cells = [("verdict", "name", "quantity", "found", "expected")]
    cells += [(r.verdict, r.name, r.quantity, _power(r.slope), _power(r.expected)) for r in shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, f"{len(rows) - limit} more rows"] if len(rows) > limit else lines)


def _head(report: Report) -> str:
    return f"{len(report.rows)} checks, {report.seconds:.1f} s"


def _coord_head(check: CoordCheck) -> str:
    label = f"{check.label}: " if check.label else ""
    sizes = ", ".join(map(str, check.sizes))
    return f"{label}{check.along}s {sizes}, {seeds_of(check)}, {check.steps} steps, {check.seconds:.1f} s"


def _power(exponent: float | None) -> str:
    return "" if exponent is None else f"{exponent:+z.2f}"


def _page(report: Report) -> str:
    from crystal.mup.report_page import page

    return page(report, "muP audit", _head(report))


def _coord_page(check: CoordCheck) -> str:
    from crystal.mup.coord_page import page

    return page([check], "Coordinate check", {"seconds": f"{check.seconds:.1f}"})


def _figure(report: Report) -> Figure:
    from crystal.mup.report_plot import figure

    return figure(report)


def _coord_figure(check: CoordCheck) -> Figure:
    from crystal.mup.coord_plots import figure

    return figure([check])


def _cell(report: Report) -> str:
    """The page in a frame of its own, so that its styles and script leave the notebook's alone."""
    page = html.escape(report.to_html())
    return f'<iframe sandbox="allow-scripts" style="width:100%;height:34em;border:0" srcdoc="{page}"></iframe>'


PRESENTATIONS[Report] = Presentation(report_text, _page, _cell, _figure)
PRESENTATIONS[CoordCheck] = Presentation(
    lambda check: report_text(check, _coord_head(check)), _coord_page, _cell, _coord_figure
)
