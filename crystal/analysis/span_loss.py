"""The loss of a span just before the run first saw it and just after, from the checkpoints around that step.

The span is scored where it stands in the training data: the stored row, plain, with the row's own text in front of it,
and with the document mask that the model trains with. A checkpoint of step N has been trained on the steps up to N.

All losses fall while a model trains, so a fall says little by itself. Beside it stands the fall, between the same two
checkpoints, of held-out rows of the same source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from crystal.analysis.trace import Match, Span, rows_of
from crystal.checkpoint import read, step_directory, steps
from crystal.data import pack
from crystal.inference.load import fitting_dtype, load_decoder
from crystal.output.progress import Bar
from crystal.training.ledger import Ledger
from crystal.zoo.decoder import Decoder

if TYPE_CHECKING:
    from rich.console import Console

HELD_OUT_ROWS = 8

Row = tuple[str, str, int]  # split, source, index


@dataclass(frozen=True)
class _Scored:
    """Where a match is scored: labels low … high-1 of a row, which is first read at step `first`."""

    row: Row
    low: int
    high: int
    first: int
    before: int | None  # the checkpoints around
    after: int | None
    between: int  # times that the row is read after `before`, up to `after`


def span_losses(
    ledger: Ledger, run: Path, spans: Sequence[Span], until: int, console: Console | None = None
) -> dict[tuple[int, int], dict]:
    """For match m of span s, at [s, m], the loss before and after it was first seen; JSON-ready.

    run: the run directory. until: only what was seen up to this step counts. What has never been seen is left out.
    Nats a token; None for a checkpoint that is not there. Each checkpoint is loaded once. Raises CheckpointError.
    """
    saved = steps(run / "checkpoints")
    scored: dict[tuple[int, int], _Scored] = {}
    for s, span in enumerate(spans):
        for m, match in enumerate(span.matches):
            if (place := _place(ledger, match, span.tokens, saved, until)) is not None:
                scored[s, m] = place
    wanted: dict[int, set[Row]] = {}
    for place in scored.values():
        for step in (place.before, place.after):
            if step is not None:
                wanted.setdefault(step, set()).update({place.row, *_held_out(ledger, place.row[1])})
    nats: dict[tuple[int, Row], np.ndarray] = {}
    with Bar(console, "scoring", sum(map(len, wanted.values())), unit="rows") as bar:
        for step, rows in sorted(wanted.items()):
            checkpoint = read(step_directory(run / "checkpoints", step))
            with bar.doing(f"reading the checkpoint of step {step}"):
                model, _ = load_decoder(checkpoint, fitting_dtype(checkpoint))
            for row in sorted(rows):
                nats[step, row] = token_losses(model, ledger, row)
                bar.advance()
    return {key: _facts(place, nats, list(_held_out(ledger, place.row[1]))) for key, place in scored.items()}


@torch.inference_mode()
def token_losses(model: Decoder, ledger: Ledger, row: Row) -> np.ndarray:
    """The loss of each label of a stored row, fp32 nats [S]."""
    split, source, index = row
    tokens_BT = torch.from_numpy(ledger.store.row(source, index, split))[None]
    ids_BT = tokens_BT[:, :-1].contiguous()
    ended_BT = ids_BT == ledger.batches.tokenizer.eos_id
    weights_BT = torch.ones(ids_BT.shape)
    _, nats_BT = model.loss(ids_BT, tokens_BT[:, 1:].contiguous(), weights_BT, ended_BT.cumsum(1) - ended_BT.long())
    return nats_BT[0].float().numpy()


def _place(ledger: Ledger, match: Match, tokens: int, saved: list[int], until: int) -> _Scored | None:
    """Of the rows that were read, that with the most labels of the span, and the checkpoints around its first reading.

    None: none was read, or only one in which the span's last token is the first, an input.
    """
    store = ledger.store
    readings: dict[int, list[int]] = {}
    for e in match.exposures:
        if e.step <= until:
            readings.setdefault(e.row, []).append(e.step)
    places = []
    for hit in match.hits:
        for row in rows_of(ledger, hit, tokens):
            span = pack.span_of_row(row, store.seq_len, store.overlap)
            low = max(hit.position - span.start - 1, 0)
            high = min(hit.position + tokens, span.stop) - span.start - 1
            if row in readings and high > low:
                places.append((low - high, readings[row][0], row, low, high))
    if not places:
        return None
    _, first, row, low, high = min(places)
    before = max((step for step in saved if step < first), default=None)
    after = min((step for step in saved if step >= first), default=None)
    between = sum(after is None or step <= after for step in readings[row])
    return _Scored(("train", match.source, row), low, high, first, before, after, between)


def _held_out(ledger: Ledger, source: str) -> Iterator[Row]:
    have = ledger.store.rows(source, "val")
    count = min(HELD_OUT_ROWS, have)
    yield from (("val", source, i * have // count) for i in range(count))


def _facts(place: _Scored, nats: dict[tuple[int, Row], np.ndarray], held_out: list[Row]) -> dict:
    facts: dict = {
        "row": place.row[2],
        "tokens": place.high - place.low,
        "first_step": place.first,
        "readings_between": place.between,
    }
    for name, step in (("before", place.before), ("after", place.after)):
        if step is None:
            facts[name] = None
            continue
        others = [float(nats[step, row].mean()) for row in held_out]
        facts[name] = {
            "step": step,
            "nats": round(float(nats[step, place.row][place.low : place.high].mean()), 4),
            "held_out": round(sum(others) / len(others), 4) if others else None,
        }
    return facts
