"""Runs the kernels themselves on CPU tensors of any size: TTIR → C → gcc -O3 -fopenmp → ctypes.

Inside `on_cpu()` a launch on CPU tensors goes through Triton's own frontend with the specialisation of the JIT, and
what comes out is translated, compiled once and called. Shared objects are cached, the C beside them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from crystal.kernels import dispatch
from crystal.kernels.gcc import build
from crystal.kernels.proof.offline import Launch, offline
from crystal.kernels.proof.ttir_c import to_c

_SCALARS = {
    "i1": ctypes.c_uint8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "f32": ctypes.c_float, "f64": ctypes.c_double,
}  # fmt: skip


@functools.lru_cache(maxsize=512)
def library(ttir: str, counting: bool = False) -> tuple[list, Any]:
    """(parameters, the C function `launch`) of a kernel."""
    parameters, source = to_c(ttir, counting)
    launch = build(source, "ttir-c").launch
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
