"""y = x W^T + b, and its gradients; in fp32 on a CPU by oneDNN, for torch's own fp32 products are MKL's.

MKL does not use the full width of other makers' processors: on a core of an AMD EPYC (Zen 4) it reaches 92 to 101
GFLOP/s where oneDNN reaches 98 to 111, on Zen 5 100 where oneDNN reaches 240. torch gives oneDNN its bf16 products
by itself. In oneDNN's fp32 weight gradient the wider of the two sides goes first: 10% at 256 x 688.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crystal.kernels.dispatch import differentiable

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(*tensors: Tensor) -> bool:
    """Whether products of these are oneDNN's: fp32 on a CPU, and no DTensor, which has rules for F.linear alone."""
    plain = _ONEDNN and all(type(t) in (Tensor, torch.nn.Parameter) and t.numel() > 0 for t in tensors)
    return plain and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [..., n] times the transpose of b [m, n], plus bias [m]: [..., m]; by oneDNN where that is faster."""
    if by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """The transpose of a [n, k] times b [n, m]: [k, m], contiguous."""
    if not by_onednn(a, b):
        return a.T @ b
    return product(a.T, b.T) if a.shape[1] >= b.shape[1] else product(b.T, a.T).T.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), [0] for what is not needed."""
    none = dy.new_empty(0)
    dy_rows = dy.flatten(0, -2)
    dx = product(dy, weight.T) if needs_x else none
    dweight = transposed_product(dy_rows, x.flatten(0, -2)) if needs_weight else none
    return dx, dweight, dy_rows.sum(0) if needs_bias else none


def _forward_shapes(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_shapes(dy, x, weight, needs_x, needs_weight, needs_bias):
    sizes = (x.shape, weight.shape, weight.shape[:1])
    needs = (needs_x, needs_weight, needs_bias)
    return tuple(dy.new_empty(size if need else 0) for size, need in zip(sizes, needs, strict=True))


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _gradients(ctx, backward, dy):
    needs = ctx.needs_input_grad
    found = backward(dy.contiguous(), *ctx.saved_tensors, needs[0], needs[1], ctx.has_bias and needs[2])
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


_linear = differentiable("linear", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., n] times the transpose of weight [m, n], plus bias [m]: [..., m], one dtype throughout."""
    if x.dim() > 1 and by_onednn(x, weight):
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)
