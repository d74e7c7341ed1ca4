"""The backend protocol: who owns a training step.

The loop hands over micro-batches and gets a result; it never calls backward, never touches a device and never
waits for one. A backend is built from a `Setup` and from then on holds the weights: `cpu` is the reference that
the others are held to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from crystal.zoo.decoder import Decoder

if TYPE_CHECKING:
    from crystal.backends.config import OptimizerConfig
    from crystal.curriculum.stages import Curriculum
    from crystal.mup.plan import Plan
    from crystal.zoo.config import ModelConfig

Schedule = Callable[[int], float]  # optimizer step (global, from 1) → base lr


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    ids_BT, labels_BT int64; weights_BT fp32: what each label counts in the step's loss, 1/(global_batch_size *
    seq_len), or 0 where masked; sources_B int64: index of each row's source; documents_BT int64: number of each
    token's document in its row.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    weights_BT: Tensor
    sources_B: Tensor
    documents_BT: Tensor


@dataclass(frozen=True)
class StepResult:
    """What a step gives back; tensors stay where they are until `host` asks for them.

    loss: the published normalisation (masked sum / (global_batch_size * seq_len)); source_nll_S and
    source_tokens_S: summed nats and unmasked tokens of each source; grad_norm before clipping; applied: 1 when
    the update was made, 0 when loss or gradient was not finite and it was left out.
    """

    loss: Tensor
    grad_norm: Tensor
    applied: Tensor
    source_nll_S: Tensor
    source_tokens_S: Tensor

    def host(self) -> dict:
        """Plain Python numbers: loss, grad_norm, applied, source_nll and source_tokens (lists by source)."""
        return {
            "loss": self.loss.item(),
            "grad_norm": self.grad_norm.item(),
            "applied": bool(self.applied.item()),
            "source_nll": self.source_nll_S.tolist(),
            "source_tokens": self.source_tokens_S.tolist(),
        }


@dataclass(frozen=True)
class Place:
    """Which of a backend's processes this is. All take the same steps; process 0 writes the run's files.

    part, parts: of each step's rows this process reads the part-th (from 0) of `parts` equal parts; processes that
    hold pieces of one model read the same part. background: `state` gives copies, so that a checkpoint is written
    while training goes on.
    """

    process: int = 0
    processes: int = 1
    part: int = 0
    parts: int = 1
    background: bool = False


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor that several processes hold together: values begin at `offset` of the whole `shape`."""

    values: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the values lie in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.values.shape, strict=True))


def started_processes() -> int:
    """How many processes torchrun started, whether or not they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Setup:
    """What every backend is built from.

    schedule: base learning rate by step, from 1. curriculum: the one that has it, for a backend that compiles its
    pieces; None where there is none, as in a benchmark. n_sources: of the data, whose losses are told apart.
    """

    model: ModelConfig
    plan: Plan
    optimizer: OptimizerConfig
    schedule: Schedule
    seed: int
    n_sources: int
    curriculum: Curriculum | None = None


class Prepared:
    """A backend that remembers its setup."""

    def keep(self, setup: Setup) -> None:
        self.model_config, self.plan, self.optimizer_config = setup.model, setup.plan, setup.optimizer
        self.schedule, self.seed, self.n_sources = setup.schedule, setup.seed, setup.n_sources


class OneProcess(Prepared):
    """What a backend in one process says of processes."""

    place = Place()

    def agree(self, *numbers: int) -> tuple[int, ...]:
        return numbers


class Backend(Protocol):
    """Everything the loop may ask for."""

    place: Place

    def agree(self, *numbers: int) -> tuple[int, ...]:
        """Each number's largest over all processes, which meet here: a signal to one of them stops all."""

    def initialise(self) -> None:
        """Fill the weights from the plan and the seed; moments zero."""

    def reset_optimizer(self) -> None:
        """Fresh moments and bias correction (CrystalCoder's stage 3 starts so)."""

    def train_step(self, step: int, micro_batches: Iterable[MicroBatch]) -> StepResult:
        """Forward, backward, clip and update at lr(step); step is global, from 1."""

    def eval_step(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(summed nats, unmasked tokens) of each source, as in StepResult; changes nothing."""

    def state(self) -> Iterator[tuple[str, Tensor | Part]]:
        """All that this process saves, fp32, one at a time: model.*, optimizer.exp_avg.*, optimizer.exp_avg_sq.*."""

    def scalars(self) -> dict:
        """What else must be saved: {"optimizer_step": int}."""

    def load(self, tensors: Callable[..., Iterable[tuple[str, Tensor]]], scalars: dict | None) -> None:
        """Take weights (and, unless scalars is None, moments) from a checkpoint.

        tensors(prefix) reads all of it under that prefix, tensors(prefix, {name: slices}) only what lies there.
        """

    def decoder(self) -> Decoder:
        """A decoder with the current fp32 weights, for generation; not a copy where that can be avoided."""

    def groups(self) -> Sequence[dict]:
        """The optimizer's own groups: {name, tensors, lr_multiplier, weight_decay, eps}, to check against the plan."""

    def describe(self) -> dict:
        """What it runs on and can do: dtypes, exact clipping, accumulation, layouts."""


@runtime_checkable
class Durable(Protocol):
    """A backend whose weights and moments lie on disk anyway: its store is the checkpoint."""

    def position(self) -> int | None:
        """The step that its store stands at, to go on from without loading; None for a store that holds nothing."""

    def result(self) -> dict | None:
        """`StepResult.host` of the step at `position`, None when that was made elsewhere."""

    def seal(self) -> Path | None:
        """Bring the store to the last step, whole, and name its directory; None where a checkpoint is to be a copy."""


def add_sources(batch: MicroBatch, nll_BT: Tensor, nll_S: Tensor, tokens_S: Tensor) -> None:
    """Add a micro-batch's losses [B, T], and the tokens that count, to the sums of each row's source [S]."""
    counted_BT = (batch.weights_BT > 0).float()
    nll_S.index_add_(0, batch.sources_B, (nll_BT * counted_BT).sum(1).to(nll_S.dtype))
    tokens_S.index_add_(0, batch.sources_B, counted_BT.sum(1).to(tokens_S.dtype))
