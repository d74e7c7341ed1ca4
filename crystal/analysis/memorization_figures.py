"""Figures over sequences: mean score, extracted, discoverable, and how that stands to what was never trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crystal.analysis.extraction import Extracted, discoverable, samples_needed
from crystal.analysis.intervals import mean_interval, share_difference, stratified_difference, wilson
from crystal.analysis.question import Question, Scores
from crystal.analysis.sequences import Chunk
from crystal.analysis.sequences import Sequence as Tokens

SAMPLES = (1, 10, 100, 1000)
PROBABILITIES = (0.1, 0.5, 0.9)


def summary(question: Question, scores: Scores) -> dict:
    """A checkpoint's figures: of all that it had seen, beside held-out sequences, and by chunk, source and how often
    the row had been read (1, 2 to 3, 4 to 7, … times)."""
    step = scores.step
    pairs = list(zip(question.trained, scores.trained, strict=True))
    seen = [(s, e) for s, e in pairs if question.seen(s, step)]

    others = list(zip(question.held_out, scores.held_out, strict=True))

    def of(pairs: Sequence[tuple[Tokens, Extracted]]) -> dict:
        return {"drawn": len(pairs)} | figures([e for _, e in distinct(pairs)], question.settings.l)

    own = {"seen": of(seen), "held_out": of(others)}
    own["against_held_out"] = against(distinct(seen), distinct(others), question.settings.l)
    if any(s.fim for s, _ in seen):
        own["seen_plain"] = of([(s, e) for s, e in seen if not s.fim])
    own["chunks"] = [
        _place(chunk, step) | of([(s, e) for s, e in pairs if s.chunk == number])
        for number, chunk in enumerate(question.chunks)
    ]
    sources = sorted({s.source for s, _ in seen})
    own["sources"] = {source: of([(s, e) for s, e in seen if s.source == source]) for source in sources}
    if question.ledger is not None:
        groups: dict[int, list] = {}
        for s, e in seen:
            groups.setdefault(question.times_seen(s, step).bit_length(), []).append((s, e))
        own["times_seen"] = [
            {"times": [2 ** (bits - 1), 2**bits - 1]} | of(group) for bits, group in sorted(groups.items())
        ]
    return own


def distinct(pairs: Sequence[tuple[Tokens, Extracted]]) -> list[tuple[Tokens, Extracted]]:
    """Each sequence once, however often it was drawn: a row of a small run comes again, and tells nothing new."""
    return list({sequence.tokens: (sequence, answer) for sequence, answer in reversed(pairs)}.values())[::-1]


def _place(chunk: Chunk, step: int) -> dict:
    """Which chunk, and whether all of it had been seen, some or none; of a file nothing is known."""
    seen = None if chunk.first is None else "all" if chunk.last <= step else "some" if chunk.first <= step else "none"
    return {"chunk": chunk.name, "first_step": chunk.first, "last_step": chunk.last, "seen": seen}


def figures(found: Sequence[Extracted], asked: int) -> dict:
    """JSON-ready; shares with Wilson's 95 % interval, means with the normal one. None where there is nothing.

    discoverable: for each n, for each p, how many sequences are (n, p)-discoverable. samples_needed: for each p, the
    least n at which one sequence is, and the median over all.
    """
    hits, n = sum(e.matches == asked for e in found), len(found)
    score = mean_interval([e.matches / asked for e in found])
    return {
        "n": n,
        "score_mean": None if score is None else _short(score[0]),
        "score_interval": None if score is None or n < 2 else [_short(min(max(x, 0.0), 1.0)) for x in score[1:]],
        "extractible": None if not n else _short(hits / n),
        "extractible_count": hits,
        "extractible_interval": [_short(x) for x in wilson(hits, n)],
        "nats_per_token": None if not n else _short(-math.fsum(e.logprob for e in found) / n / asked),
        "discoverable": {
            str(samples): {str(p): sum(discoverable(e.logprob, samples, p) for e in found) for p in PROBABILITIES}
            for samples in SAMPLES
        },
        "samples_needed": None if not n else {str(p): _needed(found, p) for p in PROBABILITIES},
    }


def _needed(found: Sequence[Extracted], p: float) -> dict:
    needed = sorted(samples_needed(e.logprob, p) for e in found)
    return {name: _count(x) for name, x in (("least", needed[0]), ("median", needed[len(needed) // 2]))}


def _count(n: float) -> float | None:
    """JSON has no infinity: beyond 1e300 samples it is None."""
    return None if n > 1e300 else n if n < 1e6 else float(f"{n:.4g}")


def against(found: Sequence[tuple[Tokens, Extracted]], others: Sequence[tuple[Tokens, Extracted]], asked: int) -> dict:
    """Trained-on sequences beside held-out ones: differences with 95 % intervals, and a line that says what they say.

    Like with like: what FIM changed is left out, for held-out rows are plain, and the difference of scores is taken
    source by source and weighted by the trained-on shares. At the baseline means that both intervals hold 0: no
    memorization can be told from these sequences.
    """
    found = [(s, e) for s, e in found if not s.fim]
    scores, other_scores = _by_source(found, asked), _by_source(others, asked)
    both = [source for source in scores if source in other_scores]
    score = stratified_difference([scores[s] for s in both], [other_scores[s] for s in both])
    if score is None:
        return {
            "score": None,
            "extractible": None,
            "at_baseline": None,
            "said": "not judged: no held-out rows to compare with",
        }
    hits, other_hits = (sum(e.matches == asked for _, e in some) for some in (found, others))
    low, high = share_difference(hits, len(found), other_hits, len(others))
    above, below = score[1] > 0 or low > 0, score[2] < 0 or high < 0
    said = (
        "above and below held-out rows: the two measures disagree" if above and below
        else "above held-out rows" if above
        else "below held-out rows" if below
        else "at the baseline: no difference from held-out rows"
    )  # fmt: skip
    shares = hits / len(found) - other_hits / len(others)
    return {
        "n": len(found),
        "score": {"difference": _short(score[0]), "interval": [_short(x) for x in score[1:]]},
        "extractible": {"difference": _short(shares), "interval": [_short(low), _short(high)]},
        "at_baseline": not above and not below,
        "said": said,
    }


def _by_source(pairs: Sequence[tuple[Tokens, Extracted]], asked: int) -> dict[str, list[float]]:
    """Scores of every source that has two or more."""
    scores: dict[str, list[float]] = {}
    for sequence, answer in pairs:
        scores.setdefault(sequence.source, []).append(answer.matches / asked)
    return {source: own for source, own in scores.items() if len(own) > 1}


def _short(x: float) -> float:
    return round(x, 6)
