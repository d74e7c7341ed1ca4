"""Datasets of an HDF5 file that somebody else made: what lies in the file itself, of the size that it says.

HDF5 follows links to other files, reads data from files that a file names, and makes up numbers that were never
written. None of that is a checkpoint's, so all of it is refused, before anything is read.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

import h5py
import numpy as np
import pyarrow

LZ4 = "32004"  # the filter's registered number
_PACKED = {LZ4, "gzip", "shuffle", "fletcher32"}
_RATIO = 1100  # of deflate, the most that a byte can stand for; LZ4 has 255
_HEAP = b"GCOL\x01\0\0\0"
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_END_AT = {0: 40, 1: 44, 2: 28}  # by version of the superblock, 3 as 2
_CHUNK = 1 << 20  # bytes that a chunk of a small dataset may have


def datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """The datasets of a file by name; all others are refused. Raises ValueError naming a link, a group, a type."""
    found = {}
    for key in file:
        if not isinstance(file.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{key}: expected data that lie in the file itself, it is a link to elsewhere")
        item = file[key]
        if not isinstance(item, h5py.Dataset):
            raise ValueError(f"{key}: expected a tensor or a number, it is a {type(item).__name__.lower()}")
        found[key] = item
    return found


def expect_sound_texts(path: Path, found: dict[str, h5py.Dataset]) -> None:
    """Raise ValueError where a heap of texts, in which attributes lie, is damaged so that HDF5 goes round in a circle.

    Heaps are the one part of a file without checksums that it walks by what it finds there. They are looked for where
    no dataset's numbers lie.
    """
    taken = sorted(extent for dataset in found.values() for extent in _extents(dataset))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        begin, last = 0, _end(memory)
        for start, end in [*taken, (last, last)]:
            at = memory.find(_HEAP, begin, start)
            while at >= 0:
                _expect_sound(memory, at)
                at = memory.find(_HEAP, at + len(_HEAP), start)
            begin = max(begin, end)


def _end(memory: mmap.mmap) -> int:
    """Where HDF5 says that the file ends. It reads nothing behind that, where terabytes of zeros may be."""
    if memory[: len(_SIGNATURE)] != _SIGNATURE:  # it has something of somebody else's in front
        return len(memory)
    (end,) = struct.unpack_from("<Q", memory, _END_AT.get(memory[len(_SIGNATURE)], _END_AT[2]))
    return min(end, len(memory))


def _extents(dataset: h5py.Dataset) -> list[tuple[int, int]]:
    """Where in the file a dataset's numbers lie."""
    if dataset.shape is None or dataset.is_virtual or dataset.external:
        return []
    if dataset.chunks is None:
        begin = dataset.id.get_offset()
        return [] if begin is None else [(begin, begin + dataset.id.get_storage_size())]
    pieces = map(dataset.id.get_chunk_info, range(dataset.id.get_num_chunks()))
    return [(piece.byte_offset, piece.byte_offset + piece.size) for piece in pieces if piece.byte_offset is not None]


def _expect_sound(memory: mmap.mmap, at: int) -> None:
    """A global heap collection: its size, then objects of [index, 2][uses, 2][4][size, 8][data, in eights]; that of
    index 0 is what is free, and its size is all of it."""
    head = struct.Struct("<HH4xQ")
    (size,) = struct.unpack_from("<Q", memory, at + 8) if at + 16 <= len(memory) else (0,)
    end, at = min(at + size, len(memory)), at + 16
    while at + head.size <= end:
        index, _, length = head.unpack_from(memory, at)
        step = head.size + -(-length // 8) * 8 if index else length
        if step < head.size or at + step > end:
            raise ValueError(f"the heap of texts is damaged at byte {at}")
        at += step


def expect_own_data(dataset: h5py.Dataset, dtype: np.dtype) -> None:
    """Raise ValueError where numbers are of another type, are not all in this file, or more than what is stored can
    stand for."""
    if dataset.dtype != dtype:
        raise ValueError(f"expected numbers of type {dtype}, got {dataset.dtype}")
    if dataset.is_virtual or dataset.external:
        raise ValueError("expected data that lie in the file itself, they are in another")
    filters = set(dataset._filters)
    if filters - _PACKED or (LZ4 in filters and len(filters) > 1):
        raise ValueError(f"expected plain data, or packed by LZ4 or gzip, got the filters {', '.join(sorted(filters))}")
    nbytes, stored = math.prod(dataset.shape) * dtype.itemsize, dataset.id.get_storage_size()
    if dataset.chunks is None:
        if stored != nbytes:
            raise ValueError(f"expected {nbytes:,} bytes of data, {stored:,} are stored")
        return
    chunk = math.prod(dataset.chunks) * dtype.itemsize
    wanted = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    if dataset.id.get_num_chunks() != wanted:
        raise ValueError(f"expected {wanted:,} pieces of data, {dataset.id.get_num_chunks():,} are stored")
    if chunk > max(4 * nbytes, _CHUNK) or wanted * chunk > _RATIO * stored:
        raise ValueError(f"expected {nbytes:,} bytes of data, {stored:,} are stored in pieces of {chunk:,}")


def array_of(dataset: h5py.Dataset) -> np.ndarray:
    """All of a dataset. Raises ValueError, OSError for what is damaged."""
    return _unpacked(dataset) if set(dataset._filters) == {LZ4} else np.asarray(dataset[()])


def _unpacked(dataset: h5py.Dataset) -> np.ndarray:
    """A dataset packed by HDF5's LZ4 filter, which cstorch writes with and h5py does not bring.

    A chunk is [bytes, 8][bytes of a block, 4] and blocks of [packed bytes, 4] and data, numbers big-endian; a block
    that did not get smaller lies there as it is.
    """
    array = np.empty(dataset.shape, dataset.dtype)
    nbytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    for i in range(dataset.id.get_num_chunks()):
        offset = dataset.id.get_chunk_info(i).chunk_offset
        skipped, packed = dataset.id.read_direct_chunk(offset)
        plain = packed if skipped else _lz4(packed, nbytes)
        if len(plain) != nbytes:
            raise ValueError(f"expected pieces of {nbytes:,} bytes, got one of {len(plain):,}")
        chunk = np.frombuffer(plain, dataset.dtype).reshape(dataset.chunks)
        there = tuple(slice(o, min(o + c, n)) for o, c, n in zip(offset, dataset.chunks, dataset.shape, strict=True))
        array[there] = chunk[tuple(slice(0, s.stop - s.start) for s in there)]
    return array


def _lz4(packed: bytes, nbytes: int) -> bytearray:
    codec, plain, at = pyarrow.Codec("lz4_raw"), bytearray(), 12
    try:
        total, size = struct.unpack_from(">QI", packed)
        if total != nbytes or not size:
            raise ValueError(f"expected pieces of {nbytes:,} bytes, got one of {total:,}")
        while len(plain) < total:
            (length,) = struct.unpack_from(">I", packed, at)
            block, room = packed[at + 4 : at + 4 + length], min(size, total - len(plain))
            unpacked = block if length == room else codec.decompress(block, room).to_pybytes()
            if len(unpacked) != room:
                raise ValueError("a piece of packed data is cut")
            plain += unpacked
            at += 4 + length
    except struct.error:
        raise ValueError("a piece of packed data is cut") from None
    return plain
