"""Files that last and files that are what they were: writes that are whole or not at all, locks, sha256."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from crystal.errors import ConfigError

RUN_LOCK = ".lock"  # the file that stands for a run directory, held by the process that trains in it


def cache_dir() -> Path:
    """Where fetched packages, corpora, tokenizers and stores live: $CRYSTAL_CACHE or ~/.cache/crystal."""
    return Path(os.environ.get("CRYSTAL_CACHE") or Path.home() / ".cache" / "crystal")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expect_new(path: Path, kind: str) -> None:
    """Raises ConfigError where a file or directory (`kind`) that a command is to make is there already."""
    if path.exists():
        raise ConfigError(f"{path}: expected a new {kind}, it is there already")


def sync(path: Path) -> None:
    """Force a file's content, or a directory's names after a rename, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A place beside `path` to make a file or a directory at, which becomes `path` when the block ends well.

    There is the old one or the new one, never a part, and nothing is left aside however the block ends. The place has
    the path's own suffix, for libraries that go by it. What is no ordinary file (/dev/null, a pipe) is written to
    itself. durable: forced to the disk before the rename and after it. shared: several processes may be at it; where
    one alone is, what it left when it was killed is written over by the next. Raises OSError.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}" if shared else f".tmp-{path.name}")
    _remove(aside)
    try:
        yield aside
        if durable:
            for made in (aside, *aside.rglob("*")) if aside.is_dir() else (aside,):
                sync(made)
        os.replace(aside, path)
    finally:
        _remove(aside)
    if durable:
        sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all, whoever else writes it (`replacing`). Raises OSError."""
    with replacing(path, shared=True) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a file, made if it is not there, as its only holder; whoever dies lets go of it.

    wait: until it is free. Raises BlockingIOError where somebody holds it and it is not to be waited for, and OSError.
    """
    import filelock

    lock = filelock.FileLock(path, thread_local=False)

    def not_waited_for() -> bool:
        """Somebody has it, and did not just look at it, or take the file away when done with it."""
        return not wait and is_locked(path)

    try:
        lock.acquire(-1 if wait else 1.0, poll_interval=0.01, cancel_check=not_waited_for)
    except filelock.Timeout:
        raise BlockingIOError(f"{path} is held") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether somebody holds it now; tried shared, for an instant, on a handle that cannot write."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
    except OSError:  # never locked, or a disk without locks
        pass
    return False
