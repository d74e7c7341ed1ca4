"""The lines of a file, plain or packed (.gz, .zst), in bounded memory and in a time that its size bounds.

A packed file of 8 KB may hold one line of 256 MB, or a billion empty ones. So a line that is wanted whole has at most
MAX_LINE bytes, and a packed file gives at most MAX_EXPANSION times its own size (or MAX_LINE bytes, where that is
more); beyond either it is refused, by name, before more than that has been unpacked.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

from crystal.errors import DataError

PACKED = (".gz", ".zst")
MAX_LINE = 1 << 26  # bytes: a row of JSON or CSV, a value of a table
MAX_EXPANSION = 1 << 10  # text of any kind packs to a hundredth at the very best; gzip cannot do more than 1,032
_LEAST = 64  # bytes that a line counts for at least: to handle an empty one costs as much
_BLOCK = 1 << 18  # bytes read at a time
_PIECE = 1 << 8  # packed bytes unpacked at a time: a zstandard block is at least 3 bytes, and at most 128 KB unpacked


class Reading:
    """How much of some files has been read, for a progress bar: `share` goes from 0 to 1 with their bytes.

    skipped: how many rows and files without text were passed over; first: what was wrong with the first of them.
    """

    def __init__(self) -> None:
        self.total = 0
        self.skipped, self.first = 0, ""
        self._done = 0
        self._at: Callable[[], float] = lambda: 0

    @contextlib.contextmanager
    def of(self, file: Path, at: Callable[[], float]) -> Iterator[None]:
        """While `file` is read; at() is how many of its bytes have been."""
        self._at = at
        try:
            yield
        finally:  # also where the rest of a file is not wanted
            self._done, self._at = self._done + file.stat().st_size, lambda: 0

    def skip(self, what: str) -> None:
        """Count something that was passed over."""
        self.first = self.first or what
        self.skipped += 1

    @property
    def share(self) -> float:
        return min((self._done + self._at()) / max(self.total, 1), 1.0)


def lines(file: Path, reading: Reading, most: int | None = None) -> Iterator[bytes]:
    """Lines with their ends. most: of about so many bytes at most, longer ones come in parts; None: whole.

    Raises DataError naming file and line for one of more than MAX_LINE bytes that is wanted whole, and for a packed
    file of more than MAX_EXPANSION times its size, where a line counts for 64 bytes at least; and what codecs raise.
    """
    found = _zstandard_lines(file, reading, most) if file.suffix.lower() == ".zst" else _lines(file, reading, most)
    room = max(MAX_LINE, MAX_EXPANSION * file.stat().st_size) if file.suffix.lower() in PACKED else None
    number = 1
    for line in found:
        if most is None and len(line) > MAX_LINE:
            raise DataError(f"{file}:{number}: expected a line of at most {MAX_LINE:,} bytes, found more", file=file)
        if room is not None and (room := room - max(len(line), _LEAST)) < 0:
            raise too_large(file, number)
        yield line
        number += line.endswith(b"\n")


def too_large(file: Path, number: int) -> DataError:
    """The mistake that a file is which unpacks to more than it may; to be raised. number: of the line or row."""
    most = f"at most {MAX_EXPANSION:,} times its size, or {MAX_LINE:,} bytes"
    return DataError(f"{file}:{number}: expected a packed file that holds {most}, found more", file=file)


def _lines(file: Path, reading: Reading, most: int | None) -> Iterator[bytes]:
    with file.open("rb") as raw, reading.of(file, raw.tell):
        stream = gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw
        while line := stream.readline(MAX_LINE + 1 if most is None else most):
            yield line


def _zstandard_lines(file: Path, reading: Reading, most: int | None) -> Iterator[bytes]:
    """As `lines`; a line that is too long comes as it is so far."""
    held: list[bytes] = []  # of the line that has no end yet
    size = 0
    for piece, is_last in _zstandard_pieces(file, reading):
        first, *others = piece.split(b"\n")
        held.append(first)
        size += len(first)
        if others:
            yield b"".join(held) + b"\n"
            for line in others[:-1]:
                yield line + b"\n"
            held, size = [others[-1]], len(others[-1])
        if size > MAX_LINE or (most is not None and is_last and size > most):
            yield b"".join(held)
            held, size = [], 0
    if size:
        yield b"".join(held)


def _zstandard_pieces(file: Path, reading: Reading) -> Iterator[tuple[bytes, bool]]:
    """(content, whether it is the last of what was read at once or of a frame), of all frames.

    The library's own reader takes a file cut short for a whole one.
    """
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    with file.open("rb") as stream, reading.of(file, stream.tell):
        while block := memoryview(stream.read(_BLOCK)):
            while block:
                piece, block = block[:_PIECE], block[_PIECE:]
                content = frame.decompress(piece)
                inside = not frame.eof
                if frame.eof:
                    unused = len(frame.unused_data)
                    block = memoryview(bytes(piece[len(piece) - unused :]) + bytes(block)) if unused else block
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield content, not inside or not block
    if inside:
        raise EOFError("the file ends inside a frame")
