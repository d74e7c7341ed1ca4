"""The curriculum's learning rate as data, and as a tensor function of the step.

A Cerebras step is traced once, so its learning rate cannot be a Python number that changes: it is computed in the
graph from the step, which is a tensor that the graph itself counts up. `pieces` cuts a curriculum's schedules into
ranges of steps on which the rate is one formula; `lr_of` evaluates them, in fp32, with operations that lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from crystal.curriculum.stages import Curriculum, Stage


class Piece(NamedTuple):
    """Steps first … last (global, from 1): lr = start + (end - start) * shape(x), x = at + slope * (step - origin).

    Linear and cosine pieces start where they are lowest, whichever way they go: so fp32 keeps the small rates at the
    end of a decay to a few parts in 10^7 of themselves, not of the peak.
    """

    first: int
    last: int
    shape: str  # linear | cosine | sqrt
    start: float
    end: float
    origin: int
    at: float
    slope: float


def pieces(curriculum: Curriculum) -> list[Piece]:
    """Every range of steps of the run with one formula, in order, without gaps."""
    return [piece for stage in curriculum.stages for piece in _pieces_of(stage)]


def _pieces_of(stage: Stage) -> Iterator[Piece]:
    schedule, counts_from = stage.schedule, stage.lr_counts_from
    begins = [0, *accumulate(segment.steps for segment in schedule.segments)]
    for (a, b), (p, q) in zip(pairwise(schedule.knots), pairwise(schedule.published), strict=True):
        # step s of the stage (from 0) has t = s + counts_from; t in (a, b] is this piece's, and t = 0 the first one's
        low, high = max(a + 1 - counts_from, 0) if a else 0, min(b - counts_from, stage.steps - 1)
        if high < low:
            continue
        first, last = stage.first_step + low + 1, stage.first_step + high + 1
        index = max(i for i, begin in enumerate(begins[:-1]) if begin <= p)
        segment = schedule.segments[index]
        if segment.shape == "linear" or p >= begins[-1]:  # behind the last segment its end stays
            ends = sorted(((stage.lr_for_step(low), first), (stage.lr_for_step(high), last)))
            (start, origin), (end, other) = ends
            yield Piece(
                first, last, "linear", start, end, origin, 0.0, 1 / (other - origin) if other != origin else 0.0
            )
            continue
        by_step = (q - p) / (b - a) / segment.steps
        at = (p - begins[index]) / segment.steps + (low + counts_from - a) * by_step  # x at the first step
        if segment.shape == "cosine" and segment.end < segment.start:
            at_end = 1 - at - (last - first) * by_step
            yield Piece(first, last, "cosine", segment.end, segment.start, last, at_end, -by_step)
        else:
            yield Piece(first, last, segment.shape, segment.start, segment.end, first, at, by_step)


def lr_of(pieces: Sequence[Piece], step: Tensor) -> Tensor:
    """Base learning rate, fp32, at a global step (from 1, a scalar integer tensor); behind the end, the last value."""
    lr = None
    for piece in pieces:
        # integers up to here: fp32 does not tell steps beyond 16.7 M apart
        inside = torch.clamp(step, piece.first, piece.last) - piece.origin
        x = inside.to(torch.float32) * piece.slope + piece.at
        if piece.shape == "cosine":
            x = torch.sin(x * (math.pi / 2)).square()  # (1 - cos(pi x)) / 2 without its cancellation
        elif piece.shape == "sqrt":
            x = torch.sqrt(x)
        value = x * (piece.end - piece.start) + piece.start
        lr = value if lr is None else torch.where(step < piece.first, lr, value)
    return lr
