"""The parameter store (MemoryX's role): weights, moments and gradients in files, and one small record that seals them.

`store.json` says which step the store stands at, which slot holds each piece's current numbers and, after a backward
pass, that the gradient file (or what gradients are made of, `boundaries.py`) is whole: with it, the update of that step
can be made or finished at any later time: it is a redo log. An updated piece is written to a free slot; then the
record, replaced by a rename, says so.
A process killed at any point leaves a store that stands at one step, or at one step and part of the next update with
all that the rest of it needs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from crystal.backends.weight_streaming.io import Buffer, DiskFile, File, Line, MemoryFile, Ticket
from crystal.backends.weight_streaming.planes import decode_m, decode_v, encode_m, encode_v, join, split
from crystal.backends.weight_streaming.store_layout import HIGH, LOW, Piece, Plane, layout
from crystal.errors import CheckpointError, ConfigError, RunError
from crystal.files import replacing, sync
from crystal.mup.plan import Plan

RECORD = "store.json"
FORMAT = 1
PART = 1 << 22  # elements of a whole tensor that pass at a time; the scales of a part begin at a page


@dataclass(frozen=True)
class Update:
    """An update that is due: gradients x scale (None: as they are), AdamW's step number from 1, base lr."""

    number: int
    optimizer_step: int
    lr: float
    scale: float | None


@dataclass
class Record:
    """What store.json holds. result: of the step; slots, updates: where each piece lies, how many it has had."""

    owner: str
    moments: str
    gradients: str
    step: int | None = None
    optimizer_step: int = 0
    update: Update | None = None
    result: dict | None = None
    slots: dict[str, int] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    spilled: bool = True

    @property
    def due(self) -> bool:
        """Whether a piece has not had the update yet."""
        return self.update is not None and any(n < self.update.number for n in self.updates.values())


class Store:
    """A model's planes on disk, or in memory (directory None). Transfers are queued on two threads."""

    def __init__(
        self, plan: Plan, directory: Path | None, moments: str, gradients: torch.dtype, owner: str = "",
        spilled: bool = True,
    ):  # fmt: skip
        self.directory = directory
        self.layout = layout(plan, moments, gradients, spilled)
        dtype = str(gradients).removeprefix("torch.")
        self.record = Record(owner, moments, dtype, spilled=spilled)
        found = None if directory is None else read_record(directory)
        if found is not None:
            for key, wanted in (
                ("owner", owner), ("moments", moments), ("gradients", dtype), ("spilled", spilled)
            ):  # fmt: skip
                if getattr(found, key) != wanted:
                    raise ConfigError(
                        f"{directory}: the store there was made with {key} {getattr(found, key)}, the run now says "
                        f"{wanted}; set another backend.path, or go on from a full checkpoint"
                    )
            self.record = found
        self.files: dict[str, File] = {}
        self._place()

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
        if self.layout.spilled:
            sizes["gradients"] = self.layout.gradient_bytes
        if self.directory is None:
            self.files = {name: MemoryFile(size) for name, size in sizes.items()}
        else:
            self.check_room()
            self.directory.mkdir(parents=True, exist_ok=True)
            self.files = {name: DiskFile(self.directory / f"{name}.bin", size) for name, size in sizes.items()}
        self.reader, self.writer = Line("store reads"), Line("store writes")

    def close(self) -> None:
        if self.files:
            self.reader.close()
            self.writer.close()
            for file in self.files.values():
                file.close()
            self.files = {}

    # --- the record

    def unseal(self) -> None:
        """From now on nothing in the store counts, until the next `seal`."""
        self.open()
        if self.directory is not None:
            (self.directory / RECORD).unlink(missing_ok=True)
            sync(self.directory)

    def seal(self, step: int, optimizer_step: int, update: Update | None, result: dict | None) -> None:
        """The store stands at `step`; with `update`, once that is made. Returns when this will last."""
        self.record.step, self.record.optimizer_step = step, optimizer_step
        self.record.update, self.record.result = update, result
        text = self._text()
        self.writer.submit(lambda: self._put(text, *self.files)).wait()

    def commit(self, piece: Piece, slot: int, number: int) -> Ticket:
        """Behind the writes queued so far: `piece` has had update `number` and lies in `slot`, its old one is free."""
        self.free[piece.numel] = self.record.slots[piece.name]
        self.record.slots[piece.name], self.record.updates[piece.name] = slot, number
        text = self._text()
        return self.writer.submit(lambda: self._put(text, "store"))

    def _text(self) -> str:
        return json.dumps({"format": FORMAT} | asdict(self.record))

    def _put(self, text: str, *files: str) -> None:
        for name in files:
            self.files[name].sync()
        if self.directory is None:
            return
        with replacing(self.directory / RECORD) as aside:
            aside.write_text(text, encoding="utf-8")

    # --- transfers, queued

    def read(self, piece: Piece, plane: Plane, begin: int, into: memoryview, after: Ticket | None = None) -> Ticket:
        """Fill `into` (whole pages) with the plane's numbers of elements from `begin` on."""
        name, offset = self._at(piece, plane, begin, self.record.slots[piece.name])
        return self.reader.submit(lambda: self.files[name].pread(offset, into), after)

    def write(self, piece: Piece, plane: Plane, begin: int, source: memoryview, slot: int | None = None) -> Ticket:
        """Write them; weights and moments go to `slot`."""
        name, offset = self._at(piece, plane, begin, slot)
        return self.writer.submit(lambda: self.files[name].pwrite(offset, source))

    def _at(self, piece: Piece, plane: Plane, begin: int, slot: int | None) -> tuple[str, int]:
        """(file, byte) of element `begin` of a plane."""
        inside = begin // plane.per * plane.dtype.itemsize
        if plane is self.layout.gradient:
            return "gradients", self.gradient_at[piece.name] + inside
        for before in self.layout.planes:
            if before.name == plane.name:
                break
            inside += before.bytes(piece.numel)
        return "store", self.bases[piece.numel] + slot * self.layout.slot_bytes(piece.numel) + inside

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
                name, offset = self._at(piece, plane, begin, self.record.slots[piece.name])
                self.files[name].pwrite(offset, memory[plane.name].bytes[: plane.bytes(n)])

    def tensors(self, kind: str, fresh: bool) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a kind, fp32, a piece's at a time; fresh: the moments are zeros, whatever the planes say."""
        planes = self._planes(kind)
        memory = {p.name: Buffer(p.bytes(PART)) for p in planes}
        for piece in self.layout.pieces:
            flat = torch.zeros(piece.numel)
            held = 0 if fresh and kind != "model" else piece.numel
            for begin in range(0, held, PART):
                part = flat[begin : begin + PART]
                n = part.numel()
                for plane in planes:
                    name, offset = self._at(piece, plane, begin, self.record.slots[piece.name])
                    self.files[name].pread(offset, memory[plane.name].bytes[: plane.bytes(n)])
                views = {p.name: memory[p.name].tensor(p.dtype, 0, n // p.per) for p in planes}
                if kind == "model":
                    join(views["high"], views["low"], part)
                else:
                    (decode_m if kind == "optimizer.exp_avg" else decode_v)(views, part)
            yield from piece.views(flat).items()

    def _planes(self, kind: str) -> list[Plane]:
        if kind == "model":
            return [HIGH, LOW]
        initial = "m" if kind == "optimizer.exp_avg" else "v"
        return [p for p in self.layout.planes if p.name in (initial, f"{initial}_scale")]


def read_record(directory: Path) -> Record | None:
    """The record of a store, or None where there is none. Raises CheckpointError when it cannot be understood."""
    path = directory / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise CheckpointError(f"{path}: expected format {FORMAT}")
        record = Record(**found)
        record.update = Update(**found["update"]) if found["update"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a store's record: {error}") from None
    return record


def sealed_tensors(directory: Path, plan: Plan, step: int, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a kind out of the store in `directory`, which a checkpoint of `step` refers to.

    Raises CheckpointError when the store is gone, has moved on, or stands in the middle of an update.
    """
    record = read_record(directory)
    if record is None:
        raise CheckpointError(f"{directory}: expected the store that holds step {step}, none is there")
    if record.step != step or record.due:
        raise CheckpointError(
            f"{directory}: expected the store at step {step}, it is {'in the update of' if record.due else 'at'} step "
            f"{record.step}; `crystal train` goes on from there"
        )
    store = Store(plan, directory, record.moments, getattr(torch, record.gradients), record.owner, record.spilled)
    store.open()
    try:
        yield from store.tensors(kind, record.optimizer_step == 0)
    finally:
        store.close()
