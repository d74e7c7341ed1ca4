"""Benchmarks while a run trains: each checkpoint, when it is on the disk, exactly as `crystal eval` would score it.

What trains and what is scored share nothing but the checkpoint's files, so every backend is scored alike, and the run
goes on as if nobody had asked. Processes that train together share the items.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.errors import ConfigError
from crystal.evaluation.evaluate import evaluate, where
from crystal.evaluation.items import Items
from crystal.evaluation.suites import OF_A_RUN, Settings, tasks_of
from crystal.evaluation.task import Task
from crystal.memory import available_bytes
from crystal.run import RunFile
from crystal.zoo.build import parameter_count

if TYPE_CHECKING:
    from rich.console import Console


def evaluator_of(run: RunFile, console: Console) -> Callable[[Path], dict[str, float]]:
    """What `train.evaluate` asks for: from a checkpoint's directory to {TASK: its first metric}.

    Its items are read here, before the first step. Raises ConfigError for a suite that is not known or cannot be had,
    and for a model that does not fit into memory beside its training.
    """
    wanted = run.config.train.evaluate
    needed, free = parameter_count(run.config.model) * 2, available_bytes()
    if free is not None and needed > free:
        raise run.error(
            ("train", "evaluate"),
            f"expected null: the model's {needed / 1e9:.1f} GB in bf16 do not fit into memory beside its training; "
            f"`crystal eval {run.config.directory}` scores its checkpoints on another machine",
        )
    def tasks() -> list[Task]:
        try:
            return tasks_of(wanted.suite, items, Settings(run=run.config.directory))
        except ConfigError as error:
            why = str(error).removeprefix(f"--suite {wanted.suite}: ").removeprefix("--suite: ")
            raise run.error(("train", "evaluate", "suite"), why) from None

    items = Items(wanted.items, console)
    # what asks about the run's own held-out documents has to wait until there is a run
    begun = (run.config.directory / "config.yaml").exists()  # another process may have made the directory by now
    made = tasks() if begun or wanted.suite not in OF_A_RUN else None

    def scores(directory: Path) -> dict[str, float]:
        nonlocal made
        made = made or tasks()
        found = evaluate(where(directory), made, wanted.limit)
        return {result.task: result.first[1].value for result in found}

    return scores
