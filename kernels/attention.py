"""Causal attention, softmax(scale q k^T) v; for training short sequences in bf16 on a CPU, with the probabilities kept.

torch's CPU kernel computes the scores again in backward, block by block, and in bf16 spends most of its time on
conversions. Up to LONGEST tokens the probabilities of all heads are a few MB a layer, no more than the activations
beside them: kept, backward is four batched products and one pass of softmax's gradient, in half the time. Heads are
worked through a few at a time, so that their scores stay in the cache between one product and the next. In fp32,
whose products are slower, torch's kernel wins, since it leaves out most of what the causal mask hides.

The scores are rounded to bf16 before the softmax, whose exponentials and sums are fp32: the arithmetic of the
published LLaMA code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crystal.kernels.dispatch import differentiable

LONGEST = 512  # tokens; beyond, the probabilities outweigh the other activations
SCORES = 1 << 20  # elements of the scores in work at a time: 1 MB


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition, op by op."""
    scores = (q @ k.transpose(-1, -2)) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


def _groups(heads: int, length: int) -> list[slice]:
    """Slices of heads whose scores are worked on together."""
    step = max(SCORES // length**2, 1)
    return [slice(start, start + step) for start in range(0, heads, step)]


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y [B, H, T, K], probabilities [B H, T, T])."""
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    heads, length, _ = q.shape
    future_TT = q.new_full((length, length), float("-inf")).triu_(1)
    y, probabilities = torch.empty_like(q), q.new_empty(heads, length, length)
    for group in _groups(heads, length):
        scores = torch.bmm(q[group], k[group].transpose(1, 2), out=probabilities[group])
        torch.add(future_TT, scores, alpha=scale, out=scores)
        torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, v[group], out=y[group])
    return y.view(shape), probabilities


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): with P the probabilities, dS = P (dP - rowsum(P dP)) and dP = dy v^T."""
    shape = q.shape
    dy, q, k, v = (x.flatten(0, 1) for x in (dy, q, k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for group in _groups(*q.shape[:2]):
        p = probabilities[group]
        torch.bmm(p.transpose(1, 2), dy[group], out=dv[group])
        dp = torch.bmm(dy[group], v[group].transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        torch.bmm(ds, k[group], out=dq[group])
        torch.bmm(ds.transpose(1, 2), q[group], out=dk[group])
    return dq.mul_(scale).view(shape), dk.mul_(scale).view(shape), dv.view(shape)


def _forward_shapes(q, k, v, scale):
    batch, heads, length, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch * heads, length, length)


def _backward_shapes(dy, q, k, v, probabilities, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    *qkv, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*qkv, output[1])


def _gradients(ctx, backward, dy, _probabilities):
    return (*backward(dy, *ctx.saved_tensors, ctx.scale), None)


_attention = differentiable("attention", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, training=False) -> Tensor:
    """softmax(scale q k^T) v, causal, or with the keys that a boolean mask [..., T, S] lets each query see.

    q, k, v [B, H, T, K] (k and v [B, H, S, K]) of one dtype, any strides. training: a gradient is wanted, or the
    same arithmetic as where it is. Returns [B, H, T, K].
    """
    short = training and mask is None and q.shape == k.shape == v.shape and 0 < q.shape[2] <= LONGEST
    if short and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _attention(q.contiguous(), k.contiguous(), v.contiguous(), scale)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
