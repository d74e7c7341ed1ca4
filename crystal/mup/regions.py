"""Which part of a storage a view is, as a box: a range of indices for each dimension of the tensor that owns it."""

from __future__ import annotations

import math

from torch import Tensor

Box = tuple[tuple[int, int], ...]  # [low, high) of each dimension


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, n) for n in shape)


def box_of(view: Tensor, shape: tuple[int, ...]) -> Box | None:
    """The part of a contiguous tensor of that shape that `view` is; None where it is no box (a diagonal, every
    second row)."""
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    offset = view.storage_offset()
    start = [offset // step % size for step, size in zip(steps, shape, strict=True)]
    row = math.prod(shape[1:])
    if view.is_contiguous() and shape and row and offset % row == 0 and view.numel() % row == 0:
        return ((start[0], start[0] + view.numel() // row), *whole(shape[1:]))
    box = [(s, s + 1) for s in start]
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        fits = [d for d, step in enumerate(steps) if step == stride and start[d] + size <= shape[d]]
        if not fits or box[fits[0]][1] - box[fits[0]][0] > 1:
            return None
        box[fits[0]] = (start[fits[0]], start[fits[0]] + size)
    return tuple(box)


def common(a: Box, b: Box) -> Box | None:
    """Where two boxes overlap."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(low < high for low, high in both) else None


def without(a: Box, b: Box) -> list[Box]:
    """a less b, in boxes that do not overlap."""
    if (middle := common(a, b)) is None:
        return [a]
    rest: list[Box] = []
    for d, ((low, high), (inner_low, inner_high)) in enumerate(zip(a, middle, strict=True)):
        before, after = middle[:d], a[d + 1 :]
        for part in ((low, inner_low), (inner_high, high)):
            if part[0] < part[1]:
                rest.append((*before, part, *after))
    return rest


def moved(box: Box, dim: int, by: int) -> Box:
    return tuple((low + by, high + by) if d == dim else (low, high) for d, (low, high) in enumerate(box))
