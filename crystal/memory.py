"""How much memory a process has held, and what glibc does with what is free."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path


def peak_rss_bytes() -> int:
    """Most memory that was resident in this process at once.

    Not getrusage's where it can be helped: that also counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine_bytes() -> dict[str, int]:
    """What /proc/meminfo says of the machine (MemTotal, MemAvailable, …), in bytes; empty where there is none."""
    values = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            values[key] = int(rest.split()[0]) * 1024
    return values


def available_bytes() -> int | None:
    """What this process can still have: the machine's free memory, or less where its control group allows less.

    None where neither is to be found out.
    """
    free = machine_bytes().get("MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # those pages can go
        left = int((group / "memory.max").read_text()) - used
        free = left if free is None else min(free, left)
    return free


def release_heap() -> None:
    """Have glibc hand back what is free now, between tensors in use too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_heap() -> None:
    """Have glibc keep what is free for the next tensor, up to 32 MB each, its limit; larger ones go back at once.

    By default each tensor of a megabyte or more is mapped anew, and the first touch of its pages costs as much as half
    of the product that fills it.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 32 << 20)
