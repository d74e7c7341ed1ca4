"""The coordinate check as a picture and a page: small multiples, a column for each parametrization.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; what fails is also drawn thicker and marked.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.mup.coord_check import CoordCheck, by_depth
from crystal.mup.verdict import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "tensor": "#0072B2",  # blue
    "attention": "#009E73",  # green
    "mlp": "#E69F00",  # orange
    "residual": "#CC79A7",  # pink
    "output": "#000000",
    "FAIL": "#D55E00",  # vermilion
}


def figure(checks: Sequence[CoordCheck]) -> Figure:
    """One column a check, one row a quantity, both axes logarithmic; the y axis is shared along a row."""
    from matplotlib.figure import Figure

    quantities = _quantities(checks[-1])
    fig = Figure(figsize=(4.2 * len(checks) + 1.2, 2.1 * len(quantities) + 0.8), layout="constrained")
    axes = fig.subplots(len(quantities), len(checks), squeeze=False, sharey="row", sharex=True)
    for column, check in enumerate(checks):
        verdicts = {(r.name, r.quantity): r.verdict for r in check.rows}
        for line, (quantity, step) in enumerate(quantities):
            ax = axes[line][column]
            label = _label(quantity, step)
            for name, ys in _lines(check, quantity, step).items():
                verdict = verdicts.get((name, label))
                if verdict is None or min(ys) <= 0:
                    continue
                failed = verdict == "FAIL"
                colour = COLOURS["FAIL" if failed else _kind(name, quantity)]
                style = {"linewidth": 1.8, "marker": "x"} if failed else {"linewidth": 0.9, "marker": "."}
                ax.plot(check.sizes, ys, color=colour, markersize=4, **style)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.grid(alpha=0.25)
            ax.tick_params(labelsize=7)
            if column == 0:
                ax.set_ylabel(label, fontsize=9)
        axes[0][column].set_title(f"{check.label or 'check'}: {check.verdict}", fontsize=10)
        axes[-1][column].set_xlabel(check.along, fontsize=9)
    for (low, high), ax in ((row[0].get_ylim(), row[0]) for row in axes):
        if high < 4 * low:  # at least two octaves, or noise fills the panel
            ax.set_ylim((low * high) ** 0.5 / 2, (low * high) ** 0.5 * 2)
    handles = [axes[0][0].plot([], [], color=c, label="fails" if k == "FAIL" else k)[0] for k, c in COLOURS.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return fig


def draw(checks: Sequence[CoordCheck], path: Path) -> None:
    """Write the picture as PNG."""
    path.write_bytes(_png(checks))


def _png(checks: Sequence[CoordCheck]) -> bytes:
    buffer = io.BytesIO()
    figure(checks).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _quantities(check: CoordCheck) -> list[tuple[str, int]]:
    """(quantity, step or 0) of the rows of the picture, those that are judged; the tensors' own come first."""
    last, judged = check.steps, {row.quantity for row in check.rows}
    shown = [("init", 0), ("update", 0), ("push", 0), ("size", 1), ("size", last), ("change", last)]
    return [(q, s) for q, s in shown if _label(q, s) in judged]


def _label(quantity: str, step: int) -> str:
    return f"{quantity} t={step}" if step else quantity


def _lines(check: CoordCheck, quantity: str, step: int) -> dict[str, list[float]]:
    """name → mean over seeds at each size, for names that every size has."""
    values: dict[str, dict[int, list[float]]] = {}
    for m in check.measured:
        for (name, q, t), value in m.values.items():
            if check.along == "depth":
                name = by_depth(name, m.size, check.blocks)
            if q == quantity and (step in (0, t)):
                values.setdefault(name, {}).setdefault(m.size, []).append(value)
    return {
        name: [sum(by_size[s]) / len(by_size[s]) for s in check.sizes]
        for name, by_size in values.items()
        if len(by_size) == len(check.sizes)
    }


def _kind(name: str, quantity: str) -> str:
    if quantity in ("init", "update", "push"):
        return "tensor"
    if name == "output":
        return "output"
    return "attention" if "attn" in name else "mlp" if "mlp" in name else "residual"


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.15rem .7rem;text-align:left;border-bottom:1px solid #eee}
td.n{text-align:right;font-variant-numeric:tabular-nums}.FAIL{color:#b34700;font-weight:600}
.INCONCLUSIVE{color:#7a5c00}img{max-width:100%}"""


def page(checks: Sequence[CoordCheck], title: str) -> str:
    """A self-contained HTML page: verdict, what is wrong, the picture, every row of the last check."""
    check = checks[-1]
    picture = base64.b64encode(_png(checks)).decode()
    faults = "".join(f"<li>{html.escape(line)}</li>" for line in summary(check.failures, 20))
    rows = "".join(
        f"<tr><td>{html.escape(r.name)}</td><td>{r.quantity}</td><td class=n>{_number(r.slope)}</td>"
        f"<td class=n>{_interval(r.ci)}</td><td class=n>{_number(r.expected)}</td>"
        f"<td class={r.verdict}>{r.verdict}</td></tr>"
        for r in check.rows
    )
    seeds = len({m.seed for m in check.measured})
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}: <span class={check.verdict}>{check.verdict}</span></h1>"
        f"<p>{check.along}s {', '.join(map(str, check.sizes))}; {seeds} seeds; {check.steps} steps; "
        f"{check.seconds:.1f} s.</p><ul>{faults}</ul>"
        f'<img alt="sizes against {check.along}" src="data:image/png;base64,{picture}">'
        f"<h2>All rows</h2><table><tr><th>tensor or activation<th>quantity<th>slope<th>95% interval<th>expected"
        f"<th>verdict</tr>{rows}</table>"
    )


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:+z.2f}"


def _interval(ci: tuple[float, float] | None) -> str:
    return "" if ci is None else f"{ci[0]:+z.2f} … {ci[1]:+z.2f}"
