"""Weights on their way to the device: piece after piece, read ahead, with or without an update on the way.

Two passes. `weights` reads pieces in a given order, the next one while this one is in use. `updated` goes through all
pieces in forward order and makes a due update as they pass, so that the next step's forward pass, which reads the
weights anyway, hides the update's traffic; a ring of chunks is read ahead and written behind the arithmetic.

The ring and the buffers of the backward pass are never in use at once and share their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from crystal.backends.weight_streaming.io import Buffer, Ticket
from crystal.backends.weight_streaming.planes import join
from crystal.backends.weight_streaming.store import Store, Update
from crystal.backends.weight_streaming.store_layout import HIGH, LOW, Piece, Plane
from crystal.backends.weight_streaming.update import Updater

GRAIN = 1 << 18  # elements; even the scales of a chunk that begins at a multiple of it begin at a page
CHUNK = 1 << 23


class Stream:
    """Buffers and passes over one store. dtype: of compute."""

    def __init__(self, store: Store, updater: Updater, dtype: torch.dtype, ring_bytes: int | None):
        """ring_bytes: None for as much as the backward pass needs anyway, or one piece's whole state."""
        self.store, self.updater, self.dtype = store, updater, dtype
        pieces, gradient = store.layout.pieces, store.layout.gradient
        largest = max(piece.numel for piece in pieces)
        self.chunk = min(CHUNK, -(-largest // GRAIN) * GRAIN)
        self.planes = (*store.layout.planes, *([gradient] if store.layout.spilled else []))
        cell = sum(plane.bytes(self.chunk) for plane in self.planes)
        whole = -(-largest // self.chunk)  # cells
        wanted = ring_bytes if ring_bytes is not None else whole * cell
        weights = largest * dtype.itemsize
        halves = largest * (HIGH.dtype.itemsize + LOW.dtype.itemsize) if dtype == torch.float32 else 0
        backward = weights + 2 * halves + 2 * gradient.bytes(largest)
        self.cells = max(2 if store.layout.spilled else whole, max(wanted, backward) // cell)
        self.bytes = weights + max(self.cells * cell, backward)
        self.made_at = self.bytes  # a piece's gradient that is recomputed, while its cells are full
        self.bytes += 0 if store.layout.spilled else gradient.bytes(largest)
        self.cell, self.largest = cell, largest
        self.buffer: Buffer | None = None

    def open(self) -> None:
        """Take the memory and open the store."""
        self.store.open()
        if self.buffer is not None:
            return
        buffer = self.buffer = Buffer(self.bytes)
        step = self.largest * self.dtype.itemsize
        self._compute_at = [0, step]
        self._halves_at = [2 * step, 2 * step + self.largest * 4]  # fp32 compute alone
        gradient = self.store.layout.gradient.bytes(self.largest)
        self.gradients_at = [2 * step + (2 * self.largest * 4 if self.dtype == torch.float32 else 0)]
        self.gradients_at.append(self.gradients_at[0] + gradient)
        self._cells_at = [step + i * self.cell for i in range(self.cells)]
        self._compute = [buffer.tensor(self.dtype, at, self.largest) for at in self._compute_at]

    def weights(self, order: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
        """(piece, its weights [numel] in the compute dtype), each good until the next is asked for."""
        coming = {0: self._fetch(order[0], 0)}
        for i, piece in enumerate(order):
            if i + 1 < len(order):
                coming[i + 1] = self._fetch(order[i + 1], (i + 1) % 2)
            for ticket in coming.pop(i):
                ticket.wait()
            flat = self._compute[i % 2][: piece.numel]
            if self.dtype == torch.float32:
                join(*(self.buffer.tensor(torch.int16, at, piece.numel) for at in self._halves(piece, i % 2)), flat)
            yield piece, flat

    def _fetch(self, piece: Piece, side: int) -> list[Ticket]:
        if self.dtype == torch.float32:
            places = zip((HIGH, LOW), self._halves(piece, side), strict=True)
        else:
            places = [(HIGH, self._compute_at[side])]
        return [
            self.store.read(piece, plane, 0, self.buffer.bytes[at : at + plane.bytes(piece.numel)])
            for plane, at in places
        ]

    def _halves(self, piece: Piece, side: int) -> tuple[int, int]:
        return self._halves_at[side], self._halves_at[side] + HIGH.bytes(piece.numel)

    def updated(
        self, update: Update, gradient: Callable[[Piece, Tensor, Tensor], None] | None = None, compute: bool = True
    ) -> Iterator[tuple[Piece, Tensor]]:
        """(piece, its weights after `update`) of all pieces, forward, each good until the next is asked for.

        gradient: where gradients are not in the store, fills one piece's [numel], given its old weights.
        Pieces that have had the update already (it was cut short) are only read. compute: False moves the same bytes
        and does no arithmetic, for a benchmark.
        """
        items = [(piece, at) for piece in self.store.layout.pieces for at in range(0, piece.numel, self.chunk)]
        due = {p.name: self.store.record.updates[p.name] < update.number for p in self.store.layout.pieces}
        reads: dict[int, list[Ticket]] = {}
        last: Ticket | None = None
        for number in range(min(self.cells, len(items))):
            reads[number] = self._read_cell(number, *items[number], due)
        made = self.buffer.tensor(self.store.layout.gradient.dtype, self.made_at, self.largest) if gradient else None
        for number, (piece, begin) in enumerate(items):
            if made is not None and begin == 0 and due[piece.name]:
                self._old_weights(number, piece, reads)
                gradient(piece, self._compute[0][: piece.numel], made[: piece.numel])
            for ticket in reads.pop(number):
                ticket.wait()
            count = min(self.chunk, piece.numel - begin)
            cell = number % self.cells
            planes = {p.name: self._tensor(cell, p, count) for p in self.planes}
            flat = self._compute[0][begin : begin + count]
            if due[piece.name]:
                if made is not None:
                    planes["gradient"] = made[begin : begin + count]
                if compute:
                    self.updater(piece, begin, planes, flat, update)
                slot = self.store.free[piece.numel]
                for plane in self.store.layout.planes:
                    last = self.store.write(piece, plane, begin, self._bytes(cell, plane, count), slot)
            else:
                self._fill(flat, planes)
            if begin + count == piece.numel and due[piece.name]:
                last = self.store.commit(piece, slot, update.number)
            ahead = number + self.cells
            if ahead < len(items):  # into the cell just used, once it is written
                reads[ahead] = self._read_cell(cell, *items[ahead], due, last)
            if begin + count == piece.numel:
                yield piece, self._compute[0][: piece.numel]
        if last is not None:
            last.wait()

    def _old_weights(self, number: int, piece: Piece, reads: dict[int, list[Ticket]]) -> None:
        """A whole piece's weights before the update, from its cells, of which `number` is the first."""
        for begin in range(0, piece.numel, self.chunk):
            count = min(self.chunk, piece.numel - begin)
            for ticket in reads[number]:
                ticket.wait()
            planes = {p.name: self._tensor(number % self.cells, p, count) for p in (HIGH, LOW)}
            self._fill(self._compute[0][begin : begin + count], planes)
            number += 1

    def _fill(self, flat: Tensor, planes: dict[str, Tensor]) -> None:
        if self.dtype == torch.float32:
            join(planes["high"], planes["low"], flat)
        else:
            flat.view(torch.int16).copy_(planes["high"])

    def _read_cell(self, cell: int, piece: Piece, begin: int, due: dict, after: Ticket | None = None) -> list[Ticket]:
        count = min(self.chunk, piece.numel - begin)
        planes = self.planes if due[piece.name] else (HIGH, LOW)
        return [self.store.read(piece, plane, begin, self._bytes(cell, plane, count), after) for plane in planes]

    def _at(self, cell: int, plane: Plane) -> int:
        before = self.planes[: [p.name for p in self.planes].index(plane.name)]
        return self._cells_at[cell] + sum(p.bytes(self.chunk) for p in before)

    def _bytes(self, cell: int, plane: Plane, count: int) -> memoryview:
        at = self._at(cell, plane)
        return self.buffer.bytes[at : at + plane.bytes(count)]

    def _tensor(self, cell: int, plane: Plane, count: int) -> Tensor:
        return self.buffer.tensor(plane.dtype, self._at(cell, plane), count // plane.per)
