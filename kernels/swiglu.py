"""SwiGLU's elementwise part: silu(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer", eq. 5 and 6).

One pass each way, every element read and written once: backward recomputes the sigmoid, which costs nothing
beside the memory, instead of reading a saved silu(gate), and gives both gradients from one reading.
    dup = dy silu(gate),   dgate = dy up s (1 + gate (1 - s)),   s = sigmoid(gate).
Contiguous gate and up are one run of numbers whatever the width, so that 16-byte accesses stay possible at
CrystalCoder's odd 10,922; only its last block is masked. A packed projection [..., 2 f] is walked by rows, its halves
one pointer and a constant, so that the compiler knows how far both are aligned (at 10,922, to 4 bytes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import crystal.kernels.native as native
from crystal.kernels.dispatch import differentiable, kernel, power_of_two, rows_of, unit, use_triton, widened

if TYPE_CHECKING:
    import triton.language as tl

RUN = 1024  # elements of a block of a run, 8 a thread


@kernel()
def gate_block(G, U, Y, at_g, at_u, at_y, mask):
    g = tl.load(G + at_g, mask=mask).to(tl.float32)
    u = tl.load(U + at_u, mask=mask).to(tl.float32)
    tl.store(Y + at_y, g * tl.sigmoid(g) * u, mask=mask)


@kernel()
def gate_block_backward(DY, G, U, DG, DU, at_dy, at_g, at_u, at_dg, at_du, mask):
    dy = tl.load(DY + at_dy, mask=mask).to(tl.float32)
    g = tl.load(G + at_g, mask=mask).to(tl.float32)
    u = tl.load(U + at_u, mask=mask).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(DG + at_dg, dy * u * s * (1.0 + g * (1.0 - s)), mask=mask)
    tl.store(DU + at_du, dy * g * s, mask=mask)


@kernel("N")
def swiglu_run(G, U, Y, N, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """y = silu(g) * u of N adjacent elements; EVEN: a whole number of blocks, none to mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if EVEN or start + BLOCK <= N:
        gate_block(G, U, Y, at, at, at, None)
    else:
        gate_block(G, U, Y, at, at, at, at < N)


@kernel("N")
def swiglu_run_backward(DY, G, U, DG, DU, N, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Both gradients of N adjacent elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if EVEN or start + BLOCK <= N:
        gate_block_backward(DY, G, U, DG, DU, at, at, at, at, at, None)
    else:
        gate_block_backward(DY, G, U, DG, DU, at, at, at, at, at, at < N)


@kernel("M")
def swiglu_rows(
    G, U, Y, M, g_step, u_step,
    N: tl.constexpr, UP: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = silu(g) * u of rows *_step * UNIT apart, ROWS x BLOCK elements a program. A row of u starts at its UP."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (rows < M) & (columns < N)
    at_u = rows * (u_step * UNIT) + UP + columns
    gate_block(G, U, Y, rows * (g_step * UNIT) + columns, at_u, rows * N + columns, mask)


@kernel("M")
def swiglu_rows_backward(
    DY, G, U, DG, DU, M, dy_step, g_step, u_step, d_step,
    N: tl.constexpr, UP: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both gradients, d_step * UNIT from row to row; rows of u and du start at UP."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (rows < M) & (columns < N)
    at_d = rows * (d_step * UNIT) + columns
    gate_block_backward(
        DY, G, U, DG, DU, rows * (dy_step * UNIT) + columns,
        rows * (g_step * UNIT) + columns, rows * (u_step * UNIT) + UP + columns, at_d, at_d + UP, mask,
    )  # fmt: skip


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The definition, op by op, in fp32 at least."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return (widened(gate) * torch.sigmoid(widened(gate)) * up).to(gate.dtype)


def _rows_tile(width: int) -> tuple[int, int]:
    block = min(power_of_two(width), 2048)
    return 2048 // block, block


def _forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) * up; without up, gate is the packed projection [..., 2 f]."""
    packed = up is None
    y = gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (1 + packed))
    if not use_triton(gate):
        gate, up = gate.chunk(2, -1) if packed else (gate, up)
        if not native.use_native(gate, up):
            return F.silu(gate) * up
        native.swiglu_forward(rows_of(gate), rows_of(up), y)
        return y
    if not packed and gate.is_contiguous() and up.is_contiguous():
        count = y.numel()
        swiglu_run[(-(-count // RUN),)](gate, up, y, count, EVEN=count % RUN == 0, BLOCK=RUN, num_warps=4)
        return y
    gate = rows_of(gate)
    up = gate if packed else rows_of(up)  # the same pointer, aligned, and a constant to add to it
    count, width = gate.shape[0], y.shape[-1]
    by = unit(gate.stride(0), up.stride(0))
    rows, block = _rows_tile(width)
    swiglu_rows[(-(-count // rows), -(-width // block))](
        gate, up, y, count, gate.stride(0) // by, up.stride(0) // by,
        N=width, UP=width if packed else 0, UNIT=by, ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dgate, dup), or (the packed projection's gradient, [0])."""
    packed = up is None
    dgate = gate.new_empty(gate.shape)
    dup = gate.new_empty(0 if packed else gate.shape)
    if not use_triton(gate):
        gate, up = gate.chunk(2, -1) if packed else (gate, up)
        to_gate, to_up = dgate.chunk(2, -1) if packed else (dgate, dup)
        if native.use_native(dy, gate, up):
            native.swiglu_backward(dy.contiguous(), *map(rows_of, (gate, up, to_gate, to_up)))
            return dgate, dup
        torch.mul(F.silu(gate), dy, out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        return dgate, dup
    if not packed and dy.is_contiguous() and gate.is_contiguous() and up.is_contiguous():
        count = dy.numel()
        swiglu_run_backward[(-(-count // RUN),)](
            dy, gate, up, dgate, dup, count, EVEN=count % RUN == 0, BLOCK=RUN, num_warps=4
        )
        return dgate, dup
    dy, gate = rows_of(dy), rows_of(gate)
    up = gate if packed else rows_of(up)
    count, width = dy.shape
    step = dgate.shape[-1]
    by = unit(dy.stride(0), gate.stride(0), up.stride(0), step)
    rows, block = _rows_tile(width)
    swiglu_rows_backward[(-(-count // rows), -(-width // block))](
        dy, gate, up, dgate, dgate if packed else dup, count,
        dy.stride(0) // by, gate.stride(0) // by, up.stride(0) // by, step // by,
        N=width, UP=width if packed else 0, UNIT=by, ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return dgate, dup


def _forward_shapes(gate, up):
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _backward_shapes(dy, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, backward, dy):
    gate, up = ctx.saved_tensors
    dgate, dup = backward(dy, gate, up)
    return dgate, None if up is None else dup


_swiglu = differentiable("swiglu", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, elementwise; or of the two halves of a packed projection gate [..., 2 f] without up.

    fp32, bf16 or fp16, on CPU also fp64; gate and up [..., f] of one shape and dtype. Returns [..., f] in that dtype.
    Raises ValueError for shapes or dtypes that differ, or a packed width that is odd.
    """
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"packed gate and up {list(gate.shape)}: expected an even last dimension")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device):
        raise ValueError(f"up {up.dtype} {list(up.shape)}: expected {gate.dtype} {list(gate.shape)} as gate")
    if use_triton(gate) or native.use_native(gate, up):
        return _swiglu(gate, up)
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up
