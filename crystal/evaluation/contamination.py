"""Evaluation items in a run's training text: which, in what documents, at which steps; and scores without them.

The rule is that of Brown et al. 2020 (GPT-3, appendix C). Words are lower case without punctuation (`ngrams.words`). An
item is found, `exact`, when one of its 13-grams is in a training document; one of 8 to 12 words when all of it is, in a
row; a shorter one is `too short` to judge, which is not clean. `near` are items without such a 13-gram 60 % of whose
words, and at least 8, lie in 5-grams that one passage of a document shares, at most twice as long as the item.

What is common says nothing of an item: as in GPT-3, 13-grams in more than 10 documents are ignored and counted, as are
n-grams in more than 10 items of a task (what every prompt says). An item that loses more than half of its own 13-grams
to the documents, has none of its own, or is near to more than 10 documents, is `too common` to judge, and not clean.

Held-out documents are looked at too and reported apart: nothing was trained on them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from crystal.data import pack
from crystal.data.store import SPLITS, TokenStore
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, RunError
from crystal.evaluation.contamination_scores import scores
from crystal.evaluation.ngrams import words
from crystal.evaluation.overlap import (
    COMMON,
    NEAR,
    SHINGLE,
    SHORTEST,
    WIDTH,
    Found,
    Item,
    Match,
    Overlap,
    Text,
    words_covered,
)
from crystal.evaluation.stored_text import Part, open_store, parts, row_of_word
from crystal.evaluation.task import Task
from crystal.files import write_whole
from crystal.output.progress import Bar
from crystal.run import RunFile, load_run
from crystal.training.ledger import Ledger
from crystal.training.metrics import read_metrics

KINDS = ("exact", "near", "too_short", "too_common", "clean")
_CHUNK_TOKENS = 1 << 20
_DOCUMENTS = 20  # of an item that are listed
_STEPS = 5  # of a document that are listed
_EXCERPT = 60  # words


def opened(run: str) -> tuple[RunFile, Path | None]:
    """A run and its directory: RUN is one, or a run file, whose directory may not be there yet (None).

    Raises ConfigError for what is neither.
    """
    if Path(run).is_dir():
        if not (Path(run) / "config.yaml").is_file():
            raise ConfigError(f"{run}: expected a run directory, it has no config.yaml", file=run)
        return load_run(Path(run) / "config.yaml"), Path(run)
    file = load_run(run)
    directory = file.config.directory
    return file, directory if (directory / "config.yaml").is_file() else None


def contamination(
    tasks: Sequence[Task], run: RunFile, directory: Path | None, suite: str, n: int = 13, console=None
) -> dict:
    """What `crystal data contamination` reports, JSON-ready; written to DIRECTORY/evals/contamination-SUITE.json.

    n: words of an n-gram, 8 or more. directory: of the run; None where it has none yet, and nothing is written.
    Raises ConfigError for another n, DataError for a store or an evaluation's results that are gone or damaged.
    """
    if n < SHORTEST:
        raise ConfigError(f"--n: expected at least {SHORTEST} words, got {n}")
    began = time.monotonic()
    store = open_store(run, directory, console)
    ledger = Ledger(run, store=store)
    trained_to = 0 if directory is None else max((r.get("step", 0) for r in read_metrics(directory)), default=0)
    items = [Item(number, id, words(text)) for number, task in enumerate(tasks) for id, text in task.texts()]
    overlap = Overlap(items, n)
    found = {split: overlap.nothing() for split in SPLITS}
    total = sum(store.manifest["sources"][s][key] for s in store.sources for key in ("tokens", "val_tokens"))
    with Bar(console, "looking for items", total) as bar:
        for split in SPLITS:
            for texts in _chunks(store, split, bar):
                overlap.look(texts, found[split])
    report = _Report(overlap, found, ledger, trained_to)
    judged = report.items()
    by_task = [[j for i, j in zip(items, judged, strict=True) if i.task == number] for number in range(len(tasks))]
    result = {
        "suite": suite,
        "run": str(directory or run.path),
        "method": _method(n),
        "store": str(store.directory),
        "documents": {split: found[split].documents for split in SPLITS},
        "trained_to": trained_to,
        "tasks": {t.name: report.counts(number, by_task[number]) for number, t in enumerate(tasks)},
        "items": {t.name: by_task[number] for number, t in enumerate(tasks)},
        "scores": [] if directory is None else scores(directory / "evals", tasks, by_task),
        "file": None if directory is None else str(directory / "evals" / f"contamination-{suite}.json"),
    }
    result["seconds"] = round(time.monotonic() - began, 1)
    if directory is not None:
        try:
            Path(result["file"]).parent.mkdir(exist_ok=True)
            write_whole(Path(result["file"]), json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise RunError(f"{result['file']}: cannot be written: {error.strerror}") from None
    return result


def _method(n: int) -> dict:
    return {
        "rule": "13-gram overlap of Brown et al. 2020 (GPT-3), appendix C",
        "words": "lower case, NFKC; runs of letters and digits, with underscores inside them; no punctuation",
        "n": n,
        "exact": f"an n-gram of the item is in a training document; an item of {SHORTEST} to {n - 1} words: all of it",
        "near": f"not exact; {SHINGLE}-grams that a passage of one document shares, at most {WIDTH} times the item's "
        f"length, hold {NEAR:.0%} of the item's words and at least {SHORTEST}",
        "ignored": f"n-grams in more than {COMMON} documents; n-grams in more than {COMMON} items of the task",
        "too_short": f"fewer than {SHORTEST} words: not judged",
        "too_common": f"more than half of its own n-grams are in more than {COMMON} documents, or all are in as many "
        f"items, or it is near to more than {COMMON} documents: not judged",
        "coverage": "exact: share of the item's n-grams found, ignored ones left out; near: share of its words",
        "steps": "at which a row with a part of the document was trained on; passage: a row with the words in common",
    }


def _chunks(store: TokenStore, split: str, bar: Bar) -> Iterator[list[Text]]:
    """The documents of a split, as many at a time as have a million tokens."""
    tokenizer = store.tokenizer()
    texts: list[Text] = []
    size = 0
    for source in store.sources:
        for part in parts(store, source, split):
            texts.append(_text(store, tokenizer, part))
            size += len(part.tokens)
            if size >= _CHUNK_TOKENS:
                yield texts
                bar.advance(size, f"looking for items in {source}")
                texts, size = [], 0
    if texts:
        yield texts
        bar.advance(size)


def _text(store: TokenStore, tokenizer: Tokenizer, part: Part) -> Text:
    def rows(first: int, last: int) -> range:
        return range(row_of_word(store, tokenizer, part, first), row_of_word(store, tokenizer, part, last) + 1)

    return Text(part.document, words(tokenizer.decode(part.tokens.tolist())), rows, part.begins, part.ends)


class _Report:
    """Says for every item what it is, and where and when it was seen."""

    def __init__(self, overlap: Overlap, found: dict[str, Found], ledger: Ledger, trained_to: int):
        self.overlap, self.found, self.ledger, self.trained_to = overlap, found, ledger, trained_to
        self._rare = {split: _rare(overlap, found[split]) for split in SPLITS}
        self._seen: dict[tuple[str, range], dict] = {}

    def items(self) -> list[dict]:
        """Every item, JSON-ready, in their order."""
        return [self._item(i) for i in range(len(self.overlap.items))]

    def counts(self, task: int, judged: list[dict]) -> dict:
        """A task in numbers."""
        counts = {kind: sum(j["kind"] == kind for j in judged) for kind in KINDS}
        held_out = {kind: sum(j.get("held_out", {}).get("kind") == kind for j in judged) for kind in KINDS[:2]}
        return {"items": len(judged), **counts, "ignored_ngrams": self._ignored(task), "held_out": held_out}

    def _ignored(self, task: int) -> int:
        """Distinct n-grams of a task that are common."""
        ignored = 0
        for length, grams in self.overlap.grams.items():
            common = (self.found["train"].documents_with[length] > COMMON)[grams.gram] | self.overlap.shared[length]
            ignored += len(np.unique(grams.gram[common & (self.overlap.tasks[grams.item] == task)]))
        return ignored

    def _item(self, i: int) -> dict:
        item = self.overlap.items[i]
        kind, coverage, matches = self._judge(i, "train")
        result = {"id": item.id, "kind": kind, "words": len(item.words), "coverage": round(coverage, 4)}
        if matches:
            best = matches[0]
            first = [s["first"] for m in matches if (s := self._sightings(m.document["source"], m.rows))["count"]]
            result |= {"longest": best.longest, "excerpt": _excerpt(item, best), "document_count": len(matches)}
            result |= {
                "first_step": min(first, default=None),
                "documents": [self._document(match) for match in matches[:_DOCUMENTS]],
            }
        kind, coverage, matches = self._judge(i, "val")
        if matches:
            documents = [_named(match) for match in matches[:_DOCUMENTS]]
            result["held_out"] = {"kind": kind, "coverage": round(coverage, 4), "documents": documents}
        return result

    def _judge(self, i: int, split: str) -> tuple[str, float, list[Match]]:
        """(kind, coverage, the matches that it rests on, the one with most in common first)."""
        length, rare, found = self.overlap.length[i], self._rare[split][i], self.found[split]
        if not length:
            return "too_short", 0.0, []
        exact = [m for m in found.exact.get(i, {}).values() if any(rare[p] for p in m.places)]
        if exact:
            places = set().union(*(m.places for m in exact))
            exact.sort(key=lambda m: (-m.longest, -len(m.places), m.document["id"]))
            return "exact", sum(bool(rare[p]) for p in places) / int(rare.sum()), exact
        near = [*found.near.get(i, {}).values()]
        if 0 < len(near) <= COMMON:
            near.sort(key=lambda m: (-len(words_covered(m.places, SHINGLE)), m.document["id"]))
            covered = words_covered(near[0].places, SHINGLE)
            return "near", len(covered) / len(self.overlap.items[i].words), near
        own = int(self.overlap.own[i].sum())
        if near or not own or 2 * int(rare.sum()) < own:
            return "too_common", 0.0, []
        return "clean", 0.0, []

    def _document(self, match: Match) -> dict:
        source, store = match.document["source"], self.ledger.store
        span = match.document["start"], match.document["tokens"]
        rows = pack.rows_of_span(*span, store.seq_len, store.overlap, store.rows(source))
        seen, passage = self._sightings(source, rows), self._sightings(source, match.rows)
        return _named(match) | {
            "steps": seen["steps"],
            "count": seen["count"],
            "stages": seen["stages"],
            "passage": {"rows": [*match.rows], "steps": passage["steps"], "count": passage["count"]},
        }

    def _sightings(self, source: str, rows: range) -> dict:
        """When rows were trained on: {steps: the first few, count, first, stages: [{stage, steps, epochs}]}."""
        if (source, rows) not in self._seen:
            seen = [s for s in self.ledger.sightings(source, rows) if s[0] <= self.trained_to]
            steps = sorted({step for step, _, _ in seen})
            stages = [
                {
                    "stage": stage,
                    "steps": len({step for step, name, _ in seen if name == stage}),
                    "epochs": len({epoch for _, name, epoch in seen if name == stage}),
                }
                for stage in dict.fromkeys(name for _, name, _ in seen)
            ]
            first = steps[0] if steps else None
            found = {"steps": steps[:_STEPS], "count": len(steps), "first": first, "stages": stages}
            self._seen[source, rows] = found
        return self._seen[source, rows]


def _rare(overlap: Overlap, found: Found) -> list[np.ndarray]:
    """For each item the places at which n-grams begin that are not common: bool [words]."""
    rare = [own.copy() for own in overlap.own]
    for length, grams in overlap.grams.items():
        common = (found.documents_with[length] > COMMON)[grams.gram]
        for item, place in zip(grams.item[common].tolist(), grams.place[common].tolist(), strict=True):
            rare[item][place] = False
    return rare


def _named(match: Match) -> dict:
    document = match.document
    return {"document": document["id"], "source": document["source"], "path": document["path"]}


def _excerpt(item: Item, match: Match) -> str:
    """The words in common; of a near copy what it lacks in between is left out."""
    if match.longest:
        shown = item.words[match.at : match.at + match.longest]
    else:
        covered = words_covered(match.places, SHINGLE)
        shown = []
        for k in range(min(covered), max(covered) + 1):
            if k in covered:
                shown.append(item.words[k])
            elif shown[-1] != "…":
                shown.append("…")
    return " ".join(shown[:_EXCERPT]) + (" …" if len(shown) > _EXCERPT else "")
