"""A text traced to its training data: which spans stand there word for word, in which documents, and when seen.

A span is a run of tokens that stands in the training text and is not part of a longer one that does (OLMoTrace, arXiv
2504.07096, finds the same). It is found in tokens, not characters: the words at a span's ends may be cut into other
tokens here than in the document, so a match of characters can lose a token at either end. Spans are ranked by the
probability of their tokens one by one, in the training text: the least likely, so the longest and rarest, come first.

A document says when its rows are read, by the same code that training reads them with (the ledger), so every span has
its steps, stages and epochs. Where a stage applies FIM, the row that was seen is made again, to say whether the span
was still in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from crystal.analysis.lookup import Hit, Index, hits_by_document
from crystal.data import pack
from crystal.data.tokenizer import Tokenizer
from crystal.training.ledger import Ledger

SEARCHED = 1000  # places of a span that are looked at, to find documents
PLACES = 16  # places of a span in one document whose steps are listed
CANDIDATES = 16  # documents of a span that are looked at, to find those that the run reads first
MIN_TOKENS = 8


@dataclass(frozen=True)
class Exposure:
    """A row with tokens of a span, read at a step (from 1).

    tokens: how many of them the row holds; the first token of a row is an input only. fim: whether FIM changed the
    row; verbatim: whether these tokens were still there one after another.
    """

    step: int
    stage: str
    epoch: int
    row: int
    tokens: int
    fim: bool
    verbatim: bool


@dataclass(frozen=True)
class Match:
    """A document that holds a span: its first places there, and when the rows with them are read in the run."""

    hits: list[Hit]
    exposures: list[Exposure]

    @property
    def document(self) -> dict:
        return self.hits[0].document

    @property
    def source(self) -> str:
        return self.hits[0].source


@dataclass(frozen=True)
class Span:
    """Tokens start … stop-1 of the query. count: how often they stand in the training text; matches: some of where."""

    start: int
    stop: int
    text: str
    count: int
    unigram_logprob: float
    matches: list[Match] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def query_ids(tokenizer: Tokenizer, index: Index, text: str) -> list[int]:
    """The tokens to look a text up by.

    A vocabulary with a dummy prefix puts a space before every text, which the middle of a document does not have. So
    the text is also read as if it came behind a line's end, and what matches further from its first token on is taken.
    """
    plain = tokenizer.encode(text)
    line_end, behind = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    if behind[: len(line_end)] != line_end:
        return plain
    inside = behind[len(line_end) :]
    left = [len(ids) - index.ends(ids)[0] for ids in (plain, inside)] if plain and inside else [0, 0]
    return inside if left[1] < left[0] else plain


def find_spans(
    ledger: Ledger,
    index: Index,
    ids: Sequence[int],
    min_tokens: int = MIN_TOKENS,
    documents: int = 5,
    until: int | None = None,
) -> list[Span]:
    """The spans of a text's tokens, the least likely first, each with up to `documents` documents that hold it.

    Of the first few documents that hold a span, those come first that the run reads first, up to step `until` if that
    is given, and last those that it never reads.
    """
    found = []
    for start, stop in index.spans(ids, min_tokens):
        part = ids[start:stop]
        groups = list(hits_by_document(index.positions(part, SEARCHED)))[: max(CANDIDATES, documents)]
        groups = [hits[:PLACES] for hits in groups]
        groups.sort(key=lambda hits: _first_step(ledger, hits, stop - start, until))
        found.append(
            Span(
                start=start,
                stop=stop,
                text=ledger.batches.tokenizer.decode(part),
                count=index.count(part),
                unigram_logprob=sum(math.log(index.unigram(i) / index.tokens) for i in part),
                matches=[Match(hits, exposures(ledger, hits, part)) for hits in groups[:documents]],
            )
        )
    return sorted(found, key=lambda span: (span.unigram_logprob, span.start))


def exposures(ledger: Ledger, hits: Sequence[Hit], ids: Sequence[int]) -> list[Exposure]:
    """When the rows that hold one or more of a span's tokens are read in the whole run, past or to come, in order."""
    found: dict[tuple[int, int, int], Exposure] = {}
    for hit in hits:
        for row in rows_of(ledger, hit, len(ids)):
            span = pack.span_of_row(row, ledger.store.seq_len, ledger.store.overlap)
            low, high = max(span.start, hit.position), min(span.stop, hit.position + len(ids))
            piece = ids[low - hit.position : high - hit.position]
            for step, stage, epoch in ledger.sightings(hit.source, [row]):
                key = step, row, epoch
                if key not in found or len(piece) > found[key].tokens:
                    fim, verbatim = _as_seen(ledger, step, hit.source, epoch, row, piece)
                    found[key] = Exposure(step, stage, epoch, row, len(piece), fim, verbatim)
    return [found[key] for key in sorted(found)]


def rows_of(ledger: Ledger, hit: Hit, tokens: int) -> range:
    """The rows that hold one or more of the tokens from a hit on."""
    store = ledger.store
    return pack.rows_of_span(hit.position, tokens, store.seq_len, store.overlap, store.rows(hit.source))


def _first_step(ledger: Ledger, hits: Sequence[Hit], tokens: int, until: int | None) -> tuple[bool, float]:
    """What documents are sorted by: whether none of their rows is read by step `until`, and the first reading."""
    first = math.inf
    for hit in hits:
        seen = ledger.sightings(hit.source, rows_of(ledger, hit, tokens))
        first = min(first, seen[0][0] if seen else math.inf)
    return until is not None and first > until, first


def _as_seen(ledger: Ledger, step: int, source: str, epoch: int, index: int, piece: Sequence[int]) -> tuple[bool, bool]:
    """(whether FIM changed a row as it was read at a step, whether the tokens were still in it in one piece)."""
    stage = ledger.curriculum.stage_at(step - 1)
    if not stage.fim_rates.get(source, 0.0):
        return False, True
    row, _, _ = ledger.batches.row(stage, source, epoch, index)
    changed = bool((row != ledger.store.row(source, index)).any())
    return changed, not changed or _stands_in(row, piece)


def _stands_in(row: np.ndarray, piece: Sequence[int]) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(row, len(piece))
    return bool((windows == np.asarray(piece)).all(axis=1).any())


def marked(tokenizer: Tokenizer, text: str, ids: Sequence[int], spans: Sequence[Span]) -> str:
    """The text that `ids` are with each span between ⟦N and ⟧N, N its place in `spans` from 1; spans may overlap."""
    opening: dict[int, list[str]] = {}
    closing: dict[int, list[str]] = {}
    for number, span in enumerate(spans, 1):
        opening.setdefault(span.start, []).append(f"⟦{number} ")
        closing.setdefault(span.stop, []).append(f"⟧{number} ")
    pieces = []
    for place in range(len(ids) + 1):
        pieces += (mark.encode() for mark in closing.get(place, []) + opening.get(place, []))
        if place < len(ids):
            i = int(ids[place])
            piece = tokenizer.token_bytes[i] if i < tokenizer.n_base else tokenizer.decode([i]).encode()
            dummy = place == 0 and not text.startswith(" ")  # the vocabulary's own space, if there is one
            pieces.append(piece.removeprefix(b" ") if dummy else piece)
    return b"".join(pieces).decode("utf-8", "replace")


def span_facts(span: Span, until: int) -> dict:
    """A span, JSON-ready. until: what is read after this step is listed apart."""
    return {
        "text": span.text,
        "tokens": span.tokens,
        "start": span.start,
        "count": span.count,
        "unigram_logprob": round(span.unigram_logprob, 4),
        "matches": [_match_facts(match, until) for match in span.matches],
    }


def _match_facts(match: Match, until: int) -> dict:
    seen = [e for e in match.exposures if e.step <= until]
    later = [e for e in match.exposures if e.step > until]
    return {
        "document": match.document["id"],
        "source": match.source,
        "path": match.document["path"],
        "license": match.document["license"],
        "offset": match.hits[0].offset,
        "places": len(match.hits),
        "steps": sorted({e.step for e in seen}),
        "stage": seen[0].stage if seen else None,
        "stages": list(dict.fromkeys(e.stage for e in seen)),
        "later_steps": sorted({e.step for e in later}),
        "seen": [vars(e) for e in seen],
    }
