"""The coordinate check as one HTML file that needs nothing else: what is wrong, the panels, all rows, how it was made.

It is read on a telephone and in the dark too, and without JavaScript, which only adds the search for a name.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from crystal.mup.coord_check import CoordCheck
from crystal.mup.coord_panels import COLORS, Panel, caption, exponent, heading, limits, panels, quantities, worst_first
from crystal.mup.coord_svg import svg
from crystal.mup.verdict import Report, Row, faults

_VERDICTS = ("FAIL", "INCONCLUSIVE", "PASS")


def page(checks: Sequence[CoordCheck], title: str, made: Mapping[str, str]) -> str:
    """The page of the first check; the others stand beside it in the panels. made: how it came about, by name."""
    check = checks[0]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}: {check.verdict}</title><style>{STYLE}</style></head>
<body><main>
<h1>{html.escape(title)}: <span class="{check.verdict}">{check.verdict}</span></h1>
<p>{html.escape(f"{check.label or 'model'}: {caption(check)}.")}</p><p>{count(check.rows)}.</p>
{wrong(check)}
<h2>Against {check.along}</h2>
{_pictures(checks)}
<h2 id="rows">All rows, worst first</h2>
{table(check)}
<h2>What is measured</h2>
<dl>{_meaning(check)}</dl>
<h2>How it was made</h2>
<dl class="made">{"".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in made.items())}</dl>
</main><script>{SCRIPT}</script></body></html>
"""


def count(rows: Sequence[Row]) -> str:
    """`30 rows: 2 FAIL, 28 PASS`."""
    verdicts = [row.verdict for row in rows]
    said = [f"{verdicts.count(v)} {v}" for v in _VERDICTS if v in verdicts]
    return f"{len(rows)} rows: {', '.join(said) or 'none'}"


def wrong(check: Report) -> str:
    """Every fault with all tensors that have it, and the notes."""
    bad = check.failures or check.unsettled
    items = []
    for same in faults(bad) if bad else []:
        others = "".join(f"<li>{html.escape(row.name)}</li>" for row in same[1:])
        more = f"<details><summary>and so {len(same) - 1} more</summary><ul>{others}</ul></details>" if others else ""
        items.append(f"<li>{html.escape(same[0].message)}{more}</li>")
    listed = sum(map(len, faults(bad))) if bad else 0
    rest = f"<p>{len(bad) - listed} more fail because of these; the table has all.</p>" if listed < len(bad) else ""
    notes = "".join(f"<li>note: {html.escape(note)}</li>" for note in check.remarks())
    heading = f"<h2>What is {'wrong' if check.failures else 'not settled'}</h2>" if bad else ""
    return heading + (f"<ul>{''.join(items)}{notes}</ul>" if items or notes else "") + rest


def _pictures(checks: Sequence[CoordCheck]) -> str:
    """A row of panels for each quantity: the check, and what it is compared with."""
    shown = quantities(checks[0])
    drawn = [panels(check, shown) for check in checks]
    ratio = checks[0].sizes[-1] / checks[0].sizes[0]
    kinds = {line.kind for column in drawn for panel in column for line in panel.lines}
    keys = [f'<span class="line {kind.split()[0]}">{_KEY}{kind}</span>' for kind in COLORS if kind in kinds]
    keys.append(f'<span class="line FAIL">{_KEY}fails</span>')
    keys.append(f'<span class="line INCONCLUSIVE">{_KEY}inconclusive</span>')
    keys.append(f"<span>{_GUIDE}expected slope</span>")
    parts = [f'<p class="keys">{"".join(keys)}</p>']
    for row in zip(*drawn, strict=True):
        parts.append(f'<h3>{html.escape(row[0].statistic.replace(chr(10), " "))}</h3><div class="panels">')
        axis = limits(row, ratio)
        for check, panel in zip(checks, row, strict=True):
            under = f"<b>{html.escape(heading(check, checks[0]))}</b>; {_under(panel)}"
            parts.append(f"<figure>{svg(check, panel, axis)}<figcaption>{under}</figcaption></figure>")
        parts.append("</div>")
    return "".join(parts)


_KEY = '<svg viewBox="0 0 24 8"><path d="M1 4H23"/></svg>'
_GUIDE = '<svg viewBox="0 0 24 8"><path class="guide" d="M1 4H23"/></svg>'


def _under(panel: Panel) -> str:
    expected = f"; expected {', '.join(map(exponent, panel.expected))}" if panel.lines else ""
    left_out = f"; zero or not finite, so not drawn: {', '.join(panel.left_out)}" if panel.left_out else ""
    return html.escape(f"here {panel.count()}{expected}{left_out}")


def table(check: Report) -> str:
    """All rows, worst first, with buttons that choose a verdict."""
    choices = "".join(
        f'<label><input type="radio" name="only" id="only-{value}"{" checked" * (value == "all")}> {value}</label>'
        for value in ("all", *_VERDICTS)
    )
    head = "".join(f"<th{_RIGHT * (word in _NUMBERS)}>{word}</th>" for word in _COLUMNS)
    rows = "".join(map(_table_row, worst_first(check.rows)))
    return (
        f'<p class="filter">{choices}<label id="search" hidden>name <input type="search" id="words"></label>'
        f'<span id="count"></span></p><div class="scroll" tabindex="0" role="region" aria-labelledby="rows">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


_RIGHT, _NUMBERS = ' class="n"', ("slope", "95% interval", "expected")
_COLUMNS = ("verdict", "tensor or activation", "quantity", *_NUMBERS, "why")


def _table_row(row: Row) -> str:
    slope = "" if row.slope is None else f"{row.slope:+z.2f}"
    interval = "" if row.ci is None else f"{row.ci[0]:+z.2f} … {row.ci[1]:+z.2f}"
    expected = "" if row.expected is None else f"{row.expected:+z.2f}"
    why = html.escape(row.message.rpartition(": ")[2])
    return (
        f'<tr class="{row.verdict}"><td class="{row.verdict}">{row.verdict}</td><td>{html.escape(row.name)}</td>'
        f'<td class="q">{html.escape(row.quantity)}</td><td class="n">{slope}</td><td class="n">{interval}</td>'
        f'<td class="n">{expected}</td><td>{why}</td></tr>'
    )


def _meaning(check: CoordCheck) -> str:
    along, words = check.along, dict(_MEANING)
    judged = {row.quantity.split()[0] for row in check.rows}
    kept = [(word, text) for word, text in words.items() if word in judged or word in ("slope", "verdict")]
    return "".join(f"<dt>{word}</dt><dd>{text.replace('SIZE', along)}</dd>" for word, text in kept)


_MEANING = (
    ("init", "Root mean square of a tensor's weights as they are initialized. It shows the initializer."),
    (
        "update",
        "Root mean square of the first change that the optimizer makes to a tensor, weight decay left out. Adam's "
        "first step is the learning rate itself, whatever the gradient, so this shows the tensor's learning rate.",
    ),
    (
        "push",
        "Root mean square of what that first update alone changes in the tensor's own output, on the same input. "
        "It should be felt alike at every SIZE.",
    ),
    (
        "size",
        "Mean absolute value of a module's output at step t. It should not depend on SIZE; over width, the model's own "
        "output may fall as width<sup>-1/2</sup>.",
    ),
    (
        "change",
        "Mean absolute difference between a module's output at step t and at step 1, on the same batch. Features are "
        "learned alike at every SIZE when it does not depend on SIZE.",
    ),
    (
        "slope",
        "The exponent p in value ∝ SIZE<sup>p</sup>, by least squares on logarithms over all sizes and seeds, with its "
        "95% interval. Expected is the exponent that the rules give.",
    ),
    (
        "verdict",
        "PASS: the whole interval lies within tolerance of what is expected. FAIL: all of it lies outside. "
        "INCONCLUSIVE: neither; more seeds or sizes would tell.",
    ),
)

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#59636e;--rule:#d5dbe1;--fails:#d55e00;--open:#8c6d1f;
--fail:#b34700;--unsettled:#7a5c00;--pass:#1a6b3a;--embedding:#0072b2;--attention:#009e73;--mlp:#e69f00;--norms:#cc79a7;
--output:#000;--other:#56b4e9}
@media (prefers-color-scheme:dark){:root{--bg:#14171c;--fg:#e4e7eb;--soft:#9aa4af;--rule:#343b45;--fails:#ff7a1a;
--open:#d9b44a;--fail:#ff9e5e;--unsettled:#e3c363;--pass:#6fcf97;--embedding:#5aa9e6;--attention:#2fc59a;--mlp:#f0b429;
--norms:#e09cc3;--output:#fff;--other:#8fd0f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem}h3{font-size:1rem;margin:1.2rem 0 .2rem}
ul{padding-left:1.2rem}details ul{font-size:.9rem}summary{cursor:pointer;color:var(--soft)}
.FAIL{color:var(--fail)}.INCONCLUSIVE{color:var(--unsettled)}.PASS{color:var(--pass)}
tr.FAIL,tr.INCONCLUSIVE,tr.PASS{color:inherit}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.5rem 1.5rem}
.panels figure{max-width:36rem}
figure{margin:0}figcaption{font-size:.85rem;color:var(--soft)}figcaption b{color:var(--fg)}
svg{display:block;width:100%;height:auto;fill:none;stroke-linejoin:round;stroke-linecap:round}
svg text{font:10px system-ui,sans-serif;fill:var(--fg)}svg tspan{font-size:7.5px}
text.end{text-anchor:end}text.mid{text-anchor:middle}
.frame{stroke:var(--soft);stroke-width:.7}.grid{stroke:var(--rule);stroke-width:.6}
.guide{stroke:var(--soft);stroke-width:1.1;stroke-dasharray:4 3}
.line path{stroke:var(--c)}.line .mark{stroke-width:3.4}.line .near{stroke-width:9;opacity:0}
.line:hover path:not(.near):not(.mark){stroke-width:3}
.embedding{--c:var(--embedding)}.attention{--c:var(--attention)}.mlp{--c:var(--mlp)}.norms{--c:var(--norms)}
.output{--c:var(--output)}.other{--c:var(--other)}.mixed{--c:var(--soft)}
.line.FAIL{--c:var(--fails)}.line.FAIL path{stroke-width:1.7}.line.FAIL .near{stroke-width:9}
.line.FAIL text{fill:var(--fail)}
.line.INCONCLUSIVE{--c:var(--open)}.line.INCONCLUSIVE .mark{stroke-width:4.6}
.keys,.filter{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem}.keys span{color:var(--fg)}
.keys .line path{stroke-width:2.4}
.keys svg{display:inline-block;width:1.5rem;margin-right:.35rem;vertical-align:middle}
.filter{align-items:center}#count{color:var(--soft)}
input[type=search]{font:inherit;color:inherit;background:transparent;border:1px solid var(--soft);border-radius:4px;
padding:.1rem .4rem;width:11rem}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:4px}
table{border-collapse:collapse;font-size:.85rem;width:100%;overflow-wrap:normal}
td,th{padding:.2rem .7rem;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
td:nth-child(2){min-width:10rem;max-width:24rem;overflow-wrap:anywhere}td:last-child:not(:empty){min-width:16rem}
.n{text-align:right;font-variant-numeric:tabular-nums}.n,.q{white-space:nowrap}
main:has(#only-FAIL:checked) tbody tr:not(.FAIL),main:has(#only-INCONCLUSIVE:checked) tbody tr:not(.INCONCLUSIVE),
main:has(#only-PASS:checked) tbody tr:not(.PASS){display:none}
dt{font-weight:600}dd{margin:0 0 .6rem;max-width:46rem}
.made{display:grid;grid-template-columns:minmax(0,8rem) minmax(0,1fr);font-size:.9rem}.made dd{margin:0 0 .3rem}
"""

# Search by name, and how many rows are shown; choosing a verdict is done by the style sheet.
SCRIPT = """
const rows = [...document.querySelectorAll("tbody tr")], words = document.getElementById("words");
function show() {
  const wanted = words.value.toLowerCase().split(/\\s+/);
  for (const row of rows) row.hidden = !wanted.every(w => row.textContent.toLowerCase().includes(w));
  const seen = rows.filter(row => getComputedStyle(row).display != "none").length;
  document.getElementById("count").textContent = `${seen} of ${rows.length} rows`;
}
document.getElementById("search").hidden = false;
words.addEventListener("input", show);
for (const choice of document.querySelectorAll("[name=only]")) choice.addEventListener("change", show);
show();
"""
