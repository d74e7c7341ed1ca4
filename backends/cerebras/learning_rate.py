"""The curriculum's learning rate as data, and as a tensor function of the step.

A Cerebras step is traced once, so its learning rate cannot be a Python number that changes: it is computed in the
graph from the step, which is a tensor that the graph itself counts up. `pieces` cuts a curriculum's schedules into
ranges of steps on which the rate is one formula; `lr_of` evaluates them, in fp32, with operations that lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from crystal.curriculum import Curriculum


class Piece(NamedTuple):
    """Steps first … last (global, from 1): lr = start + (end - start) * shape(x), x = at + slope * (step - first)."""

    first: int
    last: int
    start: float
    end: float
    shape: str  # linear | cosine | sqrt
    at: float
    slope: float


def pieces(curriculum: Curriculum) -> list[Piece]:
    """Every range of steps of the run with one formula, in order, without gaps."""
    found = []
    for stage in curriculum.stages:
        schedule = stage.schedule
        ends = [0]
        for segment in schedule.segments:
            ends.append(ends[-1] + segment.steps)
        for (a, b), (p, q) in zip(pairwise(schedule.knots), pairwise(schedule.published), strict=True):
            index = next(i for i, end in enumerate(ends[1:]) if p < end or i == len(ends) - 2)
            segment, begin = schedule.segments[index], ends[index]
            # step s of the stage (from 0) has the schedule's t = s + lr_counts_from, and t in (a, b] lies in this
            # piece; t = 0 belongs to the first one
            low = (a if a == 0 and stage.lr_counts_from == 0 else a + 1) - stage.lr_counts_from
            high = min(b - stage.lr_counts_from, stage.steps - 1)
            if high < low:
                continue
            slope = (q - p) / (b - a) / segment.steps
            at = (p + (low + stage.lr_counts_from - a) * (q - p) / (b - a) - begin) / segment.steps
            first = stage.first_step + low + 1
            found.append(
                Piece(first, stage.first_step + high + 1, segment.start, segment.end, segment.shape, at, slope)
            )
    return found


def lr_of(pieces: Sequence[Piece], step: Tensor) -> Tensor:
    """Base learning rate, fp32, at a global step (from 1, a scalar integer tensor); behind the end, the last value."""
    lr = None
    for piece in pieces:
        # integers up to here: fp32 would not tell steps beyond 16.7 M apart
        inside = torch.clamp(step, piece.first, piece.last) - piece.first
        x = inside.to(torch.float32) * piece.slope + piece.at
        if piece.shape == "cosine":
            x = (1 - torch.cos(x * math.pi)) * 0.5
        elif piece.shape == "sqrt":
            x = torch.sqrt(x)
        value = x * (piece.end - piece.start) + piece.start
        lr = value if lr is None else torch.where(step < piece.first, lr, value)
    return lr
