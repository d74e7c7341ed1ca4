"""Bits per byte of held-out text, source by source: how well a model foretells it, whatever its vocabulary.

A document is scored as one text: BOS in front (or an end token, where the model knows no BOS) is context and no text,
and the end of the document is not scored. One that is longer than a window is scored in several, each of which gives
half a window of new tokens at least half a window of context on their left; the first window's tokens have what there
is. lm-eval's rolling windows are disjoint, with one token of context. Every token is scored once. A window is what the
model can see, max_seq_len, or the rows that the run was trained on, where these are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from crystal.errors import ConfigError, DataError
from crystal.evaluation.averages import mean_of, ratio
from crystal.evaluation.held_out import Document, held_out
from crystal.evaluation.items import Items
from crystal.evaluation.scorer import score_tokens
from crystal.evaluation.task import Metric, Subject
from crystal.output.progress import Bar

_CHUNK_TOKENS = 1 << 16  # of documents that are scored together


class BitsPerByte:
    """Over the held-out documents of a run's sources, and over each .jsonl with a "text" in the user's directory.

    run: a run directory, or None; items: the user's directory, if any; per_source: documents at most, None: all.
    Raises ConfigError where there is nothing to score, DataError for a row without a text.
    """

    name = "bpb"
    part = 64

    def __init__(self, run: Path | None, items: Items, per_source: int | None = 100):
        held = None if run is None else held_out(run, per_source)
        by_source = {} if held is None else {s: d for s, d in held.documents.items() if d}
        sources = {} if held is None else {"run": held.facts}
        self._trained = None if held is None else held.store.seq_len
        for path in [] if items.directory is None else sorted(items.directory.glob("*.jsonl")):
            rows = items.local(path.stem, "the user's own")
            if "text" in rows.rows[0]:
                name = f"{path.stem}.jsonl" if path.stem in by_source else path.stem
                by_source[name] = _documents(name, path, rows.rows)[:per_source]
                sources[name] = rows.source
        if not by_source:
            raise ConfigError("bpb: expected a run with held-out documents, or .jsonl files with a text in each line")
        self._documents = [document for documents in by_source.values() for document in documents]
        own = [d for d in self._documents if held is not None and d.source in held.documents]
        uniform = None
        if own:
            vocab = held.store.manifest["tokenizer"]["vocab_size"]
            uniform = math.log2(vocab) * sum(d.tokens for d in own) / sum(_bytes(d.text) for d in own)
        self._facts = {
            "documents": {name: len(documents) for name, documents in by_source.items()},
            "documents_per_source": per_source or "all",
            "window": self._trained or "max_seq_len",
            "stride": "half a window; what is left is context, and the first window's tokens are all new",
            "mean": "unweighted, over sources",
            "bytes": "UTF-8 bytes of the text; no BOS or EOS",
            "uniform": uniform,
            "source": sources,
        }

    def facts(self) -> dict:
        """uniform: bits per byte of a uniform guess, log2(vocabulary) / (bytes a token) in the run's vocabulary."""
        return self._facts

    def ids(self) -> list[str]:
        return [f"{document.source}/{document.id}" for document in self._documents]

    def texts(self) -> Iterator[tuple[str, str]]:
        return zip(self.ids(), (document.text for document in self._documents), strict=True)

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """{id, source, bits, bytes, tokens, windows} of each document."""
        answers: list[dict] = []
        waiting: list[tuple[int, list[int]]] = []
        size = 0
        for place, number in enumerate(chosen, 1):
            waiting.append((number, subject.tokenizer.encode(self._documents[number].text)))
            size += len(waiting[-1][1])
            if size >= _CHUNK_TOKENS or place == len(chosen):
                answers += self._scored(subject, waiting)
                bar.advance(len(waiting))
                waiting, size = [], 0
        return answers

    def _scored(self, subject: Subject, documents: Sequence[tuple[int, list[int]]]) -> list[dict]:
        start, lead = beginning(subject)
        window = min(subject.decoder.config.max_seq_len, self._trained or subject.decoder.config.max_seq_len)
        requests, owners = [], []
        for place, (_, ids) in enumerate(documents):
            for request in windows(start, ids[len(lead) :], window):
                requests.append(request)
                owners.append(place)
        nats = [[] for _ in documents]
        for place, scored in zip(owners, score_tokens(subject.decoder, requests), strict=True):
            nats[place].append(math.fsum(scored.logprobs))
        answers = []
        for (number, ids), own in zip(documents, nats, strict=True):
            document = self._documents[number]
            answers.append(
                {
                    "id": f"{document.source}/{document.id}",
                    "source": document.source,
                    "bits": -math.fsum(own) / math.log(2),
                    "bytes": _bytes(document.text),
                    "tokens": len(ids) - len(lead),
                    "windows": len(own),
                }
            )
        return answers

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        """`bits_per_byte`, the unweighted mean over sources, then `bits_per_byte/SOURCE`."""
        by_source: dict[str, list[dict]] = {}
        for answer in answers:
            by_source.setdefault(answer["source"], []).append(answer)
        each = {
            f"bits_per_byte/{source}": ratio([a["bits"] for a in own], [a["bytes"] for a in own])
            for source, own in by_source.items()
        }
        return {"bits_per_byte": mean_of(list(each.values()))} | each


def beginning(subject: Subject) -> tuple[list[int], list[int]]:
    """(ids before the first token of a text, those of them that the tokenizer itself puts there).

    BOS where the model has one, else an end token, which documents follow on in training. Raises ConfigError where
    there is neither: then nothing can foretell a first token.
    """
    lead = list(subject.tokenizer.encode(""))
    start = [*subject.start, *lead] or list(subject.ends[:1])
    if not start:
        raise ConfigError(f"{subject.checkpoint}: expected a BOS or an end token, to foretell a text's first token by")
    return start, lead


def windows(start: Sequence[int], ids: Sequence[int], limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) of at most `limit` tokens together, whose continuations are `ids` when put together.

    start: what is before the first token, and fits into half a window.
    """
    whole, first, half = [*start, *ids], len(start), max(limit // 2, 1)
    stop = min(limit, len(whole))
    while first < len(whole):
        yield whole[max(stop - limit, 0) : first], whole[first:stop]
        first, stop = stop, min(stop + half, len(whole))


def _documents(name: str, path: Path, rows: Sequence[dict]) -> list[Document]:
    documents = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise DataError(f"{path}: item {number}: text: expected a text that is not empty", file=path, key="text")
        text = row["text"].encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no bytes
        documents.append(Document(str(number), name, text, 0))
    return documents


def _bytes(text: str) -> int:
    return len(text.encode("utf-8"))
