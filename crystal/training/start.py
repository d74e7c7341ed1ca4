"""`crystal train`: prepare, build, train, with a progress bar; then the plot of what happened."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rich.console import Console

from crystal.curriculum.resolve import resolve
from crystal.curriculum.stages import Curriculum, Stage
from crystal.data.store import TokenStore
from crystal.errors import ConfigError
from crystal.output.interrupts import finishing
from crystal.output.progress import Bar
from crystal.output.ranks import is_first
from crystal.run import RunFile, prepare_run
from crystal.training.guards import alone_in
from crystal.training.loop import Evaluator, Outcome, Trainer


class _Screen:
    """What the loop says, on one bar for the whole run; notes above it."""

    def __init__(self, bar: Bar):
        self.bar = bar
        self.where = ""

    def begin(self, curriculum: Curriculum, step: int, stop: int) -> None:
        self._enter(curriculum.stage_at(step))
        self.bar.begin(self.where, stop, step)
        self.bar.keep = True

    def step(self, stage: Stage, record: dict) -> None:
        self._enter(stage)
        loss = f"{record['loss']:.3f}" if record["applied"] else "not finite"
        self.bar.numbers = f"loss {loss}  {record['tokens_per_second']:,.0f} tok/s"
        self.bar.reach(record["step"], self.where)
        if "val_loss" in record:
            losses = "  ".join(f"{source} {value:.3f}" for source, value in record["val_loss"].items())
            self.note(f"{self.where}: step {record['step']}  validation  {losses}")

    def doing(self, what: str) -> contextlib.AbstractContextManager:
        return self.bar.doing(what)

    def stopping(self) -> None:
        self.bar.what = "stopping after this step"

    def note(self, text: str) -> None:
        self.bar.note(text)

    def _enter(self, stage: Stage) -> None:
        self.where = f"stage {stage.index + 1} {stage.name}"


def start(
    run: RunFile,
    stage: int | None,
    until: int | None,
    console: Console,
    evaluator: Evaluator | None = None,
    like: Path | None = None,
) -> Outcome:
    """Train what the run file says; stage (from 1) and until narrow it. evaluator: asked about every checkpoint. like:
    a run whose measured choices a new one keeps to.

    Raises ConfigError.

    The run directory is locked first of all: a second command hears at once that it came second.
    """
    check_until(run, until)
    chosen = None if stage is None else resolve(run.config.curriculum, run.source).numbered(stage)
    with alone_in(run.config.directory) if is_first() else contextlib.nullcontext():
        store = TokenStore.open(prepare_run(run, console), verify=run.config.data.verify)
        with Bar(console, "building the model", lines=20, unit="step") as bar:
            trainer = Trainer(run, store, _Screen(bar), evaluator, like)
            outcome = trainer.train(chosen, until)
            if trainer.writes:
                from crystal.training.plots import plot_losses

                with bar.doing("drawing loss.png"), finishing():
                    plot_losses(outcome.directory, trainer.curriculum)
    return outcome


def check_until(run: RunFile, until: int | None) -> None:
    """Raise ConfigError unless `until` is None or a step of the run."""
    steps = resolve(run.config.curriculum, run.source).steps
    if until is not None and not 1 <= until <= steps:
        raise ConfigError(f"--until: expected a step from 1 to {steps}, the run's last, got {until}")
