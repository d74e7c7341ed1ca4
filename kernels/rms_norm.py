"""RMSNorm over the last dimension (Zhang & Sennrich 2019, eq. 4), the root mean square in fp32 whatever the dtype.

The kernels are in `norm`; here are the definition, its gradient and what torch's CPU uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crystal.kernels.dispatch import differentiable, eager_cpu, use_triton, widened
from crystal.kernels.norm import backward as norm_backward
from crystal.kernels.norm import check, seen
from crystal.kernels.norm import forward as norm_forward


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, op by op, in fp32 at least."""
    wide = widened(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * seen(rstd, rstd) * weight).to(x.dtype)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd [rows])."""
    y, _, _, rstd = norm_forward(x, None, weight, None, eps)
    return y, rstd


def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    dx, _, dweight, _ = norm_backward(dy, None, x, weight, None, rstd)
    return dx, dweight


def _forward_shapes(x, weight, eps):
    return x.new_empty(x.shape), widened(x.new_empty(x.shape[:-1].numel()))


def _backward_shapes(dy, x, weight, rstd):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made for the statistics
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx, backward, dy, _rstd):
    return (*backward(dy, *ctx.saved_tensors), None)


_rms_norm = differentiable("rms_norm", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.

    x [..., d], any strides; weight [d], of x's dtype or fp32. fp32, bf16 or fp16, on CPU also fp64.
    Returns [..., d] in x's dtype. Raises ValueError or TypeError for other shapes and dtypes.
    """
    check(x, weight)
    if use_triton(x) or eager_cpu(x):
        return _rms_norm(x, weight, eps)[0]
    return rms_norm_reference(x, weight, eps)
