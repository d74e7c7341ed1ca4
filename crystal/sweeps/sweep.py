"""A sweep, read: which models, data and hyperparameters its trials have, and what makes two trials the same.

A sweep is a YAML file. crystal/sweeps/store.py keeps its trials, crystal/sweeps/workers.py runs them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from crystal.backends.config import OptimizerConfig, load_preset
from crystal.config import (
    CONFIGS,
    Config,
    Count,
    Seed,
    Strict,
    called_by,
    find,
    load_yaml,
    mistake,
    override,
    parse,
    within,
)
from crystal.errors import ConfigError, WrongValue
from crystal.files import from_json
from crystal.kernels import tuning
from crystal.mup.tolerances import MAX_REGRET, MAX_SHIFT
from crystal.mup.transfer import Trial
from crystal.run import RunFile, load_run
from crystal.sweeps.trial import Length, Rows
from crystal.zoo.config import Depth, Factor, ModelConfig, MupConfig, Width, with_width

Parametrization = Literal["sp", "mup", "crystalcoder", "completep"]
Parameter = Literal["lr", "init_std", "embedding_multiplier", "output_alpha", "weight_decay"]
Log2 = Annotated[float, within(-60, 60)]
MAX_MODELS, MAX_TRIALS = 500, 100_000  # more than a sweep of weeks has
MAX_LR, MAX_WEIGHT_DECAY = 1000, 1000  # what a run may have, see CurriculumConfig and OptimizerConfig


class Range(Strict):
    """Where a hyperparameter is searched: a list of values, or powers of two from low to high in steps."""

    values: tuple[float, ...] | None = None
    log2: tuple[Log2, Log2] | None = None
    step: Annotated[float, Field(gt=0), within(0.01, 120)] = 1.0

    @model_validator(mode="after")
    def _one(self) -> Range:
        if (self.values is None) == (self.log2 is None):
            raise ValueError("expected either values or log2: [low, high]")
        if self.log2 and self.log2[0] > self.log2[1]:
            raise WrongValue(f"expected [low, high], got {list(self.log2)}", "log2")
        if self.values is not None and (not self.values or min(self.values) <= 0):
            raise WrongValue("expected positive numbers", "values")
        if self.values is not None and (min(self.values) < 2.0**-60 or max(self.values) > 2.0**60):
            raise WrongValue("expected numbers from 2^-60 to 2^60", "values")
        return self

    def grid(self) -> list[float]:
        """The values in order. Rounded exponents: a range that starts elsewhere meets the same numbers."""
        if self.values is not None:
            return sorted(set(self.values))
        low, high = self.log2
        return [2.0 ** round(low + i * self.step, 9) for i in range(math.floor((high - low) / self.step + 1e-9) + 1)]


class Target(Strict):
    """What the result is for: a run file to extend, with the transferred values put in."""

    run: str = Field(description="a file beside the sweep's, or a packaged run")
    parametrization: Parametrization | None = Field(None, description="null: the sweep's")


class SweepConfig(Strict):
    """The whole of a sweep file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$"), called_by]
    run: str = Field(description="run file that gives corpus, tokenizer and mix: beside the sweep's, or packaged")
    set: dict[str, float | int | str | bool] = Field({}, description="overrides of the run")
    stage: Count = 1
    family: str
    parametrization: Parametrization
    beside: tuple[Parametrization, ...] = ()
    base_d_model: Width
    widths: tuple[Width, ...] = Field(min_length=1)
    depths: tuple[Depth, ...] = Field((2,), min_length=1)
    model: dict[str, float | int | str | bool] = Field({}, description="settings of the models' mup section")
    steps: Count
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    final_fraction: float = Field(0.1, ge=0, le=1)
    eval_rows: Count = 16
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="compute; auto: the faster where it begins")
    seeds: tuple[Seed, ...] = Field((1, 2, 3), min_length=1)
    sampler: Literal["grid", "random", "tpe"] = "grid"
    trials: Count | None = Field(None, description="random and tpe: points of each width and depth")
    search: dict[Parameter, Range]
    max_shift: Factor = Field(MAX_SHIFT, description="octaves")
    max_regret: Factor = MAX_REGRET
    target: Target | None = None

    @model_validator(mode="after")
    def _whole(self) -> SweepConfig:
        if "lr" not in self.search:
            raise WrongValue("expected lr", "search")
        for key in ("widths", "depths", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise WrongValue(f"expected each number once, got {list(values)}", key)
        if len({self.parametrization, *self.beside}) <= len(self.beside):
            raise WrongValue(
                f"expected others than {self.parametrization}, each once, got {list(self.beside)}", "beside"
            )
        if self.sampler != "grid" and self.trials is None:
            raise WrongValue(f"expected a number with sampler: {self.sampler}", "trials")
        models = len(self.widths) * len(self.depths) * (1 + len(self.beside))
        if models > MAX_MODELS:
            raise WrongValue(f"expected at most {MAX_MODELS:,} models in all, got {models:,}", "widths")
        grid = math.prod(len(space.grid()) for space in self.search.values()) * len(self.seeds)
        each = grid if self.sampler == "grid" else self.trials
        if models * each > MAX_TRIALS:
            raise WrongValue(f"expected at most {MAX_TRIALS:,} trials in all, got {models * each:,}", "search")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep, read: its config, the runs it takes its data from and writes its values for, where its results lie."""

    config: SweepConfig
    source: Config
    run: RunFile
    target: RunFile | None
    directory: Path

    @cached_property
    def dtype(self) -> str:
        """What all its trials multiply in, "bf16" or "fp32": auto is what it began with, or what is faster here."""
        if self.config.dtype != "auto":
            return self.config.dtype
        try:
            began = from_json((self.directory / "sweep.json").read_text(encoding="utf-8"))["dtype"]
        except (OSError, ValueError, KeyError, TypeError):  # not begun, or damaged, which `read_record` says
            began = None
        return began if began in tuning.DTYPES else tuning.tuning(threads=1).dtype

    @cached_property
    def data(self) -> dict:
        """What the trials read: the token store's fingerprint, and its corpus. Prepares it, unless it is there."""
        manifest = self.rows.store.manifest
        return {"store": manifest["fingerprint"], "corpus": manifest["corpus"]}

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

    def makes(self, parametrization: str, width: int, depth: int) -> dict:
        """All that decides the loss of this model's trials, but for their seeds and what is searched on a grid."""
        run, config = self.run.config, self.config
        made = {
            "model": self.model(parametrization, width, depth).model_dump(mode="json"),
            "optimizer": family(config.family)[1].model_dump(mode="json"),
            "curriculum": run.curriculum.model_dump(mode="json"),
            "micro_batch_size": run.train.micro_batch_size,
            "store": self.data["store"],
            "dtype": self.dtype,
        } | config.model_dump(mode="json", include={"stage", "steps", "warmup_fraction", "final_fraction", "eval_rows"})
        if config.sampler != "grid":  # its trials are where they are because of those before them
            made |= config.model_dump(mode="json", include={"sampler", "search"})
        return made

    def fingerprint(self, *shapes: tuple[str, int, int]) -> str:
        """sha256 of what makes the trials of some (parametrization, width, depth), or of the whole sweep."""
        made = [self.makes(*shape) for shape in shapes or self.shapes()]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    def shapes(self) -> list[tuple[str, int, int]]:
        """(parametrization, width, depth) of every model, narrow ones first: early verdicts compare like with like."""
        config = self.config
        sizes = itertools.product(sorted(config.widths), sorted(config.depths), self.parametrizations)
        return [(parametrization, width, depth) for width, depth, parametrization in sizes]


def load_sweep(path: str, overrides: tuple[str, ...] = (), out: Path | None = None) -> Sweep:
    """Read and check a sweep file, and the run files it names. Raises ConfigError, one line, for any mistake."""
    return sweep_of(override(load_yaml(find(path, "sweeps")), overrides), out)


def sweep_of(source: Config, out: Path | None = None) -> Sweep:
    """The sweep that a mapping describes. Raises ConfigError."""
    config = parse(SweepConfig, source.mapping, source)
    settings = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in config.set.items()]
    run = load_run(_run_file(source, config.run, "run"), settings)
    target = load_run(_run_file(source, config.target.run, "target", "run")) if config.target else None
    sweep = Sweep(config, source, run, target, out or Path("sweeps") / config.name)
    for shape in sweep.shapes():
        sweep.model(*shape)
    _check_search(sweep)
    return sweep


def _check_search(sweep: Sweep) -> None:
    """Raise ConfigError for a search that goes where no run may, so that no trial ends there after hours of others."""
    most = {"lr": MAX_LR, "weight_decay": MAX_WEIGHT_DECAY}
    for name, space in sweep.config.search.items():
        for value in (min(space.grid()), max(space.grid())):
            if value > most.get(name, math.inf):
                raise mistake(sweep.source, ("search", name), f"expected at most {most[name]:,}, got {value:g}")
            if name not in most:
                mup = sweep.model(*sweep.shapes()[0]).mup.model_dump() | {name: value}
                parse(MupConfig, mup, f"{sweep.source.where(('search', name))}: search")


def _run_file(source: Config, name: str, *loc: str) -> Path:
    """The run file that a key means: beside the file that names it, or as every command finds one."""
    beside = Path(source.where(loc)).parent / name
    try:
        return beside if os.path.isfile(beside) else find(name, "runs")
    except ConfigError as error:
        raise ConfigError(f"{source.where(loc)}: {'.'.join(loc)}: {error}") from None


def name_from(directory: Path, file: str | Path) -> str:
    """How a YAML file in `directory` names a run file, so that this very file is meant: a packaged one by its place
    under configs/, another by the way there."""
    whole = Path(file).resolve()
    if whole.is_relative_to(CONFIGS.resolve()):
        name = whole.relative_to(CONFIGS.resolve()).as_posix()
    else:
        name = os.path.relpath(whole, directory.resolve())
    beside = directory / name
    meant = beside if beside.is_file() else find(name)
    return name if meant.samefile(whole) else str(whole)  # another file has the packaged one's name, here


def family(name: str) -> tuple[ModelConfig, OptimizerConfig]:
    """The proxy that a ladder starts from, and its published optimizer."""
    return load_preset(f"{name}-proxy")


def points(config: SweepConfig) -> list[dict]:
    """What is fixed of every trial of one width and depth: its seed, and on a grid every hyperparameter's value."""
    if config.sampler != "grid":
        return [{"seed": config.seeds[i % len(config.seeds)], "index": i} for i in range(config.trials)]
    grids = (config.search[name].grid() for name in config.search)
    combined = [dict(zip(config.search, values, strict=True)) for values in itertools.product(*grids)]
    return [{"seed": seed, "values": values} for values in combined for seed in config.seeds]


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
