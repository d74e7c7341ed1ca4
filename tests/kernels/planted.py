"""Kernels with a known property or fault, which the counters and the C emitter must see."""

import triton
import triton.language as tl


@triton.jit
def hoards(X, Y, N: tl.constexpr):
    """Holds N numbers in registers until the last of four sweeps over the input is done."""
    i = tl.arange(0, N)
    total = tl.load(X + i)
    for k in range(4):
        total += tl.load(X + i + k * N) * tl.load(Y + i)
    tl.store(Y + i, total)


@triton.jit
def copies_rows_of_any_width(X, Y, N, BLOCK: tl.constexpr):
    """At width 1000, known at run time and no multiple of 16, Triton trusts no alignment."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(Y + row * N + i, tl.load(X + row * N + i, mask=i < N), mask=i < N)


@triton.jit
def copies_rows_of_one_width(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(Y + row * N + i, tl.load(X + row * N + i, mask=i < N), mask=i < N)


@triton.jit
def adds_in_any_order(X, Y, N: tl.constexpr):
    tl.atomic_add(Y + tl.arange(0, N), tl.load(X + tl.arange(0, N)))


@triton.jit
def in_double(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, (tl.load(X + i).to(tl.float64) * 1.1 + 0.3).to(tl.float32))


@triton.jit
def offset_in_32_bits(X, Y, step, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + tl.program_id(0) * step + i, tl.load(X + tl.program_id(0) * step + i))


@triton.jit
def offset_in_64_bits(X, Y, step, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(Y + row * step + i, tl.load(X + row * step + i))


@triton.jit
def reads_undefined_lanes(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + tl.program_id(0), tl.sum(tl.load(X + i, mask=i < N), axis=0))


@triton.jit
def in_bf16(A, B, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(A + i), tl.load(B + i)
    tl.store(Y + i, (a + b) * b)
