"""What no limit of the kernel covers: the memory of all processes of a program together, and a plain folder's size."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LISTED = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def children(process: int) -> list[int]:
    """What each of its threads started; empty where it is gone. Kernels without such lists are asked about every
    process."""
    if not _LISTED:
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == process]
    try:
        lists = [f"/proc/{process}/task/{thread}/children" for thread in os.listdir(f"/proc/{process}/task")]
        return [int(pid) for path in lists for pid in Path(path).read_text().split()]
    except OSError:
        return []


def descendants(process: int) -> list[int]:
    """Its children, theirs, and so on."""
    found = children(process)
    for pid in found:
        found += children(pid)
    return found


def memory(processes: list[int], enough: int) -> int:
    """Resident bytes of all; shared pages count once, but only where the plain sum is above `enough`."""
    resident = sum(_resident(pid) for pid in processes)
    return resident if resident <= enough else sum(_proportional(pid) for pid in processes)


def disk(folder: str) -> float:
    """Bytes of the files in it; each counts for 4 KiB at least. Infinite where a folder in it hides what it holds."""
    total = 0.0
    try:
        for directory, folders, files in os.walk(folder, onerror=_shut):
            for name in (*folders, *files):
                with suppress(FileNotFoundError):
                    total += max(4096, os.lstat(os.path.join(directory, name)).st_blocks * 512)
    except PermissionError:
        return math.inf
    return total


def clear(folder: str) -> None:
    """Remove it, also what its programs, all dead by now, made unreadable."""
    for directory, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _shut(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise error


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return _resident(pid)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
