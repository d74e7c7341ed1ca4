"""A report as one HTML file that needs nothing else: verdict, what is wrong, all rows."""

from __future__ import annotations

import html

from crystal.mup.coord_page import SCRIPT, STYLE, count, table, wrong
from crystal.mup.verdict import Report


def page(report: Report, title: str, about: str) -> str:
    """about: a line on how it was made."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}: {report.verdict}</title><style>{STYLE}</style></head>
<body><main>
<h1>{html.escape(title)}: <span class="{report.verdict}">{report.verdict}</span></h1>
<p>{html.escape(about)}; {count(report.rows)}.</p>
{wrong(report)}
<h2 id="rows">All rows, worst first</h2>
{table(report)}
<h2>What is read</h2>
<dl>{_meaning(report)}</dl>
</main><script>{SCRIPT}</script></body></html>
"""


def _meaning(report: Report) -> str:
    judged = {row.quantity for row in report.rows}
    kept = {word: text for word, text in _MEANING.items() if word in judged or word in ("slope", "verdict")}
    return "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in kept.items())


_MEANING = {
    "role": "What a tensor is for: the rules differ for hidden matrices, embeddings, the readout and vectors.",
    "init": "Standard deviation that the initializer draws a tensor's weights with.",
    "lr": "Learning rate of the tensor's optimizer group.",
    "weight decay": "Weight decay of the tensor's optimizer group.",
    "eps": "Adam's eps of the tensor's optimizer group.",
    "forward": "What the forward pass multiplies the tensor's output by, such as the logits' multiplier.",
    "attention": "What attention scores are multiplied by, as a power of the head size.",
    "activation": "What multiplies a tensor's output past a nonlinearity, where its size still counts.",
    "slope": "The exponent p in value ∝ m<sup>p</sup>, m the width multiplier, read off the real objects. Expected is "
    "the exponent that the rules give.",
    "verdict": "PASS: as the rules say. FAIL: otherwise. INCONCLUSIVE: it could not be judged, and the row says why.",
}
