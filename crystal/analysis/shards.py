"""The files of an index's shards: which documents each holds, its text, its suffix array (the layout: `index`)."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from crystal.config import Strict
from crystal.data import pack
from crystal.data.store import TokenStore
from crystal.errors import ConfigError, DataError
from crystal.files import from_json, replacing, sha256_of

LARGEST_BYTES = (1 << 31) - 1  # of a shard's text: suffixes are sorted as int32
_CHUNK = 1 << 18  # elements that are converted and written together


class Part(Strict):
    """Consecutive training documents of one source: from number `first`, at stream position `start`.

    line: the byte of documents.jsonl at which the first one's line begins.
    """

    source: str
    first: int
    documents: int
    start: int
    tokens: int
    line: int


class File(Strict):
    bytes: int
    sha256: str


class Shard(Strict):
    """A shard: what is in it, in order, and its files."""

    parts: list[Part]
    files: dict[str, File]

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)


def plan(store: TokenStore, shard_tokens: int, width: int) -> Iterator[list[Part]]:
    """What each shard holds: whole documents, as many as fit into shard_tokens with their separators.

    Reads documents.jsonl a line at a time. Raises DataError for a document that is too long to sort.
    """
    parts: list[dict] = []
    room = shard_tokens
    for source in store.sources:
        for number, (line, start, tokens) in enumerate(_extents(store, source)):
            if (tokens + 1) * width > LARGEST_BYTES:
                where = store.directory / source / "documents.jsonl"
                raise DataError(f"{where}: document {number}: {tokens:,} tokens are too many to index", file=where)
            if tokens + 1 > room and parts:
                yield [Part(**part) for part in parts]
                parts, room = [], shard_tokens
            if not parts or parts[-1]["source"] != source:
                parts.append({"source": source, "first": number, "start": start, "line": line})
            parts[-1]["documents"] = parts[-1].get("documents", 0) + 1
            parts[-1]["tokens"] = parts[-1].get("tokens", 0) + tokens
            room -= tokens + 1
    if parts:
        yield [Part(**part) for part in parts]


def _extents(store: TokenStore, source: str) -> Iterator[tuple[int, int, int]]:
    """Of each training document that rows hold: where its line begins, where it does in the stream, and its tokens,
    cut where the rows end."""
    end, line = stream_end(store, source), 0
    for text in _lines(store, source, 0):
        document = from_json(text)
        if document["split"] != "train" or document["start"] >= end:  # they come in order, train first
            return
        yield line, document["start"], min(document["tokens"], end - document["start"])
        line += len(text)


def _lines(store: TokenStore, source: str, line: int) -> Iterator[bytes]:
    with store.documents_file(source).open("rb") as file:
        file.seek(line)
        yield from file


def files_of(number: int) -> list[str]:
    """The names of a shard's files."""
    return [f"{kind}.{number}" for kind in ("metadata", "metaoff", "offset", "tokenized", "unigram", "table")]


def write_shard(store: TokenStore, parts: list[Part], width: int, directory: Path, number: int) -> dict[str, File]:
    """Write the files of a shard; their records."""
    lines = array("Q")
    files = {f"metadata.{number}": _write(directory / f"metadata.{number}", _metadata(store, parts, lines))}
    text, offsets = _text(store, parts, width)
    contents = {
        "metaoff": _chunks(np.frombuffer(lines, np.uint64).astype("<u8")),
        "offset": _chunks(offsets),
        "tokenized": _chunks(text),
        "unigram": _unigrams(text),
        "table": _suffixes(text),
    }
    for kind, chunks in contents.items():
        files[f"{kind}.{number}"] = _write(directory / f"{kind}.{number}", chunks)
    return files


def _metadata(store: TokenStore, parts: list[Part], begins: array) -> Iterator[bytes]:
    """A line a document, in the form of infini-gram's own indexes; `begins` takes the byte at which each begins."""
    at = 0
    for part in parts:
        path = f"{part.source}/documents.jsonl"
        for i, document in enumerate(_documents_of(store, part)):
            line = json.dumps({"path": path, "linenum": part.first + i, "metadata": document}).encode() + b"\n"
            begins.append(at)
            at += len(line)
            yield line


def _text(store: TokenStore, parts: list[Part], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids with a separator in front of each document, where in bytes the documents begin)."""
    dtype = np.dtype(f"<u{width}")
    text = np.empty(sum(part.tokens + part.documents for part in parts), dtype)
    offsets = []
    at = 0
    for part in parts:
        starts = (document["start"] - part.start for document in _documents_of(store, part))
        begins = np.fromiter(starts, np.int64, part.documents)
        stop = at + part.tokens + part.documents
        text[at:stop] = np.insert(_stream(store, part, dtype), begins, np.iinfo(dtype).max)
        offsets.append(at + begins + np.arange(len(begins)))
        at = stop
    return text, (np.concatenate(offsets) * width).astype("<u8")


def sorter() -> Callable[[np.ndarray], np.ndarray]:
    """uint8[n] → the positions of its suffixes in their order, int32[n]. Raises ConfigError where it is missing."""
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise ConfigError("an index is sorted by pydivsufsort, which is not there: pip install pydivsufsort") from None
    return divsufsort


def _suffixes(text: np.ndarray) -> Iterator[bytes]:
    """The byte positions of all tokens and separators of a text, in the order of the bytes from there on."""
    every_byte = sorter()(text.view(np.uint8))
    for first in range(0, len(every_byte), _CHUNK):
        chunk = every_byte[first : first + _CHUNK]
        yield chunk[chunk % text.itemsize == 0].astype("<u4").tobytes()


def _documents_of(store: TokenStore, part: Part) -> Iterator[dict]:
    lines = zip(range(part.documents), _lines(store, part.source, part.line), strict=False)
    return (from_json(line) for _, line in lines)


def _stream(store: TokenStore, part: Part, dtype: np.dtype) -> np.ndarray:
    """The tokens of a part, read row by row; what two rows share is written twice, and the same."""
    stream = np.empty(part.tokens, dtype)
    rows = pack.rows_of_span(part.start, part.tokens, store.seq_len, store.overlap, store.rows(part.source))
    for index in rows:
        span = pack.span_of_row(index, store.seq_len, store.overlap)
        low, high = max(span.start, part.start), min(span.stop, part.start + part.tokens)
        row = store.row(part.source, index)
        stream[low - part.start : high - part.start] = row[low - span.start : high - span.start]
    return stream


def _chunks(array: np.ndarray) -> Iterator[bytes]:
    for first in range(0, len(array), _CHUNK):
        yield array[first : first + _CHUNK].tobytes()


def _unigrams(text: np.ndarray) -> Iterator[bytes]:
    separator = np.iinfo(text.dtype).max
    counts = np.zeros(0, np.int64)
    documents = 0
    for first in range(0, len(text), _CHUNK):
        chunk = text[first : first + _CHUNK]
        ids = chunk[chunk != separator].astype(np.int64)
        documents += len(chunk) - len(ids)
        found = np.bincount(ids, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    for i in np.flatnonzero(counts).tolist():
        yield b"%d %d\n" % (i, counts[i])
    yield b"%d %d\n" % (separator, documents)


def _write(path: Path, chunks: Iterable[bytes]) -> File:
    """Write a file, whole or not at all; its record."""
    size, sha256 = 0, hashlib.sha256()
    with replacing(path) as aside, aside.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            sha256.update(chunk)
            size += len(chunk)
    return File(bytes=size, sha256=sha256.hexdigest())


def damage_of(path: Path, file: File, contents: bool = True) -> str | None:
    """What is wrong with a file of an index, as the end of a sentence about it; None: nothing.

    contents: compare its sha256, else its size alone.
    """
    if not path.is_file():
        return "missing from the index"
    if (size := path.stat().st_size) != file.bytes:
        return f"expected {file.bytes} bytes, got {size}"
    if contents and (found := sha256_of(path)) != file.sha256:
        return f"expected sha256 {file.sha256[:16]}…, got {found[:16]}…"
    return None


def stream_end(store: TokenStore, source: str) -> int:
    """Tokens of a source's training stream that its rows hold."""
    rows = store.rows(source)
    return pack.span_of_row(rows - 1, store.seq_len, store.overlap).stop if rows else 0
