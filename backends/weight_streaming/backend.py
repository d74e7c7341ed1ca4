"""The weight-streaming backend: a training step over a store, one piece of the model in memory at a time.

A step's update is not made at its end. The gradients are spilled, their global norm is known when the last one is
there, and the update, clipped exactly, is made piece by piece while the next forward pass reads the weights. Until
then it is due; whatever needs the weights first (a checkpoint, validation, a change of stage) has it made first.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from crystal.backends.base import MicroBatch, Place, Prepared, Setup, StepResult, add_sources, started_processes
from crystal.backends.config import WeightStreamingConfig
from crystal.backends.machine import with_dtype
from crystal.backends.weight_streaming.boundaries import Boundaries, load_boundaries
from crystal.backends.weight_streaming.executor import Executor
from crystal.backends.weight_streaming.gradients import Gradients
from crystal.backends.weight_streaming.reduce import (
    executors,
    join_executors,
    largest_over_executors,
    rank,
    summed_over_executors,
)
from crystal.backends.weight_streaming.store import Store, Update
from crystal.backends.weight_streaming.store_layout import Piece
from crystal.backends.weight_streaming.stream import Stream
from crystal.backends.weight_streaming.update import Updater
from crystal.errors import ConfigError
from crystal.kernels import tuning
from crystal.memory import release_heap
from crystal.mup.plan import Plan
from crystal.zoo.build import build, initial_tensor
from crystal.zoo.decoder import Decoder


class WeightStreamingBackend(Prepared):
    """See `Backend` and `Durable` for the methods."""

    def __init__(
        self,
        setup: Setup,
        config: WeightStreamingConfig,
        directory: Path,
        micro_batches: int = 1,
    ):
        """directory: the run's; micro_batches: how many a step has, at most. Raises ConfigError, writing nothing, for
        a store that is another run's, or a disk that is too small."""
        if config.gradients == "recomputed" and started_processes() > 1:
            raise ConfigError("backend.gradients: several executors sum them, expected spilled, got recomputed")
        if config.threads:
            torch.set_num_threads(config.threads)
        config = with_dtype(config)
        join_executors()
        self.place = Place(process=rank(), processes=executors(), part=rank(), parts=executors())
        self.keep(setup)
        self.config = config
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        sums = dtype == torch.float32 or micro_batches > 1 or executors() > 1
        self.store = Store(
            self.plan, _store_directory(config, directory), config.moments, torch.float32 if sums else torch.bfloat16,
            owner=str(directory.absolute()) if config.path else "", spilled=config.gradients == "spilled",
            identity=directory / ("store.id" if executors() == 1 else f"store-{rank()}.id"),
        )  # fmt: skip
        self.store.check_room()
        self.updater = Updater(self.plan, self.optimizer_config)
        ring = None if config.buffers_gb is None else int(config.buffers_gb * 1e9)
        self.stream = Stream(self.store, self.updater, dtype, ring)
        self.executor = Executor(build(self.model_config, self.plan), self.stream, Gradients(self.store, self.stream))
        record = self.store.record
        self.step, self.optimizer_step, self.sealed = record.step, record.optimizer_step, True
        self._result = record.result
        self.update = record.update if record.due else None  # due, not made yet
        self.boundaries: Boundaries | None = None  # of the step whose update is due, where gradients are recomputed

    def agree(self, *numbers: int) -> tuple[int, ...]:
        return largest_over_executors(*numbers)

    # --- training

    def train_step(self, step: int, micro_batches: Iterable[MicroBatch]) -> StepResult:
        batches = list(micro_batches)
        self._check(batches)
        if self.step is None:  # weights that were loaded
            self.step = step - 1
        self._seal()
        loss = torch.zeros(())
        nll_S, tokens_S = torch.zeros(self.n_sources), torch.zeros(self.n_sources)
        spilled = self.store.layout.spilled
        groups = self._that_fit(batches) if spilled else [batches]
        coming = None if spilled else Boundaries(batches)
        for i, group in enumerate(groups):
            results = self.executor.train(group, self._weights(), i == 0, i == len(groups) - 1, coming)
            for batch, (part, nll_BT) in zip(group, results, strict=True):
                loss += part
                add_sources(batch, nll_BT, nll_S, tokens_S)
        norms = self.executor.gradients.norms
        norm = torch.linalg.vector_norm(torch.stack([norms[row.tensor] for row in self.plan.tensors]))
        loss, nll_S, tokens_S = summed_over_executors(loss, nll_S, tokens_S)
        applied = torch.isfinite(norm) & torch.isfinite(loss)
        if applied:
            clip = self.optimizer_config.grad_clip
            scale = clip / norm.item() if clip is not None and norm > clip else None
            self.optimizer_step += 1
            self.update = Update(self._updates() + 1, self.optimizer_step, self.schedule(step), scale)
        result = StepResult(loss, norm, applied, nll_S, tokens_S)
        self.boundaries = coming
        self.step, self.sealed, self._result = step, False, result.host()
        return result

    @torch.no_grad()
    def eval_step(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        self._seal()
        nll_S, tokens_S = torch.zeros(self.n_sources), torch.zeros(self.n_sources)
        add_sources(batch, self.executor.evaluate(batch, self._weights()), nll_S, tokens_S)
        return summed_over_executors(nll_S, tokens_S)

    def _weights(self) -> Iterator[tuple[Piece, Tensor]]:
        """All pieces in forward order; an update that is due is made on the way."""
        self.stream.open()
        if self.update is None:
            yield from self.stream.weights(self.store.layout.pieces)
        else:
            yield from self.stream.updated(self.update, None if self.store.layout.spilled else self._gradient)
            self.update = self.boundaries = None

    def _gradient(self, piece: Piece, weights: Tensor, into: Tensor) -> None:
        if self.boundaries is None:  # another process took the step
            self.boundaries = load_boundaries(self.store.directory, self.store.record.boundaries)
        self.executor.gradient(piece, weights, into, self.boundaries)

    def _that_fit(self, batches: list[MicroBatch]) -> list[list[MicroBatch]]:
        """Micro-batches in groups whose kept activations (each block's input) fit into the budget."""
        width = self.model_config.d_model * (self.model_config.n_layers + 1) * self.stream.dtype.itemsize
        groups, room = [], 0.0
        for batch in batches:
            size = batch.ids_BT.numel() * width
            if not groups or size > room:
                groups.append([])
                room = self.config.activations_gb * 1e9
            groups[-1].append(batch)
            room -= size
        return groups

    def _check(self, batches: list[MicroBatch]) -> None:
        if len(batches) > 1 and self.store.layout.gradient.dtype != torch.float32:
            raise ConfigError("weight_streaming: expected one micro-batch a step, as when the store was made")

    # --- what is due, and what lasts

    def _updates(self) -> int:
        return max(self.store.record.updates.values())

    def _seal(self) -> None:
        """Have the store stand at the last step, its update due: from here on, that step is not lost."""
        if not self.sealed and self.step is not None:
            total = None
            if self.boundaries is not None and self.update is not None and self.store.directory is not None:
                self.store.open()  # from here on it is this process's
                total = self.boundaries.save(self.store.directory)
            self.store.seal(self.step, self.optimizer_step, self.update, self._result, total)
            self.sealed = True

    def _settle(self) -> None:
        """Make the update that is due, if one is."""
        self._seal()
        if self.update is not None:
            deque(self._weights(), maxlen=0)  # the pass over the weights makes the update

    def position(self) -> int | None:
        return self.step

    def result(self) -> dict | None:
        return self._result

    def seal(self) -> Path | None:
        if self.store.directory is None or self.config.full_checkpoints:
            return None
        self._settle()
        return self.store.directory.absolute()

    # --- coming and going

    def initialise(self) -> None:
        self.load(lambda kind: _initial_weights(self.plan, self.seed), None)
        self.step = 0

    def reset_optimizer(self) -> None:
        self._settle()
        self.optimizer_step, self.sealed = 0, False
        self._seal()

    @torch.no_grad()
    def load(self, tensors: Callable[..., Iterable[tuple[str, Tensor]]], scalars: dict | None) -> None:
        self.store.unseal()
        self.step, self.update, self._result, self.sealed = None, None, None, False
        self.store.put("model", tensors("model"))
        self.optimizer_step = 0 if scalars is None else scalars["optimizer_step"]
        if self.optimizer_step:
            for kind in ("optimizer.exp_avg", "optimizer.exp_avg_sq"):
                self.store.put(kind, tensors(kind))
        release_heap()  # whole tensors were there; the stream's buffers come now

    def state(self) -> Iterator[tuple[str, Tensor]]:
        self._settle()
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            for name, tensor in self.store.tensors(kind, self.optimizer_step == 0):
                yield f"{kind}.{name}", tensor

    def scalars(self) -> dict:
        return {"optimizer_step": self.optimizer_step}

    def decoder(self) -> Decoder:
        self._settle()
        decoder = build(self.model_config, self.plan)
        decoder.load_state_dict(dict(self.store.tensors("model", fresh=False)), assign=True)
        return decoder

    def groups(self) -> Sequence[dict]:
        return self.updater.groups

    def describe(self) -> dict:
        return {
            "name": "weight_streaming",
            "device": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "compute_dtype": self.config.dtype,
            "choices": tuning.choices(),
            "weights_dtype": "fp32",
            "moments_dtype": self.config.moments,
            "store": self.config.store,
            "store_bytes": self.store.layout.store_bytes + self.store.layout.gradient_bytes,
            "buffer_bytes": self.stream.bytes,
            "exact_clipping": True,
            "gradient_accumulation": True,
            "executors": executors(),
            "layouts": ["data parallel, a store each"],
        }


def _initial_weights(plan: Plan, seed: int, workers: int = 2) -> Iterator[tuple[str, Tensor]]:
    """As `crystal.zoo.build.initial_weights`; a generator is serial, so several tensors are drawn at a time."""
    rows = deque(plan.tensors)
    coming: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while rows or coming:
            while rows and len(coming) < 2 * workers:
                coming.append((rows[0].tensor, pool.submit(initial_tensor, rows.popleft(), seed)))
            name, tensor = coming.popleft()
            yield name, tensor.result()


def _store_directory(config: WeightStreamingConfig, directory: Path) -> Path | None:
    if config.store == "memory":
        return None
    base = config.path or directory / "store"
    return base / f"executor-{rank()}" if executors() > 1 else base
