"""`crystal train`: prepare, build, train, with a progress bar; then the plot of what happened."""

from __future__ import annotations

from rich.console import Console

from crystal.config import ConfigError
from crystal.curriculum import Curriculum, Stage
from crystal.data.store import TokenStore
from crystal.progress import Bar, has_bar
from crystal.run import RunFile, prepare_run
from crystal.training.loop import Outcome, Trainer


class _Bar:
    """A bar for the whole run on a terminal, a line now and then elsewhere; notes above it."""

    def __init__(self, console: Console):
        self.console = console
        self.progress = Bar(console)
        self.task = self.progress.add_task("", total=None, numbers="")
        self.stop = 0

    def begin(self, curriculum: Curriculum, step: int, stop: int) -> None:
        self.stop = stop
        self.progress.update(self.task, total=stop, completed=step)

    def step(self, stage: Stage, record: dict) -> None:
        loss = f"{record['loss']:.3f}" if record["applied"] else "not finite"
        numbers = f"loss {loss}  {record['tokens_per_second']:,.0f} tok/s"
        where = f"stage {stage.index + 1} {stage.name}"
        self.progress.update(self.task, completed=record["step"], description=where, numbers=numbers)
        if not has_bar(self.console) and record["step"] % max(self.stop // 20, 1) == 0:
            self.console.print(f"{where}: step {record['step']}/{self.stop}  {numbers}", highlight=False, markup=False)
        if "val_loss" in record:
            losses = "  ".join(f"{source} {value:.3f}" for source, value in record["val_loss"].items())
            self.note(f"{where}: step {record['step']}  validation  {losses}")

    def note(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False)


def start(run: RunFile, stage: int | None, until: int | None, console: Console) -> Outcome:
    """Train what the run file says; stage (from 1) and until narrow it. Raises ConfigError."""
    if until is not None and until < 1:
        raise ConfigError(f"--until: expected a step from 1, got {until}")
    store = TokenStore.open(prepare_run(run, console))
    bar = _Bar(console)
    trainer = Trainer(run, store, bar)
    chosen = None if stage is None else trainer.curriculum.numbered(stage)
    with bar.progress:
        outcome = trainer.train(chosen, until)
    if trainer.writes:
        from crystal.training.plots import plot_losses

        plot_losses(outcome.directory, trainer.curriculum)
    return outcome
