"""The training loop: steps through a curriculum on a backend, and writes everything down.

It knows stages, validation, checkpoints and signals; it does not know devices. Of processes it knows that there may
be others in step with this one, and that one of them writes. All it carries from step to step is
the step's number: the batch, the learning rate and the stage follow from it, the weights and moments are the
backend's. So a run that was killed anywhere goes on from its last checkpoint to the same losses, bit for bit.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crystal import checkpoint
from crystal.backends.base import Durable, Setup
from crystal.backends.create import create
from crystal.backends.machine import keep_choices
from crystal.curriculum.resolve import resolve
from crystal.curriculum.stages import Curriculum, Stage
from crystal.data.store import TokenStore
from crystal.errors import CheckpointError, ConfigError, RunError
from crystal.files import reason
from crystal.memory import peak_rss_bytes
from crystal.run import RunFile
from crystal.training import post_mortem
from crystal.training.batches import Batches
from crystal.training.cadence import Cadence
from crystal.training.guards import BadSteps, Interrupts, plan_differences
from crystal.training.metrics import Metrics, NoMetrics, event, read_metrics
from crystal.training.patience import Patience
from crystal.training.rank_log import logged
from crystal.training.record import open_run, recorded_choices, with_recorded_dtype
from crystal.training.saving import Saver


class Display(Protocol):
    """What the loop tells the screen."""

    def begin(self, curriculum: Curriculum, step: int, stop: int) -> None: ...

    def step(self, stage: Stage, record: dict) -> None: ...

    def doing(self, what: str) -> AbstractContextManager: ...

    def stopping(self) -> None: ...

    def note(self, text: str) -> None: ...


# Scores of a checkpoint's directory by name, made while its run waits; asked in every process of the run.
Evaluator = Callable[[Path], dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `interrupted` is the signal's name, or None."""

    directory: Path
    step: int
    interrupted: str | None
    peak_rss_bytes: int  # of the process that had most
    tokens_per_second: float  # over the steps of this start, validation and saving left out


class Trainer:
    """One start of a run. `position` is the number of steps done."""

    def __init__(
        self,
        run: RunFile,
        store: TokenStore,
        display: Display,
        evaluator: Evaluator | None = None,
        like: Path | None = None,
    ):
        """like: another run's directory, whose measured choices are kept to where this run has none of its own."""
        run = with_recorded_dtype(run)
        config = run.config
        self.run, self.config, self.store, self.display = run, config, store, display
        self.evaluator, self.unscored = evaluator, None  # a checkpoint that is to be evaluated when it is whole
        self.curriculum = resolve(config.curriculum, run.source, store.sources)
        vocab_size = store.manifest["tokenizer"]["vocab_size"]
        if vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"{run.where('model', 'vocab_size')}: expected {vocab_size}, the tokenizer's padded vocabulary, "
                f"got {config.model.vocab_size}"
            )
        train = config.train
        self.batches = Batches(self.curriculum, store, train.seed, train.micro_batch_size, train.without)
        for stage in self.curriculum.stages:  # a stage without data is a mistake to hear of now, not days from now
            self.batches.order(stage)
        self.plan = config.plan()
        recorded = recorded_choices(config.directory) or (recorded_choices(like) if like else [])
        self.choices = keep_choices(config.backend, recorded)
        setup = Setup(
            config.model, self.plan, config.optimizer, self.curriculum.base_lr, config.train.seed,
            len(self.batches.sources), self.curriculum,
        )  # fmt: skip
        self.backend = create(
            setup, config.backend, config.directory, self.curriculum.global_batch_size, config.train.micro_batch_size
        )
        if problems := plan_differences(self.plan, self.backend.groups()):
            raise RuntimeError(f"the optimizer does not follow the parameter plan: {problems[0]}")
        self.batches.part, self.batches.parts = self.backend.place.part, self.backend.place.parts
        self.writes = self.backend.place.process == 0  # the run's files; the others only take steps
        self.directory = config.directory
        self.saver = Saver(self.backend)
        self.checkpoints = self.directory / "checkpoints"
        self.tokenizer_file = store.directory / store.manifest["tokenizer"]["path"]
        self.position = 0
        self.judging = 0.0  # seconds of the longest validation or evaluation so far: no stop signal cuts one short
        self.held = False  # the backend's store stood there already

    def resume(self, stage: Stage | None) -> None:
        """Take up the newest checkpoint (of `stage`, or the end of the one before it), or start afresh."""
        if self.writes:
            checkpoint.sweep(self.checkpoints)
        self.saver.meet()
        found = checkpoint.steps(self.checkpoints)
        held = self._held()
        found = sorted({*found, *([] if held is None else [held])})
        if stage is not None:
            last = stage.first_step + stage.steps
            found = [s for s in found if stage.first_step <= s <= last]
            if stage.first_step and not found:
                raise CheckpointError(
                    f"{self.directory}: expected the checkpoint at the end of stage {stage.index}, "
                    f"step {stage.first_step}; train that stage first"
                )
        if not found:
            with self.display.doing("initializing the weights"):
                self.backend.initialise()
            return
        self.position = found[-1]
        self.display.note(f"continuing from step {self.position}")
        if self.position == held:
            self.held = True
            return
        saved = checkpoint.read(checkpoint.step_directory(self.checkpoints, self.position))
        if saved.state.get("backend") is None:
            raise CheckpointError(f"{saved.directory}: expected a checkpoint of this run, it has no optimizer state")
        saved.expect_model(self.config.model)
        with self.display.doing(f"reading {saved.directory.name}"):
            self.backend.load(saved.tensors, saved.state["backend"])

    def _held(self) -> int | None:
        """The step that the stores of all processes stand at; None where there is none that all do.

        A process that died before it had sealed a step left its store one behind. Raises CheckpointError where that
        leaves nothing to go on from.
        """
        if not isinstance(self.backend, Durable):
            return None
        held = self.backend.position()
        number = -1 if held is None else held
        last, first = self.backend.agree(number, -number)
        if last == -first:
            return held
        if not checkpoint.steps(self.checkpoints):
            raise CheckpointError(
                f"{self.directory}: expected the stores of all processes at one step, they stand at {-first} to "
                f"{last}, and there is no checkpoint to go back to (backend.full_checkpoints=true makes some)"
            )
        return None

    def train(self, stage: Stage | None = None, until: int | None = None) -> Outcome:
        """Run to the end of the curriculum, of `stage`, or to global step `until`. Raises ConfigError.

        The caller holds the run directory (`alone_in`).
        """
        try:
            return self._train(stage, until)
        except OSError as error:
            file = error.filename or self.directory
            raise RunError(f"{file}: the run cannot be recorded: {reason(error)}", file=file) from None

    def _train(self, stage: Stage | None, until: int | None) -> Outcome:
        if self.writes:
            open_run(self.run, self.plan, self.store, self.backend.describe(), self.choices)
            if dead := post_mortem.of_the_last_start(self.directory):
                self._event("death", **{key: dead[key] for key in ("process", "host", "restart", "how")})
        self.saver.meet()  # the directory is there, and what it says of the last start has been read
        with logged(self.directory, self.backend.place, lambda: self.position):
            return self._train_in_step(stage, until)

    def _train_in_step(self, stage: Stage | None, until: int | None) -> Outcome:
        self.resume(stage)
        start, stop = self.position, self.curriculum.steps if stage is None else stage.first_step + stage.steps
        stop = min(stop, until) if until is not None else stop
        if start >= stop and not self.held:
            return Outcome(self.directory, start, None, peak_rss_bytes(), 0.0)
        self._event("start", step=start, stop=stop, backend=self.backend.describe())
        train, busy = self.config.train, 0.0
        cadence = Cadence(train.eval_every, train.checkpoint_every, stop)
        metrics = Metrics(self.directory, start or None) if self.writes else NoMetrics()
        try:
            with Interrupts(self.display.stopping) as interrupts:
                interrupted = None if start else self._first_validation(interrupts, metrics)
                if not interrupted:
                    if self.held and start:
                        self._catch_up(cadence, metrics)
                    self.display.begin(self.curriculum, start, stop)
                    interrupted, busy = self._steps(cadence, interrupts, metrics)
                self.saver.finish()
                if not interrupted:
                    self._evaluate(metrics)
                # no process leaves before the run is whole: torchrun ends the others when one has left
                received = interrupts.agreed(self.saver.meet(interrupts.received))
                if received and not interrupted:  # while the last step was saved
                    interrupted = self._interrupted(received)
        finally:
            metrics.close()
        tokens = (self.position - start) * self.curriculum.global_batch_size * self.curriculum.seq_len
        peak = self.backend.agree(peak_rss_bytes())[0]  # of the process that had most
        rate = tokens / busy if busy else 0.0
        self._event("stop", step=self.position, peak_rss_bytes=peak, tokens_per_second=round(rate, 1))
        return Outcome(self.directory, self.position, interrupted, peak, rate)

    def _steps(
        self, cadence: Cadence, interrupts: Interrupts, metrics: Metrics | NoMetrics
    ) -> tuple[str | None, float]:
        """Every step to the last of this start, or to a signal: (its name, seconds that steps alone took)."""
        guard, patience, busy = BadSteps(self.config.train.max_bad_steps), Patience(), 0.0
        since = time.perf_counter()
        for micro_batches in self.batches.ahead(self.position, cadence.stop - 1):
            stage = self.curriculum.stage_at(self.position)
            if self.position == stage.first_step:
                self._enter(stage)
            record, seconds = self._step(stage, micro_batches, since)
            busy += seconds
            if cadence.validates(stage, self.position):
                record["val_loss"] = self.validate()
            metrics.write(record)
            self.display.step(stage, record)
            if warning := patience.warning(seconds, self.saver.seconds, self.judging):
                self.display.note(f"note: {warning}")
            if not guard.go_on(record["applied"]):
                self.saver.finish()
                raise RunError(
                    f"{self.directory}: {guard.in_a_row} steps in a row up to step {self.position} gave a loss or "
                    f"gradient that is not finite; try a lower lr or backend.dtype=fp32 in another run_dir"
                )
            received = interrupts.agreed(self.saver.meet(interrupts.received))
            if cadence.saves(stage, self.position, record["applied"], bool(received)):
                self.save(stage, cadence.ends(stage, self.position), drop_old=record["applied"])
            if received:
                return self._interrupted(received), busy
            self._evaluate(metrics)
            since = time.perf_counter()
        return None, busy

    def _evaluate(self, metrics: Metrics | NoMetrics) -> None:
        """Ask the evaluator about the newest checkpoint, once it is on the disk."""
        if self.evaluator is None or self.unscored is None or self.saver.writing is not None:
            return
        directory, self.unscored = self.unscored, None
        began = time.perf_counter()
        if (directory / checkpoint.SEAL).is_file():
            with self.display.doing(f"evaluating {directory.name}"):
                scores = self.evaluator(directory)
            step = checkpoint.read(directory).state["step"]
            self._event("evaluation", step=step, scores=scores)
            metrics.scores(step, scores)
            said = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
            self.display.note(f"step {step}  evaluation  {said}")
        self.judging = max(self.judging, time.perf_counter() - began)

    def _interrupted(self, number: int) -> str:
        name = signal.Signals(number).name
        self._event("interrupted", step=self.position, signal=name)
        return name

    def _catch_up(self, cadence: Cadence, metrics: Metrics | NoMetrics) -> None:
        """Record and save the step that the store stands at, where the process before ended in between."""
        stage, result = self.curriculum.stage_at(self.position - 1), self.backend.result()
        recorded = max((record["step"] for record in read_metrics(self.directory)), default=0)
        if recorded < self.position and result is not None:
            record = self._record(stage, result)
            if cadence.validates(stage, self.position):
                record["val_loss"] = self.validate()
            metrics.write(record)
        if cadence.ends(stage, self.position):
            self.save(stage, True)

    def _enter(self, stage: Stage) -> None:
        """Cross into a stage: its first step is next."""
        if stage.index and not stage.carry_optimizer:
            self.backend.reset_optimizer()
        self._event("stage", step=self.position, name=stage.name, optimizer_carried=stage.carry_optimizer)

    def _step(self, stage: Stage, micro_batches: list, since: float) -> tuple[dict, float]:
        self.saver.move_on(self.checkpoints)
        result = self.backend.train_step(self.position + 1, micro_batches).host()
        seconds = time.perf_counter() - since  # waiting for the batch counts
        self.position += 1
        if not result["applied"]:
            self._event("update_left_out", step=self.position, loss=str(result["loss"]))
        return self._record(stage, result, seconds), seconds

    def _record(self, stage: Stage, result: dict, seconds: float | None = None) -> dict:
        """The line of metrics.jsonl of the step just made."""
        step_tokens = stage.global_batch_size * stage.seq_len
        return {
            "step": self.position,
            "stage": stage.index + 1,
            "loss": result["loss"],
            "lr": self.curriculum.base_lr(self.position),
            "grad_norm": result["grad_norm"],
            "applied": result["applied"],
            "tokens": self.position * step_tokens,
            "tokens_per_second": round(step_tokens / seconds, 1) if seconds else None,
            "source_loss": self._by_source(result["source_nll"], result["source_tokens"]),
        }

    def validate(self, go_on: Callable[[], bool] = lambda: True) -> dict[str, float]:
        """Mean loss per held-out token of every source, in nats. go_on: asked after every batch."""
        nll_S, tokens_S, began = None, None, time.perf_counter()
        for number, batch in enumerate(self.batches.validation(self.config.train.eval_rows), 1):
            with self.display.doing(f"validating, batch {number}"):
                nll, tokens = self.backend.eval_step(batch)
            nll_S = nll if nll_S is None else nll_S + nll
            tokens_S = tokens if tokens_S is None else tokens_S + tokens
            if not go_on():
                break
        self.judging = max(self.judging, time.perf_counter() - began)
        return {} if nll_S is None else self._by_source(nll_S.tolist(), tokens_S.tolist())

    def _first_validation(self, interrupts: Interrupts, metrics: Metrics | NoMetrics) -> str | None:
        """Judge the initial weights; a signal's name, if one cut that short: there is nothing to save yet."""
        received = 0

        def go_on() -> bool:
            nonlocal received
            received = interrupts.agreed(self.saver.meet(interrupts.received))
            return not received

        losses = self.validate(go_on)
        if received:
            return self._interrupted(received)
        metrics.write({"step": 0, "stage": 1, "val_loss": losses})
        return None

    def _by_source(self, nll: list[float], tokens: list[float]) -> dict[str, float]:
        return {s: n / t for s, n, t in zip(self.batches.sources, nll, tokens, strict=True) if t}

    def save(self, stage: Stage, stage_ended: bool, drop_old: bool = True) -> None:
        """Write the checkpoint of this step; when it is whole, list it and drop those that need not be kept."""
        directory = checkpoint.step_directory(self.checkpoints, self.position)
        if self.position in checkpoint.steps(self.checkpoints):
            return
        state = {
            "step": self.position,
            "stage": stage.name,
            "stage_ended": stage.index + 1 if stage_ended else None,
            "model": self.config.model.model_dump(mode="json"),
            "optimizer": self.config.optimizer.model_dump(mode="json"),
            "backend": self.backend.scalars(),
            "tokenizer": self.tokenizer_file.name,
            "added_tokens": self.store.manifest["tokenizer"]["added_tokens"],
            "bos": self.config.data.bos,
        }

        def sealed() -> None:
            event(self.directory, "checkpoint", step=state["step"], path=directory.name)
            keep = self.config.train.keep_checkpoints
            if keep is not None and drop_old:
                ends = {s.first_step + s.steps for s in self.curriculum.stages}
                for old in [s for s in checkpoint.steps(self.checkpoints) if s not in ends][:-keep]:
                    checkpoint.remove(checkpoint.step_directory(self.checkpoints, old))

        with self.display.doing(f"saving {directory.name}"):
            self.saver.save(directory, state, [self.tokenizer_file], sealed)
        self.unscored = directory

    def _event(self, kind: str, **details) -> None:
        if self.writes:
            event(self.directory, kind, **details)
