"""Files that last and files that are what they were: writes that are whole or not at all, locks, sha256; and the one
line that is said where the machine does not let us write."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from crystal.errors import ConfigError, RunError

RUN_LOCK = ".lock"  # the file that stands for a run directory, held by the process that trains in it


def cache_dir() -> Path:
    """Where fetched packages, corpora, tokenizers and stores live: $CRYSTAL_CACHE or ~/.cache/crystal."""
    return Path(os.environ.get("CRYSTAL_CACHE") or Path.home() / ".cache" / "crystal")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces. Raises OSError as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(path: Path, error: OSError, what: str = "") -> RunError:
    """The one line for a file or directory that the machine does not let us write; to be raised.

    path: what was to be written, for an error that names nothing itself; what: the same in words ("the picture").
    """
    file = error.filename or path
    subject = f"{what} cannot" if what else "cannot"
    why = dangling(Path(file)) or reason(error)  # of a link to nowhere the system says "file exists"
    return RunError(f"{file}: {subject} be written: {why}", file=file)


def reason(error: Exception) -> str:
    """What the machine says, in its own words in lower case: "no space left on device"."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return said[:1].lower() + said[1:] if said[1:2].islower() else said


@contextlib.contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """A block that writes `path`, or files below it. Raises RunError (`cannot_write`) where the machine refuses."""
    try:
        yield
    except BlockingIOError:  # a lock that is held
        raise
    except OSError as error:
        raise cannot_write(path, error, what) from None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read, links followed. Raises OSError, also for a pipe or a device, which never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(number, "expected a file, it is a directory, a pipe or a device", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def expect_regular(path: Path) -> None:
    """Raise OSError where something stands in a file's place that is none: opening a pipe would wait for its reader."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "expected a file, it is a directory, a pipe or a device", str(path))


def regular_bytes(path: Path, most: int = 1 << 28) -> bytes:
    """A file's content. Raises OSError as `open_regular`, and where it has more than `most` bytes."""
    with open_regular(path) as file:
        large = os.fstat(file.fileno()).st_size > most  # of zeros that lie on no disk, perhaps
        content = b"" if large else file.read(most + 1)
    if large or len(content) > most:
        raise OSError(errno.EFBIG, f"expected at most {most:,} bytes", str(path))
    return content


def no_number(word: str) -> None:
    """For json's `parse_constant`: refuses NaN and the infinities, which Python reads and JSON does not know."""
    raise ValueError(f"{word} is no number")


def from_json(content: str | bytes, finite: bool = False) -> Any:
    """What a JSON text says. Raises ValueError for everything that is none, nesting too deep for Python included.

    finite: also for numbers that are none (`no_number`)."""
    try:
        return json.loads(content, parse_constant=no_number if finite else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
def alone_at(path: Path) -> Iterator[None]:
    """A block that makes `path` from what it has aside, which a second process would write into, and take away.

    Raises OSError where another process is in such a block, and where the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another process is writing it", str(path)) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # still held: whoever waits for it looks whether it is still there


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True, shared: bool = False, alone: bool = False) -> Iterator[Path]:
    """A place beside `path` to make a file or a directory at, which becomes `path` when the block ends well.

    There is the old one or the new one, never a part, and nothing is left aside however the block ends. The place has
    the path's own suffix, for libraries that go by it. What is no ordinary file (/dev/null, a pipe) is written to
    itself. durable: forced to the disk before the rename and after it. shared: several processes may be at it; where
    one alone is, what it left when it was killed is written over by the next. alone: another that is at it is refused
    (`alone_at`). Raises OSError, which names `path` where a write failed: the system's own names no file.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        with contextlib.ExitStack() as held:
            if path.is_fifo():  # held open while it is written; one that nobody reads is an error here, not a wait
                held.callback(os.close, os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            yield path
        return
    if alone:
        with alone_at(path), replacing(path, durable) as aside:
            yield aside
        return
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}" if shared else f".tmp-{path.name}")
    discard(aside)
    try:
        yield aside
        if durable:
            for made in (aside, *aside.rglob("*")) if aside.is_dir() else (aside,):
                sync(made)
        os.replace(aside, path)
    except OSError as error:
        raise _naming(path, aside, error) from None
    finally:
        discard(aside)
    if durable:
        sync(path.parent)


def _naming(path: Path, aside: Path, error: OSError) -> OSError:
    """The same error, which says that it was `path` that could not be written.

    Libraries raise some without a number, in words of their own ("24 requested and 0 written").
    """
    if error.errno is None:
        full = shutil.disk_usage(aside.parent).free < 1 << 20
        number = errno.ENOSPC if full else errno.EIO
        return OSError(number, os.strerror(number) if full else reason(error), str(path))
    if error.filename is None or str(error.filename) == str(aside):
        error.filename, error.filename2 = str(path), None
    return error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all, whoever else writes it (`replacing`). Raises OSError."""
    with replacing(path, shared=True) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def dangling(path: Path) -> str | None:
    """What to say of a link that leads nowhere, or in a circle; None where it is none."""
    if not path.is_symlink() or path.exists():
        return None
    return f"a link to {os.readlink(path)}, which does not exist"


def discard(path: Path) -> None:
    """Take away a file, a directory with all in it, or a link, never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a file, made if it is not there, as its only holder; whoever dies lets go of it.

    wait: until it is free. Its content is left as it is, and a link is never followed: somebody else's file would be
    made or held. Raises BlockingIOError where somebody holds it and it is not to be waited for, and OSError, also
    where a link, a directory, a pipe or a device stands in the lock's place.
    """
    import filelock

    _expect_lock_file(path)
    lock = filelock.FileLock(path, thread_local=False)  # opens with O_NOFOLLOW and without O_TRUNC

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


def _expect_lock_file(path: Path) -> None:
    """Raise OSError where something that cannot be our lock stands in its place."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        found = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        raise OSError(errno.ELOOP, f"expected a lock file, it is {found}; remove it", str(path))


def is_locked(path: Path) -> bool:
    """Whether somebody holds it now; tried shared, for an instant, on a handle that cannot write.

    What is no regular file is nobody's lock, and is not waited for as a pipe would be.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # never locked, a link, closed to us
        return False
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return False
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:  # a disk without locks
        pass
    finally:
        os.close(handle)
    return False
