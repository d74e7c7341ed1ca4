"""CRC-32 of each plane of each piece, made as its bytes are written and compared as they are read.

A plane passes in stretches, in order, so its sum is a running one and is compared with the last stretch: nothing that
was made of a plane is yielded or committed before. Sums are kept by the threads of transfers: those of a slot that is
being written count from `settle` on, which goes with the record that says the same of the slot.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from crystal.backends.weight_streaming.store_layout import Piece, Plane
from crystal.errors import CheckpointError
from crystal.kernels.crc32 import crc32

Sums = dict[str, dict[str, int]]  # piece → plane → CRC-32


class Checksums:
    """The sums of a store's current numbers. unchecked: whether something was read that has none."""

    def __init__(self, sums: Sums):
        self.sums = {piece: dict(planes) for piece, planes in sums.items()}
        self.unchecked = False
        self._read: dict[tuple[str, str], tuple[int, int]] = {}  # (piece, plane) → (bytes so far, their sum)
        self._written: dict[tuple[str, str], tuple[int, int]] = {}

    def copy(self) -> Sums:
        """For a record."""
        return {piece: dict(planes) for piece, planes in self.sums.items()}

    def forget(self) -> None:
        """What is in the store no longer counts."""
        self.sums, self._written = {}, {}

    def wrote(self, piece: Piece, plane: Plane, at: int, source: memoryview) -> None:
        """Bytes from `at` of the plane on are being written."""
        self._written[piece.name, plane.name] = _add(self._written, piece, plane, at, source)

    def settle(self, piece: Piece, planes: tuple[Plane, ...]) -> None:
        """What was written of these planes of the piece is what counts now."""
        kept = self.sums.setdefault(piece.name, {})
        for plane in planes:
            size, total = self._written.pop((piece.name, plane.name), (0, 0))
            kept.pop(plane.name, None)
            if size == plane.bytes(piece.numel):  # else it went elsewhere: a benchmark's files that do nothing
                kept[plane.name] = total

    def read(self, piece: Piece, plane: Plane, at: int, found: memoryview, path: Path) -> None:
        """Bytes from `at` on were read. Raises CheckpointError where they end the plane and are not those written."""
        expected = self.sums.get(piece.name, {}).get(plane.name)
        if expected is None:
            self.unchecked = True
            return
        key = (piece.name, plane.name)
        size, total = self._read[key] = _add(self._read, piece, plane, at, found)
        if size == plane.bytes(piece.numel) and total != expected:
            raise CheckpointError(
                f"{path}: {piece.name}, {plane.name}: expected CRC-32 {expected:08x}, got {total:08x}: it is damaged, "
                f"or of another run or step; restore it, or take the store away to go on from a full checkpoint"
            )


def _add(running: dict, piece: Piece, plane: Plane, at: int, data: memoryview) -> tuple[int, int]:
    size, total = running.get((piece.name, plane.name), (0, 0)) if at else (0, 0)
    if size != at:
        raise ValueError(f"{piece.name}, {plane.name}: expected bytes from {size} on, got those from {at} on")
    return at + len(data), crc32(data, total)


@functools.cache
def note_unchecked(directory: Path) -> None:
    """Say, once in a process, that a store has no sums to check it by."""
    print(
        f"crystal: {directory}: made by crystal 0.1.0, which kept no checksums: what is read of it is not checked; "
        f"training adds them as it writes",
        file=sys.stderr,
    )
