"""Triton's interpreter, made to compute as a GPU does, and a sanitizer for every access it makes.

The interpreter runs a kernel's Python on numpy, program after program. Triton must be imported with
TRITON_INTERPRET=1, so this is for processes of their own, and a program costs milliseconds, so it is for small
shapes. As it comes (3.7 to 3.9), it truncates where bfloat16 should round, computes and compares bfloat16 as if it
were an integer, and fills lanes that a load leaves undefined with zeros; `repair` mends all three.

`Sanitizer` watches what is launched inside it. What it reports is what compute-sanitizer reports on a GPU (memcheck,
racecheck, misaligned addresses), but between programs, for global memory, in any order of programs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder, Executor = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter.GridExecutor
FLOATS = {np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum, np.fmax, np.fmin}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to nearest even, as the 16 bits of a bfloat16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded).reshape(np.shape(x))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 value of a bfloat16's 16 bits."""
    wide = np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def _poison(shape: tuple[int, ...], dtype: np.dtype, element: tl.dtype) -> np.ndarray:
    """What lanes outside the mask of a load without `other` hold: NaN, or integers that lead nowhere."""
    if element == tl.bfloat16:
        return np.full(shape, 0x7FC1, dtype)
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max // 3, dtype)


def repair() -> None:
    """Mend this process's interpreter, once."""
    binary, masked_load = Builder.binary_op, Builder.create_masked_load
    convert, implicit = interpreter._convert_float, interpreter._implicit_cvt

    def convert_float(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return from_bf16(data).view(np.uint32)
        return convert(data, source, target, rounding)

    def binary_op(self, a, b, op):
        if a.dtype.scalar == tl.bfloat16 and op in FLOATS | COMPARISONS:
            result = op(from_bf16(a.data), from_bf16(b.data))
            return Handle(result, tl.int1) if op in COMPARISONS else Handle(to_bf16(result), tl.bfloat16)
        return binary(self, a, b, op)

    def load(self, pointers, mask, other, *how):
        if other is None:
            element = pointers.get_element_ty()
            dtype = np.dtype(interpreter._get_np_dtype(element))
            other = Handle(_poison(pointers.data.shape, dtype, element), element)
        return masked_load(self, pointers, mask, other, *how)

    def implicit_cvt(argument):  # a float scalar is fp32 on a GPU, not Python's 64 bits
        if isinstance(argument, float):
            return tl.tensor(Handle(np.array([argument], np.float32), tl.float32), tl.float32)
        return implicit(argument)

    interpreter._convert_float, interpreter._implicit_cvt = convert_float, implicit_cvt
    Builder.binary_op, Builder.create_masked_load = binary_op, load


@dataclass
class _Storage:
    """Memory of a launch's tensors: for every byte which program of this launch wrote and read it last."""

    names: str
    size: int
    writer: np.ndarray  # NOBODY, or a program's number
    reader: np.ndarray  # also SEVERAL


NOBODY, SEVERAL = -1, -2


@dataclass
class Sanitizer:
    """Use as a context; `findings` counts what was found, "memcheck: ...", "racecheck: ..." and so on."""

    findings: Counter[str] = field(default_factory=Counter)
    launched: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Sanitizer:
        self.storages: dict[int, _Storage] = {}
        self.kernel, self.program = "", 0
        self.before = (
            Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw,
            Builder.create_atomic_cas, Builder.set_grid_idx, Executor.__call__,
        )  # fmt: skip
        load, store, rmw, cas, set_index, call = self.before
        watch = self

        def watched_load(self, pointers, mask, *rest):
            return load(self, pointers, watch.access(pointers, mask, writes=False), *rest)

        def watched_store(self, pointers, value, mask, *rest):
            return store(self, pointers, value, watch.access(pointers, mask, writes=True), *rest)

        def atomic(original):
            def watched(self, *rest):
                watch.found("atomic: the order of additions is not fixed")
                return original(self, *rest)

            return watched

        def watched_index(self, x, y, z):
            watch.program = x + self.grid_dim[0] * (y + self.grid_dim[1] * z)
            return set_index(self, x, y, z)

        def watched_call(self, *arguments, **named):
            watch.kernel = self.fn.__name__
            watch.launched[watch.kernel] += 1
            watch.storages = {}
            for name, value in [*zip(self.arg_names, arguments, strict=False), *named.items()]:
                if isinstance(value, torch.Tensor):
                    watch.register(name, value)
            return call(self, *arguments, **named)

        Builder.create_masked_load, Builder.create_masked_store = watched_load, watched_store
        Builder.create_atomic_rmw, Builder.create_atomic_cas = atomic(rmw), atomic(cas)
        Builder.set_grid_idx, Executor.__call__ = watched_index, watched_call
        return self

    def __exit__(self, *_) -> None:
        (
            Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw,
            Builder.create_atomic_cas, Builder.set_grid_idx, Executor.__call__,
        ) = self.before  # fmt: skip

    def found(self, what: str) -> None:
        self.findings[f"{what} ({self.kernel})"] += 1

    def register(self, name: str, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        known = self.storages.get(storage.data_ptr())
        if known is not None:
            known.names += f", {name}"
            return
        size = storage.nbytes()
        owners = (np.full(size, NOBODY, np.int32) for _ in range(2))
        self.storages[storage.data_ptr()] = _Storage(name, size, *owners)

    def access(self, pointers: Handle, mask: Handle, writes: bool) -> Handle:
        """Note what a load or store touches. Returns its mask, or one of nothing if it would leave every tensor."""
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        at = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64).ravel()
        if not at.size:
            return mask
        verb = "store" if writes else "load"
        if (at % size).any():
            self.found(f"misaligned: {verb} of {size} bytes")
        low, high = int(at.min()), int(at.max()) + size
        inside = [(b, s) for b, s in self.storages.items() if b <= low and high <= b + s.size]
        if not inside:
            self.found(f"memcheck: {verb} outside every tensor of the launch")
            return Handle(np.zeros_like(mask.data), mask.dtype)
        start, storage = inside[0]
        touched = ((at - start)[:, None] + np.arange(size)).ravel()
        if writes:
            if np.unique(at).size != at.size:
                self.found(f"racecheck: one store writes an element of {storage.names} twice")
            self.compare(storage.writer[touched], f"two programs write the same element of {storage.names}")
            self.compare(storage.reader[touched], f"a program writes what another reads of {storage.names}")
            storage.writer[touched] = self.program
        else:
            self.compare(storage.writer[touched], f"a program reads what another writes of {storage.names}")
            known = storage.reader[touched]
            alone = (known == NOBODY) | (known == self.program)
            storage.reader[touched] = np.where(alone, self.program, SEVERAL)
        return mask

    def compare(self, owner: np.ndarray, what: str) -> None:
        if ((owner != NOBODY) & (owner != self.program)).any():
            self.found(f"racecheck: {what}")
