"""LayerNorm over the last dimension (Ba, Kiros & Hinton 2016, eq. 3-4), statistics in fp32 whatever the dtype.

The kernels are in `norm`; here are the definition, its gradient and what torch's CPU uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crystal.kernels.dispatch import differentiable, eager_cpu, use_triton, widened
from crystal.kernels.norm import backward as norm_backward
from crystal.kernels.norm import check, seen
from crystal.kernels.norm import forward as norm_forward


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition, op by op, in fp32 at least."""
    centred = widened(x) - widened(x).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normal = centred * seen(rstd, rstd)
    return (normal * weight + bias).to(x.dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [rows], rstd [rows])."""
    y, _, mean, rstd = norm_forward(x, None, weight, bias, eps)
    return y, mean, rstd


def _backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias)."""
    dx, _, dweight, dbias = norm_backward(dy, None, x, weight, mean, rstd)
    return dx, dweight, dbias


def _forward_shapes(x, weight, bias, eps):
    stats = widened(x.new_empty(x.shape[:-1].numel()))
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


def _backward_shapes(dy, x, weight, mean, rstd):
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # else zeros are made for the statistics
    ctx.save_for_backward(x, weight, mean, rstd)


def _gradients(ctx, backward, dy, _mean, _rstd):
    return (*backward(dy, *ctx.saved_tensors), None)


_layer_norm = differentiable("layer_norm", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var the biased variance.

    x [..., d], any strides; weight and bias [d], of x's dtype or fp32. fp32, bf16 or fp16, on CPU also fp64.
    Returns [..., d] in x's dtype. Raises ValueError or TypeError for other shapes and dtypes.
    """
    check(x, weight, bias)
    if use_triton(x) or eager_cpu(x):
        return _layer_norm(x, weight, bias, eps)[0]
    y, _, rstd = torch.native_layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps)
    return seen(y, rstd).to(x.dtype)
