"""Compiled objects lie in one cache outside the checkout; large tensors come from the heap, whose pages are kept."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@pytest.fixture(scope="module", autouse=True)
def _keep_pages():
    """Half the time of a proof at [4096, 4096] is the kernel's zeroing of pages that were given back a moment ago.

    They are given back at the end of a file.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        yield
        libc.malloc_trim(0)
    else:
        yield


@pytest.fixture(scope="session")
def interpreted():
    """interpreted(what, script=...) → the JSON lines of a script beside this, in a process with the interpreter."""

    def run(*arguments: str, script: str = "interpreted.py") -> list[dict]:
        done = subprocess.run(
            [sys.executable, Path(__file__).parent / script, *arguments],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
