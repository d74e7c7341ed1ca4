"""Checkpoints while training goes on, by all processes of a run.

A backend that gives copies of its state lets a thread write them. Each process writes the shards of what it holds and
a note of them beside; when all have (they meet after every step), process 0 seals the checkpoint. Until then it is
not there: a run that dies goes on from the one before.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from crystal import checkpoint
from crystal.backends.base import Backend, Durable, Part, Place
from crystal.errors import CheckpointError, ConfigError, CrystalError
from crystal.files import from_json, sync


class Saver:
    """Writes a run's checkpoints, at once or in the background, whichever its backend is made for."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.writing: _Writing | None = None
        self.seconds = 0.0  # that the last save took
        self.referred = isinstance(backend, Durable)  # there may be checkpoints that refer to the backend's store

    def save(self, directory: Path, state: dict, files: Iterable[Path], sealed: Callable[[], None]) -> None:
        """Write the backend's state; `sealed` is called, in process 0, when it is on the disk and whole.

        A save that is still being written is waited for. Raises CheckpointError when the disk does not take it.
        """
        began = time.perf_counter()
        store = self.backend.seal() if isinstance(self.backend, Durable) else None
        if not self.backend.place.background:
            self.referred = store is not None
            if self.backend.place.process == 0:
                if store is None:
                    checkpoint.write(directory, self.backend.state(), state, files)
                else:
                    checkpoint.refer(directory, store, state, files)
                sealed()
            self.seconds = time.perf_counter() - began
            return
        self.finish()

        def seal(shards: dict) -> None:
            checkpoint.seal(directory, shards, state, files)
            sealed()

        self.writing = _Writing(directory, list(self.backend.state()), self.backend.place, seal)

    def move_on(self, checkpoints: Path) -> None:
        """Take away what refers to the backend's store, which is about to change."""
        if self.referred and self.backend.place.process == 0:
            checkpoint.remove_references(checkpoints)
        self.referred = False

    def meet(self, signal: int = 0) -> int:
        """Meet the other processes, after a step: the signal that any of them was sent, or 0.

        A checkpoint that all have written is sealed. Raises CheckpointError, in all, when one of them could not write.
        """
        if self.writing is None:
            return self.backend.agree(signal)[0]
        unwritten, error = self.writing.thread.is_alive(), self.writing.error
        signal, unwritten, failed = self.backend.agree(signal, int(unwritten), int(error is not None))
        if failed:
            raise error or CheckpointError(f"{self.writing.directory}: another process cannot write its part")
        if not unwritten:
            self.writing.all_have_written()
            self.seconds = time.perf_counter() - self.writing.began
            self.writing = None
        return signal

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if one is, is sealed. All processes must call it."""
        if self.writing is not None:
            self.writing.thread.join()
            self.meet()


class _Writing:
    """One process' part of one checkpoint, on its way to the disk."""

    def __init__(
        self, directory: Path, tensors: list[tuple[str, Tensor | Part]], place: Place, seal: Callable[[dict], None]
    ):
        self.directory, self.place, self.seal = directory, place, seal
        self.began = time.perf_counter()
        self.error: ConfigError | None = None
        self.thread = threading.Thread(target=self._write, args=(tensors,), daemon=True)
        self.thread.start()

    def _note(self, process: int) -> Path:
        return checkpoint.aside_of(self.directory) / f"process-{process:05d}.json"

    def _write(self, tensors: list[tuple[str, Tensor | Part]]) -> None:
        try:
            shards = checkpoint.write_shards(self.directory, tensors, self.place.process)
            note = self._note(self.place.process)
            note.write_text(json.dumps(shards), encoding="utf-8")
            sync(note)
        except CrystalError as error:
            self.error = error
        except Exception as error:  # whatever it is, the run must hear of it
            self.error = CheckpointError(f"{self.directory}: the checkpoint cannot be written: {error}")

    def all_have_written(self) -> None:
        """In process 0, gather the notes and seal."""
        if self.place.process:
            return
        shards = {}
        for process in range(self.place.processes):
            note = self._note(process)
            shards |= from_json(note.read_text(encoding="utf-8"))
            note.unlink()
        self.seal(shards)
