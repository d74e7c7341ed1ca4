"""A curriculum ready to train by: stages with their steps, weights, rows and learning rates, plain and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from crystal.curriculum.config import split_entry
from crystal.curriculum.schedule import Schedule
from crystal.data.order import StageOrder
from crystal.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """One stage at the run's scale. Steps count from 0 inside the stage, except in `lr_at`."""

    name: str
    index: int
    steps: int
    first_step: int  # global step number of its step 0
    seq_len: int
    global_batch_size: int
    weights: dict[str, float]  # by published name, summing to 1
    bound: dict[str, float]  # by store source, with a row range where it has one; summing to 1
    schedule: Schedule
    lr_counts_from: int
    fim_rate: float  # the stage's figure; what a source gets is in fim_rates
    fim_rates: dict[str, float]  # by store source
    spm_rate: float
    carry_optimizer: bool
    checkpoint_every: int

    @property
    def tokens(self) -> int:
        """Tokens trained on in the stage."""
        return self.steps * self.global_batch_size * self.seq_len

    def lr_at(self, t: float) -> float:
        """The schedule's value at t, counted as in the published tables (lr(0) = 0 before a warm-up)."""
        return self.schedule(t)

    def lr_for_step(self, step: int) -> float:
        """The base LR that the optimizer step number `step` (from 0) uses: lr(step + lr_counts_from)."""
        return self.schedule(step + self.lr_counts_from)

    def order(self, rows: Mapping[str, int], seed: int) -> StageOrder:
        """The stage's data order. rows: of each store source. Raises ConfigError where there are none."""
        ranges = {}
        for entry in self.bound:
            source, (low, high) = split_entry(entry)
            if source not in rows:
                known = ", ".join(rows)
                raise ConfigError(f"stage {self.name}: expected {source} in the store, it has {known}")
            first, stop = math.floor(low * rows[source]), math.floor(high * rows[source])
            if stop <= first:
                raise ConfigError(f"stage {self.name}: expected rows in {entry}, {source} has {rows[source]}")
            ranges[entry] = range(first, stop)
        return StageOrder(self.bound, ranges, self.global_batch_size, seed, self.name)


@dataclass(frozen=True)
class Curriculum:
    """All stages of a run, end to end."""

    name: str
    seq_len: int
    global_batch_size: int
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(s.steps for s in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(s.tokens for s in self.stages)

    def stage_at(self, global_step: int) -> Stage:
        """The stage that global step number `global_step` (from 0) lies in; the last one behind the end."""
        return next((s for s in reversed(self.stages) if s.first_step <= global_step), self.stages[0])

    def base_lr(self, step: int) -> float:
        """Base LR of global optimizer step `step`, from 1; a pure function of it."""
        stage = self.stage_at(step - 1)
        return stage.lr_for_step(step - 1 - stage.first_step)

    def numbered(self, number: int) -> Stage:
        """Stage `number`, counted from 1 as on the command line. Raises ConfigError."""
        if not 1 <= number <= len(self.stages):
            raise ConfigError(f"--stage: expected 1 to {len(self.stages)}, got {number}")
        return self.stages[number - 1]
