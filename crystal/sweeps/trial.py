"""One trial of a sweep: a small model, trained on the run's real rows, judged on its held-out ones.

Everything but the hyperparameters is the same for all trials of a seed: the rows and their order, the held-out rows,
the shape of the schedule. The same trial gives the same loss, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from crystal.backends.base import Setup
from crystal.backends.config import CpuConfig, OptimizerConfig
from crystal.backends.cpu import CpuBackend
from crystal.curriculum.resolve import resolve
from crystal.data.store import TokenStore
from crystal.run import RunFile, prepare_run
from crystal.training.batches import Batches
from crystal.zoo.config import ModelConfig

DIVERGED = 0.1  # nats above the loss at initialisation


@dataclass(frozen=True)
class Point:
    """What one trial is. values: hyperparameters by name: lr, init_std, embedding_multiplier, output_alpha,
    weight_decay; those that are not given are the model's and optimizer's own."""

    model: ModelConfig
    optimizer: OptimizerConfig
    seed: int
    values: dict[str, float]


@dataclass(frozen=True)
class Length:
    """How long trials are: steps, of which `warmup` rise linearly from 0; then a line down to final_fraction."""

    steps: int
    warmup: int
    final_fraction: float

    def schedule(self, lr: float) -> Callable[[int], float]:
        """Base LR at a step, from 1."""

        def at(step: int) -> float:
            if step <= self.warmup:
                return lr * step / self.warmup
            left = (self.steps - step) / max(self.steps - self.warmup, 1)
            return lr * (self.final_fraction + (1 - self.final_fraction) * left)

        return at


@dataclass(frozen=True)
class Rows:
    """The data of all trials: the run's token store and curriculum, its stage, held-out rows per source."""

    run: RunFile
    stage: int
    eval_rows: int

    @cached_property
    def store(self) -> TokenStore:
        return TokenStore.open(prepare_run(self.run), verify=self.run.config.data.verify)

    def batches(self, seed: int) -> tuple[Batches, int]:
        """(batches, global step at which the stage starts) with rows in the seed's own order."""
        config = self.run.config
        curriculum = resolve(config.curriculum, self.run.source, self.store.sources)
        batches = Batches(curriculum, self.store, seed, config.train.micro_batch_size, config.train.without)
        return batches, curriculum.numbered(self.stage).first_step


def run_trial(point: Point, length: Length, rows: Rows, dtype: str) -> dict:
    """Train and judge. Returns loss (held-out nats a token), diverged, first_loss, steps, seconds, cpu_seconds."""
    began, cpu_began = time.perf_counter(), time.process_time()
    model, optimizer = _with(point)
    plan = optimizer.plan_for(model)
    batches, first = rows.batches(point.seed)
    schedule = length.schedule(point.values["lr"])
    setup = Setup(model, plan, optimizer, schedule, point.seed, len(batches.sources))
    backend = CpuBackend(setup, CpuConfig(dtype=dtype, threads=torch.get_num_threads()))
    backend.initialise()
    held_out = list(batches.validation(rows.eval_rows))
    before, steps = _loss(backend, held_out), 0
    for step in range(1, length.steps + 1):
        result = backend.train_step(step, batches.step(first + step - 1)).host()
        steps = step
        if not result["applied"] or not math.isfinite(result["loss"]):
            break
    loss = _loss(backend, held_out) if steps == length.steps else math.inf
    diverged = not math.isfinite(loss) or loss > before + DIVERGED
    seconds, cpu = round(time.perf_counter() - began, 2), round(time.process_time() - cpu_began, 2)
    return {
        "loss": loss, "diverged": diverged, "first_loss": before, "steps": steps,
        "seconds": seconds, "cpu_seconds": cpu,
    }  # fmt: skip


def _with(point: Point) -> tuple[ModelConfig, OptimizerConfig]:
    """The point's hyperparameters in their places."""
    of_model = {k: v for k, v in point.values.items() if k in ("init_std", "embedding_multiplier", "output_alpha")}
    model = point.model.model_copy(update={"mup": point.model.mup.model_copy(update=of_model)})
    decay = point.values.get("weight_decay", point.optimizer.weight_decay)
    return model, point.optimizer.model_copy(update={"weight_decay": decay})


def _loss(backend: CpuBackend, held_out: list) -> float:
    """Mean nats a token over the held-out rows of all sources."""
    nll, tokens = 0.0, 0.0
    for batch in held_out:
        nll_S, tokens_S = backend.eval_step(batch)
        nll, tokens = nll + nll_S.sum().item(), tokens + tokens_S.sum().item()
    return nll / tokens
