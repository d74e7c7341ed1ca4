"""Causal attention of packed documents, each of which sees itself alone, without a mask of tokens by tokens.

A mask is B T^2 bytes, more once it is added to scores, and half of what is computed under it is thrown away. Documents
lie one after another, so where each begins is all that need be known: on a CPU each one is attention of its own, by the
C of attention.c or torch's kernel; on a GPU, in bf16, FlashAttention has a form for sequences of many lengths. Other
devices and dtypes are masked a row at a time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from crystal.kernels.attention_native import available, by_token
from crystal.kernels.attention_native import backward as native_backward
from crystal.kernels.attention_native import forward as native_forward
from crystal.kernels.dispatch import PLAIN, differentiable, power_of_two

LEAST = 16  # numbers of documents are rounded up to powers of two from here, so that graphs meet few shapes


def document_bounds(documents_BT: Tensor) -> Tensor:
    """Where documents begin among the B * T tokens, int32, ascending from 0; the rest are B * T.

    documents_BT: each token's document, of integers; those of a row lie one after another, and end with it. Waits for
    the device, once for a micro-batch: how many there are is the shape.
    """
    new_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    new_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    begins = new_BT.flatten().nonzero().squeeze(1)
    bounds = begins.new_full((max(LEAST, power_of_two(len(begins))) + 1,), documents_BT.numel(), dtype=torch.int32)
    bounds[: len(begins)] = begins
    return bounds


def _spans(bounds: Tensor, length: int) -> Iterator[tuple[int, slice]]:
    """(row, its tokens) of each document."""
    for begin, end in itertools.pairwise(bounds.tolist()):
        if begin < end:
            yield begin // length, slice(begin % length, begin % length + end - begin)


def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y [B, H, T, K], log-sum-exp of each query's scores [B, H, T] fp32)."""
    y, lse = _forward_shapes(q, k, v, bounds, scale)
    for row, tokens in _spans(bounds, q.shape[2]):
        at = (slice(row, row + 1), slice(None), tokens)
        if available():
            y[at], lse[at] = native_forward(q[at], k[at], v[at], scale)
        else:
            y[at], lse[at] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[at], k[at], v[at], 0.0, True, attn_mask=None, scale=scale
            )
    return y, lse


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    out = _backward_shapes(dy, q, k, v, y, lse, bounds, scale)
    for row, tokens in _spans(bounds, q.shape[2]):
        at = (slice(row, row + 1), slice(None), tokens)
        own = [*(t[at] for t in (dy, q, k, v, y)), lse[at].contiguous()]  # C has no strides for the latter
        if available():
            found = native_backward(*own, scale)
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *own, 0.0, True, attn_mask=None, scale=scale
            )
        for to, part in zip(out, found, strict=True):
            to[at] = part
    return out


def _forward_shapes(q, k, v, bounds, scale):
    return by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_shapes(dy, q, k, v, y, lse, bounds, scale):
    return tuple(map(by_token, (q, k, v)))


def _save(ctx, inputs, output):
    *tensors, bounds, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, bounds)


def _gradients(ctx, backward, dy, _lse):
    return (*backward(dy, *ctx.saved_tensors, ctx.scale), None, None)


_attention = differentiable(
    "attention_documents", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes
)


def _masked(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """By masks, one row's at a time."""
    rows, _, length, _ = q.shape
    number_BT = torch.bucketize(torch.arange(rows * length, device=q.device), bounds, right=True).view(rows, length)
    y = [
        F.scaled_dot_product_attention(
            q[i : i + 1], k[i : i + 1], v[i : i + 1], scale=scale,
            attn_mask=(number_BT[i, :, None] == number_BT[i, None]).tril(),
        )
        for i in range(rows)
    ]  # fmt: skip
    return torch.cat(y)


def has_varlen() -> bool:
    """Whether this torch has FlashAttention for sequences of many lengths, with a scale. Imports it, and Triton."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


has_varlen._dynamo_marked_constant = True  # as `attention._chosen` is


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """By FlashAttention, whose sequences are documents; those that begin where all tokens end are empty."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, length, n = q.shape
    tokens = [t.transpose(1, 2).reshape(rows * length, heads, n) for t in (q, k, v)]
    y = varlen_attn(*tokens, bounds, bounds, length, length, scale=scale, window_size=(-1, 0))
    return y.view(rows, length, heads, n).transpose(1, 2)


def attention_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, causal within each document, with no sight of others.

    q, k, v [B, H, T, K] of one shape and dtype, any strides; bounds: `document_bounds`. Returns [B, H, T, K].
    """
    known = torch.compiler.is_compiling() or all(type(t) in PLAIN for t in (q, k, v))
    if known and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16):
        return _attention(q, k, v, bounds, scale)[0]
    fits = q.is_cuda and q.dtype == torch.bfloat16 and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    if known and fits and has_varlen():
        return _varlen(q, k, v, bounds, scale)
    return _masked(q, k, v, bounds, scale)
