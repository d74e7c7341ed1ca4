"""The Triton kernels of every norm: LayerNorm and RMSNorm, with or without the residual sum in front.

Forward. A row lives in registers: read once, mean, then the centred variance, written once. Narrow rows share a
program, so weight and bias are read once for several rows. Rows over 16,384 elements do not fit; they are read
twice (the second time from L2), with Welford's running mean and variance per lane (Chan, Golub & LeVeque 1983 to
merge the lanes), so that nothing is lost to cancellation.

Backward. With h the normalised x and g = dy * weight, dx = (g - mean(g) - h mean(h g)) / std (RMSNorm: without
mean(g)); dweight = sum over rows of dy h, dbias of dy. One program per multiprocessor walks its rows, and the
loads of the next rows are under way while it computes, because a few programs alone do not hide the latency of
memory. The sums over its rows stay in registers and are written once; `column_sums` adds the programs' sums in a
fixed order and rounds. Over 8,192 elements those sums no longer fit; there the rows give dx, and one program per
strip of columns gives dweight and dbias.

All arithmetic is fp32, with one rounding at the store. Row numbers are 64-bit. Rows of x and dy lie *_step * UNIT
elements apart; what is written is contiguous. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crystal.kernels.dispatch import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel()
def tile(P, rows, columns, step, mask):
    """P at rows x columns, 0 outside the mask."""
    return tl.load(P + rows[:, None] * step + columns[None, :], mask=mask, other=0.0)


@kernel()
def inverse_root(variance, eps, LATE: tl.constexpr):
    """1 / sqrt(variance + eps); nan where the variance overflowed, for 1 / sqrt(inf) would make a row of zeros.

    inf - inf is nan and any other difference 0. It is added after the root (LATE) or before: the same numbers, but one
    of them costs RMSNorm 2 registers on sm_90, and with them a quarter of its warps.
    """
    variance += eps
    if LATE:
        return tl.rsqrt(variance) + (variance - variance)
    else:
        return tl.rsqrt(variance + (variance - variance))


@kernel("M")
def norm_forward(
    X, R, W, B, Y, S, MEAN, RSTD, M, x_step, r_step, scale, eps,
    N: tl.constexpr, UNIT: tl.constexpr, RMS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = norm(x) of ROWS rows a program; ADD: of s = r + scale * x, rounded and stored."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    live = rows < M
    inside = columns < N
    mask = live[:, None] & inside[None, :]
    x = tile(X, rows, columns, x_step * UNIT, mask).to(tl.float32)
    out = rows[:, None] * N + columns[None, :]
    if ADD:
        r = tile(R, rows, columns, r_step * UNIT, mask)
        s = (r.to(tl.float32) + x * scale).to(r.dtype)
        tl.store(S + out, s, mask=mask)
        x = s.to(tl.float32)
    if not RMS:
        mean = tl.sum(x, axis=1) * (1.0 / N)
        tl.store(MEAN + rows, mean, mask=live)
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = inverse_root(tl.sum(x * x, axis=1) * (1.0 / N), eps, ADD)
    tl.store(RSTD + rows, rstd, mask=live)
    y = x * rstd[:, None] * tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if not RMS:
        y += tl.load(B + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + out, y, mask=mask)


@kernel()
def norm_forward_wide(
    X, R, W, B, Y, S, MEAN, RSTD, x_step, r_step, scale, eps,
    N: tl.constexpr, UNIT: tl.constexpr, RMS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """norm_forward for rows of any length: one row a program, read twice."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)  # of deviations from the lane's mean
    seen = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + lanes
        mask = columns < N
        x = tl.load(X + row * (x_step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            r = tl.load(R + row * (r_step * UNIT) + columns, mask=mask, other=0.0)
            x = (r.to(tl.float32) + x * scale).to(r.dtype).to(tl.float32)
        if RMS:
            squares += x * x
        else:
            seen += tl.where(mask, 1.0, 0.0)
            deviation = tl.where(mask, x - mean, 0.0)
            mean += deviation / tl.maximum(seen, 1.0)
            squares += deviation * (x - mean)
    if RMS:
        row_mean = 0.0
        variance = tl.sum(squares, axis=0) * (1.0 / N)
    else:
        row_mean = tl.sum(mean * seen, axis=0) * (1.0 / N)
        apart = mean - row_mean
        variance = tl.sum(squares + seen * apart * apart, axis=0) * (1.0 / N)
        tl.store(MEAN + row, row_mean)
    rstd = inverse_root(variance, eps, ADD)
    tl.store(RSTD + row, rstd)
    for start in range(0, N, BLOCK):
        columns = start + lanes
        mask = columns < N
        x = tl.load(X + row * (x_step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            r = tl.load(R + row * (r_step * UNIT) + columns, mask=mask, other=0.0)
            s = (r.to(tl.float32) + x * scale).to(r.dtype)
            tl.store(S + row * N + columns, s, mask=mask)
            x = s.to(tl.float32)
        y = (x - row_mean) * rstd * tl.load(W + columns, mask=mask, other=0.0).to(tl.float32)
        if not RMS:
            y += tl.load(B + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + row * N + columns, y, mask=mask)


@kernel("M")
def norm_backward(
    DY, DS, X, W, MEAN, RSTD, DX, DA, PARTIAL, M, dy_step, ds_step, x_step, scale,
    N: tl.constexpr, UNIT: tl.constexpr, RMS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    AHEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of every programs-th ROWS rows, and this program's sums for dweight and dbias.

    ADD: ds, the gradient that reaches the sum past the norm, is added; SCALED: DA gets scale * dx. AHEAD: not only
    x but dy as well is loaded a round early.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    w = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sum_w = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    rows = program * ROWS + tl.arange(0, ROWS)
    mask = (rows < M)[:, None] & inside[None, :]
    x_here = tile(X, rows, columns, x_step * UNIT, mask)
    dy_here = tile(DY, rows, columns, dy_step * UNIT, mask)
    rstd_here = tl.load(RSTD + rows, mask=rows < M, other=0.0)
    mean_here = rstd_here
    if not RMS:
        mean_here = tl.load(MEAN + rows, mask=rows < M, other=0.0)
    for _ in range(tl.program_id(0), tl.cdiv(M, ROWS), programs):
        if not AHEAD:
            dy_here = tile(DY, rows, columns, dy_step * UNIT, mask)
        x, dy, rstd, mean = x_here.to(tl.float32), dy_here.to(tl.float32), rstd_here[:, None], mean_here[:, None]
        ahead = rows + programs * ROWS
        ahead_mask = (ahead < M)[:, None] & inside[None, :]
        x_here = tile(X, ahead, columns, x_step * UNIT, ahead_mask)
        if AHEAD:
            dy_here = tile(DY, ahead, columns, dy_step * UNIT, ahead_mask)
        rstd_here = tl.load(RSTD + ahead, mask=ahead < M, other=0.0)
        if not RMS:
            mean_here = tl.load(MEAN + ahead, mask=ahead < M, other=0.0)
            x = tl.where(mask, x - mean, 0.0)
        h = x * rstd
        g = dy * w
        dx = g - h * (tl.sum(h * g, axis=1) * (1.0 / N))[:, None]
        if not RMS:
            dx -= (tl.sum(g, axis=1) * (1.0 / N))[:, None]
        dx *= rstd
        if ADD:
            dx += tile(DS, rows, columns, ds_step * UNIT, mask).to(tl.float32)
        tl.store(DX + rows[:, None] * N + columns[None, :], dx, mask=mask)
        if SCALED:
            tl.store(DA + rows[:, None] * N + columns[None, :], dx * scale, mask=mask)
        sum_w += dy * h
        if not RMS:
            sum_b += dy
        rows = ahead
        mask = ahead_mask
    tl.store(PARTIAL + program * N + columns, tl.sum(sum_w, axis=0), mask=inside)
    if not RMS:
        tl.store(PARTIAL + (programs + program) * N + columns, tl.sum(sum_b, axis=0), mask=inside)


@kernel("P")
def column_sums(
    PARTIAL, DW, DB, P, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight (programs with second id 0) and dbias (1) from PARTIAL [1 or 2, P, N]."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        offset = (which * P + p)[:, None] * N + columns[None, :]
        total += tl.load(PARTIAL + offset, mask=(p < P)[:, None] & (columns < N)[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(DW + columns, result, mask=columns < N)
    elif DB is not None:
        tl.store(DB + columns, result, mask=columns < N)


@kernel()
def norm_backward_rows(
    DY, DS, X, W, MEAN, RSTD, DX, DA, dy_step, ds_step, x_step, scale,
    N: tl.constexpr, UNIT: tl.constexpr, RMS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row of any length a program; the second reading of x and dy comes from L2."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    rstd = tl.load(RSTD + row)
    mean = 0.0
    if not RMS:
        mean = tl.load(MEAN + row)
    sum_hg = tl.zeros((BLOCK,), tl.float32)
    sum_g = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + lanes
        mask = columns < N
        x = tl.load(X + row * (x_step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * (dy_step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32)
        g = dy * tl.load(W + columns, mask=mask, other=0.0).to(tl.float32)
        sum_hg += (x - mean) * rstd * g
        sum_g += g
    mean_hg = tl.sum(sum_hg, axis=0) * (1.0 / N)
    mean_g = 0.0
    if not RMS:
        mean_g = tl.sum(sum_g, axis=0) * (1.0 / N)
    for start in range(0, N, BLOCK):
        columns = start + lanes
        mask = columns < N
        x = tl.load(X + row * (x_step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * (dy_step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32)
        g = dy * tl.load(W + columns, mask=mask, other=0.0).to(tl.float32)
        dx = (g - mean_g - (x - mean) * rstd * mean_hg) * rstd
        if ADD:
            dx += tl.load(DS + row * (ds_step * UNIT) + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + row * N + columns, dx, mask=mask)
        if SCALED:
            tl.store(DA + row * N + columns, dx * scale, mask=mask)


@kernel("M")
def norm_backward_columns(
    DY, X, MEAN, RSTD, DW, DB, M, dy_step, x_step,
    N: tl.constexpr, UNIT: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of one strip of columns, over all rows from first to last."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_w = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, M, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        live = rows < M
        mask = live[:, None] & (columns < N)[None, :]
        x = tile(X, rows, columns, x_step * UNIT, mask).to(tl.float32)
        dy = tile(DY, rows, columns, dy_step * UNIT, mask).to(tl.float32)
        if not RMS:
            x -= tl.load(MEAN + rows, mask=live, other=0.0)[:, None]
            sum_b += dy
        sum_w += dy * x * tl.load(RSTD + rows, mask=live, other=0.0)[:, None]
    tl.store(DW + columns, tl.sum(sum_w, axis=0), mask=columns < N)
    if not RMS:
        tl.store(DB + columns, tl.sum(sum_b, axis=0), mask=columns < N)
