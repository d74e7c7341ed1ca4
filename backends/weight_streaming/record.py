"""A store's record, `store.json`: which step the store stands at, where each piece lies, and the sums of its bytes.

Format 2 (format 1 is crystal 0.1.0's, without sums, identity, layout and a digest of its own): the record carries a
sha256 of itself, so that a changed digit in it is not taken for another step, slot or learning rate. It is the root of
what is known about the store: each plane's CRC-32 is in it, so that other bytes than those that were written, be they
damaged or of another step or run, are not this store's.

`store.id` is in the run directory and outlives the record: which store is the run's, and whether it must be there.
Without it a store that is lost would be taken for one that was never filled, and training would begin anew.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from crystal.errors import CheckpointError
from crystal.files import regular_bytes, replacing

RECORD = "store.json"
FORMAT, WITHOUT_SUMS = 2, 1
IDENTITY_FORMAT = 1
DIGEST = "sha256"


@dataclass(frozen=True)
class Update:
    """An update that is due: gradients x scale (None: as they are), AdamW's step number from 1, base lr."""

    number: int
    optimizer_step: int
    lr: float
    scale: float | None


@dataclass
class Record:
    """What store.json holds.

    result: of the step; slots, updates: where each piece lies, how many it has had. identity: the store's, "" for one
    of 0.1.0; layout: the fingerprint of its layout, likewise; sums: piece → plane → CRC-32 of its bytes, where they
    were written since sums are kept; boundaries: the CRC-32 of the file of that name.
    """

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
    identity: str = ""
    layout: str = ""
    sums: dict[str, dict[str, int]] = field(default_factory=dict)
    boundaries: int | None = None

    @property
    def due(self) -> bool:
        """Whether a piece has not had the update yet."""
        return self.update is not None and any(n < self.update.number for n in self.updates.values())


def as_text(record: dict) -> str:
    """store.json of a record's fields."""
    body = {"format": FORMAT} | record
    return json.dumps(body | {DIGEST: _digest(body)})


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_record(directory: Path) -> Record | None:
    """The record of a store, or None where there is none. Raises CheckpointError when it cannot be understood."""
    path = directory / RECORD
    try:
        found = json.loads(regular_bytes(path))
        digest = found.pop(DIGEST, None)
        version = found["format"]
        if version not in (WITHOUT_SUMS, FORMAT):
            raise CheckpointError(f"{path}: expected format {WITHOUT_SUMS} or {FORMAT}, got {version}")
        if version == FORMAT and digest != _digest(found):
            raise CheckpointError(f"{path}: expected what has the {DIGEST} that is in it, the file is damaged")
        del found["format"]
        record = Record(**found)
        record.update = Update(**found["update"]) if found["update"] else None
        _expect_kinds(record)
    except FileNotFoundError:
        return None
    except RecursionError:
        raise CheckpointError(f"{path}: expected a store's record: it is nested too deep") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a store's record: {error}") from None
    return record


def _expect_kinds(record: Record) -> None:
    """Raise ValueError for a field of another kind: a record of format 1 has no digest."""
    numbers = [record.step, record.optimizer_step, *record.slots.values(), *record.updates.values()]
    if record.update is not None:
        numbers += [record.update.number, record.update.optimizer_step]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("expected steps, slots and updates as numbers from 0 on")
    texts = [record.owner, record.moments, record.gradients, record.identity, record.layout]
    if any(type(text) is not str for text in texts) or type(record.spilled) is not bool:
        raise ValueError("expected owner, moments and gradients as text, spilled as true or false")
    if record.update is not None:
        real = [record.update.lr] + ([] if record.update.scale is None else [record.update.scale])
        if any(type(n) not in (int, float) for n in real):
            raise ValueError("expected lr and scale as numbers")


@dataclass(frozen=True)
class Identity:
    """What store.id holds. filled: there is a record, or was one."""

    identity: str
    filled: bool


def new_identity() -> str:
    """A store's name for itself, at random."""
    return secrets.token_hex(8)


def read_identity(path: Path) -> Identity | None:
    """What a store.id says; None where there is none. Raises CheckpointError when it cannot be understood."""
    try:
        found = json.loads(regular_bytes(path))
        if found["format"] != IDENTITY_FORMAT:
            raise ValueError(f"expected format {IDENTITY_FORMAT}, got {found['format']}")
        identity = Identity(**{f.name: found[f.name] for f in fields(Identity)})
        if type(identity.identity) is not str or type(identity.filled) is not bool:
            raise ValueError("expected an identity, and whether the store is filled")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected the identity of the run's store: {error}") from None
    return identity


def write_identity(path: Path, identity: Identity) -> None:
    """Replace a store.id; returns when this will last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(json.dumps({"format": IDENTITY_FORMAT} | asdict(identity)), encoding="utf-8")


def expect_the_runs(directory: Path, record: Record | None, path: Path, known: Identity | None) -> None:
    """Raise CheckpointError where a run's store.id (`path`, which says `known`) means another store, or a lost one."""
    if record is None and known is not None and known.filled:
        raise CheckpointError(
            f"{directory / RECORD}: expected the record of the run's store, it is missing; restore it, or take {path} "
            f"away to begin again from the newest full checkpoint, or from the start"
        )
    if record is not None and known is not None and record.identity not in ("", known.identity):
        raise CheckpointError(
            f"{directory}: expected store {known.identity}, the run's own by {path}, got {record.identity}: another "
            f"run's"
        )
