"""Causal attention on a CPU by `attention.c`: one pass that keeps nothing but y and a number for each query.

Scores are made block by block and once more in backward, so memory grows with the length and not with its square.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

import crystal.kernels.native as native
from crystal.kernels.dispatch import differentiable

_POINTER, _WHOLE, _REAL, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "attention_forward": [_POINTER] * 8 + [_REAL, _INT],
    "attention_backward": [_POINTER] * 12 + [_REAL, _INT],
    "attention_scratch": [_WHOLE, _WHOLE, _INT],
}
ENOUGH = 1 << 17  # multiplications that are worth a second thread


@functools.cache
def _libraries() -> dict[torch.dtype, ctypes.CDLL]:
    return native.load("attention.c", _SIGNATURES, results={"attention_scratch": _WHOLE})


def available() -> bool:
    """Whether attention on CPU tensors may be attention.c's."""
    return native.available() and bool(_libraries())


def by_token(x: Tensor) -> Tensor:
    """Empty [B, H, T, K], in memory [B, T, H, K]: the layout of the products before and after attention."""
    batch, heads, length, n = x.shape
    return x.new_empty(batch, length, heads, n).transpose(1, 2)


def _call(name: str, backward: bool, scale: float, lse: Tensor, *tensors: Tensor) -> None:
    """tensors [B, H, T, K] in the order of C's parameters, lse before the first that is written."""
    of = tensors[0]
    batch, heads, length, n = of.shape
    library = _libraries()[of.dtype]
    threads = min(torch.get_num_threads(), batch * heads) if of.numel() * length >= ENOUGH else 1
    scratch = torch.empty(threads * library.attention_scratch(length, n, backward))
    steps = [step for t in tensors for step in t.stride()[:3]]
    at = [t.data_ptr() for t in tensors]
    at.insert(5 if backward else 4, lse.data_ptr())
    shape, steps = (ctypes.c_int64 * 4)(*of.shape), (ctypes.c_int64 * len(steps))(*steps)
    getattr(library, name)(*at, scratch.data_ptr(), shape, steps, scale, threads)


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y [B, H, T, K], log-sum-exp of the scaled scores [B, H, T] fp32)."""
    y, lse = _forward_shapes(q, k, v, scale)
    if not native.use_native(q, k, v):  # a graph that was captured elsewhere
        scores = _scores(q, k, scale)
        return y.copy_(scores.softmax(-1) @ v.float()), lse.copy_(scores.logsumexp(-1))
    _call("attention_forward", False, scale, lse, *map(_adjacent, (q, k, v)), y)
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): with P the probabilities, dS = scale P (dP - rowsum(dy y)) and dP = dy v^T."""
    out = _backward_shapes(dy, q, k, v, y, lse, scale)
    if not native.use_native(dy, q, k, v, y):
        p, wide = (_scores(q, k, scale) - lse[..., None]).exp(), dy.float()
        ds = scale * p * (wide @ v.float().mT - (wide * y.float()).sum(-1, keepdim=True))
        found = (ds @ k.float(), ds.mT @ q.float(), p.mT @ wide)
        return tuple(to.copy_(x) for to, x in zip(out, found, strict=True))
    _call("attention_backward", True, scale, lse, *map(_adjacent, (dy, y, q, k, v)), *out)
    return out


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = scale * (q.float() @ k.float().mT)
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))


def _forward_shapes(q, k, v, scale):
    return by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_shapes(dy, q, k, v, y, lse, scale):
    return tuple(map(by_token, (q, k, v)))


def _save(ctx, inputs, output):
    *qkv, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*qkv, *output)


def _gradients(ctx, backward, dy, _lse):
    return (*backward(dy, *ctx.saved_tensors, ctx.scale), None)


_attention = differentiable("attention_native", forward, backward, _save, _gradients, _forward_shapes, _backward_shapes)


def attention_native(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, causal; q, k, v [B, H, T, K] of one dtype, fp32 or bf16, any strides."""
    return _attention(q, k, v, scale)[0]
