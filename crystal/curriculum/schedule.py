"""Learning rate as a pure function of the step.

A schedule is a list of segments laid end to end, each going from one value to another over a number of steps.
That covers the usual forms: linear warm-up and decay (CrystalCoder), warm-up and cosine (Amber), constant
(one flat segment), warm-up-stable-decay (three segments, the last one linear, cosine or sqrt). A stage may
stop in the middle of a segment, as CrystalCoder's first does; behind the last segment the value stays.

A run at proxy scale keeps the published time axis: its step t is mapped to a published step by a line through
the places where segments meet, so that the peak, the value at the stage's end and the form of every segment
are the published ones, whatever the rounding of step counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """From `start` to `end` over `steps` steps; shape is linear, cosine or sqrt.

    cosine: half a period (Loshchilov & Hutter 2017, eq. 5); sqrt: 1 - sqrt(x), the cool-down of Hägele et al.
    2024.
    """

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def at(self, x: float) -> float:
        """The value at the fraction x in [0, 1] of the segment; exactly `start` at 0 and `end` at 1."""
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        elif self.shape == "sqrt":
            x = math.sqrt(x)
        return self.end if x == 1 else self.start + (self.end - self.start) * x


@dataclass(frozen=True)
class Schedule:
    """`schedule(t)`: the learning rate at t. Made by `fit`.

    knots: own steps at which a segment or the stage ends, from 0; published: the same places on the published
    axis.
    """

    segments: tuple[Segment, ...]
    knots: tuple[int, ...]
    published: tuple[int, ...]

    def __call__(self, t: float) -> float:
        """LR at t >= 0 steps. Where one segment ends and the next starts, the ending one counts."""
        tau = self._published(t)
        begin = 0
        for segment in self.segments:
            if tau <= begin + segment.steps:
                return segment.at((tau - begin) / segment.steps)
            begin += segment.steps
        return self.segments[-1].end

    def _published(self, t: float) -> float:
        """The published step that t stands for."""
        end, published_end = self.knots[-1], self.published[-1]
        if t >= end:
            return published_end + (t - end) * published_end / end
        i = max(1, bisect_left(self.knots, t))
        (a, b), (p, q) = self.knots[i - 1 : i + 1], self.published[i - 1 : i + 1]
        return p + (t - a) * (q - p) / (b - a)


def fit(segments: Sequence[Segment], published_steps: int, steps: int | None = None, min_warmup: int = 1) -> Schedule:
    """The schedule of a stage published with `published_steps` steps, fitted to `steps` (None: the same).

    Places where segments meet are scaled and rounded to whole steps, at least one step apart; a first segment
    that rises gets at least `min_warmup` steps (as far as the stage has room). The stage's end falls on its
    published end.
    """
    steps = published_steps if steps is None else steps
    published, knots = [0], [0]
    for i, segment in enumerate(segments):
        here = published[-1] + segment.steps
        if here >= published_steps:
            break
        warms_up = i == 0 and segment.end > segment.start and steps != published_steps
        shortest = min_warmup if warms_up else 1
        published.append(here)
        knots.append(min(max(knots[-1] + shortest, round(here * steps / published_steps)), max(steps - 1, 1)))
    return Schedule(tuple(segments), (*knots, steps), (*published, published_steps))
