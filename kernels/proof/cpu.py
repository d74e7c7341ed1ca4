"""Runs the kernels themselves on CPU tensors of any size: TTIR → C → gcc -O3 -fopenmp → ctypes.

Inside `on_cpu()` a launch on CPU tensors goes through Triton's own frontend with the specialisation of the JIT, and
what comes out is translated, compiled once and called. Shared objects lie in crystal's cache ($CRYSTAL_CACHE, else
~/.cache/crystal) under the hash of their source and of the compiler, the C beside them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crystal.kernels import dispatch
from crystal.kernels.proof.offline import Launch, offline
from crystal.kernels.proof.ttir_c import to_c

FLAGS = (
    "-O3 -march=native -fopenmp -fwrapv -fno-math-errno -fno-trapping-math -fno-signed-zeros -ffp-contract=fast "
    "-shared -fPIC -w"
).split()
_SCALARS = {
    "i1": ctypes.c_uint8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "f32": ctypes.c_float, "f64": ctypes.c_double,
}  # fmt: skip


def cache() -> Path:
    """Where compiled objects are kept."""
    root = os.environ.get("CRYSTAL_CACHE") or Path.home() / ".cache" / "crystal"
    return Path(root) / "ttir-c"


@functools.cache
def compiler() -> tuple[str, str]:
    """(gcc's path, its version and this processor). Raises RuntimeError, one line, where there is no gcc."""
    path = shutil.which("gcc")
    if path is None:
        raise RuntimeError("no gcc on PATH: the kernels' full-size CPU runs compile C with it (apt install gcc)")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    return path, version + "".join(cpu)


def build(source: str) -> ctypes.CDLL:
    """Compile C, once for all processes that share the cache."""
    gcc, version = compiler()
    name = hashlib.sha256("\n".join((source, version, *FLAGS)).encode()).hexdigest()[:24]
    target = cache() / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            text, made = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
            text.write_text(source)
            done = subprocess.run(
                [gcc, *FLAGS, str(text), "-o", str(made), "-lmvec", "-lm"], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"gcc: {done.stderr.splitlines()[0]}")
            text.replace(target.with_suffix(".c"))
            made.replace(target)
    return ctypes.CDLL(str(target))


@functools.lru_cache(maxsize=512)
def library(ttir: str, counting: bool = False) -> tuple[list, Any]:
    """(parameters, the C function `launch`) of a kernel."""
    parameters, source = to_c(ttir, counting)
    launch = build(source).launch
    kinds = [ctypes.c_void_p if kind.pointer else _SCALARS[kind.element] for _, kind in parameters]
    launch.argtypes = [*kinds, *[ctypes.c_int] * 3, *[ctypes.c_void_p] * (2 if counting else 1)]
    return parameters, launch


def run(launch: Launch, order: Tensor | None = None) -> None:
    """Execute one recorded launch on its CPU tensors, programs in this order (int64, flat ids, x fastest)."""
    parameters, function = library(launch.compiled.asm["ttir"])
    values = [launch.arguments[name[1:]] for name, _ in parameters]
    values = [v.data_ptr() if isinstance(v, Tensor) else v for v in values]
    function(*values, *launch.grid, None if order is None else order.data_ptr())


@contextlib.contextmanager
def on_cpu(arch: int = 80, shuffle: int | None = None) -> Iterator[list[Launch]]:
    """Inside, operators on CPU tensors run their Triton kernels, planned as for sm_{arch}.

    shuffle: a seed; every launch then runs its programs in another order, which must not change a bit.
    """

    def execute(launch: Launch) -> None:
        order = None
        if shuffle is not None:
            count = launch.grid[0] * launch.grid[1] * launch.grid[2]
            order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle))
        run(launch, order)

    with dispatch.forced("triton"), offline(arch, frontend=True, execute=execute) as log:
        yield log
