"""Whether the files of a token store hold what its manifest says, and the memory that they did.

A shard is compared with its sha256, and each of its ids with the vocabulary's size, when it is first read on a machine.
What was found right is remembered in cache/hashes by path, size, times and inode, so the next start costs a look at
each file. What changes a file and leaves all of those as they were (a disk that forgets) is for `crystal data verify`,
or `data.verify: always`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from crystal.data import pack
from crystal.data.document_index import Documents
from crystal.data.store_manifest import SourceEntry
from crystal.errors import DataError
from crystal.files import cache_dir, dangling, sha256_of, write_whole

WHOLE_BYTES = 8 << 30  # stores up to this size are read from end to end on first use; larger ones shard by shard
_SMALL = 1 << 18  # bytes below which a file is read again: remembering very many would fill the cache
_BLOCK = 1 << 20


def expect_size(file: Path, size: int | None) -> None:
    """Raise DataError unless the file is there, and of `size` bytes where that is given."""
    if nowhere := dangling(file):
        raise DataError(f"{file}: {nowhere}", file=file)
    if not file.is_file():
        raise DataError(f"{file}: missing from the token store; run `crystal prepare` again", file=file)
    if size is not None and file.stat().st_size != size:
        raise DataError(f"{file}: expected {size} bytes, got {file.stat().st_size}", file=file)


def expect_file(file: Path, sha256: str, remember: bool = True) -> None:
    """Raise DataError unless a file has this sha256. remember: believe it where it was found right before."""
    _once(file, sha256, remember, lambda: _expect_sha256(file, sha256, sha256_of(file)))


def expect_shard(
    file: Path,
    sha256: str,
    dtype: np.dtype,
    vocab_size: int,
    remember: bool = True,
    say: Callable[[int], None] | None = None,
) -> None:
    """Raise DataError unless a shard has this sha256 and no id of `vocab_size` or above. say: told of bytes read."""

    def read() -> None:
        digest, largest = hashlib.sha256(), 0
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                ids = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
                largest = max(largest, int(ids.max(initial=0)))
                if say is not None:
                    say(len(block))
        _expect_sha256(file, sha256, digest.hexdigest())
        if largest >= vocab_size:
            raise DataError(
                f"{file}: expected token ids below {vocab_size}, the vocabulary's size, got {largest}", file=file
            )

    _once(file, f"{sha256} {vocab_size}", remember, read)


def _expect_sha256(file: Path, expected: str, found: str) -> None:
    if found != expected:
        raise DataError(f"{file}: expected sha256 {expected}, got {found}", file=file)


def expect_derived(file: Path, entry: SourceEntry, documents: dict[str, Documents]) -> None:
    """Raise DataError unless the manifest's licences and bytes of a source are those of its documents."""
    held = documents.values()
    found = {
        "licenses": sorted(set().union(*(d.licenses for d in held))),
        "text_bytes": sum(d.text_bytes for d in held),
    }
    for key, value in found.items():
        if getattr(entry, key) != value or not all(d.told for d in held):
            raise DataError(f"{file}: expected documents with {key} {getattr(entry, key)}, got {value}", file=file)


def expect_frames(
    file: Path, maps: list[np.ndarray], documents: Documents, overlap: bool, bos_id: int | None, bos: bool, eos_id: int
) -> None:
    """Raise DataError unless the rows [n, seq_len + 1] of one split hold documents framed as the manifest says: each
    ends with EOS where its line says, begins with BOS or none does, and rows share a token or not.

    file: the manifest, for messages.
    """
    maps = [shard for shard in maps if len(shard)]
    if not maps:
        return
    if overlap:
        for shard, after in zip(maps, [*maps[1:], None], strict=True):
            same = np.array_equal(shard[:-1, -1], shard[1:, 0])
            if not same or (after is not None and shard[-1, -1] != after[0, 0]):
                raise DataError(f"{file}: overlap: expected rows that share a token, got others", file=file)
    starts = np.array(documents.starts, np.int64)
    ends = np.append(starts[1:], documents.tokens) - 1
    if (_at(maps, ends, overlap) != eos_id).any():
        raise DataError(
            f"{file}: expected documents that end where documents.jsonl says, with the id {eos_id}, got others; "
            "overlap or the documents are another store's",
            file=file,
        )
    begin = _at(maps, starts, overlap) == bos_id
    if len(begin) and (not begin.all() if bos else begin.all()):
        raise DataError(f"{file}: bos: expected documents {'with' if bos else 'without'} BOS, got others", file=file)


def _at(maps: list[np.ndarray], positions: np.ndarray, overlap: bool) -> np.ndarray:
    """The ids at stream positions, those that no row holds left out."""
    width, rows = maps[0].shape[1], sum(map(len, maps))
    step = pack.stride(width - 1, overlap)
    positions = positions[positions < (rows - 1) * step + width]
    row = np.minimum(positions // step, rows - 1)
    found, first = np.empty(len(positions), np.int64), 0
    for shard in maps:
        here = (row >= first) & (row < first + len(shard))
        found[here] = shard[row[here] - first, positions[here] - row[here] * step]
        first += len(shard)
    return found


# ------------------------------------------------------------------------------------------------- memory


def identity(files: Iterable[Path], what: str) -> str:
    """What tells files, and what was found of them, from other files: paths, sizes, times, inodes."""
    digest = hashlib.sha256(what.encode())
    for file in files:
        stat = file.stat()
        said = f"\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}"
        digest.update(said.encode(errors="surrogateescape"))
    return digest.hexdigest()


def known(key: str) -> bool:
    """Whether what stands behind this identity was found right before."""
    return (cache_dir() / "hashes" / f"store-{key}").is_file()


def keep(key: str) -> None:
    """Remember that it was found right. A cache that cannot be written remembers nothing."""
    with contextlib.suppress(OSError):
        (cache_dir() / "hashes").mkdir(parents=True, exist_ok=True)
        write_whole(cache_dir() / "hashes" / f"store-{key}", "")


def _once(file: Path, what: str, remember: bool, check: Callable[[], None]) -> None:
    try:
        key = identity([file], what)
        if remember and known(key):
            return
        check()
        if file.stat().st_size >= _SMALL and identity([file], what) == key:  # it did not change meanwhile
            keep(key)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}", file=file) from None
