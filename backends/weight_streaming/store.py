"""The parameter store (MemoryX's role): weights, moments and gradients in files, and one small record that seals them.

`store.json` (`record.py`) says which step the store stands at, which slot holds each piece's current numbers, what sums
their bytes have and, after a backward pass, that the gradient file (or what gradients are made of, `boundaries.py`) is
whole: with it, the update of that step can be made or finished at any later time: it is a redo log. An updated piece is
written to a free slot; then the record, replaced by a rename, says so.
A process killed at any point leaves a store that stands at one step, or at one step and part of the next update with
all that the rest of it needs.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from crystal.backends.weight_streaming.checksums import Checksums, note_unchecked
from crystal.backends.weight_streaming.io import Buffer, DiskFile, File, Line, MemoryFile, Ticket, expect_size
from crystal.backends.weight_streaming.lock import expect_free, hold
from crystal.backends.weight_streaming.planes import decode_m, decode_v, encode_m, encode_v, join, split
from crystal.backends.weight_streaming.record import (
    RECORD,
    Identity,
    Record,
    Update,
    as_text,
    expect_the_runs,
    new_identity,
    read_identity,
    read_record,
    write_identity,
)
from crystal.backends.weight_streaming.store_layout import HIGH, LOW, Piece, Plane, layout
from crystal.errors import CheckpointError, ConfigError, RunError
from crystal.files import replacing, sync
from crystal.mup.plan import Plan

PART = 1 << 22  # elements of a whole tensor that pass at a time; the scales of a part begin at a page


class Store:
    """A model's planes on disk, or in memory (directory None). Transfers are queued on two threads."""

    def __init__(
        self, plan: Plan, directory: Path | None, moments: str, gradients: torch.dtype, owner: str = "",
        spilled: bool = True, reads_only: bool = False, identity: Path | None = None,
    ):  # fmt: skip
        """reads_only: whole tensors of a store that is there, which nothing here writes to or locks. identity: the
        file, of a run, that says which store is its own.

        Raises ConfigError for a store made with other settings, CheckpointError for one that is not the run's or whose
        files do not fit its record, RunError for one that another process trains in.
        """
        self.directory, self.reads_only, self.identity = directory, reads_only, identity
        self.layout = layout(plan, moments, gradients, spilled)
        dtype = str(gradients).removeprefix("torch.")
        self.record = Record(owner, moments, dtype, spilled=spilled)
        if directory is not None and not reads_only:
            expect_free(directory)
        self._found = self._on_disk()
        found = None if directory is None else read_record(directory)
        known = None if directory is None or identity is None else read_identity(identity)
        if identity is not None and directory is not None:
            expect_the_runs(directory, found, identity, known)
        if found is not None:
            for key, wanted in (
                ("owner", owner), ("moments", moments), ("gradients", dtype), ("spilled", spilled),
                ("layout", self.layout.fingerprint if found.layout else ""),
            ):  # fmt: skip
                if getattr(found, key) != wanted:
                    raise ConfigError(
                        f"{directory}: the store there was made with {key} {getattr(found, key)}, the run now says "
                        f"{wanted}; set another backend.path, or go on from a full checkpoint"
                    )
            self.record = found
            self._expect_files()
            if not reads_only and any("high" not in found.sums.get(piece.name, {}) for piece in self.layout.pieces):
                note_unchecked(directory)
        self.record.layout = self.layout.fingerprint
        self.sums, self.record.sums = Checksums(self.record.sums), {}  # kept by the threads; a record gets a copy
        self.record.identity = self.record.identity or (known.identity if known else new_identity())
        self._known = known  # what is in that file
        self.files: dict[str, File] = {}
        self._place()

    def _on_disk(self) -> bytes | None:
        """The record's bytes as they are now."""
        path = None if self.directory is None else self.directory / RECORD
        return path.read_bytes() if path is not None and path.is_file() else None

    def _expect_files(self) -> None:
        """Raise CheckpointError unless the record fits the layout and the files fit the record."""
        record, where = self.record, self.directory / RECORD
        for key in ("slots", "updates"):
            if getattr(record, key).keys() != {piece.name for piece in self.layout.pieces}:
                raise CheckpointError(f"{where}: {key}: expected the model's pieces, got another model's")
        for _, pieces in self.layout.slots():
            slots = {record.slots[piece.name] for piece in pieces}
            if len(slots) < len(pieces) or not slots <= set(range(len(pieces) + 1)):
                raise CheckpointError(f"{where}: slots: expected one of its own for each piece, got {sorted(slots)}")
        expect_size(self.directory / "store.bin", self.layout.store_bytes)
        if record.due and self.layout.spilled:
            expect_size(self.directory / "gradients.bin", self.layout.gradient_bytes)

    def _place(self) -> None:
        """Byte offsets of all slots and gradients; a fresh store has its last slot of each size free."""
        self.bases, self.free, self.gradient_at = {}, {}, {}
        offset = 0
        for numel, pieces in self.layout.slots():
            self.bases[numel] = offset
            offset += self.layout.slot_bytes(numel) * (len(pieces) + 1)
            for slot, piece in enumerate(pieces):
                self.record.slots.setdefault(piece.name, slot)
                self.record.updates.setdefault(piece.name, 0)
            self.free[numel] = (set(range(len(pieces) + 1)) - {self.record.slots[p.name] for p in pieces}).pop()
        offset = 0
        for piece in self.layout.pieces:
            self.gradient_at[piece.name] = offset
            offset += self.layout.gradient.bytes(piece.numel)

    @property
    def sealed_step(self) -> int | None:
        """The step that the store stands at on disk (its update may still be due), or None."""
        return self.record.step

    def check_room(self) -> None:
        """Raise ConfigError when the disk has no room for the store, before anything is written."""
        if self.directory is None or self.record.step is not None:
            return
        needed = self.layout.store_bytes + self.layout.gradient_bytes
        parent = next(p for p in (self.directory, *self.directory.absolute().parents) if p.exists())
        held = sum(f.stat().st_size for f in self.directory.glob("*.bin")) if self.directory.exists() else 0
        free = shutil.disk_usage(parent).free + held
        if free < needed:
            raise RunError(
                f"{self.directory}: the store needs {needed:,} bytes on disk (weights and {self.record.moments} "
                f"moments {self.layout.store_bytes:,}, gradients {self.layout.gradient_bytes:,}), {free:,} are free; "
                f"set backend.moments to bf16 or int8, or backend.gradients to recomputed, or backend.path to a larger "
                f"disk"
            )

    def open(self) -> None:
        """Open the files, making them (and reserving their room) where they are not there."""
        if self.files:
            return
        sizes = {"store": self.layout.store_bytes}
        if self.reads_only:
            self.files = {name: DiskFile(self._path(name), size, "read") for name, size in sizes.items()}
            return
        if self.layout.spilled:
            sizes["gradients"] = self.layout.gradient_bytes
        let_go = None
        if self.directory is None:
            self.files = {name: MemoryFile(size) for name, size in sizes.items()}
        else:
            self.check_room()
            self.directory.mkdir(parents=True, exist_ok=True)
            let_go = hold(self.directory)
            try:
                if self._on_disk() != self._found:
                    raise RunError(f"{self.directory}: another process has trained in this store since it was opened")
                self.files = {name: DiskFile(self._path(name), size, self._kind(name)) for name, size in sizes.items()}
            except OSError as error:
                let_go()
                raise RunError(f"{self.directory}: the store cannot be opened: {error}") from None
            except BaseException:
                let_go()
                raise
        self.reader, self.writer = Line("store reads"), Line("store writes")
        # a store that nobody knows of any more does not keep others out
        self._end = weakref.finalize(self, _end, self.reader, self.writer, list(self.files.values()), let_go)
        self._end.atexit = False

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _kind(self, name: str) -> str:
        """How a file is opened: what counts is there, what does not is made as it should be."""
        counts = self.record.step is not None and (name == "store" or self.record.due)
        return "write" if counts else "make"

    def close(self) -> None:
        """Finish what is queued; nothing in the process holds the store's files or its lock afterwards."""
        if not self.files:
            return
        if self.reads_only:
            for file in self.files.values():
                file.close()
        else:
            self.reader.close()
            self.writer.close()
            self._found = self._on_disk()
            self._end()
        self.files = {}

    # --- the record

    def unseal(self) -> None:
        """From now on nothing in the store counts, until the next `seal`."""
        self.open()
        self.sums.forget()
        if self.directory is not None:
            self._identify(filled=False)
            (self.directory / RECORD).unlink(missing_ok=True)
            sync(self.directory)

    def seal(
        self, step: int, optimizer_step: int, update: Update | None, result: dict | None, boundaries: int | None = None
    ) -> None:
        """The store stands at `step`; with `update`, once that is made. Returns when this will last.

        boundaries: the CRC-32 of the file of what the update is made of, where gradients are not spilled.
        """
        self.open()
        self.record.step, self.record.optimizer_step = step, optimizer_step
        self.record.update, self.record.result, self.record.boundaries = update, result, boundaries
        body = asdict(self.record)
        self.writer.submit(lambda: self._put(body, *self.files)).wait()

    def commit(self, piece: Piece, slot: int, number: int) -> Ticket:
        """Behind the writes queued so far: `piece` has had update `number` and lies in `slot`, its old one is free."""
        self.free[piece.numel] = self.record.slots[piece.name]
        self.record.slots[piece.name], self.record.updates[piece.name] = slot, number
        body = asdict(self.record)

        def put() -> None:
            self.sums.settle(piece, self.layout.planes)
            self._put(body, "store")

        return self.writer.submit(put)

    def _put(self, body: dict, *files: str) -> None:
        """Replace the record by `body` and today's sums, behind what was written to `files`."""
        for name in files:
            self.files[name].sync()
        if self.directory is None:
            return
        with replacing(self.directory / RECORD) as aside:
            aside.write_text(as_text(body | {"sums": self.sums.copy()}), encoding="utf-8")
        self._identify(filled=True)

    def _identify(self, filled: bool) -> None:
        """Have the run know that this is its store; filled: that it is lost when it is not there."""
        now = Identity(self.record.identity, filled)
        if self.identity is not None and self._known != now:
            write_identity(self.identity, now)
            self._known = now

    # --- transfers, queued

    def read(self, piece: Piece, plane: Plane, begin: int, into: memoryview, after: Ticket | None = None) -> Ticket:
        """Fill `into` (whole pages) with the plane's numbers of elements from `begin` on."""
        slot = self.record.slots[piece.name]
        return self.reader.submit(lambda: self._read(piece, plane, begin, slot, into), after)

    def write(self, piece: Piece, plane: Plane, begin: int, source: memoryview, slot: int | None = None) -> Ticket:
        """Write them; weights and moments go to `slot`."""
        return self.writer.submit(lambda: self._write(piece, plane, begin, slot, source))

    def _read(self, piece: Piece, plane: Plane, begin: int, slot: int, into: memoryview) -> None:
        name, offset, inside = self._at(piece, plane, begin, slot)
        self.files[name].pread(offset + inside, into)
        if self.directory is not None:
            self.sums.read(piece, plane, inside, into, self._path(name))

    def _write(self, piece: Piece, plane: Plane, begin: int, slot: int | None, source: memoryview) -> None:
        name, offset, inside = self._at(piece, plane, begin, slot)
        if self.directory is not None:
            self.sums.wrote(piece, plane, inside, source)
        self.files[name].pwrite(offset + inside, source)
        if plane is self.layout.gradient:
            self.sums.settle(piece, (plane,))

    def _at(self, piece: Piece, plane: Plane, begin: int, slot: int | None) -> tuple[str, int, int]:
        """(file, byte at which a plane begins, bytes from there to element `begin`)."""
        inside = begin // plane.per * plane.dtype.itemsize
        if plane is self.layout.gradient:
            return "gradients", self.gradient_at[piece.name], inside
        offset = self.bases[piece.numel] + slot * self.layout.slot_bytes(piece.numel)
        for before in self.layout.planes:
            if before.name == plane.name:
                break
            offset += before.bytes(piece.numel)
        return "store", offset, inside

    # --- whole tensors, for checkpoints: at once, in the caller's thread

    def put(self, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write fp32 tensors of one kind (model, optimizer.exp_avg, optimizer.exp_avg_sq), in any order.

        Raises CheckpointError for a tensor that is missing, of another shape or none of the model's.
        """
        places = {p.name: (piece, p) for piece in self.layout.pieces for p in piece.places}
        missing, gathered = set(places), {}
        for name, tensor in tensors:
            piece, place = places.get(name, (None, None))
            if name not in missing or tuple(tensor.shape) != place.shape:
                raise CheckpointError(
                    f"checkpoint: {name} {list(tensor.shape)}: expected each tensor of the model once"
                )
            missing.remove(name)
            if piece.name not in gathered:
                gathered[piece.name] = torch.zeros(piece.numel)
            gathered[piece.name][place.start : place.stop] = tensor.detach().flatten()
            if not missing.intersection(p.name for p in piece.places):
                self._put_piece(piece, kind, gathered.pop(piece.name))
        if missing:
            raise CheckpointError(f"checkpoint: expected every tensor of the model, {min(missing)} is not in it")

    def _put_piece(self, piece: Piece, kind: str, flat: Tensor) -> None:
        planes = self._planes(kind)
        memory = {p.name: Buffer(p.bytes(PART)) for p in planes}
        scratch = torch.empty(PART, dtype=torch.int32)
        chance = torch.zeros(PART, dtype=torch.int16)  # 0: the middle, plain rounding
        for begin in range(0, piece.numel, PART):
            part = flat[begin : begin + PART]
            n = part.numel()
            views = {p.name: memory[p.name].tensor(p.dtype, 0, n // p.per) for p in planes}
            if kind == "model":
                split(part, views["high"], views["low"], scratch[:n])
            else:
                (encode_m if kind == "optimizer.exp_avg" else encode_v)(part, views, chance[:n])
            for plane in planes:
                slot = self.record.slots[piece.name]
                self._write(piece, plane, begin, slot, memory[plane.name].bytes[: plane.bytes(n)])
        self.sums.settle(piece, planes)

    def tensors(self, kind: str, fresh: bool) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a kind, fp32; fresh: the moments are zeros, whatever the planes say.

        Raises CheckpointError for a piece whose bytes are not those that were written.
        """
        for piece in self.pieces(kind, fresh):
            yield from piece.items()

    def pieces(self, kind: str, fresh: bool) -> Iterator[dict[str, Tensor]]:
        """The same, each piece's by name."""
        planes = self._planes(kind)
        memory = {p.name: Buffer(p.bytes(PART)) for p in planes}
        for piece in self.layout.pieces:
            flat = torch.zeros(piece.numel)
            held = 0 if fresh and kind != "model" else piece.numel
            for begin in range(0, held, PART):
                part = flat[begin : begin + PART]
                n = part.numel()
                for plane in planes:
                    slot = self.record.slots[piece.name]
                    self._read(piece, plane, begin, slot, memory[plane.name].bytes[: plane.bytes(n)])
                views = {p.name: memory[p.name].tensor(p.dtype, 0, n // p.per) for p in planes}
                if kind == "model":
                    join(views["high"], views["low"], part)
                else:
                    (decode_m if kind == "optimizer.exp_avg" else decode_v)(views, part)
            yield piece.views(flat)

    def _planes(self, kind: str) -> tuple[Plane, ...]:
        if kind == "model":
            return HIGH, LOW
        initial = "m" if kind == "optimizer.exp_avg" else "v"
        return tuple(p for p in self.layout.planes if p.name in (initial, f"{initial}_scale"))


def _end(reader: Line, writer: Line, files: list[File], let_go: Callable[[], None] | None) -> None:
    for line in (reader, writer):
        line.close(wait=False)
    for file in files:
        file.close()
    if let_go is not None:
        let_go()
