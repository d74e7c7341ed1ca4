"""Sweeps: which trials there are, where they are kept, and who runs them.

A sweep is a YAML file. Trials live in an optuna study per parametrization, in one SQLite file, so a sweep that was
killed anywhere goes on where it was: what was finished stays, what was running is queued again. Workers are
processes; each takes the next waiting trial from the file, which hands it out once.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from crystal.backends.config import OptimizerConfig
from crystal.config import Config, ConfigError, Strict, find, load_yaml, override, parse
from crystal.interrupts import shielded
from crystal.mup.transfer import Trial
from crystal.run import RunFile, load_run
from crystal.sweep_trial import Length, Point, Rows, run_trial
from crystal.training.guards import alone_in
from crystal.zoo.config import ModelConfig, preset, with_width

Parametrization = Literal["sp", "mup", "crystalcoder", "completep"]
Parameter = Literal["lr", "init_std", "embedding_multiplier", "output_alpha", "weight_decay"]
Count = Annotated[int, Field(gt=0)]


class Range(Strict):
    """Where a hyperparameter is searched: a list of values, or powers of two from low to high in steps."""

    values: tuple[float, ...] | None = None
    log2: tuple[float, float] | None = None
    step: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Range:
        if (self.values is None) == (self.log2 is None):
            raise ValueError("expected either values or log2: [low, high]")
        if self.log2 and self.log2[0] > self.log2[1]:
            raise ValueError(f"log2: expected [low, high], got {list(self.log2)}")
        if self.values is not None and (not self.values or min(self.values) <= 0):
            raise ValueError("values: expected positive numbers")
        return self

    def grid(self) -> list[float]:
        if self.values is not None:
            return sorted(self.values)
        low, high = self.log2
        return [2.0 ** (low + i * self.step) for i in range(math.floor((high - low) / self.step + 1e-9) + 1)]


class Target(Strict):
    """What the result is for: a run file to extend, with the transferred values put in."""

    run: str
    parametrization: Parametrization | None = Field(None, description="null: the sweep's")


class SweepConfig(Strict):
    """The whole of a sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    run: str = Field(description="run file that gives corpus, tokenizer, mix and optimizer")
    set: dict[str, float | int | str | bool] = Field({}, description="overrides of the run")
    stage: Count = 1
    family: str
    parametrization: Parametrization
    beside: tuple[Parametrization, ...] = ()
    base_d_model: Count
    widths: tuple[Count, ...] = Field(min_length=1)
    depths: tuple[Count, ...] = (2,)
    model: dict[str, float | int | str | bool] = Field({}, description="settings of the models' mup section")
    steps: Count
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    final_fraction: float = Field(0.1, ge=0, le=1)
    eval_rows: Count = 16
    dtype: Literal["bf16", "fp32"] = "bf16"
    seeds: tuple[int, ...] = (1, 2, 3)
    sampler: Literal["grid", "random", "tpe"] = "grid"
    trials: Count | None = Field(None, description="random and tpe: points of each width and depth")
    search: dict[Parameter, Range]
    max_shift: float = Field(0.5, gt=0, description="octaves")
    max_regret: float = Field(0.01, gt=0)
    target: Target | None = None

    @model_validator(mode="after")
    def _whole(self) -> SweepConfig:
        if "lr" not in self.search:
            raise ValueError("search: expected lr")
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"trials: expected a number with sampler: {self.sampler}")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep, read: its config, the run it takes its data from, and where its results lie."""

    config: SweepConfig
    source: Config
    run: RunFile
    directory: Path

    @property
    def storage(self) -> str:
        return f"sqlite:///{self.directory / 'trials.sqlite'}"

    @property
    def rows(self) -> Rows:
        return Rows(self.run, self.config.stage, self.config.eval_rows)

    @property
    def length(self) -> Length:
        steps = self.config.steps
        return Length(steps, max(1, round(self.config.warmup_fraction * steps)), self.config.final_fraction)

    @property
    def parametrizations(self) -> tuple[str, ...]:
        return (self.config.parametrization, *self.config.beside)

    def model(self, parametrization: str, width: int, depth: int) -> ModelConfig:
        """The proxy of one width and depth. Raises ConfigError for one that does not exist."""
        model, _ = family(self.config.family)
        mup = {**self.config.model, "parametrization": parametrization, "base_d_model": self.config.base_d_model}
        if parametrization == "completep":
            mup.setdefault("base_n_layers", min(self.config.depths))
        section = model.model_dump() | {
            "n_layers": depth,
            "vocab_size": self.run.config.model.vocab_size,
            "mup": model.mup.model_dump() | mup,
        }
        return with_width(parse(ModelConfig, section, f"{self.source.where(('model',))}: model"), width)

    def decides(self) -> dict:
        """All that decides a trial's loss, but for its own width, seed and hyperparameters."""
        return self.config.model_dump(mode="json", include=set(_DECIDES))

    def fingerprint(self) -> str:
        """sha256 over `decides`."""
        return hashlib.sha256(json.dumps(self.decides(), sort_keys=True).encode()).hexdigest()


_DECIDES = (
    "run set stage family base_d_model model steps warmup_fraction final_fraction eval_rows dtype sampler".split()
)


def load_sweep(path: str, overrides: tuple[str, ...] = (), out: Path | None = None) -> Sweep:
    """Read and check a sweep file. Raises ConfigError, one line, for any mistake in it."""
    source = override(load_yaml(find(path, "sweeps")), overrides)
    config = parse(SweepConfig, source.mapping, source)
    settings = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in config.set.items()]
    sweep = Sweep(config, source, load_run(config.run, settings), out or Path("sweeps") / config.name)
    for parametrization, width, depth in itertools.product(sweep.parametrizations, config.widths, config.depths):
        sweep.model(parametrization, width, depth)
    return sweep


def family(name: str) -> tuple[ModelConfig, OptimizerConfig]:
    """The proxy that a ladder starts from, and its published optimizer."""
    source = preset(f"{name}-proxy")
    return (
        parse(ModelConfig, source.mapping["model"], source, ("model",)),
        parse(OptimizerConfig, source.mapping.get("optimizer", {}), source, ("optimizer",)),
    )


def run_sweep(sweep: Sweep, workers: int, show: Callable[[int, int, float], None]) -> None:
    """Run what is left of a sweep. show: is called with (finished, all, seconds left).

    Raises ConfigError when the directory holds another sweep of that name, or another process runs this one.
    """
    import multiprocessing

    _ = sweep.rows.store.directory  # prepared once, before workers race for it
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{sweep.directory}: cannot be written: {error.strerror}") from None
    with alone_in(sweep.directory):
        _same_sweep(sweep)
        total = enqueue(sweep)
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(sweep,), daemon=True) for _ in range(workers)]
        with shielded():
            for process in processes:
                process.start()
        studies = _studies(sweep)  # opened once: opening them costs ten times what counting does
        began, at_start = time.time(), len(_complete(studies))
        try:
            while any(p.is_alive() for p in processes):
                time.sleep(2)
                done = len(_complete(studies))
                rate = (done - at_start) / (time.time() - began)
                show(done, total, (total - done) / rate if rate else math.inf)
        finally:
            for process in processes:
                process.terminate()
                process.join()
        if len(_complete(studies)) < total and any(p.exitcode for p in processes):
            raise ConfigError(f"{sweep.directory}: a worker stopped before the sweep's end; the same command goes on")


def _same_sweep(sweep: Sweep) -> None:
    """Refuse a directory whose trials were run on other models, data or lengths."""
    file = sweep.directory / "sweep.json"
    if file.is_file():
        before = json.loads(file.read_text())["decides"]
        differing = [k for k, v in sweep.decides().items() if before.get(k) != v]
        if differing:
            raise ConfigError(
                f"{sweep.directory}: holds trials of another sweep, whose {', '.join(differing)} differ; "
                f"use another --out or name"
            )
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps({"decides": sweep.decides(), "config": sweep.config.model_dump(mode="json")}, indent=1))
    aside.replace(file)


def _studies(sweep: Sweep) -> list[tuple]:
    """(parametrization, width, depth, study), narrow ones first, so that early verdicts compare like with like."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = sweep.config
    kind = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}.get(config.sampler)
    storage = optuna.storages.RDBStorage(sweep.storage, engine_kwargs={"connect_args": {"timeout": 60}})
    shapes = itertools.product(sorted(config.widths), sorted(config.depths), sweep.parametrizations)
    return [
        (p, width, depth, optuna.create_study(
            study_name=f"{config.name}/{p}-w{width}-l{depth}", storage=storage, sampler=kind and kind(),
            load_if_exists=True,
        ))
        for width, depth, p in shapes
    ]  # fmt: skip


def points(config: SweepConfig) -> list[dict]:
    """What is fixed of every trial of one width and depth: its seed, and on a grid every hyperparameter."""
    if config.sampler != "grid":
        return [{"seed": config.seeds[i % len(config.seeds)], "index": i} for i in range(config.trials)]
    grids = (config.search[name].grid() for name in config.search)
    combined = [dict(zip(config.search, values, strict=True)) for values in itertools.product(*grids)]
    return [{"seed": seed, **values} for values in combined for seed in config.seeds]


def enqueue(sweep: Sweep) -> int:
    """Queue what is neither finished nor queued, and again what a killed worker left running. Returns how many
    trials the sweep has in all."""
    from optuna.trial import TrialState

    wanted, total = points(sweep.config), 0
    for *_, study in _studies(sweep):
        have = set()
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state != TrialState.FAIL:
                have.add(json.dumps(trial.user_attrs["point"], sort_keys=True))
        for point in wanted:
            if json.dumps(point, sort_keys=True) not in have:
                study.enqueue_trial({k: v for k, v in point.items() if k in sweep.config.search}, {"point": point})
        total += len(wanted)
    return total


def _work(sweep: Sweep) -> None:
    """One worker: take waiting trials until there are none."""
    import threading

    import torch
    from optuna.trial import TrialState

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _, optimizer = family(sweep.config.family)
    rows = sweep.rows
    for parametrization, width, depth, study in _studies(sweep):
        model = sweep.model(parametrization, width, depth)
        while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            with _turn(sweep.directory):  # SQLite cannot lock a row: two workers could be handed the same trial
                trial = study.ask()
            point = trial.user_attrs.get("point")
            if point is None:  # the other worker took the last one in between
                study.tell(trial, state=TrialState.FAIL)
                break
            values = {name: _suggest(trial, name, space) for name, space in sweep.config.search.items()}
            outcome = run_trial(Point(model, optimizer, point["seed"], values), sweep.length, rows, sweep.config.dtype)
            trial.set_user_attr("outcome", outcome | {"loss": _finite(outcome["loss"])})
            study.tell(trial, outcome["first_loss"] if outcome["diverged"] else outcome["loss"])


def _end_with_parent() -> None:
    """End a worker whose command was killed: going on, it would finish a trial that the next command queues again."""
    import multiprocessing

    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """One process at a time; a killed one's turn ends with it."""
    with open(directory / "turn.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _suggest(trial, name: str, space: Range) -> float:
    if space.values is not None or trial.user_attrs["point"].get(name) is not None:
        return trial.suggest_categorical(name, space.grid())
    low, high = space.log2
    return trial.suggest_float(name, 2.0**low, 2.0**high, log=True)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def finished(sweep: Sweep) -> list[dict]:
    """Every finished trial: parametrization, width, depth, seed, hyperparameters, loss (None: not finite), diverged."""
    return [
        {
            "parametrization": parametrization, "width": width, "depth": depth,
            "seed": trial.user_attrs["point"]["seed"], **trial.params, **trial.user_attrs["outcome"],
        }
        for parametrization, width, depth, trial in _complete(_studies(sweep))
    ]  # fmt: skip


def _complete(studies: list[tuple]) -> list[tuple]:
    """(parametrization, width, depth, trial) of every finished trial."""
    from optuna.trial import TrialState

    return [
        (parametrization, width, depth, trial)
        for parametrization, width, depth, study in studies
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def as_trials(rows: list[dict], parametrization: str) -> list[Trial]:
    """The rows of one parametrization as the statistics take them: the best over all but lr, width and seed."""
    best: dict[tuple, dict] = {}
    for row in rows:
        if row["parametrization"] == parametrization:
            key = (row["width"], row["seed"], round(math.log2(row["lr"]), 6))
            loss = math.inf if row["loss"] is None or row["diverged"] else row["loss"]
            if key not in best or loss < best[key]["value"]:
                best[key] = row | {"value": loss}
    return [
        Trial(width, seed, 2.0**log2_lr, row["value"], diverged=not math.isfinite(row["value"]))
        for (width, seed, log2_lr), row in best.items()
    ]
