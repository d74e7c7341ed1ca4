"""Reading a store that a checkpoint refers to: nothing is written, nothing is locked, and it is one step or an error.

A run may train in the store meanwhile. Its record says where each piece of the step lies, and a slot is written over
only after a newer record is on the disk: when the record is still the same after a piece was read, what was read is of
that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from crystal.backends.weight_streaming.checksums import note_unchecked
from crystal.backends.weight_streaming.record import Record, read_record
from crystal.backends.weight_streaming.store import Store
from crystal.errors import CheckpointError, ConfigError
from crystal.mup.plan import Plan

POSITION = ("identity", "step", "optimizer_step", "update", "slots", "updates", "sums")  # of the record's fields


def sealed_tensors(
    directory: Path, plan: Plan, step: int, kind: str, identity: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a kind out of the store in `directory`, which a checkpoint of `step` refers to.

    identity: of the store that it refers to, where it says so. Raises CheckpointError when the store is gone, another,
    damaged, has moved on, moves on meanwhile, or stands in the middle of an update.
    """
    record = read_record(directory)
    if record is None:
        raise CheckpointError(f"{directory}: expected the store that holds step {step}, none is there")
    expect_identity(directory, record, identity)
    if record.step != step or record.due:
        raise CheckpointError(
            f"{directory}: expected the store at step {step}, it is {'in the update of' if record.due else 'at'} step "
            f"{record.step}; `crystal train` goes on from there"
        )
    try:
        gradients = getattr(torch, record.gradients)
        store = Store(plan, directory, record.moments, gradients, record.owner, record.spilled, reads_only=True)
        store.open()
    except (ConfigError, KeyError, AttributeError) as error:
        _expect_still(directory, record)
        raise CheckpointError(f"{directory}: expected the store of this checkpoint's model: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{directory}: the store cannot be read: {error}") from None
    try:
        for tensors in _pieces(store, kind, record):
            yield from tensors
    finally:
        store.close()


def _pieces(store: Store, kind: str, record: Record) -> Iterator[list[tuple[str, Tensor]]]:
    """Each piece's tensors, once it is known that they are of the record's step."""
    pieces = store.pieces(kind, record.optimizer_step == 0)
    while True:
        try:
            tensors = next(pieces, None)
        except CheckpointError:
            _expect_still(store.directory, record)
            raise
        except OSError as error:
            _expect_still(store.directory, record)
            raise CheckpointError(f"{store.directory}: the store cannot be read: {error}") from None
        if tensors is None:
            return
        _expect_still(store.directory, record)
        if store.sums.unchecked:
            note_unchecked(store.directory)
        yield list(tensors.items())


def _expect_still(directory: Path, record: Record) -> None:
    """Raise CheckpointError where a store's record is no longer this one."""
    now = read_record(directory)
    if now is not None and all(getattr(now, key) == getattr(record, key) for key in POSITION):
        return
    moved = "is being filled anew" if now is None else f"moved on to step {now.step}"
    raise CheckpointError(
        f"{directory}: a run trains in this store: it {moved} while step {record.step} was read; read it when the run "
        f"has stopped, or set backend.full_checkpoints=true"
    )


def expect_identity(directory: Path, record: Record, identity: str | None) -> None:
    """Raise CheckpointError where a checkpoint refers to another store than the one that is there."""
    if identity and record.identity and record.identity != identity:
        raise CheckpointError(
            f"{directory}: expected store {identity}, which the checkpoint refers to, got {record.identity}: another "
            f"run's"
        )
