"""Causal attention, softmax(scale q k^T) v, by the way that is fastest on its device.

On a CPU there are three: `native`, the C of attention.c; `kept`, batched products with the probabilities kept; and
`torch`, F.scaled_dot_product_attention, which is also the one on every other device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import crystal.kernels.tuning as tuning
from crystal.kernels.attention_documents import attention_documents
from crystal.kernels.attention_kept import attention_kept
from crystal.kernels.attention_native import attention_native, available

LONGEST = 512  # tokens; beyond, kept probabilities outweigh the other activations

Path = Literal["native", "kept", "torch"]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition, op by op."""
    scores = (q @ k.transpose(-1, -2)) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


def attention_torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, causal, by torch's own kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


PATHS: dict[Path, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "native": attention_native,
    "kept": attention_kept,
    "torch": attention_torch,
}


def _chosen(key: str, long: bool) -> Path:
    """The path that was measured to be the fastest here, of those that there are."""
    chosen = tuning.chosen(key, "native")
    if chosen == "native" and not available():
        chosen = "kept"
    return "torch" if chosen == "kept" and long else chosen


# A compiler cannot look into files, and need not. This is all that torch.compiler.assume_constant_result does, after it
# has imported the compiler and Triton.
_chosen._dynamo_marked_constant = True


def path(q: Tensor) -> Path:
    """How causal attention of queries [B, H, T, K], with keys and values of the same shape, is computed."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16) or q.numel() == 0:
        return "torch"
    if not (torch.compiler.is_compiling() or type(q) in (Tensor, torch.nn.Parameter)):  # a DTensor, say
        return "torch"
    key = tuning.attention_key(q.dtype, q.shape[2], q.shape[3])  # no numbers below: they may be symbols in a graph
    return _chosen(key, True) if q.shape[2] > LONGEST else _chosen(key, False)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v, causal, or with the keys that a mask lets each query see.

    q, k, v [B, H, T, K] (k and v [B, H, S, K]) of one dtype, any strides; mask: boolean [..., T, S], or, for documents
    that see themselves alone, and causally, their `document_bounds`. Returns [B, H, T, K].
    """
    if mask is not None and mask.dtype != torch.bool:
        return attention_documents(q, k, v, mask, scale)
    if mask is None and q.shape == k.shape == v.shape:
        return PATHS[path(q)](q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
