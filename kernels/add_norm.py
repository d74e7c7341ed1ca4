"""A residual sum and the norm after it in one pass: the sum is stored while its row is in registers.

Separately the sum is written, read again and normalised: five passes over memory forward where four suffice, and
backward six where four do, for the gradient that reaches the sum past the norm is added in the norm's kernel.
muP's multiplier of the residual branch (CompleteP's m_L^-alpha) rides along. The kernels are in `norm_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crystal.kernels.dispatch import differentiable, use_triton, widened
from crystal.kernels.layer_norm import layer_norm
from crystal.kernels.native import use_native
from crystal.kernels.norm import backward as norm_backward
from crystal.kernels.norm import check, seen
from crystal.kernels.norm import forward as norm_forward
from crystal.kernels.rms_norm import rms_norm


def add_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The definition, op by op, in fp32 at least; the sum is rounded to its dtype before it is normalised."""
    summed = (widened(residual) + widened(x) * scale).to(residual.dtype)
    normal = widened(summed) if bias is None else widened(summed) - widened(summed).mean(-1, keepdim=True)
    rstd = torch.rsqrt(normal.square().mean(-1, keepdim=True) + eps)
    normal = normal * seen(rstd, rstd) * weight
    return (normal if bias is None else normal + bias).to(x.dtype), summed


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean [rows] or [0] of RMSNorm, rstd [rows])."""
    y, summed, mean, rstd = norm_forward(x, residual, weight, bias, eps, scale)
    return y, summed, rstd.new_empty(0) if mean is None else mean, rstd


def _backward(
    dy: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dresidual, dx or [0] where they are the same, dweight, dbias or [0])."""
    dresidual, dx, dweight, dbias = norm_backward(dy, dsummed, summed, weight, mean, rstd, scale)
    return dresidual, dy.new_empty(0) if dx is None else dx, dweight, dy.new_empty(0) if dbias is None else dbias


def _forward_shapes(x, residual, weight, bias, eps, scale):
    rstd = widened(x.new_empty(x.shape[:-1].numel()))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd.new_empty(0 if bias is None else rstd.shape), rstd


def _backward_shapes(dy, dsummed, summed, weight, mean, rstd, scale):
    dx = summed.new_empty(0 if scale == 1 else summed.shape)
    dbias = dy.new_empty(0) if mean is None else torch.empty_like(weight)
    return summed.new_empty(summed.shape), dx, torch.empty_like(weight), dbias


def _save(ctx, inputs, output):
    _, _, weight, bias, _, ctx.scale = inputs
    _, summed, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed, weight, mean, rstd)


def _gradients(ctx, backward, dy, dsummed, _mean, _rstd):
    summed, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the sum was used
        dy = torch.zeros_like(summed)
    mean = mean if ctx.has_bias else None
    dresidual, dx, dweight, dbias = backward(dy, dsummed, summed, weight, mean, rstd, ctx.scale)
    return dresidual if ctx.scale == 1 else dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None


_add_norm = differentiable("add_norm", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) of sum = residual + scale * x: LayerNorm, or RMSNorm where bias is None.

    x and residual [..., d] of one shape and dtype, any strides; weight and bias [d], of that dtype or fp32; fp32,
    bf16 or fp16, on CPU also fp64. Raises ValueError or TypeError for other shapes and dtypes.
    """
    check(x, weight, *(() if bias is None else (bias,)))
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(f"residual {residual.dtype} {list(residual.shape)}: expected {x.dtype} {list(x.shape)} as x")
    if use_triton(x) or use_native(x, residual):
        return _add_norm(x, residual, weight, bias, eps, scale)[:2]
    summed = residual + (x if scale == 1 else x * scale)
    return rms_norm(summed, weight, eps) if bias is None else layer_norm(summed, weight, bias, eps), summed
