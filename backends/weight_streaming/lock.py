"""One process trains in a store. The lock is the process's: it ends with it, or with the last of its own users."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crystal.errors import RunError
from crystal.files import is_locked, locked, reason

LOCK = ".store.lock"  # no run's: a store may lie in a run directory itself


@dataclass
class _Hold:
    lock: contextlib.ExitStack
    users: int = 0


_holds: dict[Path, _Hold] = {}
_guard = threading.RLock()  # a collected store lets go of its lock in whatever thread


def hold(directory: Path) -> Callable[[], None]:
    """Hold a directory that is there; what to call to let go. Raises RunError where another process holds it."""
    directory = directory.resolve()
    with _guard:
        if directory not in _holds:
            lock = contextlib.ExitStack()
            try:
                lock.enter_context(locked(directory / LOCK, wait=False))
            except BlockingIOError:
                raise _held(directory) from None
            except OSError as error:
                raise RunError(f"{error.filename or directory}: cannot be locked: {reason(error)}") from None
            _holds[directory] = _Hold(lock)
        _holds[directory].users += 1

    def let_go() -> None:
        with _guard:
            found = _holds[directory]
            found.users -= 1
            if not found.users:
                del _holds[directory]
                found.lock.close()

    return let_go


def expect_free(directory: Path) -> None:
    """Raise RunError where another process holds a directory, which need not be there; nothing is made."""
    if directory.resolve() not in _holds and is_locked(directory / LOCK):
        raise _held(directory)


def _held(directory: Path) -> RunError:
    return RunError(f"{directory}: another process is training in this store; wait for it, or set another backend.path")
