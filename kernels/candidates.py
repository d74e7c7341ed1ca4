"""What `measuring` times: the candidates of each choice, at sizes that stand for their class."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crystal.kernels import attention_native as native
from crystal.kernels import tuning
from crystal.kernels.attention import PATHS
from crystal.kernels.gcc import cache
from crystal.kernels.linear import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, names_of

ROWS = {128: 1024, 256: 512, 512: 512, 1024: 256}  # tokens of a product, at PACE or more
FEWEST = 128  # on a slower processor, which would measure for too long
PACE = 2e11  # FLOP/s
D_FF = 43 / 16  # LLaMA's feed-forward width, in widths: a product's larger side
VOCABULARY, CHUNK = 4096, 256  # words and tokens of the loss head's products
SMALL = 384  # both sides of a product that tells a processor's rates roughly
FASTER = 0.9  # bf16 is `auto` where its products take less than this of fp32's time: its rounding costs passes
SEQUENCE = 256  # tokens of a short one
READ = 16 << 20  # bytes from disk
HOPELESS = 2.5  # times the best: not timed again and again
_PRODUCTS = {"forward": FORWARD, "input_gradient": INPUT_GRADIENT, "weight_gradient": WEIGHT_GRADIENT}


def compile_kernels() -> None:
    """Have the C kernels compiled, or read from the cache: no part of what is timed."""
    native.available()


def cases() -> Iterator[tuple[str, float, tuning.Candidates]]:
    """(key, work of one call, candidates): FLOPs of products, bytes of memory."""
    rate = {dtype: _rate(dtype) for dtype in tuning.NAMES}
    pace = min(1.0, rate[torch.float32] / PACE)
    for dtype in tuning.NAMES:
        # without bf16 instructions a library's bf16 products take 5 to 20 times as long: not worth timing each
        hopeless = HOPELESS * rate[dtype] < rate[torch.float32]
        for size, rows in ROWS.items():
            rows, wide = max(FEWEST, int(pace * rows)), round(D_FF * size)
            for operation in _PRODUCTS:
                yield _product(operation, dtype, rows, size, wide, hopeless)
            yield _product("weight_gradient", dtype, rows, wide, size, hopeless)
        for size in tuning.HEADS:
            for operation in _PRODUCTS:
                yield _product(operation, dtype, max(FEWEST, int(pace * CHUNK)), size, VOCABULARY, hopeless)
        for d_head in tuning.HEAD_SIZES:
            yield _attention(dtype, SEQUENCE, d_head)
        yield _attention(dtype, 2 * tuning.LONG, 64)
    a = torch.ones(SMALL, SMALL, dtype=torch.bfloat16)
    yield "bf16 small", 2.0 * SMALL**3, {name: _call(FORWARD[name], a, a) for name in names_of(FORWARD, a.dtype)}
    with contextlib.suppress(OSError):  # a cache without room, or a file system that has no O_DIRECT
        yield "huge pages", READ, {"huge": _reading(huge=True), "plain": _reading(huge=False)}


def _rate(dtype: torch.dtype) -> float:
    """FLOP/s of torch's product of two small matrices."""
    a = torch.ones(SMALL, SMALL, dtype=dtype)
    a @ a
    return max(2 * SMALL**3 / seconds_of(lambda: a @ a, 1) for _ in range(3))


def seconds_of(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call, over several made one after another."""
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begun) / calls


def faster_dtype(found: dict[str, tuning.Case]) -> str:
    """The dtype whose products, each by its fastest candidate, take less time for the same work."""
    seconds = dict.fromkeys(tuning.DTYPES, 0.0)
    for key, case in found.items():
        dtype, _, what = key.partition(" ")
        if dtype in seconds and what.startswith(tuple(_PRODUCTS)):
            seconds[dtype] += 1 / case.rates[case.chosen]
    return "bf16" if seconds["bf16"] < FASTER * seconds["fp32"] else "fp32"


def _product(
    operation: str, dtype: torch.dtype, rows: int, features_in: int, features_out: int, hopeless: bool
) -> tuple[str, float, tuning.Candidates]:
    x_NI, weight_OI, dy_NO = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for shape in ((rows, features_in), (features_out, features_in), (rows, features_out))
    )
    of = {"forward": (x_NI, weight_OI), "input_gradient": (dy_NO, weight_OI), "weight_gradient": (dy_NO, x_NI)}
    candidates = _PRODUCTS[operation]
    names = [name for name in names_of(candidates, dtype) if not hopeless or name.startswith("widened")]
    calls = {name: _call(candidates[name], *of[operation]) for name in names}
    key = tuning.product_key(operation, dtype, features_in, features_out)
    return key, 2.0 * rows * features_in * features_out, calls


def _attention(dtype: torch.dtype, tokens: int, d_head: int) -> tuple[str, float, tuning.Candidates]:
    """Forward and backward of as many heads as two threads can share."""
    heads = 2 * max(1, SEQUENCE // tokens * 4)
    q, k, v, dy = torch.randn(4, 1, heads, tokens, d_head, generator=torch.Generator().manual_seed(0)).to(dtype)
    can = {"native": native.available(), "kept": tokens <= tuning.LONG}

    def both(path: Callable[..., Tensor]) -> Callable[[], None]:
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def call() -> None:
            with torch.enable_grad():
                torch.autograd.grad(path(*leaves, d_head**-0.5), leaves, dy)

        return call

    # two products forward and four backward, over the half that the causal mask leaves
    work = 6.0 * heads * tokens * tokens * d_head
    calls = {name: both(path) for name, path in PATHS.items() if can.get(name, True)}
    return tuning.attention_key(dtype, tokens, d_head), work, calls


def _call(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Tensor]:
    return lambda: function(*tensors)


def _reading(huge: bool) -> Callable[[], None]:
    """Read a file past the page cache into memory with huge pages, or without: what weight streaming does all day."""
    memory = mmap.mmap(-1, READ, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    folder = cache("tuning")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        descriptor = os.open(file.name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        os.pwritev(descriptor, [memory], 0)
    os.fsync(descriptor)
    return lambda: os.preadv(descriptor, [memory], 0)
