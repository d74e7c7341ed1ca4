"""How many bytes a launch moves, counted exactly: which 32-byte sectors of which tensor it reads and writes.

The kernel's own address arithmetic runs for the whole grid (see `ttir_c`), on tensors that need not exist. A sector
read by many programs of one launch counts once, as if the caches were perfect; what a later launch reads again
counts again, and so do partial sums on their way. `asked` counts every request of every program instead: what the
caches have to serve. Accesses outside a tensor's storage, or not aligned to their size, are found on the way.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from crystal.kernels.proof.cpu import library
from crystal.kernels.proof.offline import Launch

SECTOR = 32


@dataclass
class Traffic:
    """Bytes of one launch."""

    read: int
    written: int
    asked_read: int
    asked_written: int
    outside: bool
    misaligned: bool


class _Extent(ctypes.Structure):
    _fields_ = [
        ("read", ctypes.c_void_p), ("written", ctypes.c_void_p), ("start", ctypes.c_uint64), ("bytes", ctypes.c_uint64)
    ]  # fmt: skip


def traffic(launch: Launch) -> Traffic:
    """Count a recorded launch. Raises ttir.Unsupported for a kernel that cannot be translated."""
    parameters, function = library(launch.compiled.asm["ttir"], counting=True)
    storages: dict[int, tuple[int, np.ndarray, np.ndarray, int]] = {}
    values, extents = [], (_Extent * max(len(parameters), 1))()
    for number, (name, kind) in enumerate(parameters):
        value = launch.arguments[name[1:]]
        if not kind.pointer:
            values.append(value)
            continue
        start = 0
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage._cdata not in storages:
                size = storage.nbytes()
                maps = (np.zeros(size // SECTOR + 1, np.uint8) for _ in range(2))
                storages[storage._cdata] = (len(storages) + 1 << 44, *maps, size)
            start, read, written, size = storages[storage._cdata]
            extents[number] = _Extent(read.ctypes.data, written.ctypes.data, start, size)
            start += value.storage_offset() * value.element_size()
        values.append(start)
    result = (ctypes.c_int64 * 4)()
    function(*values, *launch.grid, ctypes.addressof(extents), ctypes.addressof(result))
    read, written = (SECTOR * sum(int(s[k].sum()) for s in storages.values()) for k in (1, 2))
    return Traffic(read, written, result[0], result[1], bool(result[2]), bool(result[3]))
