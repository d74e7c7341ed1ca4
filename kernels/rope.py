"""Rotary position embedding on the first `rotary_dim` dimensions of each head, in both pairings that are in use.

`half`: dimension i turns with i + rotary_dim/2 (GPT-NeoX, LLaMA in Hugging Face form).
`interleaved`: dimension 2i turns with 2i + 1 (GPT-J; CrystalCoder).
Both turn pair i at position t by the angle t * base^(-2i/rotary_dim) (RoFormer, Su et al. 2021, eq. 15).

One launch turns q and k, or the q and k heads of a packed q/k/v. A program holds some tokens of some heads, reads
their cosines once for all these heads, and every pair is read and written by one program. In place nothing but the
rotary dimensions of turning heads is touched: a quarter of the bytes for CrystalCoder's 32 of 128. The gradient is
the turn by the opposite angle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import crystal.kernels.native as native
from crystal.kernels.dispatch import (
    differentiable,
    eager_cpu,
    kernel,
    power_of_two,
    unit,
    use_triton,
    widened,
)

if TYPE_CHECKING:
    import triton.language as tl

STYLES = ("interleaved", "half")
LAYOUTS = {"bhsd": 2, "bshd": 1}  # where the sequence is
PAIRS_OF_A_PROGRAM = 1024  # 8 a thread


@kernel()
def turn_block(
    X, Y, at_x, at_y, live, turns, cos, sin,
    D: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr, TAIL: tl.constexpr, ALL: tl.constexpr,
    INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Turn BT x BH heads whose first elements lie at X + at_x; unless in place, copy what does not turn."""
    if INTERLEAVED:
        lane = tl.arange(0, 2 * LANES)[None, None, :]
        mask = live & (lane < 2 * PAIRS)
        x = tl.load(X + at_x + lane, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BT, BH, LANES, 2)))
    else:
        lane = tl.arange(0, LANES)[None, None, :]
        mask = live & (lane < PAIRS)
        a = tl.load(X + at_x + lane, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(X + at_x + PAIRS + lane, mask=mask, other=0.0).to(tl.float32)
    new_a = a * cos - b * sin
    new_b = b * cos + a * sin
    if not ALL:
        new_a = tl.where(turns, new_a, a)
        new_b = tl.where(turns, new_b, b)
    if INTERLEAVED:
        tl.store(Y + at_y + lane, tl.reshape(tl.join(new_a, new_b), (BT, BH, 2 * LANES)), mask=mask)
    else:
        tl.store(Y + at_y + lane, new_a, mask=mask)
        tl.store(Y + at_y + PAIRS + lane, new_b, mask=mask)
    if not INPLACE and TAIL > 0:
        rest = 2 * PAIRS + tl.arange(0, TAIL)[None, None, :]
        mask = live & (rest < D)
        tl.store(Y + at_y + rest, tl.load(X + at_x + rest, mask=mask), mask=mask)


@kernel(*"S T seq_blocks q_b q_s q_h qo_b qo_s qo_h k_b k_s k_h ko_b ko_s ko_h p_b".split())
def rope_turn(
    Q, K, QO, KO, COS, SIN, POSITIONS, S, T, seq_blocks,
    q_b, q_s, q_h, qo_b, qo_s, qo_h, k_b, k_s, k_h, ko_b, ko_s, ko_h, p_b,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, TURNED: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    LANES: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr,
    BACK: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Programs (batch x block of BT tokens, block of BH heads): first q's blocks of heads, then k's.

    The first TURNED heads of q turn and all of k; positions beyond the table's T turn to nan. *_b, *_s, *_h are
    the strides of batch, sequence and heads in UNITs.
    """
    batch = (tl.program_id(0) // seq_blocks).to(tl.int64)
    s = (tl.program_id(0) % seq_blocks).to(tl.int64) * BT + tl.arange(0, BT)
    here = s < S
    position = s
    if POSITIONS is not None:
        position = tl.load(POSITIONS + batch * p_b + s, mask=here, other=0).to(tl.int64)
    pair = tl.arange(0, LANES)
    in_table = (here & (position >= 0) & (position < T))[:, None] & (pair < PAIRS)[None, :]
    at = position[:, None] * PAIRS + pair[None, :]
    cos = tl.load(COS + at, mask=in_table, other=float("nan")).to(tl.float32)[:, None, :]
    sin = tl.load(SIN + at, mask=in_table, other=float("nan")).to(tl.float32)[:, None, :]
    if BACK:
        sin = -sin
    t = s[:, None, None]
    block = tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BH - 1) // BH
    if block < Q_BLOCKS:
        h = (block.to(tl.int64) * BH + tl.arange(0, BH))[None, :, None]
        at_x = (batch * q_b + t * q_s + h * q_h) * UNIT
        at_y = (batch * qo_b + t * qo_s + h * qo_h) * UNIT
        turn_block(
            Q, QO, at_x, at_y, here[:, None, None] & (h < Q_HEADS), h < TURNED, cos, sin,
            D, PAIRS, LANES, TAIL, TURNED >= Q_HEADS, INTERLEAVED, INPLACE, BT, BH,
        )  # fmt: skip
    elif K is not None:
        h = ((block - Q_BLOCKS).to(tl.int64) * BH + tl.arange(0, BH))[None, :, None]
        at_x = (batch * k_b + t * k_s + h * k_h) * UNIT
        at_y = (batch * ko_b + t * ko_s + h * ko_h) * UNIT
        turn_block(
            K, KO, at_x, at_y, here[:, None, None] & (h < K_HEADS), h < K_HEADS, cos, sin,
            D, PAIRS, LANES, TAIL, True, INTERLEAVED, INPLACE, BT, BH,
        )  # fmt: skip


def rope_table(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle, fp32 [T, rotary_dim/2], for integer positions [T].

    Frequencies and angles stay in fp32: bf16 angles are off by whole turns from a few hundred positions on.
    Frequencies are rounded as 1 / base^(2i/d), the published order of operations in both families: at position
    2,000 the other order is off by 6e-5, which logits show.
    """
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device)
    angle_TP = positions.float()[:, None] * (1.0 / base ** (pair / rotary_dim))
    return angle_TP.cos(), angle_TP.sin()


def _tables(cos: Tensor, sin: Tensor, positions: Tensor | None, seq_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin that broadcast against [B, H, S, P] or [B, S, H, P]."""
    if positions is not None:
        cos, sin = _rows(cos, positions), _rows(sin, positions)
    head_dim = -3 if seq_dim == 2 else -2
    if cos.dim() == 2:
        return (cos, sin) if seq_dim == 2 else (cos.unsqueeze(-2), sin.unsqueeze(-2))
    return cos.unsqueeze(head_dim), sin.unsqueeze(head_dim)


def _reference(x, cos, sin, turned: int, interleaved: bool, seq_dim: int) -> Tensor:
    """The definition of one tensor's turn, op by op, in fp32 at least."""
    rotary_dim, head_dim = 2 * cos.shape[-1], 3 - seq_dim
    others = x.shape[head_dim] - turned
    whole = x.narrow(head_dim, 0, turned) if others else x  # never an empty tensor: Cerebras' graphs know none
    turning, tail = widened(whole[..., :rotary_dim]), whole[..., rotary_dim:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    out = out.to(x.dtype) if tail.shape[-1] == 0 else torch.cat((out.to(x.dtype), tail), -1)
    return torch.cat((out, x.narrow(head_dim, turned, others)), head_dim) if others else out


def _turn_by_torch(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, turned: int, interleaved: bool, seq_dim: int):
    """Turn x into y, which may be x: a third faster on a CPU than the definition's slices and joins."""
    pairs, others = cos.shape[-1], x.shape[3 - seq_dim] - turned
    if y is not x:
        y[..., 2 * pairs :] = x[..., 2 * pairs :]
        y.narrow(3 - seq_dim, turned, others).copy_(x.narrow(3 - seq_dim, turned, others))
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    x, y = x.narrow(3 - seq_dim, 0, turned), y.narrow(3 - seq_dim, 0, turned)
    a, b = widened(x[..., first]), widened(x[..., second])
    new_a = (a * cos).addcmul_(b, sin, value=-1)
    y[..., second] = (b * cos).addcmul_(a, sin)
    y[..., first] = new_a


def _launch(q, k, q_out, k_out, cos, sin, positions, turned: int, interleaved: bool, seq_dim: int, back: bool) -> None:
    """One launch over q [B, H, S, D] and, if given, k; q_out is q where they turn in place."""
    inplace, head_dim = q_out is q, 3 - seq_dim
    batch, length, width = q.shape[0], q.shape[seq_dim], q.shape[3]
    pairs = cos.shape[-1]
    lanes = power_of_two(pairs)
    block_heads = min(power_of_two(q.shape[head_dim]), 16)
    block_tokens = max(PAIRS_OF_A_PROGRAM // (lanes * block_heads), 1)
    seq_blocks = -(-length // block_tokens)
    q_heads, k_heads = turned if inplace else q.shape[head_dim], 0 if k is None else k.shape[head_dim]
    strides = [
        stride
        for x in ((q, q_out) if k is None else (q, q_out, k, k_out))
        for stride in (x.stride(0), x.stride(seq_dim), x.stride(head_dim))
    ]
    by = unit(*strides)
    strides = [stride // by for stride in strides] + [0] * (12 - len(strides))
    rope_turn[(batch * seq_blocks, -(-q_heads // block_heads) + -(-k_heads // block_heads))](
        q, k, q_out, k_out, cos, sin, positions, length, cos.shape[0], seq_blocks, *strides,
        positions.stride(0) if positions is not None and positions.dim() == 2 else 0,
        Q_HEADS=q_heads, K_HEADS=k_heads, TURNED=turned, D=width, PAIRS=pairs, LANES=lanes,
        TAIL=power_of_two(width - 2 * pairs) if width > 2 * pairs else 0, UNIT=by, INTERLEAVED=interleaved,
        INPLACE=inplace, BACK=back, BT=block_tokens, BH=block_heads, num_warps=4,
    )  # fmt: skip


def _run(q, k, q_out, k_out, cos, sin, positions, turned: int, interleaved: bool, seq_dim: int, back: bool) -> None:
    if use_triton(q):
        positions = None if positions is None else _adjacent(positions)
        _launch(q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), positions, turned, interleaved, seq_dim, back)
        return
    if cos.dtype != torch.float64 and native.use_native(q, k):
        cos, sin = (cos, sin) if positions is None else (_rows(cos, positions), _rows(sin, positions))
        native.rope_turn(q, q_out, cos, sin, turned, interleaved, seq_dim, back)
        if k is not None:
            native.rope_turn(k, k_out, cos, sin, k.shape[3 - seq_dim], interleaved, seq_dim, back)
        return
    cos, sin = _tables(cos, -sin if back else sin, positions, seq_dim)
    _turn_by_torch(q, q_out, cos, sin, turned, interleaved, seq_dim)
    if k is not None:
        _turn_by_torch(k, k_out, cos, sin, k.shape[3 - seq_dim], interleaved, seq_dim)


def _adjacent(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """An empty tensor in the memory layout of x, its last dimension adjacent, as the kernel writes it."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else x.new_empty(x.shape)


def _shapes(q: Tensor, k: Tensor | None, *_) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(0) if k is None else _like(k)


def _turn(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    turned: int, interleaved: bool, seq_dim: int, back: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(q turned, k turned or [0]), in the memory layout of q and k."""
    q_out, k_out = _shapes(q, k)
    q, k = _adjacent(q), None if k is None else _adjacent(k)
    _run(q, k, q_out, k_out, cos, sin, positions, turned, interleaved, seq_dim, back)
    return q_out, k_out


def _forward(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    turned: int, interleaved: bool, seq_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _turn(q, k, cos, sin, positions, turned, interleaved, seq_dim, False)


def _backward(
    dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    turned: int, interleaved: bool, seq_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _turn(dq, dk, cos, sin, positions, turned, interleaved, seq_dim, True)


def _save(ctx, inputs, output):
    _, k, cos, sin, positions, *ctx.how = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx, backward, dq, dk):
    dq, dk = backward(dq, dk if ctx.has_k else None, *ctx.saved_tensors, *ctx.how)
    return dq, dk if ctx.has_k else None, *[None] * 6


_rope = differentiable("rope", _forward, _backward, _save, _gradients, _shapes, _shapes)


class _RopeInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions, *how):
        _run(x, None, x, None, cos, sin, positions, *how, False)
        ctx.how = how
        ctx.save_for_backward(cos, sin, positions)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx):
        return _backward(dx, None, *ctx.saved_tensors, *ctx.how)[0], *[None] * 6


def _is_readable(x: Tensor) -> bool:
    """Whether the values of x can be looked at: not in a graph being compiled, and on a GPU only by waiting for it."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _rows(table: Tensor, positions: Tensor) -> Tensor:
    """table[positions], nan where a position is outside, as the kernel has it."""
    if _is_readable(positions):  # and has been looked at
        return table[positions]
    outside = (positions < 0) | (positions >= table.shape[0])
    return table[positions.clamp(0, table.shape[0] - 1)].masked_fill(outside.unsqueeze(-1), torch.nan)


def _checked(q, cos, sin, style, k, positions, heads, layout) -> tuple[int, bool, int]:
    """(heads of q that turn, interleaved, dimension of the sequence), or one line of what is wrong."""
    if style not in STYLES or layout not in LAYOUTS:
        raise ValueError(f"rope style {style!r}, layout {layout!r}: expected {STYLES} and {tuple(LAYOUTS)}")
    seq_dim = LAYOUTS[layout]
    if q.dim() != 4 or not q.is_floating_point():
        raise TypeError(f"rope of {q.dtype} {list(q.shape)}: expected floating point of 4 dimensions, {layout}")
    turned = q.shape[3 - seq_dim] if heads is None else heads
    if not 0 < turned <= q.shape[3 - seq_dim]:
        raise ValueError(f"{heads} heads to turn: q has {q.shape[3 - seq_dim]}")
    if k is not None and (
        k.dtype != q.dtype or k.device != q.device or k.dim() != 4
        or any(k.shape[i] != q.shape[i] for i in (0, seq_dim, 3))
    ):  # fmt: skip
        raise ValueError(f"k {k.dtype} {list(k.shape)}: expected {q.dtype} as q {list(q.shape)}, heads apart")
    if any(t is not None and t.device != q.device for t in (cos, sin, positions)):
        raise ValueError(f"cos, sin or positions on another device than q: expected {q.device}")
    if positions is not None and (positions.is_floating_point() or positions.dtype == torch.bool):
        raise TypeError(f"positions of {positions.dtype}: expected integers")
    if cos.shape != sin.shape or cos.dim() != 2 or not 0 < 2 * cos.shape[1] <= q.shape[3]:
        raise ValueError(
            f"cos {list(cos.shape)}, sin {list(sin.shape)}: expected [positions, pairs], pairs <= {q.shape[3] // 2}"
        )
    length = q.shape[seq_dim]
    if positions is None and cos.shape[0] != length:
        raise ValueError(f"cos of {cos.shape[0]} positions: expected {length}, the length of the sequence")
    if positions is not None and positions.shape not in ((length,), (q.shape[0], length)):
        raise ValueError(f"positions {list(positions.shape)}: expected [{length}] or [{q.shape[0]}, {length}]")
    if positions is not None and positions.numel() and _is_readable(positions):
        held = positions.detach().numpy()  # no operation of torch's, which a graph would record
        if held.min() < 0 or held.max() >= cos.shape[0]:
            raise IndexError(f"positions {held.min()} to {held.max()}: expected 0 to {cos.shape[0] - 1}")
    return turned, style == "interleaved", seq_dim


def rope(
    q: Tensor, cos: Tensor, sin: Tensor, style: str, k: Tensor | None = None, *,
    positions: Tensor | None = None, heads: int | None = None, layout: str = "bhsd",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Turn the first 2 P of the D dimensions of every head of q, and of k if given; the rest passes through.

    q [B, H, S, D] (layout "bhsd") or [B, S, H, D] ("bshd"), any strides; k likewise with its own number of heads;
    fp32, bf16 or fp16, on CPU also fp64, turned in fp32 (fp64). cos, sin [S, P], or [any, P] with integer positions
    [S] or [B, S]. heads: only so many leading heads of q turn, those of a packed q/k/v that are q and k. Returns q, or
    (q, k), turned, in their dtype and memory layout. Raises ValueError or TypeError for other shapes and dtypes,
    IndexError for positions outside the table; those turn to nan instead where nobody can look at them without
    waiting: on CUDA and in compiled graphs.
    """
    how = _checked(q, cos, sin, style, k, positions, heads, layout)
    if use_triton(q) or eager_cpu(q):
        turned = _rope(q, k, cos, sin, positions, *how)
        return turned[0] if k is None else turned
    return rope_reference(q, cos, sin, style, k, positions=positions, heads=heads, layout=layout)


def rope_(
    q: Tensor, cos: Tensor, sin: Tensor, style: str, k: Tensor | None = None, *,
    positions: Tensor | None = None, heads: int | None = None, layout: str = "bhsd",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`rope` in place: returns q (and k) themselves, and autograd knows that they were overwritten.

    Where a gradient is due, q and k are turned by a launch each, and views cost autograd a copy in backward: `rope`
    is then the better one. Raises ValueError also for tensors whose elements share memory.
    """
    how = _checked(q, cos, sin, style, k, positions, heads, layout)
    tensors = (q,) if k is None else (q, k)
    if any(size > 1 and stride == 0 for x in tensors for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError("rope_ of an expanded tensor: its elements share memory")
    if torch.compiler.is_compiling() or not (use_triton(q) or eager_cpu(q)) or any(x.stride(3) != 1 for x in tensors):
        turned = rope(q, cos, sin, style, k, positions=positions, heads=heads, layout=layout)
        for x, new in zip(tensors, (turned,) if k is None else turned, strict=True):
            x.copy_(new)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        for x, first in zip(tensors, (how[0], 0 if k is None else k.shape[3 - how[2]]), strict=False):
            _RopeInPlace.apply(x, cos, sin, positions, first, *how[1:])
    else:
        _run(q, k, q, k, cos, sin, positions, *how, False)
        torch.autograd.graph.increment_version(tensors)
    return q if k is None else (q, k)


def rope_reference(
    q: Tensor, cos: Tensor, sin: Tensor, style: str, k: Tensor | None = None, *,
    positions: Tensor | None = None, heads: int | None = None, layout: str = "bhsd",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`rope` in plain torch operations."""
    turned, interleaved, seq_dim = _checked(q, cos, sin, style, k, positions, heads, layout)
    cos, sin = _tables(cos, sin, positions, seq_dim)
    new_q = _reference(q, cos, sin, turned, interleaved, seq_dim)
    return new_q if k is None else (new_q, _reference(k, cos, sin, k.shape[3 - seq_dim], interleaved, seq_dim))
