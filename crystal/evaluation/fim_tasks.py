"""Fill-in-the-middle: a line is taken out of a program, and the model writes it from what is before and after it.

Prompts are in PSM order, as `crystal.data.fim` makes training rows: FIM tokens around prefix and suffix, each piece
tokenised by itself, BOS at the head of the prefix. A model ends a middle with EOS; here it also ends with its line.
Where both sides do not fit, the prefix loses its beginning and the suffix its end: into what the model can see, or, of
a run's own documents, into the rows that it was trained on, where these are shorter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from crystal.data.fim import no_fim
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, DataError
from crystal.evaluation.averages import mean, ratio
from crystal.evaluation.code_tasks import (
    LIMITS,
    Program,
    check_texts,
    confined,
    human_eval_rows,
    part_of,
    pass_metrics,
    stored,
    write_and_run,
)
from crystal.evaluation.held_out import Document, held_out
from crystal.evaluation.items import Items
from crystal.evaluation.scorer import score_tokens
from crystal.evaluation.task import Metric, Subject
from crystal.evaluation.writing import Sampling, Written, budget, room, write
from crystal.output.progress import Bar

_STOPS = ("\n",)
_LONGEST_LINE = 400  # characters of a middle that is taken out of a held-out document
_CHUNK = 128  # items that are asked about together


@dataclass(frozen=True)
class Gap:
    """A line with its newline, taken out; what is before and after it; the tests of the whole, where it has any."""

    id: str
    prefix: str
    middle: str
    suffix: str
    tests: str = ""
    source: str = ""


class FimHumanEval:
    """HumanEval single-line infilling (Bavarian et al. 2022, arXiv 2207.14255): every line but blank ones of every
    canonical solution, 1,033 of them, is written anew and the tests run.

    Made from HumanEval in the published construction, or of items.local("humaneval_infilling"), the published file.
    Raises ConfigError for settings out of range, DataError for a row that lacks something.
    """

    name = "fim-humaneval"
    sampling = Sampling(samples=1, temperature=0.0, top_p=0.95, max_new_tokens=128, seed=0)

    def __init__(self, items: Items, unsafe: bool = False, **changed):
        """changed: of `sampling`, by its names."""
        self._sampling, self._unsafe = dataclasses.replace(self.sampling, **changed), unsafe
        self.part = part_of(self._sampling)
        rows = items.local("humaneval_infilling", "MIT")
        if rows is not None:
            check_texts(rows, "task_id", "prompt", "suffix", "canonical_solution", "test", "entry_point")
            self._gaps = [
                Gap(r["task_id"], r["prompt"], r["canonical_solution"], r["suffix"], _tests(r)) for r in rows.rows
            ]
            made = "the published infilling file"
        else:
            rows = human_eval_rows(items)
            self._gaps = [gap for row in rows.rows for gap in _gaps(row)]
            made = "made from HumanEval, the published infilling file is not in a package; same construction"
        self._facts = {"items": len(self._gaps), "source": rows.source, "made": made, "order": "PSM", "stops": ["\n"]}

    @cached_property
    def _confined(self) -> bool:
        return confined(self._unsafe)

    def facts(self) -> dict:
        """Raises ConfigError where programs cannot be confined: nothing of this task can be done then."""
        running = {"confined": self._confined, "limits": dataclasses.asdict(LIMITS)}
        return self._facts | running | self._sampling.facts()

    def ids(self) -> list[str]:
        return [gap.id for gap in self._gaps]

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((gap.id, gap.prefix + gap.middle + gap.suffix) for gap in self._gaps)

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """{id, n, passed, exact, cut, samples: [{text, ended, status, detail}]} of each line; exact: samples that are
        the line itself but for space around it."""
        tokenizer = fim_tokenizer(subject)
        limit = room(subject.decoder, self._sampling.max_new_tokens)
        programs, cuts = [], []
        for gap in (self._gaps[number] for number in chosen):
            ids, cut = psm(tokenizer, subject.start, gap.prefix, gap.suffix, limit)
            programs.append(Program(gap.id, ids, lambda written, gap=gap: _filled(gap, written)))
            cuts.append(cut)
        ends = fim_ends(subject, tokenizer)
        results = write_and_run(subject, programs, _STOPS, ends, self._sampling, self._unsafe, bar)
        answers = []
        for number, cut, samples in zip(chosen, cuts, results, strict=True):
            middle = self._gaps[number].middle.strip()
            answers.append(
                {
                    "id": self._gaps[number].id,
                    "n": len(samples),
                    "passed": sum(outcome.status == "passed" for _, outcome in samples),
                    "exact": sum(written.text.strip() == middle for written, _ in samples),
                    "cut": cut,
                    "samples": [stored(*sample) for sample in samples],
                }
            )
        return answers

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        exact = mean([answer["exact"] / answer["n"] for answer in answers])
        return pass_metrics(answers) | {"exact_match": exact}


class FimHeldOut:
    """Lines taken out of the run's own held-out code: of the sources that the curriculum applies FIM to, or of all.

    One line a document at a place that (seed, source, document) decides; not the first, nor a blank one. Written
    greedily; its bits per byte with the suffix known are compared with those after the prefix alone.
    run: a run directory; per_source: documents at most, None: all. Raises ConfigError or DataError.
    """

    name = "fim-heldout"
    part = 128

    def __init__(self, run: Path, per_source: int | None = 100, max_new_tokens: int = 128, seed: int = 0):
        self._sampling = Sampling(1, 0.0, 1.0, max_new_tokens, seed)
        held = held_out(run, per_source)
        if (reason := no_fim(held.store.tokenizer())) is not None:
            raise ConfigError(f"{run}: FIM needs {reason}")
        sources = held.fim_sources or list(held.documents)
        found = [_gap(document, seed) for source in sources for document in held.documents[source]]
        self._gaps = [gap for gap in found if gap is not None]
        self._trained = held.store.seq_len
        if not self._gaps:
            raise DataError(f"{run}: expected held-out documents of {', '.join(sources)} with two lines, there is none")
        self._facts = {
            "items": len(self._gaps),
            "documents_without_a_line": len(found) - len(self._gaps),
            "source": held.facts,
            "sources": sources,
            "window": self._trained,
            "order": "PSM",
            "stops": list(_STOPS),
            "line_seed": seed,
        } | self._sampling.facts()

    def facts(self) -> dict:
        return self._facts

    def ids(self) -> list[str]:
        return [gap.id for gap in self._gaps]

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((gap.id, gap.prefix + gap.middle + gap.suffix) for gap in self._gaps)

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """{id, source, expected, text, ended, exact, similarity, bytes, bits, bits_left_only, cut} of each line."""
        answers = []
        for first in range(0, len(chosen), _CHUNK):
            answers += self._answered(subject, [self._gaps[number] for number in chosen[first : first + _CHUNK]], bar)
        return answers

    def _answered(self, subject: Subject, gaps: Sequence[Gap], bar: Bar) -> list[dict]:
        tokenizer, decoder = fim_tokenizer(subject), subject.decoder
        window = min(decoder.config.max_seq_len, self._trained)
        limit = window - min(budget(decoder, self._sampling.max_new_tokens), window // 2)
        prompts = [psm(tokenizer, subject.start, gap.prefix, gap.suffix, limit) for gap in gaps]
        texts: dict[int, Written] = {}
        asked = [(ids, 0) for ids, _ in prompts]
        for batch in write(decoder, tokenizer, asked, _STOPS, fim_ends(subject, tokenizer), self._sampling):
            texts.update(batch)
            bar.advance(len(batch))
        with bar.doing("scoring middles"):
            judged = [_requests(tokenizer, subject, gap, window) for gap in gaps]
            scored = iter(score_tokens(decoder, [request for both, _ in judged for request in both]))
            bits = [[-math.fsum(next(scored).logprobs) / math.log(2) for _ in both] for both, _ in judged]
        return [
            {
                "id": gap.id,
                "source": gap.source,
                "expected": gap.middle.strip(),
                "text": texts[i].text[: 2 * _LONGEST_LINE],
                "ended": texts[i].ended,
                "exact": texts[i].text.strip() == gap.middle.strip(),
                "similarity": similarity(texts[i].text.strip()[: 2 * _LONGEST_LINE], gap.middle.strip()),
                "bytes": judged[i][1],
                "bits": bits[i][0],
                "bits_left_only": bits[i][1],
                "cut": prompts[i][1],
            }
            for i, gap in enumerate(gaps)
        ]

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        """bits_per_byte: of the middle, given both sides; left_only: given the prefix, as ordinary text; gain: how
        many bits a byte FIM saves."""
        sizes = [answer["bytes"] for answer in answers]
        left, both = ([answer[key] for answer in answers] for key in ("bits_left_only", "bits"))
        return {
            "exact_match": mean([float(answer["exact"]) for answer in answers]),
            "edit_similarity": mean([answer["similarity"] for answer in answers]),
            "bits_per_byte": ratio(both, sizes),
            "bits_per_byte_left_only": ratio(left, sizes),
            "bits_per_byte_gain": ratio([a - b for a, b in zip(left, both, strict=True)], sizes),
        }


def fim_tokenizer(subject: Subject) -> Tokenizer:
    """The subject's. Raises ConfigError where it has no FIM tokens."""
    tokenizer = subject.tokenizer
    plain = not isinstance(tokenizer, Tokenizer)
    reason = "a vocabulary with CrystalCoder's added tokens" if plain else no_fim(tokenizer)
    if reason is not None:
        raise ConfigError(f"{subject.checkpoint}: FIM needs {reason}")
    return tokenizer


def fim_ends(subject: Subject, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids at which a middle ends: the model's own, and FIM's."""
    return (*subject.ends, tokenizer.fim_prefix, tokenizer.fim_middle, tokenizer.fim_suffix, tokenizer.fim_pad)


def psm(tokenizer: Tokenizer, start: Sequence[int], prefix: str, suffix: str, limit: int) -> tuple[list[int], int]:
    """(PREFIX start prefix SUFFIX suffix MIDDLE in at most `limit` tokens, how many tokens were left out for that).

    A prefix that has lost its beginning has no BOS, as the later rows of a long document in training have none.
    """
    before, after = [*start, *tokenizer.encode(prefix)], tokenizer.encode(suffix)
    free = max(limit - 3, 0)
    share = min(len(after), max(free // 2, free - len(before)))
    keep = min(len(before), free - share)
    cut = len(before) - keep + len(after) - share
    prompt = [tokenizer.fim_prefix, *before[len(before) - keep :], tokenizer.fim_suffix, *after[:share]]
    return [*prompt, tokenizer.fim_middle], cut


def similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer; 1 for two empty texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return 1 - row[-1] / max(len(a), len(b), 1)


def _requests(
    tokenizer: Tokenizer, subject: Subject, gap: Gap, limit: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """The middle with both sides known, and as ordinary text after its prefix; and its bytes.

    Of a middle that would take more than half of the `limit` tokens there are, the first part counts, in both.
    """
    text = gap.middle
    while len(middle := tokenizer.encode(text)) > max(limit // 2 - 1, 1):
        text = text[: len(text) // 2]
    context, _ = psm(tokenizer, subject.start, gap.prefix, gap.suffix, limit - len(middle))
    before, whole = tokenizer.encode(gap.prefix), tokenizer.encode(gap.prefix + text)
    same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    left = [*subject.start, *whole[:same]][-(limit - len(whole) + same) :] or [tokenizer.eos_id]
    return [(context, middle), (left, whole[same:])], len(text.encode("utf-8"))


def _filled(gap: Gap, written: Written) -> str:
    """The program. A line that the model ended with a newline has it again; without one it runs into the suffix."""
    newline = "\n" if written.ended == "stop" and gap.middle.endswith("\n") else ""
    return f"{gap.prefix}{written.text}{newline}{gap.suffix}\n{gap.tests}\n"


def _tests(row: dict) -> str:
    return f"{row['test']}\ncheck({row['entry_point']})"


def _gaps(row: dict) -> Iterator[Gap]:
    """Named as published: Lk is line k of the solution, blank ones counted."""
    lines = row["canonical_solution"].splitlines(keepends=True)
    for k, line in enumerate(lines):
        if line.strip():
            prefix, suffix = row["prompt"] + "".join(lines[:k]), "".join(lines[k + 1 :])
            yield Gap(f"SingleLineInfilling/{row['task_id']}/L{k}", prefix, line, suffix, _tests(row))


def _gap(document: Document, seed: int) -> Gap | None:
    """None where the document has no line to take out."""
    lines = document.text.split("\n")
    lines = [line + "\n" for line in lines[:-1]] + lines[-1:]
    fitting = [k for k, line in enumerate(lines) if k and line.strip() and len(line) <= _LONGEST_LINE]
    if not fitting:
        return None
    key = f"{seed}\0{document.source}\0{document.id}".encode("utf-8", "replace")
    k = fitting[int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % len(fitting)]
    before, after = "".join(lines[:k]), "".join(lines[k + 1 :])
    return Gap(f"{document.source}/{document.id}", before, lines[k], after, source=document.source)
