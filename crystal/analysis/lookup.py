"""Looking up in an index: how often tokens stand in the training text, where, and which parts of a text do.

The tokens that are sought stand together in each shard's suffix array; two binary searches over the mapped file find
where. A search compares bytes, as the array was sorted. For the longest match from some token on one search is enough:
the suffix with the longest common prefix is a neighbour of the place where the text itself would be inserted.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crystal.analysis.index import Manifest, header_of, index_directory, read_manifest
from crystal.analysis.shards import Part, Shard, damage_of
from crystal.data.store import TokenStore
from crystal.errors import ConfigError, DataError
from crystal.files import from_json

Engine = Literal["own", "infini-gram"]
CHECKED_BYTES = 1 << 28  # an index up to this size is compared with its checksums when a process first opens it
_FIRST_REACH = 64  # tokens that are compared at first, for the longest match
_checked: set[tuple[str, str]] = set()  # (index, its manifest's sha256s) that this process has compared


@dataclass(frozen=True)
class Hit:
    """A place where tokens stand: a source, its document (a line of documents.jsonl) and the token in it, from 0."""

    source: str
    document: dict
    offset: int

    @property
    def position(self) -> int:
        """In the source's training stream."""
        return self.document["start"] + self.offset


class Index:
    """An index opened for reading. `verified`: whether its content was compared with its checksums, or only sizes."""

    def __init__(self, directory: Path, manifest: Manifest, verified: bool, engine: Engine):
        self.directory, self.manifest, self.verified, self.engine = directory, manifest, verified, engine
        self.tokens = sum(shard.tokens for shard in manifest.shards)
        self.documents = sum(shard.documents for shard in manifest.shards)
        self._dtype = np.dtype(f"<u{manifest.token_bytes}")
        self._separator = int(np.iinfo(self._dtype).max)
        self._shards = [_Shard(directory, n, shard, self._dtype) for n, shard in enumerate(manifest.shards)]
        self._infini_gram = _infini_gram(directory, manifest) if engine == "infini-gram" else None
        self._unigrams: dict[int, int] | None = None

    @classmethod
    def open(cls, store: TokenStore, run: str = "RUN", engine: Engine = "own") -> Index:
        """The index of a store.

        run: what to call the run in messages. Raises DataError where there is none, where it is another store's, or
        naming the file that is damaged; ConfigError for an engine that is not installed.
        """
        directory, command = index_directory(store), f"`crystal data index {run}`"
        manifest = read_manifest(directory)
        if manifest is None:
            raise DataError(f"{directory}: no index yet; {command} builds it", file=directory)
        for key, value in header_of(store, manifest.shard_tokens).model_dump().items():
            if getattr(manifest, key) != value:
                raise DataError(
                    f"{directory}: stale: {key}: expected the store's {str(value)[:16]}, "
                    f"got {str(getattr(manifest, key))[:16]}; {command} builds it again", file=directory, key=key,
                )  # fmt: skip
        return cls(directory, manifest, _check(directory, manifest, command), engine)

    def count(self, ids: Sequence[int]) -> int:
        """How often the tokens stand in the text, one after another in one document. Raises ValueError for none."""
        return sum(last - first for first, last in self._find(ids))

    def positions(self, ids: Sequence[int], limit: int | None = None) -> list[Hit]:
        """Where the tokens stand, in the order of the text; limit: so many at most, as they come in the index."""
        hits: list[Hit] = []
        for shard, (first, last) in zip(self._shards, self._find(ids), strict=True):
            stop = last if limit is None else min(last, first + limit - len(hits))
            hits += (shard.hit(at) for at in sorted(shard.at(rank) for rank in range(first, stop)))
        return hits

    def ends(self, ids: Sequence[int]) -> list[int]:
        """For each token of `ids` where its longest match ends: ids[i : ends[i]] stands somewhere, and no more does."""
        return self._ends_by_counting(ids) if self._infini_gram else self._ends_by_neighbours(ids)

    def spans(self, ids: Sequence[int], min_tokens: int) -> list[tuple[int, int]]:
        """(start, stop) of the longest runs of `ids` that stand in the text: at least min_tokens, none in another."""
        found, reached = [], 0
        for start, stop in enumerate(self.ends(ids)):
            if stop > reached and stop - start >= min_tokens:
                found.append((start, stop))
            reached = max(reached, stop)
        return found

    def unigram(self, token: int) -> int:
        """How often a token stands in the text."""
        if self._unigrams is None:
            self._unigrams = {}
            for number in range(len(self._shards)):
                for line in (self.directory / f"unigram.{number}").read_text().splitlines():
                    i, count = map(int, line.split())
                    self._unigrams[i] = self._unigrams.get(i, 0) + count
        return 0 if token == self._separator else self._unigrams.get(token, 0)

    def _find(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The ranks first … last-1 of the suffixes that begin with the tokens, in each shard."""
        if not len(ids):
            raise ValueError("expected at least one token to look up")
        if not all(0 <= i < self._separator for i in ids):
            return [(0, 0)] * len(self._shards)
        if self._infini_gram:
            return self._infini_gram(list(map(int, ids)))
        pattern = np.asarray(ids).astype(self._dtype).tobytes()
        return [shard.range(pattern) for shard in self._shards]

    def _ends_by_neighbours(self, ids: Sequence[int]) -> list[int]:
        known = [0 <= i < self._separator for i in ids]
        pattern = np.array([i if ok else self._separator for i, ok in zip(ids, known, strict=True)], self._dtype)
        ends, reached = [], 0
        for start, ok in enumerate(known):
            reach = max(_FIRST_REACH, 2 * (reached - start))
            longest = reach if ok else 0
            while longest == reach:  # all of what was compared: compare more
                part = pattern[start : start + reach].tobytes()
                longest = max(shard.longest(part) for shard in self._shards)
                if start + reach >= len(ids):
                    break
                reach, longest = (2 * reach, 2 * reach) if longest == reach else (reach, longest)
            reached = start + longest
            ends.append(reached)
        return ends

    def _ends_by_counting(self, ids: Sequence[int]) -> list[int]:
        ends, stop = [], 0
        for start in range(len(ids)):
            stop = max(stop, start)
            while stop < len(ids) and self.count(ids[start : stop + 1]):
                stop += 1
            ends.append(stop)
        return ends


class _Shard:
    """One shard, mapped."""

    def __init__(self, directory: Path, number: int, shard: Shard, dtype: np.dtype):
        self._dtype = dtype
        self._text = _mapped(directory / f"tokenized.{number}")
        self._table = np.frombuffer(_mapped(directory / f"table.{number}"), "<u4")
        self._begins = np.frombuffer(_mapped(directory / f"offset.{number}"), "<u8")
        self._lines = np.frombuffer(_mapped(directory / f"metaoff.{number}"), "<u8")
        self._metadata = _mapped(directory / f"metadata.{number}")
        self._parts: list[Part] = shard.parts
        self._firsts = np.cumsum([0, *(part.documents for part in shard.parts)])[:-1].tolist()

    def range(self, pattern: bytes) -> tuple[int, int]:
        """The ranks first … last-1 of the suffixes that begin with a pattern."""
        first = self._place(pattern, 0)
        return first, self._place_after(pattern, first)

    def longest(self, pattern: bytes) -> int:
        """The most tokens of a pattern, from its first on, that stand somewhere."""
        place = self._place(pattern, 0)
        best = 0
        for rank in (place - 1, place):
            if 0 <= rank < len(self._table):
                at = self.at(rank)
                best = max(best, self._common(pattern, self._text[at : at + len(pattern)]))
        return best

    def at(self, rank: int) -> int:
        """The byte at which the suffix of a rank begins."""
        return self._table.item(rank)

    def hit(self, at: int) -> Hit:
        """The place that a byte of the text is."""
        number = int(np.searchsorted(self._begins, at, side="right")) - 1
        offset = (at - self._begins.item(number)) // self._dtype.itemsize - 1  # behind the separator
        line = self._lines.item(number)
        document = from_json(self._metadata[line : self._metadata.find(b"\n", line)])["metadata"]
        part = self._parts[bisect_right(self._firsts, number) - 1]
        return Hit(part.source, document, offset)

    def _place(self, pattern: bytes, low: int) -> int:
        """The first rank whose suffix is not smaller than a pattern."""
        text, item, size, high = self._text, self._table.item, len(pattern), len(self._table)
        while low < high:
            middle = (low + high) // 2
            at = item(middle)
            if text[at : at + size] < pattern:
                low = middle + 1
            else:
                high = middle
        return low

    def _place_after(self, pattern: bytes, low: int) -> int:
        """The first rank from `low` on whose suffix does not begin with a pattern, nor is smaller."""
        text, item, size, high = self._text, self._table.item, len(pattern), len(self._table)
        while low < high:
            middle = (low + high) // 2
            at = item(middle)
            if text[at : at + size] <= pattern:
                low = middle + 1
            else:
                high = middle
        return low

    def _common(self, a: bytes, b: bytes) -> int:
        """Tokens that two byte strings have in common from the left."""
        size = min(len(a), len(b)) // self._dtype.itemsize
        differ = np.frombuffer(a, self._dtype, size) != np.frombuffer(b, self._dtype, size)
        return int(differ.argmax()) if differ.any() else size


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from None


def _check(directory: Path, manifest: Manifest, command: str) -> bool:
    """Compare sizes, and checksums unless the index is large; whether they were compared. Raises DataError."""
    files = {name: file for shard in manifest.shards for name, file in shard.files.items()}
    contents = sum(file.bytes for file in files.values()) <= CHECKED_BYTES
    identity = (str(directory.resolve()), "".join(file.sha256 for file in files.values()))
    for name, file in files.items():
        if damage := damage_of(directory / name, file, contents and identity not in _checked):
            raise DataError(f"{directory / name}: {damage}; {command} builds it again", file=directory / name)
    if contents:
        _checked.add(identity)
    return contents


def _infini_gram(directory: Path, manifest: Manifest) -> Any:
    """ids → the ranks in each shard, by the infini-gram package. Raises ConfigError where it is not installed."""
    try:
        from infini_gram.engine import InfiniGramEngine
    except ImportError:
        raise ConfigError("--engine infini-gram: the package is not there: pip install infini-gram") from None
    dtype, vocabulary = ("u16", 1 << 16) if manifest.token_bytes == 2 else ("u32", 1 << 32)
    engine = InfiniGramEngine(str(directory), eos_token_id=2, vocab_size=vocabulary - 1, token_dtype=dtype)
    # it takes the files as the directory lists them by name: tokenized.10 before tokenized.2
    names = sorted(f"tokenized.{n}" for n in range(len(manifest.shards)))
    order = [names.index(f"tokenized.{n}") for n in range(len(manifest.shards))]

    def find(ids: list[int]) -> list[tuple[int, int]]:
        segments = engine.find(input_ids=ids)["segment_by_shard"]
        return [tuple(segments[place]) for place in order]

    return find


def hits_by_document(hits: Sequence[Hit]) -> Iterator[list[Hit]]:
    """The hits of one document after another, in the order in which the documents come."""
    grouped: dict[tuple[str, str], list[Hit]] = {}
    for hit in hits:
        grouped.setdefault((hit.source, hit.document["id"]), []).append(hit)
    yield from grouped.values()
