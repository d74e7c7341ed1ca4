"""Bytes between files and buffers, in the background: one thread that reads, one that writes, each in order.

Files are opened with O_DIRECT where the file system has it: what passes through does not push other things out of the
page cache, costs a twentieth of a CPU second a gigabyte, and the process's memory is its buffers and no more. Buffers
are allocated once: on a virtual machine the first touch of a gigabyte can cost seconds.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from crystal.errors import CheckpointError
from crystal.kernels import tuning

STRETCH = 32 << 20  # bytes a system call; the disk is at full speed from 8 MB on


class Buffer:
    """Memory in whole pages, seen as bytes by files and as tensors by everybody else."""

    def __init__(self, size: int):
        # private: Python's default is shared, to which huge pages are not given, and O_DIRECT on small ones reaches
        # half of the disk's speed on some machines
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE") and tuning.chosen("huge pages", "huge") == "huge":
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.size, self.bytes = size, memoryview(self.memory)
        torch.frombuffer(self.memory, dtype=torch.uint8).zero_()  # touched here, once

    def tensor(self, dtype: torch.dtype, start: int, numel: int) -> Tensor:
        """`numel` numbers from byte `start` on; to autograd no part of any other tensor here."""
        return torch.frombuffer(self.memory, dtype=dtype, count=numel, offset=start)


class File(Protocol):
    """Bytes at offsets: `pread` fills a buffer, `pwrite` empties one, `sync` makes what was written last."""

    def pread(self, offset: int, into: memoryview) -> None: ...

    def pwrite(self, offset: int, source: memoryview) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class DiskFile:
    """A file of fixed size. `direct` says whether the page cache is bypassed."""

    def __init__(self, path: Path, size: int, kind: Literal["make", "write", "read"] = "make"):
        """Open it: made if need be and brought to its size; there already and of this size; or that, to read only.

        Raises OSError, with nothing left behind, when the disk has no room for `size` bytes, and CheckpointError for a
        file that is to be there and is not, or has another size.
        """
        self.path = path
        made = not path.exists()
        flags = os.O_RDONLY if kind == "read" else os.O_RDWR
        if kind != "make":
            expect_size(path, size)
        self.cached = os.open(path, flags | (os.O_CREAT if kind == "make" else 0), 0o644)
        try:
            if kind == "make" and (held := os.fstat(self.cached).st_size) != size:
                if held > size:
                    os.ftruncate(self.cached, size)
                os.posix_fallocate(self.cached, 0, size)
        except OSError:
            os.close(self.cached)
            if made:
                path.unlink()
            raise
        try:
            self.fd = os.open(path, flags | os.O_DIRECT)
            self.direct = True
        except (OSError, AttributeError):  # tmpfs and some network file systems
            self.fd, self.direct = os.dup(self.cached), False

    def pread(self, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            got = os.preadv(self.fd, [into[done : done + STRETCH]], offset + done)
            if not got:
                raise OSError(f"{self.path}: expected bytes at {offset + done}, the file ends before")
            done += got

    def pwrite(self, offset: int, source: memoryview) -> None:
        done = 0
        while done < len(source):
            done += os.pwritev(self.fd, [source[done : done + STRETCH]], offset + done)

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.cached)


class MemoryFile:
    """The same in host memory."""

    direct = False

    def __init__(self, size: int):
        self.data = np.zeros(size, np.uint8)

    def pread(self, offset: int, into: memoryview) -> None:
        np.frombuffer(into, np.uint8)[:] = self.data[offset : offset + len(into)]

    def pwrite(self, offset: int, source: memoryview) -> None:
        self.data[offset : offset + len(source)] = np.frombuffer(source, np.uint8)

    def sync(self) -> None: ...

    def close(self) -> None: ...


def expect_size(path: Path, size: int) -> None:
    """Raise CheckpointError unless there is a file of this size."""
    held = path.stat().st_size if path.is_file() else None
    if held != size:
        found = "it is missing" if held is None else f"got {held:,}"
        raise CheckpointError(f"{path}: expected {size:,} bytes, as the record beside it says, {found}")


class Ticket:
    """A job that a thread will do; `wait` returns when it is done, or raises what went wrong."""

    def __init__(self) -> None:
        self._done, self._error = threading.Event(), None

    def finish(self, error: BaseException | None = None) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error


class Line:
    """A thread that does one job after the other, in the order they came."""

    def __init__(self, name: str):
        self.busy_s, self._jobs = 0.0, queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None], after: Ticket | None = None) -> Ticket:
        """Do `work`, once `after` (of another line) is done."""
        ticket = Ticket()
        self._jobs.put((work, after, ticket))
        return ticket

    def close(self, wait: bool = True) -> None:
        """Finish what is queued and end the thread; wait: until it has."""
        self._jobs.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(*job)
            del job  # what a thread that waits still knows of is never collected

    def _do(self, work: Callable[[], None], after: Ticket | None, ticket: Ticket) -> None:
        try:
            if after is not None:
                after.wait()
            since = time.perf_counter()
            work()
            self.busy_s += time.perf_counter() - since
            ticket.finish()
        except BaseException as error:  # told to whoever waits
            ticket.finish(error)
