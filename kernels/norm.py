"""One norm behind layer_norm, rms_norm and add_norm: what is launched on which grid, and the same by torch.

Rows are x[..., :] whatever the leading dimensions; a norm without a bias is RMSNorm and has no mean. Tiles are
chosen by the width and the size of an element alone, so that a new batch size compiles nothing; they were chosen
by the compiler's counts for sm_80 (registers without spills, warps that stay resident, bytes on their way), which
sm_90 shares. The kernels are described in `norm_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import crystal.kernels.native as native
from crystal.kernels.dispatch import power_of_two, rows_of, target, unit, use_triton, widened
from crystal.kernels.norm_kernels import (
    column_sums,
    norm_backward,
    norm_backward_columns,
    norm_backward_rows,
    norm_forward,
    norm_forward_wide,
)

WIDEST_FORWARD = 16384  # elements of a row that fit in a program's registers
WIDEST_BACKWARD = 8192
LEAST_ROWS = 8  # per program of the backward: fewer, and its two rows of sums outweigh them


def forward_tile(width: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program of norm_forward: 16 elements a thread, 32 for the widest of 2 bytes."""
    block = power_of_two(width)
    if block > 2048:
        return 1, block, min(block // 512, 8 * itemsize)
    return min(2048 // block, 16), block, 4


def backward_tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of norm_backward: 16 warps, for those of one program are all that is resident."""
    block = power_of_two(width)
    return max(4096 // block, 1), block, 16


def check(x: Tensor, *vectors: Tensor) -> None:
    """Raise unless x is floating point [..., d] and every vector is [d] on its device, in its dtype or fp32."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise TypeError(f"norm of {x.dtype} {list(x.shape)}: expected floating point [..., d] with d > 0")
    for vector in vectors:
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"norm weight or bias {list(vector.shape)}: expected [{x.shape[-1]}]")
        if vector.dtype not in (x.dtype, torch.float32) or vector.device != x.device:
            raise TypeError(f"norm weight or bias {vector.dtype} on {vector.device}: x is {x.dtype} on {x.device}")


def seen(values: Tensor, rstd: Tensor) -> Tensor:
    """Values of rows, nan, and so their gradient, in those whose sum of squares left its dtype: 1 / sqrt(inf) is 0, and
    the row would be a row of zeros that nobody sees. rstd [..., 1].

    Not on other devices than CPU and CUDA: a graph that Cerebras' compiler is to read holds the norm and no more.
    """
    return values * torch.where(rstd == 0, torch.nan, 1.0) if rstd.device.type in ("cpu", "cuda") else values


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(y, residual + scale * x, mean [rows], rstd [rows]); None for what this norm has not.

    y = norm(x), or with a residual norm of the sum as it is stored, rounded. Shapes have been checked.
    """
    if use_triton(x):
        return _launch_forward(x, residual, weight, bias, eps, scale)
    if native.use_native(x, residual):
        return native.norm_forward(x, residual, weight, bias, eps, scale)
    summed = None
    if residual is not None:
        x = summed = residual + (x if scale == 1 else x * scale)
    if bias is None:
        wide = widened(x).contiguous()
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        rstd = seen(rstd, rstd)
        # rounded before the weight, as the published LLaMA models were trained
        return ((wide * rstd).to(x.dtype) * weight).to(x.dtype), summed, None, rstd.flatten()
    y, mean, rstd = torch.native_layer_norm(widened(x), x.shape[-1:], widened(weight), widened(bias), eps)
    return seen(y, rstd).to(x.dtype), summed, mean.flatten(), seen(rstd, rstd).flatten()


def backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(dx, scale * dx if scale is not 1, dweight, dbias); None for what this norm has not.

    x is what was normalised; dsummed, the gradient that reaches it past the norm, is part of dx.
    By torch, RMSNorm's gradient is LayerNorm's at mean 0 without its term -mean(g) / std, which is added back: on a
    CPU 2 to 5 times faster than the gradients of RMSNorm's single operations.
    """
    if use_triton(x):
        return _launch_backward(dy, dsummed, x, weight, mean, rstd, scale)
    if native.use_native(dy, dsummed, x):
        dx, dweight, dbias = native.norm_backward(dy, dsummed, x, weight, mean, rstd)
        return dx, None if scale == 1 else dx * scale, dweight, dbias
    sizes, width = (*x.shape[:-1], 1), x.shape[-1:]
    centre, rstd = torch.zeros_like(rstd) if mean is None else mean, rstd.view(sizes)
    dy, wide = widened(dy), widened(weight)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, widened(x), width, centre.view(sizes), rstd, wide, wide, [True, True, mean is not None]
    )
    if mean is None:
        dx.addcmul_((dy @ wide).unsqueeze(-1), rstd, value=1 / width[0])
    dbias = None if mean is None else dbias.to(weight.dtype)
    dx = (dx if dsummed is None else dx.add_(dsummed)).to(x.dtype)
    return dx, None if scale == 1 else dx * scale, dweight.to(weight.dtype), dbias


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    shape, width = x.shape, x.shape[-1]
    x = rows_of(x)
    count = x.shape[0]
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    summed, residual = (None, None) if residual is None else (torch.empty_like(y), rows_of(residual))
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    mean, rstd = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    by = unit(*strides)
    arguments = (x, residual, weight, bias, y, summed, mean, rstd)
    constants = {"N": width, "UNIT": by, "RMS": bias is None, "ADD": residual is not None}
    if width > WIDEST_FORWARD:
        norm_forward_wide[(count,)](
            *arguments, *(s // by for s in strides), scale, eps, **constants, BLOCK=8192, num_warps=16
        )
    else:
        rows, block, warps = forward_tile(width, x.element_size())
        norm_forward[(-(-count // rows),)](
            *arguments, count, *(s // by for s in strides), scale, eps, **constants,
            ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, summed, None if bias is None else mean, rstd


def _launch_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, scale: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    shape, width, rms = x.shape, x.shape[-1], mean is None
    dy, x = rows_of(dy), rows_of(x)
    dsummed = None if dsummed is None else rows_of(dsummed)
    count, weight = x.shape[0], weight.contiguous()
    dx = torch.empty(shape, dtype=x.dtype, device=x.device)
    scaled = None if scale == 1 else torch.empty_like(dx)
    dweight = torch.empty_like(weight)
    dbias = None if rms else torch.empty_like(weight)
    strides = (dy.stride(0), 0 if dsummed is None else dsummed.stride(0), x.stride(0))
    by = unit(*strides)
    dy_step, ds_step, x_step = (s // by for s in strides)
    constants = {"N": width, "UNIT": by, "RMS": rms}
    branches = {"ADD": dsummed is not None, "SCALED": scaled is not None}
    if width > WIDEST_BACKWARD:
        norm_backward_rows[(count,)](
            dy, dsummed, x, weight, mean, rstd, dx, scaled, dy_step, ds_step, x_step, scale,
            **constants, **branches, BLOCK=4096, num_warps=8,
        )  # fmt: skip
        strip = 128 // x.element_size()  # whole cache lines
        norm_backward_columns[(-(-width // strip),)](
            dy, x, mean, rstd, dweight, dbias, count, dy_step, x_step,
            **constants, ROWS=4096 // strip, BLOCK=strip, num_warps=8,
        )  # fmt: skip
        return dx, scaled, dweight, dbias
    rows, block, warps = backward_tile(width)
    programs = min(target(x.device)[1], -(-count // max(rows, LEAST_ROWS)))
    partial = torch.empty(1 if rms else 2, programs, width, dtype=torch.float32, device=x.device)
    ahead = block * x.element_size() < 32768  # beyond, the loads ahead would not fit in the registers either
    norm_backward[(programs,)](
        dy, dsummed, x, weight, mean, rstd, dx, scaled, partial, count, dy_step, ds_step, x_step, scale,
        **constants, **branches, AHEAD=ahead, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    column_sums[(-(-width // 32), partial.shape[0])](
        partial, dweight, dbias, programs, N=width, BLOCK_P=32, BLOCK=32, num_warps=4
    )
    return dx, scaled, dweight, dbias
