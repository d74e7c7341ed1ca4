"""The CRC-32 that stores are checked by is zlib's, by whichever way it is made."""

import ctypes
import random
import zlib
from pathlib import Path

import pytest

from crystal.kernels import crc32 as module
from crystal.kernels.crc32 import crc32
from crystal.kernels.gcc import build

SIZES = (0, 1, 63, 64, 255, 4095, 4096, 4097, 4160, 5000, 65536, 65600, 300_001)


@pytest.mark.parametrize("way", ["fastest", "fold_narrow", "fold_wide", "zlib"])
def test_it_is_zlibs_in_one_go_and_in_pieces(monkeypatch, way):
    if way != "fastest":
        monkeypatch.setattr(module, "_fold", lambda: None if way == "zlib" else _function(way))
    rng = random.Random(1)
    for size in SIZES:
        data = rng.randbytes(size)
        assert crc32(memoryview(data)) == zlib.crc32(data)
        cut = rng.randint(0, size)
        assert crc32(memoryview(data)[cut:], crc32(memoryview(data)[:cut])) == zlib.crc32(data)
        assert crc32(memoryview(b"x" + data)[1:]) == zlib.crc32(data)  # wherever it begins in memory


def _function(name):
    try:
        library = build(Path(module.__file__).with_name("crc32.c").read_text(), "native")
    except RuntimeError as error:
        pytest.skip(str(error))
    if library.can_fold() < {"fold_narrow": 1, "fold_wide": 2}[name]:
        pytest.skip(f"this processor has not what {name} takes")
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_char_p], None
    return function
