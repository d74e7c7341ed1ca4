"""The text that a run was trained on, document by document, out of the token store: no corpus is needed for it.

What the store dropped (the end of a source that filled no row) was trained on by nobody and is not here. Files are
compared with their checksums when they are first read on a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crystal.data import pack
from crystal.data.store import TokenStore
from crystal.data.tokenizer import Tokenizer
from crystal.errors import DataError
from crystal.evaluation.ngrams import words
from crystal.files import cache_dir, from_json, regular_bytes
from crystal.run import RunFile, prepare_run

_PART_TOKENS = 1 << 20  # a longer document comes in parts
_SHARED_TOKENS = 1 << 14  # that a part has in common with the one before it


@dataclass(frozen=True)
class Part:
    """A document, or a part of a very long one: `start` is the stream position of its first token.

    document: as in documents.jsonl, and `source`. begins, ends: whether the document begins and ends with it.
    """

    document: dict
    start: int
    tokens: np.ndarray
    begins: bool
    ends: bool


def open_store(run: RunFile, directory: Path | None, console=None) -> TokenStore:
    """The token store that a run directory was trained from, found by its manifest; else made as `prepare` makes it.

    The corpus may be gone. Raises DataError where the store is.
    """
    manifest = None if directory is None else directory / "manifest.json"
    if manifest is None or not manifest.exists():
        return TokenStore.open(prepare_run(run, console))
    try:
        fingerprint = from_json(regular_bytes(manifest))["data"]["store"]
        if not isinstance(fingerprint, str) or not fingerprint.isalnum():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{manifest}: data.store: expected the token store of the run", file=manifest) from None
    stores = run.config.data.dir or cache_dir() / "stores"
    for found in sorted(stores.glob(f"*-{run.config.curriculum.seq_len}-{fingerprint[:16]}")):
        store = TokenStore.open(found)
        if store.manifest["fingerprint"] == fingerprint:
            return store
    raise DataError(
        f"{stores}: expected the run's token store, {fingerprint[:16]}, it is gone; `crystal prepare "
        f"{directory}/config.yaml` makes it again from the corpus"
    )


def parts(store: TokenStore, source: str, split: str = "train", most: int = _PART_TOKENS) -> Iterator[Part]:
    """Every document of a source and split that has a token in a row, in token order; in parts above `most` tokens."""
    rows, step = store.rows(source, split), pack.stride(store.seq_len, store.overlap)
    end = pack.span_of_row(rows - 1, store.seq_len, store.overlap).stop if rows else 0
    shared = min(_SHARED_TOKENS, most // 2)
    for document in _listed(store, source, split):
        start, stop = document["start"], min(document["start"] + document["tokens"], end)
        if start >= stop:
            break
        for first in range(start, max(stop - shared, start + 1), most - shared):
            last = min(first + most, stop)
            yield Part(document, first, _tokens(store, source, split, first, last, step), first == start, last == stop)


def row_of_word(store: TokenStore, tokenizer: Tokenizer, part: Part, word: int) -> int:
    """The row in which word number `word` (from 0) of a part begins, found by halving: what is known of a token's
    place in the text is the text up to it."""
    last = part.start + len(part.tokens) - 1
    step = pack.stride(store.seq_len, store.overlap)
    low, high = part.start // step, last // step
    while low < high:
        middle = (low + high) // 2
        upto = pack.span_of_row(middle, store.seq_len, store.overlap).stop - part.start
        if len(words(tokenizer.decode(part.tokens[:upto].tolist()))) > word:
            high = middle
        else:
            low = middle + 1
    return low


def _tokens(store: TokenStore, source: str, split: str, start: int, stop: int, step: int) -> np.ndarray:
    """Stream positions start … stop-1: int64."""
    first, last = start // step, min((stop - 1) // step, store.rows(source, split) - 1)
    taken = [store.row(source, row, split)[: step if row < last else None] for row in range(first, last + 1)]
    return np.concatenate(taken)[start - first * step : stop - first * step]


def _listed(store: TokenStore, source: str, split: str) -> Iterator[dict]:
    """documents.jsonl, a line at a time."""
    file = store.documents_file(source)
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                document = from_json(line)
                if document["split"] == split:
                    yield document | {"source": source}
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{file}: line {number}: damaged; see `crystal data verify RUN`", file=file) from None
