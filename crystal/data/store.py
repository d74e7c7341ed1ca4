"""The token store: packed rows on disk, memory-mapped, with the documents that each row came from.

    DIR/manifest.json                     what this is, and the sha256 of every other file
    DIR/tokenizer.model (or .json)        the vocabulary, so a store can be read without the run that made
    it DIR/SOURCE/{train,val}-NNNNN.bin      little-endian uint16 (uint32 above 65,536 ids), [rows, seq_len
    + 1] DIR/SOURCE/documents.jsonl            a line a document in token order, train first: id, path,
    license, bytes,
                                          tokens, split, start (its offset in the stream of its source and
                                          split)

Rows are found from stream offsets and back by arithmetic (`crystal.data.pack`), so the ledger is exact,
including the token that two neighbouring rows share. Opening checks names and sizes, which costs nothing;
`verify` reads all.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from crystal.config import Strict, nearest, parse
from crystal.data import pack
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, DataError
from crystal.files import sha256_of
from crystal.output.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 1
SPLITS = ("train", "val")
_SHARD_BYTES = 1 << 28


class Shard(Strict):
    file: str
    rows: int
    sha256: str


class SourceEntry(Strict):
    """One source: counts over its train and val documents; `text_bytes` are UTF-8 bytes of text."""

    licenses: list[str]
    documents: int
    val_documents: int
    tokens: int
    val_tokens: int
    text_bytes: int
    train_rows: int
    val_rows: int
    documents_sha256: str
    shards: list[Shard]


class TokenizerEntry(Strict):
    """The vocabulary of a store; `path` is inside the store."""

    sha256: str
    vocab_size: int
    n_base: int
    added_tokens: bool
    path: str


class CorpusEntry(Strict):
    name: str
    fingerprint: str


class Manifest(Strict):
    """manifest.json."""

    version: Literal[1]
    seq_len: int
    overlap: bool
    bos: bool
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerEntry
    corpus: CorpusEntry
    fingerprint: str
    sources: dict[str, SourceEntry]


class ShardWriter:
    """Writes the rows of one source and split to numbered shards, hashing them on the way."""

    def __init__(self, root: Path, source: str, split: str, seq_len: int, dtype: np.dtype) -> None:
        self.root, self.source, self.split, self.dtype = root, source, split, dtype
        self.rows_per_shard = max(1, _SHARD_BYTES // ((seq_len + 1) * dtype.itemsize))
        self.shards: list[Shard] = []
        self._file = None
        self._rows = 0

    def write(self, rows: np.ndarray) -> None:
        """Append rows [n, seq_len + 1]."""
        while len(rows):
            if self._file is None:
                self._name = f"{self.source}/{self.split}-{len(self.shards):05d}.bin"
                self._file, self._hash, self._rows = open(self.root / self._name, "wb"), hashlib.sha256(), 0  # noqa: SIM115
            now, rows = np.split(rows, [self.rows_per_shard - self._rows])
            content = now.astype(self.dtype).tobytes()
            self._file.write(content)
            self._hash.update(content)
            self._rows += len(now)
            if self._rows == self.rows_per_shard:
                self.close()

    def close(self) -> None:
        """Finish the shard in progress, on disk for certain."""
        if self._file is not None:
            flush(self._file)
            self._file.close()
            self._file = None
            self.shards.append(Shard(file=self._name, rows=self._rows, sha256=self._hash.hexdigest()))


def flush(file: IO) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


class TokenStore:
    """A store opened for reading. `manifest` is manifest.json as a dict; `sources` the names in it."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest.model_dump(mode="json")
        self.seq_len, self.overlap = manifest.seq_len, manifest.overlap
        self.sources = list(manifest.sources)
        self._entries = manifest.sources
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._maps: dict[str, np.memmap] = {}
        self._documents: dict[tuple[str, str], _Documents] = {}
        self._source_of: dict[str, str] | None = None

    @classmethod
    def open(cls, directory: str | Path, tokenizer: Tokenizer | None = None) -> TokenStore:
        """Open a store and check that every file is there with its right size.

        tokenizer: the vocabulary the caller goes on with; it must be the store's.
        Raises DataError naming the file that is missing, damaged or does not fit.
        """
        directory = Path(directory)
        file = directory / "manifest.json"
        try:
            mapping = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise DataError(f"{file}: not found; `crystal prepare RUN.yaml` makes it") from None
        except ValueError:
            raise DataError(f"{file}: expected JSON; run `crystal prepare` again") from None
        store = cls(directory, parse(Manifest, mapping, str(file)))
        store._check_sizes()
        if tokenizer is not None:
            store.check_tokenizer(tokenizer)
        return store

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ConfigError unless `tokenizer` is the vocabulary that this store was made with."""
        mine = self.manifest["tokenizer"]
        wanted = mine["sha256"], mine["added_tokens"]
        if wanted != (tokenizer.sha256, tokenizer.added_tokens):
            raise DataError(
                f"{tokenizer.path}: expected the tokenizer of {self.directory} (sha256 {wanted[0][:12]}, "
                f"added tokens {wanted[1]}), got sha256 {tokenizer.sha256[:12]}, added tokens "
                f"{tokenizer.added_tokens}"
            )

    def tokenizer(self) -> Tokenizer:
        """The vocabulary kept in the store. Raises DataError when the file is not the one recorded."""
        entry = self.manifest["tokenizer"]
        tokenizer = Tokenizer.load(self.directory / entry["path"], added_tokens=entry["added_tokens"])
        self.check_tokenizer(tokenizer)
        return tokenizer

    def verify(self, console: Console | None = None) -> list[str]:
        """Compare every file's sha256; returns the names. Raises DataError for the first bad one."""
        expected = {self.manifest["tokenizer"]["path"]: self.manifest["tokenizer"]["sha256"]}
        for source, entry in self._entries.items():
            expected |= {shard.file: shard.sha256 for shard in entry.shards}
            expected[f"{source}/documents.jsonl"] = entry.documents_sha256
        sizes = {name: (self.directory / name).stat().st_size for name in expected}
        with Bar(console, "verifying", sum(sizes.values()), unit="bytes") as bar:
            for name, sha256 in expected.items():
                found = sha256_of(self.directory / name)
                bar.advance(sizes[name])
                if found != sha256:
                    raise DataError(f"{self.directory / name}: expected sha256 {sha256}, got {found}")
        return list(expected)

    def rows(self, source: str, split: str = "train") -> int:
        """Rows of a source in a split."""
        entry = self._entry(source)
        return entry.val_rows if split == "val" else entry.train_rows

    def row(self, source: str, index: int, split: str = "train") -> np.ndarray:
        """Row `index`: int64 [seq_len + 1], inputs row[:-1] and labels row[1:]."""
        left = index if index >= 0 else self.rows(source, split)
        for shard in self._shards(source, split):
            if left < shard.rows:
                return self._map(shard)[left].astype(np.int64)
            left -= shard.rows
        raise IndexError(f"{source} has {self.rows(source, split)} {split} rows, there is no row {index}")

    def documents_in_row(self, source: str, index: int, split: str = "train") -> list[dict]:
        """The documents that have at least one token in a row, in order, as in documents.jsonl."""
        if not 0 <= index < self.rows(source, split):
            raise IndexError(f"{source} has {self.rows(source, split)} {split} rows, there is no row {index}")
        span = pack.span_of_row(index, self.seq_len, self.overlap)
        return self._documents_of(source, split).between(span.start, span.stop)

    def rows_of_document(self, document_id: str, split: str = "train") -> tuple[str, range]:
        """(source, rows): where a document's tokens are; none when in the other split or the dropped end.

        Raises DataError when no source has the document.
        """
        if self._source_of is None:
            self._source_of = {
                i: source for source in self.sources for s in SPLITS for i in self._documents_of(source, s).position
            }
        source = self._source_of.get(document_id)
        if source is None:
            raise ConfigError(f"{self.directory}: no document {document_id}")
        document = self._documents_of(source, split).get(document_id)
        if document is None:
            return source, range(0)
        rows = self.rows(source, split)
        return source, pack.rows_of_span(document["start"], document["tokens"], self.seq_len, self.overlap, rows)

    def documents(self, source: str, split: str = "train") -> Iterable[dict]:
        """Every document of a source and split in token order."""
        return self._documents_of(source, split).between(0, None)

    def _entry(self, source: str) -> SourceEntry:
        if source not in self._entries:
            raise ConfigError(f"{self.directory}: no source '{source}'{nearest(source, self.sources)}")
        return self._entries[source]

    def _shards(self, source: str, split: str) -> list[Shard]:
        return [shard for shard in self._entry(source).shards if shard.file.startswith(f"{source}/{split}-")]

    def _map(self, shard: Shard) -> np.memmap:
        if shard.file not in self._maps:
            shape = (shard.rows, self.seq_len + 1)
            self._maps[shard.file] = np.memmap(self.directory / shard.file, self._dtype, "r", shape=shape)
        return self._maps[shard.file]

    def _check_sizes(self) -> None:
        sizes = {self.manifest["tokenizer"]["path"]: None}
        for source, entry in self._entries.items():
            sizes[f"{source}/documents.jsonl"] = None
            for shard in entry.shards:
                sizes[shard.file] = shard.rows * (self.seq_len + 1) * self._dtype.itemsize
            for split in SPLITS:
                listed = sum(shard.rows for shard in self._shards(source, split))
                if listed != self.rows(source, split):
                    raise DataError(
                        f"{self.directory / 'manifest.json'}: sources.{source}: expected shards with "
                        f"{self.rows(source, split)} {split} rows, got {listed}"
                    )
        for name, size in sizes.items():
            file = self.directory / name
            if not file.is_file():
                raise DataError(f"{file}: missing from the token store; run `crystal prepare` again")
            if size is not None and file.stat().st_size != size:
                raise DataError(f"{file}: expected {size} bytes, got {file.stat().st_size}")

    def _documents_of(self, source: str, split: str) -> _Documents:
        self._entry(source)
        if (source, split) not in self._documents:
            for s in SPLITS:
                self._documents[source, s] = _Documents(self.directory / source / "documents.jsonl", s)
        return self._documents[source, split]


class _Documents:
    """The index of one source and split: starts and ids in memory, the rest read when asked for."""

    def __init__(self, file: Path, split: str) -> None:
        self.file = file
        self.starts: list[int] = []
        self.lines: list[int] = []
        self.position: dict[str, int] = {}
        offset = 0
        with open(file, "rb") as lines:
            for line in lines:
                try:
                    document = json.loads(line)
                except ValueError:
                    raise DataError(f"{file}: damaged at byte {offset}; see `crystal data verify RUN`") from None
                if document["split"] == split:
                    self.position[document["id"]] = len(self.starts)
                    self.starts.append(document["start"])
                    self.lines.append(offset)
                offset += len(line)

    def get(self, document_id: str) -> dict | None:
        i = self.position.get(document_id)
        return None if i is None else self._read(i, i + 1)[0]

    def between(self, start: int, stop: int | None) -> list[dict]:
        """Documents with a token at one of the stream positions start ... stop-1."""
        first = max(0, bisect_right(self.starts, start) - 1)
        return self._read(first, len(self.starts) if stop is None else bisect_left(self.starts, stop))

    def _read(self, first: int, last: int) -> list[dict]:
        if last <= first:
            return []
        with open(self.file, "rb") as file:
            file.seek(self.lines[first])
            return [json.loads(file.readline()) for _ in range(first, last)]
