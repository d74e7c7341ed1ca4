"""The token store: packed rows on disk, memory-mapped, with the documents that each row came from.

    DIR/manifest.json                     what this is, the sha256 of every other file, and a seal over both
    DIR/tokenizer.model (or .json)        the vocabulary, so a store can be read without the run that made it
    DIR/SOURCE/{train,val}-NNNNN.bin      little-endian uint16 (uint32 above 65,536 ids), [rows, seq_len + 1]
    DIR/SOURCE/documents.jsonl            a line a document in token order, train first: id, path, license, bytes,
                                          tokens, split, start (its offset in the stream of its source and split)

Rows are found from stream offsets and back by arithmetic (`crystal.data.pack`), so the ledger is exact,
including the token that two neighbouring rows share. Opening checks the manifest, names and sizes, which costs
nothing. A file's content is checked when it is first read on a machine (`crystal.data.store_check`), all of a small
store's before training (`check`); `verify` reads all, whatever was read before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from crystal.config import nearest
from crystal.data import pack, store_check
from crystal.data.document_index import Documents, read_documents
from crystal.data.store_manifest import (
    SPLITS,
    VERSION,
    CorpusEntry,
    Manifest,
    Shard,
    SourceEntry,
    TokenizerEntry,
    read_manifest,
)
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, DataError
from crystal.files import sha256_of
from crystal.output.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console

Verify = Literal["first", "always", "never"]
_SHARD_BYTES = 1 << 28
__all__ = ["SPLITS", "VERSION", "CorpusEntry", "Manifest", "Shard", "SourceEntry", "TokenStore", "TokenizerEntry"]


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
    """A store opened for reading. `manifest` is manifest.json as a dict; `sources` the names in it.

    verify: what is done with a file that is read for the first time: "never" nothing, else it is checked.
    """

    def __init__(self, directory: Path, manifest: Manifest, verify: Verify = "first") -> None:
        self.directory = directory
        self._checks = verify != "never"
        self.manifest = manifest.model_dump(mode="json", exclude_none=True)
        self.seq_len, self.overlap = manifest.seq_len, manifest.overlap
        self.sources = list(manifest.sources)
        self._entries = manifest.sources
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._maps: dict[str, np.memmap] = {}
        self._right: set[str] = set()  # shards that were found right since the store was opened
        self._documents: dict[str, dict[str, Documents]] = {}

    @classmethod
    def open(cls, directory: str | Path, tokenizer: Tokenizer | None = None, verify: Verify = "first") -> TokenStore:
        """Open a store and check that its manifest is whole and every file there with its right size.

        tokenizer: the vocabulary the caller goes on with; it must be the store's. verify: of files that are read later.
        Raises DataError naming the file that is missing, damaged or does not fit.
        """
        directory = Path(directory)
        manifest = read_manifest(directory / "manifest.json")
        store = cls(directory, manifest, verify)
        store._check_sizes()
        if wrong := manifest.miscount():
            raise DataError(f"{directory / 'manifest.json'}: {wrong}", file=directory / "manifest.json")
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
        for key in ("vocab_size", "n_base"):
            if entry[key] != getattr(tokenizer, key):
                said = f"expected {getattr(tokenizer, key)}, as {entry['path']} has, got {entry[key]}"
                raise DataError(f"{self.directory / 'manifest.json'}: tokenizer.{key}: {said}")
        return tokenizer

    def check(self, always: bool = False, console: Console | None = None) -> bool:
        """Read the whole store, unless it was found right before; whether it was read now.

        Beside what `verify` compares: that documents are framed in the rows as the manifest says. always: read it
        whatever is remembered. Raises DataError naming the file.
        """
        files = [self.directory / name for name in ("manifest.json", *self._files())]
        key = store_check.identity(files, "all of it")
        if not always and store_check.known(key):
            return False
        self.verify(console, remember=not always)
        self.check_frames()
        if store_check.identity(files, "all of it") == key:
            store_check.keep(key)
        return True

    def check_frames(self) -> None:
        """Raise DataError unless the documents stand in the rows as the manifest says, with `bos` and `overlap`."""
        file, tokenizer = self.directory / "manifest.json", self.tokenizer()
        for source, entry in self._entries.items():
            store_check.expect_derived(self.directory / source / "documents.jsonl", entry, self._index(source))
            for split, documents in self._index(source).items():
                maps = [self._map(shard) for shard in self._shards(source, split)]
                frames = self.overlap, tokenizer.bos_id, self.manifest["bos"], tokenizer.eos_id
                store_check.expect_frames(file, maps, documents, *frames)

    def verify(self, console: Console | None = None, remember: bool = False) -> list[str]:
        """Compare every file's sha256, ids with the vocabulary and documents with the manifest; returns the names.

        remember: believe what was found right before. Raises DataError for the first bad one.
        """
        self._check_sizes()
        vocabulary = self.manifest["tokenizer"]
        names = self._files()
        sizes = {name: (self.directory / name).stat().st_size for name in names}
        with Bar(console, "verifying", sum(sizes.values()), unit="bytes") as bar:
            self._check_file(vocabulary["path"], vocabulary["sha256"])
            for source, entry in self._entries.items():
                for shard in entry.shards:
                    self._check_shard(shard, remember, bar.advance)
                self._check_file(f"{source}/documents.jsonl", entry.documents_sha256)
                self._documents[source] = read_documents(self.directory / source / "documents.jsonl", entry, False)
                bar.reach(sum(sizes[name] for name in names[: names.index(f"{source}/documents.jsonl") + 1]))
        return names

    @property
    def bytes(self) -> int:
        """The size of all files but the manifest."""
        return sum((self.directory / name).stat().st_size for name in self._files())

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

    def rows_of_document(self, document_id: str, split: str = "train") -> tuple[str, Sequence[int]]:
        """(source, rows): where a document's tokens are; none when in the other split or the dropped end. Of an id
        that several sources have, those of the first: `occurrences` gives all.

        Raises ConfigError when no source has the document.
        """
        return self.occurrences(document_id, split)[0]

    def occurrences(self, document_id: str, split: str = "train") -> list[tuple[str, list[int]]]:
        """(source, rows) of every source that has a document of this id: the rows of all of them, each once.

        Raises ConfigError when no source has one.
        """
        found = []
        for source in self.sources:
            if any(document_id in self._documents_of(source, s).position for s in SPLITS):
                rows: set[int] = set()
                for document in self._documents_of(source, split).get(document_id):
                    span, count = (document["start"], document["tokens"]), self.rows(source, split)
                    rows.update(pack.rows_of_span(*span, self.seq_len, self.overlap, count))
                found.append((source, sorted(rows)))
        if not found:
            raise ConfigError(f"{self.directory}: no document {document_id}")
        return found

    def documents(self, source: str, split: str = "train") -> Iterable[dict]:
        """Every document of a source and split in token order."""
        return self._documents_of(source, split).between(0, None)

    def documents_file(self, source: str) -> Path:
        """documents.jsonl of a source, checked, for those who read it line by line."""
        file = self.directory / source / "documents.jsonl"
        if self._checks:
            store_check.expect_file(file, self._entry(source).documents_sha256)
        return file

    def _entry(self, source: str) -> SourceEntry:
        if source not in self._entries:
            raise ConfigError(f"{self.directory}: no source '{source}'{nearest(source, self.sources)}")
        return self._entries[source]

    def _shards(self, source: str, split: str) -> list[Shard]:
        return [shard for shard in self._entry(source).shards if shard.file.startswith(f"{source}/{split}-")]

    def _map(self, shard: Shard) -> np.memmap:
        if shard.file not in self._maps:
            if self._checks:
                self._check_shard(shard)
            shape = (shard.rows, self.seq_len + 1)
            self._maps[shard.file] = np.memmap(self.directory / shard.file, self._dtype, "r", shape=shape)
        return self._maps[shard.file]

    def _check_shard(self, shard: Shard, remember: bool = True, say: Callable[[int], None] | None = None) -> None:
        if remember and shard.file in self._right:
            return
        ids = self.manifest["tokenizer"]["vocab_size"]
        store_check.expect_shard(self.directory / shard.file, shard.sha256, self._dtype, ids, remember, say)
        self._right.add(shard.file)

    def _check_file(self, name: str, sha256: str) -> None:
        file = self.directory / name
        try:
            found = sha256_of(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}", file=file) from None
        if found != sha256:
            raise DataError(f"{file}: expected sha256 {sha256}, got {found}", file=file)

    def _files(self) -> list[str]:
        """Every file but the manifest."""
        names = [self.manifest["tokenizer"]["path"]]
        for source, entry in self._entries.items():
            names += [*(shard.file for shard in entry.shards), f"{source}/documents.jsonl"]
        return names

    def _check_sizes(self) -> None:
        row = (self.seq_len + 1) * self._dtype.itemsize
        sizes = {shard.file: shard.rows * row for entry in self._entries.values() for shard in entry.shards}
        for name in self._files():
            store_check.expect_size(self.directory / name, sizes.get(name))

    def _index(self, source: str) -> dict[str, Documents]:
        entry = self._entry(source)
        if source not in self._documents:
            file = self.directory / source / "documents.jsonl"
            try:
                self._documents[source] = read_documents(file, entry, self._checks)
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}", file=file) from None
        return self._documents[source]

    def _documents_of(self, source: str, split: str) -> Documents:
        return self._index(source)[split]
