"""zlib's CRC-32, at the speed of memory where gcc and the processor's carry-less multiplication are there.

It finds every change of up to 32 neighbouring bits, and any two changed bits that are less than 512 MB apart; of other
damage one in 2^32 is missed. It is no signature: whoever wants to can make other bytes of the same sum.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crystal.kernels.gcc import build

WORTH_IT = 1 << 12  # bytes; below, zlib is called and done
GRAIN = 64  # what is folded is a multiple of it


def crc32(data: memoryview, before: int = 0) -> int:
    """The CRC-32 of what had the sum `before`, and then `data`: `zlib.crc32`. The interpreter's lock is let go."""
    fold = _fold() if len(data) >= WORTH_IT else None
    if fold is None:
        return zlib.crc32(data, before)
    folded, rest = len(data) // GRAIN * GRAIN, ctypes.create_string_buffer(16)
    fold(np.frombuffer(data, np.uint8).ctypes.data, folded, before ^ 0xFFFFFFFF, rest)
    return zlib.crc32(data[folded:], zlib.crc32(rest.raw, 0xFFFFFFFF))


@functools.cache
def _fold() -> Callable | None:
    """The fastest of crc32.c's functions that this processor has; None where there is none, or no gcc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = build(Path(__file__).with_name("crc32.c").read_text(encoding="utf-8"), "native")
    except (RuntimeError, OSError):  # zlib's own is several times slower, and the same
        return None
    found = [None, library.fold_narrow, library.fold_wide][library.can_fold()]
    if found is not None:
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_char_p], None
    return found
