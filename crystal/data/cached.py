"""What is made once and kept: by one process at a time, beside its place, and found whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.errors import DataError
from crystal.files import cannot_write, discard, locked, sha256_of, sync, write_whole, writing
from crystal.output.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def only_one(path: Path, console: Console | None) -> Iterator[None]:
    """Hold a lock beside `path`; a process that dies lets go of it.

    What is there already can be read from a place that takes no lock (a read-only disk, another user's, a full one).
    Raises RunError where it is not there and its place cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            with Bar(console, f"waiting for another process, which makes {path.name}"):
                held.enter_context(locked(lock))
        except OSError as error:
            if not path.exists():
                raise cannot_write(path.parent, error) from None
        yield


@contextlib.contextmanager
def made_aside(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`: renamed to it when the block ends well, else removed. Raises RunError where
    the disk does not take it."""
    partial = directory.with_name(f".{directory.name}.partial")
    discard(partial)
    try:
        with writing(directory):
            partial.mkdir(parents=True)
            yield partial
            discard(directory)  # of a link the link alone
            partial.rename(directory)
            sync(directory.parent)
    finally:
        discard(partial)


def write_checksum(path: Path) -> None:
    """Keep a file's sha256 beside it, for `expect_checksum`."""
    with writing(path):
        write_whole(_checksum(path), sha256_of(path) + "\n")


def expect_checksum(path: Path) -> None:
    """Raise DataError where a file is not what it was. Those that 0.1.0 made have no checksum."""
    try:
        expected = _checksum(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return
    if (found := sha256_of(path)) != expected:
        message = f"{path}: expected sha256 {expected}, got {found}; delete it to have it made again"
        raise DataError(message, file=path)


def _checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
