"""Causal attention of short sequences on a CPU by batched products, with the probabilities kept for backward.

torch's CPU kernel computes the scores again in backward, and in bf16 spends most of its time on conversions. Of a few
hundred tokens the probabilities of all heads are no more than the activations beside them: kept, backward is four
batched products and one pass of softmax's gradient. Queries are worked through ROWS at a time, with the keys that
the causal mask lets them see, and HEADS heads together, so that scores stay in the cache between one product and the
next.

In bf16 the scores are rounded before the softmax, whose exponentials and sums are fp32: the arithmetic of the
published LLaMA code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import crystal.kernels.native as native
from crystal.kernels.dispatch import differentiable

ROWS = {torch.float32: 64, torch.bfloat16: 128}  # queries at a time: smaller blocks waste less on the masked half
HEADS = 64  # at a time


def _blocks(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """(heads, first query, end of the queries) of each block of q [B H, T, K]."""
    heads, length, _ = q.shape
    for first in range(0, heads, HEADS):
        for start in range(0, length, ROWS[q.dtype]):
            yield slice(first, min(first + HEADS, heads)), start, min(start + ROWS[q.dtype], length)


def _kept(q: Tensor) -> int:
    """Number of probabilities: of each query and the keys up to the end of its block."""
    return sum((heads.stop - heads.start) * (end - start) * end for heads, start, end in _blocks(q))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y [B, H, T, K], probabilities of the blocks one after another)."""
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    future = q.new_full((ROWS[q.dtype],) * 2, float("-inf")).triu_(1)
    fast = native.use_native(q)
    y, probabilities, at = torch.empty_like(q), q.new_empty(_kept(q)), 0
    for heads, start, end in _blocks(q):
        rows, size = end - start, (heads.stop - heads.start, end - start, end)
        p = probabilities[at : at + size[0] * rows * end].view(size)
        torch.bmm(q[heads, start:end], k[heads, :end].transpose(1, 2), out=p)
        if fast:
            native.causal_softmax(p, start, scale)
        else:
            p.mul_(scale)
            p[:, :, start:] += future[:rows, :rows]
            torch.softmax(p, -1, out=p)
        torch.bmm(p, v[heads, :end], out=y[heads, start:end])
        at += p.numel()
    return y.view(shape), probabilities


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): with P the probabilities, dS = scale P (dP - rowsum(P dP)) and dP = dy v^T."""
    shape = q.shape
    dy, q, k, v = (x.flatten(0, 1) for x in (dy, q, k, v))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    at, fast = 0, native.use_native(q)
    for heads, start, end in _blocks(q):
        size, own = (heads.stop - heads.start, end - start, end), (heads, slice(start, end))
        p = probabilities[at : at + size[0] * size[1] * end].view(size)
        dv[heads, :end].baddbmm_(p.transpose(1, 2), dy[own])
        dp = torch.bmm(dy[own], v[heads, :end].transpose(1, 2))
        if fast:
            native.softmax_backward(p, dp, scale)
            ds = dp
        else:
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
        torch.bmm(ds, k[heads, :end], out=dq[own])
        dk[heads, :end].baddbmm_(ds.transpose(1, 2), q[own])
        at += p.numel()
    return dq.view(shape), dk.view(shape), dv.view(shape)


def _forward_shapes(q, k, v, scale):
    return q.new_empty(q.shape), q.new_empty(_kept(q.flatten(0, 1)))


def _backward_shapes(dy, q, k, v, probabilities, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    *qkv, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*qkv, output[1])


def _gradients(ctx, backward, dy, _probabilities):
    return (*backward(dy, *ctx.saved_tensors, ctx.scale), None)


_attention = differentiable("attention", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def attention_kept(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, causal; q, k, v [B, H, T, K] of one dtype, fp32 or bf16."""
    return _attention(q.contiguous(), k.contiguous(), v.contiguous(), scale)[0]
