"""A run file, read: model, optimizer, curriculum, data, backend and training in one validated value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from crystal.backends.config import BackendConfig, CpuConfig, OptimizerConfig
from crystal.backends.layout import check_layout
from crystal.config import Config, ConfigError, Strict, find, load_yaml, override, parse
from crystal.curriculum import CurriculumConfig, resolve, split_entry
from crystal.data.prepare import DataConfig, prepare
from crystal.mup.plan import Plan
from crystal.zoo.build import plan_for
from crystal.zoo.config import ModelConfig

if TYPE_CHECKING:
    from rich.console import Console


class TrainConfig(Strict):
    """How the loop goes about it; steps are optimizer steps."""

    seed: int = Field(1, description="of the first weights, the order of the data and FIM")
    micro_batch_size: int = Field(gt=0, description="rows that go through the model together")
    eval_every: int | None = Field(None, gt=0, description="validation every so many steps; always at stage ends")
    eval_rows: int = Field(32, gt=0, description="validation rows of each source")
    checkpoint_every: int | None = Field(None, gt=0, description="null: the curriculum's cadence, as scaled")
    keep_checkpoints: int | None = Field(
        None, gt=0, description="newest ones to keep; null: all. Ends of stages are always kept"
    )
    max_bad_steps: int = Field(5, gt=0, description="stop after so many steps in a row that were not finite")


class RunConfig(Strict):
    """The whole of a run file."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="of the run, and of its directory")
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    curriculum: CurriculumConfig
    data: DataConfig
    backend: BackendConfig = CpuConfig()
    train: TrainConfig
    run_dir: Path | None = Field(None, description="where it is recorded; null: runs/NAME")
    provenance: dict[str, float | int | str | bool] = Field({}, description="where its values come from; recorded")

    @property
    def directory(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    def plan(self) -> Plan:
        """The parameter plan, with this run's weight decay and eps."""
        return plan_for(
            self.model,
            weight_decay=self.optimizer.weight_decay,
            decay_vectors=self.optimizer.decay_norms_and_biases,
            eps=self.optimizer.eps,
        )


@dataclass(frozen=True)
class RunFile:
    """A run, the mapping it was read from, and the file's name for messages."""

    config: RunConfig
    source: Config
    path: str

    def where(self, *loc: str) -> str:
        """`FILE: dotted.key`, for an error about that key."""
        return f"{self.source.where(loc)}: {'.'.join(loc)}"

    def error(self, loc: Sequence[str], message: str) -> ConfigError:
        """The mistake that the key at `loc` holds; to be raised."""
        return ConfigError(f"{self.where(*loc)}: {message}", file=self.source.where(tuple(loc)), key=".".join(loc))


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a run file. Raises ConfigError, one line, for any mistake in it."""
    source = override(load_yaml(find(path, "runs")), overrides)
    run = RunFile(parse(RunConfig, source.mapping, source), source, str(path))
    curriculum, model, train = run.config.curriculum, run.config.model, run.config.train
    if curriculum.seq_len > model.max_seq_len:
        expected = f"expected at most model.max_seq_len {model.max_seq_len}, got {curriculum.seq_len}"
        raise run.error(("curriculum", "seq_len"), expected)
    if curriculum.global_batch_size % train.micro_batch_size:
        expected = f"expected a divisor of curriculum.global_batch_size {curriculum.global_batch_size}"
        raise run.error(("train", "micro_batch_size"), f"{expected}, got {train.micro_batch_size}")
    if run.config.backend.name == "cuda":
        check_layout(model, run.config.backend, curriculum.global_batch_size, train.micro_batch_size, run.error)
    return run


def prepare_run(run: RunFile, console: Console | None = None) -> Path:
    """Make the run's token store, unless it is there; returns its directory. Raises ConfigError."""
    curriculum = resolve(run.config.curriculum, run.source)
    sources = sorted({split_entry(entry)[0] for stage in curriculum.stages for entry in stage.bound})
    return prepare(run.config.data, curriculum.seq_len, sources=sources, where=run.path, console=console)
