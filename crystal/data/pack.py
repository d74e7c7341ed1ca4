"""Documents to packed rows: frame, shuffle, concatenate, cut.

A document becomes [BOS] tokens EOS. Documents are put in a seeded random order, joined to one stream, and
the stream is cut into rows of seq_len + 1 tokens. Rows start seq_len tokens apart (CrystalCoder: the last
token of a row is also the first of the next, so every token is a label once), or seq_len + 1 apart (Amber).
What is left at the end is dropped.

The order is that of a keyed hash of the document id, so it depends on the seed and on the documents, not on
the order in which they are read, and it can be made with bounded memory: `Spool` writes every document to
one of 64 files by the first bits of its hash, then reads one file after the other, each sorted by hash. The
result is the sort of the whole, and only one 64th of the index is in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

_BUCKET_BITS = 6
_HELD_BYTES = 1 << 24  # of a spool, before they are written
_BLOCK_TOKENS = 1 << 20  # rows are cut from blocks of about this many tokens


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16, or uint32 for a vocabulary of more than 65,536 ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def frame(ids: list[int], bos_id: int | None, eos_id: int, dtype: np.dtype) -> np.ndarray:
    """A document as it stands in the stream: [BOS] ids EOS (no BOS when `bos_id` is None)."""
    return np.array([*([] if bos_id is None else [bos_id]), *ids, eos_id], dtype=dtype)


def stride(seq_len: int, overlap: bool) -> int:
    """Tokens from the start of a row to the start of the next."""
    return seq_len if overlap else seq_len + 1


def count_rows(tokens: int, seq_len: int, overlap: bool) -> int:
    """How many full rows a stream of `tokens` tokens gives."""
    return max(0, (tokens - seq_len - 1) // stride(seq_len, overlap) + 1)


def span_of_row(row: int, seq_len: int, overlap: bool) -> range:
    """The positions in the stream that row number `row` holds."""
    start = row * stride(seq_len, overlap)
    return range(start, start + seq_len + 1)


def rows_of_span(start: int, tokens: int, seq_len: int, overlap: bool, rows: int) -> range:
    """The rows, of `rows` in all, that hold one or more of positions start ... start+tokens-1."""
    step = stride(seq_len, overlap)
    first = max(0, (start - seq_len - 1) // step + 1)
    return range(min(first, rows), min((start + tokens - 1) // step + 1, rows))


def windows(documents: Iterable[np.ndarray], seq_len: int, overlap: bool) -> Iterator[np.ndarray]:
    """Cut the joined documents into rows; yields blocks [n, seq_len + 1], n may be 0, in order."""
    step = stride(seq_len, overlap)
    held: list[np.ndarray] = []
    size = 0

    def cut() -> np.ndarray:
        nonlocal held, size
        stream = np.concatenate(held) if held else np.empty(0, dtype=np.uint16)
        rows = count_rows(len(stream), seq_len, overlap)
        held = [stream[rows * step :]]
        size = len(held[0])
        if not rows:
            return np.empty((0, seq_len + 1), dtype=stream.dtype)
        return np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::step][:rows]

    for document in documents:
        held.append(document)
        size += len(document)
        if size >= max(_BLOCK_TOKENS, seq_len + 1):
            yield cut()
    if len(block := cut()):
        yield block


def hash_fraction(purpose: str, document_id: str) -> float:
    """A number in [0, 1), uniform over document ids and independent between purposes."""
    return _key(purpose, document_id) / 2**64


def _key(purpose: str, document_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{purpose}\0{document_id}".encode(), digest_size=8).digest(), "big")


class Spool:
    """Framed documents on disk, read back in the random order of `seed`.

    `add` in any order, then `shuffled` once. Two documents with the same id keep the order in which they
    came. No file stays open: there are 128 of them, and a process may have as few as 64.
    """

    def __init__(self, directory: Path, seed: int, dtype: np.dtype) -> None:
        directory.mkdir(parents=True)
        self.directory, self.seed = directory, seed
        self.purpose = f"shuffle {seed}"
        self.dtype = dtype
        self.tokens = 0
        self._buckets: set[int] = set()
        self._held: dict[int, tuple[list[str], list[bytes]]] = {}  # not yet written, by bucket: lines and tokens
        self._held_bytes = 0

    def add(self, record: dict, tokens: np.ndarray) -> None:
        """Keep one document: `record` (JSON-able, with its `id`) and its framed tokens."""
        key = _key(self.purpose, record["id"])
        bucket = key >> (64 - _BUCKET_BITS)
        line, content = json.dumps([key, len(tokens), record]) + "\n", tokens.astype(self.dtype).tobytes()
        lines, data = self._held.setdefault(bucket, ([], []))
        lines.append(line)
        data.append(content)
        self.tokens += len(tokens)
        self._held_bytes += len(line) + len(content)
        if self._held_bytes >= _HELD_BYTES:
            self._write()

    def _write(self) -> None:
        for bucket, (lines, data) in self._held.items():
            with self._index(bucket).open("a", encoding="utf-8") as file:
                file.writelines(lines)
            with self._data(bucket).open("ab") as file:
                file.writelines(data)
        self._buckets |= self._held.keys()
        self._held, self._held_bytes = {}, 0

    def _index(self, bucket: int) -> Path:
        return self.directory / f"{bucket:02d}.jsonl"

    def _data(self, bucket: int) -> Path:
        return self.directory / f"{bucket:02d}.bin"

    def shuffled(self) -> Iterator[tuple[dict, np.ndarray]]:
        """Every document, in the order of its key; files are removed as they are read."""
        self._write()
        for bucket in sorted(self._buckets):
            index, data = self._index(bucket), self._data(bucket)
            with open(index, encoding="utf-8") as lines:
                entries = [json.loads(line) for line in lines]
            ends = np.cumsum([size for _, size, _ in entries])
            stream = np.memmap(data, dtype=self.dtype, mode="r")
            for i in sorted(range(len(entries)), key=lambda i: entries[i][0]):
                _, size, record = entries[i]
                yield record, np.array(stream[ends[i] - size : ends[i]])
            del stream
            index.unlink()
            data.unlink()
        self.directory.rmdir()
