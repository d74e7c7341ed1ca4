"""Run under TRITON_INTERPRET=1: every operator's small shapes and the planted faults, a JSON line each.

python interpreted.py operators | faults
"""

import json
import sys

import torch
import triton
import triton.language as tl

from crystal.kernels.bench.peers import torch_functions
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.proof.accuracy import errors
from crystal.kernels.proof.interpreter import Sanitizer, repair


def operators() -> None:
    baselines = torch_functions()
    for operator in OPERATORS:
        for number, (name, shape) in enumerate(operator.shapes.items()):
            if not name.startswith("small"):
                continue
            dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
            with Sanitizer() as sanitizer:
                found = errors(operator, shape, dtype, baselines[operator.name])
            print(json.dumps({
                "operator": operator.name, "shape": name, "dtype": str(dtype), "findings": sanitizer.findings,
                "launched": sanitizer.launched, "errors": [error.record() for error in found],
            }))  # fmt: skip


@triton.jit
def outside(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i), mask=i < N)


@triton.jit
def same_element(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y, tl.sum(tl.load(X + i, mask=i < N, other=0.0), axis=0))


@triton.jit
def neighbour(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    tl.store(Y + p, tl.load(Y + p + 1))


@triton.jit
def lane_twice(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i // 2, tl.load(X + i // 2))


@triton.jit
def undefined(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + tl.program_id(0), tl.sum(tl.load(X + i, mask=i < N), axis=0))


@triton.jit
def misaligned(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    p = (X.to(tl.pointer_type(tl.uint8)) + 2).to(tl.pointer_type(tl.float32))
    tl.store(Y + tl.program_id(0), tl.load(p))


@triton.jit
def atomic(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    tl.atomic_add(Y, tl.load(X + tl.program_id(0)))


@triton.jit
def clean(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + tl.program_id(0), tl.sum(tl.load(X + i, mask=i < N, other=0.0), axis=0))


def faults() -> None:
    for kernel in (outside, same_element, neighbour, lane_twice, undefined, misaligned, atomic, clean):
        x, y = torch.ones(12), torch.zeros(16)
        with Sanitizer() as sanitizer:
            kernel[(2,)](x, y, N=12, BLOCK=16)
        print(json.dumps({"kernel": kernel.fn.__name__, "findings": sanitizer.findings, "nan": bool(y.isnan().any())}))


@triton.jit
def arithmetic(A, B, SUM, PRODUCT, LESS, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(A + i), tl.load(B + i)
    tl.store(SUM + i, a + b)
    tl.store(PRODUCT + i, a * b)
    tl.store(LESS + i, (a < b).to(tl.int32))


@triton.jit
def rounded(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


def rounding() -> None:
    """How many of random values are not as torch has them: casts from any bits of fp32, arithmetic on bfloat16."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator).int().view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        y = torch.empty_like(bits, dtype=dtype)
        rounded[(1,)](bits, y, N=bits.numel())
        wrong = (y != bits.to(dtype)) & ~(y.isnan() & bits.isnan())
        print(json.dumps({"case": f"cast to {dtype}", "wrong": int(wrong.sum())}))
    a, b = (torch.randn(4096, generator=generator).bfloat16() for _ in range(2))
    total, product, less = torch.empty_like(a), torch.empty_like(a), torch.empty(4096, dtype=torch.int32)
    arithmetic[(1,)](a, b, total, product, less, N=4096)
    for case, found, right in (("a + b", total, a + b), ("a * b", product, a * b), ("a < b", less, (a < b).int())):
        print(json.dumps({"case": case, "wrong": int((found != right).sum())}))


if __name__ == "__main__":
    if sys.argv[2:] != ["stock"]:
        repair()
    {"operators": operators, "faults": faults, "rounding": rounding}[sys.argv[1]]()
