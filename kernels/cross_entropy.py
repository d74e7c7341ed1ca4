"""Cross-entropy of logits with integer labels: ignored labels, label smoothing, z-loss, muP's logit multiplier.

    x = logits_scale * logits,   lse = log sum exp(x)
    loss = lse - (1 - e) x[label] - e mean(x) + z lse²           (e: label_smoothing, z: z_loss)
    dlogits = g logits_scale (p (1 + 2 z lse) - (1 - e) onehot - e / V),   p = exp(x - lse)
Smoothing as in Szegedy et al. 2016, eq. 3; z-loss as in PaLM (Chowdhery et al. 2022, section 5).

Forward reads the logits once: each lane keeps its own running maximum and sum (Milakov & Gimelshein 2018), for
four values at a time, so that rescaling costs a quarter of an exponential per value and no thread waits for another
before the end of the row. It saves the two parts of each row's lse, its greatest x and the logarithm of the sum;
backward rebuilds the softmax from them (one reading, one writing), and their sum, rounded, would cost it a digit.
Sum and mean are one more launch, of one program, in a fixed order; nothing waits for the host. A label that is
neither ignored nor a class gives nan: raising would wait for the GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crystal.kernels.dispatch import differentiable, kernel, power_of_two, rows_of, unit, use_triton, widened

if TYPE_CHECKING:
    import triton.language as tl

REDUCTIONS = ("none", "sum", "mean")


@kernel("ignore_index")
def cross_entropy_forward(
    LOGITS, LABELS, LOSS, LSE, step, scale, smoothing, z_loss, ignore_index,
    V: tl.constexpr, UNIT: tl.constexpr, SMOOTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits a program, DEPTH x BLOCK at a time."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, DEPTH)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, DEPTH * BLOCK):
        columns = start + lanes
        x = tl.load(LOGITS + row * (step * UNIT) + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        x = tl.where(columns < V, x * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(x, axis=0))
        about = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - about) + tl.sum(tl.exp(x - about[None, :]), axis=0)
        peak = higher
        if SMOOTH:
            plain += tl.sum(tl.where(columns < V, x, 0.0), axis=0)
    top = tl.max(peak, axis=0)
    rest = tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
    tl.store(LSE + 2 * row, top)
    tl.store(LSE + 2 * row + 1, rest)
    label = tl.load(LABELS + row)
    real = (label >= 0) & (label < V)
    x = tl.load(LOGITS + row * (step * UNIT) + label, mask=real, other=float("nan")).to(tl.float32) * scale
    lse = top + rest
    loss = (top - x) + rest + z_loss * lse * lse
    if SMOOTH:
        loss += smoothing * (x - tl.sum(plain, axis=0) * (1.0 / V))
    tl.store(LOSS + row, tl.where(label == ignore_index, 0.0, loss))


@kernel("M", "ignore_index")
def cross_entropy_total(LOSS, LABELS, TOTAL, COUNT, M, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the rows' losses, MEAN: over the number of labels that count, which is stored for backward."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(LOSS + rows, mask=rows < M, other=0.0)
        if MEAN:
            labels = tl.load(LABELS + rows, mask=rows < M, other=0)
            count += tl.where((rows < M) & (labels != ignore_index), 1.0, 0.0)
    result = tl.sum(total, axis=0)
    if MEAN:
        counted = tl.sum(count, axis=0)
        tl.store(COUNT, counted)
        result = result / counted
    tl.store(TOTAL, result)


@kernel("ignore_index")
def cross_entropy_backward(
    LOGITS, LABELS, LSE, DLOSS, COUNT, DLOGITS, step, dloss_step, scale, smoothing, z_loss, ignore_index,
    V: tl.constexpr, UNIT: tl.constexpr, INPLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK gradients of a row a program; DLOGITS may be LOGITS itself, whose rows then lie as far apart."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < V
    label = tl.load(LABELS + row)
    top = tl.load(LSE + 2 * row)
    rest = tl.load(LSE + 2 * row + 1)
    g = tl.load(DLOSS + row * dloss_step).to(tl.float32)
    if COUNT is not None:
        g = g / tl.load(COUNT)
    real = (label >= 0) & (label < V)
    g = tl.where(label == ignore_index, 0.0, tl.where(real, g * scale, float("nan")))
    x = tl.load(LOGITS + row * (step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32) * scale
    d = tl.exp(x - top - rest) * (1.0 + 2.0 * z_loss * (top + rest)) - smoothing * (1.0 / V)
    d = tl.where(columns == label, d - (1.0 - smoothing), d)
    d = tl.where(label == ignore_index, 0.0, d * g)
    out = row * (step * UNIT) if INPLACE else row * V
    tl.store(DLOGITS + out + columns, d, mask=mask)


def forward_rows(
    logits: Tensor, labels: Tensor, scale: float, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(loss [rows], the two parts of lse [rows, 2]), fp32 at least, of logits [rows, V], labels [rows]; 0: ignored."""
    count, width = logits.shape
    if use_triton(logits):
        loss, lse = (torch.empty(size, dtype=torch.float32, device=logits.device) for size in (count, (count, 2)))
        logits, labels = rows_of(logits), labels.contiguous()
        by = unit(logits.stride(0))
        block = min(power_of_two(width), 1024)
        cross_entropy_forward[(count,)](
            logits, labels, loss, lse, logits.stride(0) // by, scale, smoothing, z_loss, ignore_index,
            V=width, UNIT=by, SMOOTH=smoothing != 0, DEPTH=4, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return loss, lse
    x = widened(logits) * scale
    lse = torch.logsumexp(x, -1)
    ignored = labels == ignore_index
    picked = x.gather(1, labels.masked_fill(ignored, 0)[:, None]).squeeze(1)
    loss = lse - (1 - smoothing) * picked + z_loss * lse.square()
    if smoothing:
        loss -= smoothing * x.mean(-1)
    top = x.amax(-1)
    return loss.masked_fill(ignored, 0), torch.stack((top, lse - top), -1)


def backward_rows(
    out: Tensor, dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, count: Tensor | None,
    scale: float, ignore_index: int, smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """Write the gradient of logits [rows, V] into out, which may be logits; dloss [rows] or [], over count."""
    rows, width = logits.shape
    if use_triton(logits):
        inplace, labels = out is logits, labels.contiguous()
        if not inplace:
            logits = rows_of(logits)
        by, block = unit(logits.stride(0), *(() if inplace else (width,))), min(power_of_two(width), 4096)
        cross_entropy_backward[(rows, -(-width // block))](
            logits, labels, lse, dloss, count, out, logits.stride(0) // by, dloss.stride(0) if dloss.dim() else 0,
            scale, smoothing, z_loss, ignore_index, V=width, UNIT=by, INPLACE=inplace, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return
    g = (dloss.expand(rows) if count is None else (dloss / count).expand(rows)).to(lse.dtype) * scale
    ignored = labels == ignore_index
    d = (widened(logits) * scale).sub_(lse[:, :1]).sub_(lse[:, 1:]).exp_()
    if z_loss:
        d *= 1 + 2 * z_loss * lse.sum(-1, keepdim=True)
    if smoothing:
        d -= smoothing / width
    d.scatter_add_(1, labels.masked_fill(ignored, 0)[:, None], torch.full_like(g, smoothing - 1)[:, None])
    out.copy_((d * g[:, None]).masked_fill_(ignored[:, None], 0))


def _forward(
    logits: Tensor, labels: Tensor, scale: float, ignore_index: int, smoothing: float, z_loss: float,
    reduction: str, inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss as reduced, parts of lse [rows, 2], number of labels that count or [0])."""
    flat = labels.reshape(-1).contiguous()
    loss, lse = forward_rows(rows_of(logits), flat, scale, ignore_index, smoothing, z_loss)
    count = lse.new_empty(() if reduction == "mean" else 0)
    if reduction == "none":
        return loss.view(labels.shape), lse, count
    if use_triton(logits):
        total, mean = lse.new_empty(()), reduction == "mean"
        rows = loss.numel()
        cross_entropy_total[(1,)](loss, flat, total, count, rows, ignore_index, MEAN=mean, BLOCK=4096, num_warps=8)
        return total, lse, count
    if reduction == "mean":
        count = (flat != ignore_index).sum().to(lse.dtype)
        return loss.sum() / count, lse, count
    return loss.sum(), lse, count


def _backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, count: Tensor | None,
    scale: float, ignore_index: int, smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """The gradient of logits."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dloss = dloss.reshape(-1) if dloss.dim() else dloss
    out, rows, flat = rows_of(dlogits), rows_of(logits), labels.reshape(-1)
    backward_rows(out, dloss, rows, flat, lse, count, scale, ignore_index, smoothing, z_loss)
    return dlogits


def _forward_shapes(logits, labels, scale, ignore_index, smoothing, z_loss, reduction, inplace):
    lse = widened(logits.new_empty((labels.numel(), 2)))
    loss = lse.new_empty(labels.shape if reduction == "none" else ())
    return loss, lse, lse.new_empty(() if reduction == "mean" else 0)


def _backward_shapes(dloss, logits, *_):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, labels, *ctx.how, reduction, ctx.inplace = inputs
    _, lse, count = output
    ctx.mean = reduction == "mean"
    ctx.mark_non_differentiable(lse, count)
    ctx.set_materialize_grads(False)  # else zeros are made for the statistics
    ctx.save_for_backward(logits, labels, lse, count)


def _gradients(ctx, backward, dloss, _lse, _count):
    logits, labels, lse, count = ctx.saved_tensors
    count = count if ctx.mean else None
    if ctx.inplace:
        rows = logits.detach().view(-1, logits.shape[-1])
        backward_rows(rows, dloss.reshape(-1) if dloss.dim() else dloss, rows, labels.reshape(-1), lse, count, *ctx.how)
        torch.autograd.graph.increment_version(logits)
        dlogits = rows.view(logits.shape)
    else:
        dlogits = backward(dloss, logits, labels, lse, count, *ctx.how)
    return dlogits, *[None] * 7


_cross_entropy = differentiable(
    "cross_entropy", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes
)


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, *, logits_scale: float = 1.0, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean", inplace_backward: bool = False,
) -> Tensor:  # fmt: skip
    """The definition, op by op, in fp32 at least."""
    x = widened(logits) * logits_scale
    lse = torch.logsumexp(x, -1)
    ignored = labels == ignore_index
    picked = x.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * picked + z_loss * lse.square()
    loss = loss - label_smoothing * x.mean(-1) if label_smoothing else loss
    loss = loss.masked_fill(ignored, 0)
    return loss if reduction == "none" else loss.sum() / ((~ignored).sum() if reduction == "mean" else 1)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, logits_scale: float = 1.0, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean", inplace_backward: bool = False,
) -> Tensor:  # fmt: skip
    """Cross-entropy in nats of softmax(logits_scale * logits) and labels, as the module's docstring has it.

    logits [..., V], any strides; fp32, bf16 or fp16, on CPU also fp64. labels [...], int64; those equal to
    ignore_index count for nothing. reduction: "none" [...], "sum", or "mean" over labels that count (nan if none
    does, as torch has it). Returns fp32 (fp64). inplace_backward: eager backward writes the gradient over contiguous
    logits and autograd knows it, so that a second backward, or another use of them, is an error. Raises ValueError or
    TypeError for other arguments.
    """
    if not logits.is_floating_point() or logits.dim() == 0 or labels.dtype != torch.int64:
        raise TypeError(f"cross_entropy of {logits.dtype}, labels {labels.dtype}: expected floating point and int64")
    if labels.shape != logits.shape[:-1] or labels.device != logits.device:
        raise ValueError(
            f"labels {list(labels.shape)} of logits {list(logits.shape)}: expected {list(logits.shape[:-1])}"
        )
    if reduction not in REDUCTIONS or not 0 <= label_smoothing < 1:
        raise ValueError(f"reduction {reduction!r}, label_smoothing {label_smoothing}: expected {REDUCTIONS}, [0, 1)")
    if use_triton(logits):
        inplace = inplace_backward and not torch.compiler.is_compiling() and logits.is_contiguous()
        how = (logits_scale, ignore_index, label_smoothing, z_loss, reduction, inplace)
        return _cross_entropy(logits, labels, *how)[0]
    if z_loss:
        return cross_entropy_reference(
            logits, labels, logits_scale=logits_scale, ignore_index=ignore_index, label_smoothing=label_smoothing,
            z_loss=z_loss, reduction=reduction,
        )  # fmt: skip
    x, flat = widened(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1)
    x = x if logits_scale == 1 else x * logits_scale
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    loss = F.cross_entropy(x, flat, **how)  # on a CPU twice as fast as these formulas op by op
    return loss.view(labels.shape) if reduction == "none" else loss
