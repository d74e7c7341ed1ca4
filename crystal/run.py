"""A run file, read: model, optimizer, curriculum, data, backend and training in one validated value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from crystal.backends.config import BackendConfig, CpuConfig, OptimizerConfig
from crystal.backends.cuda.layout import check_layout
from crystal.config import (
    COMMAND_LINE,
    Config,
    Count,
    Seed,
    Strict,
    Tally,
    called_by,
    find,
    load_yaml,
    mistake,
    override,
    parse,
)  # fmt: skip
from crystal.curriculum.config import CurriculumConfig, split_entry
from crystal.curriculum.resolve import resolve
from crystal.data.corpus.build import Recipe, load_recipe
from crystal.data.fim import no_fim
from crystal.data.prepare import DataConfig, prepare, vocab_size
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, CrystalError
from crystal.mup.plan import Plan
from crystal.zoo.config import ModelConfig, rung

if TYPE_CHECKING:
    from rich.console import Console

MICRO_BATCH_TOKENS = 8192  # what goes through a model at once where the run does not say


class EvaluateConfig(Strict):
    """Benchmarks on every checkpoint while it trains; `crystal eval` finds the same results, and can ask more items."""

    suite: str = Field("proxy", description="as `crystal eval --suite`: a suite or one task")
    limit: Count | None = Field(200, description="items of each task; null: all")
    items: Path | None = Field(None, description="a directory of your own items, which come first")


class TrainConfig(Strict):
    """How the loop goes about it; steps are optimizer steps."""

    seed: Seed = Field(1, description="of the first weights, the order of the data and FIM")
    micro_batch_size: Count = Field(
        1,
        description=f"rows that go through the model together; auto: as many as make {MICRO_BATCH_TOKENS:,} tokens",
        json_schema_extra={"default": "auto"},  # which `resolved` makes a number
    )
    eval_every: Tally | None = Field(None, description="validation every so many steps; always at stage ends")
    eval_rows: Count = Field(32, description="validation rows of each source")
    checkpoint_every: Tally | None = Field(None, description="null: the curriculum's cadence, as scaled")
    keep_checkpoints: Count | None = Field(
        None, description="newest ones to keep; null: all. Ends of stages are always kept"
    )
    max_bad_steps: Tally = Field(5, description="stop after so many steps in a row that were not finite")
    without: tuple[str, ...] = Field(
        (),
        description="sources, and ids of documents, that are read as ever but count nothing in the loss; the rest of a "
        "step counts for them. What a twin differs in, `crystal analyze memorization --counterfactual`",
    )
    evaluate: EvaluateConfig | None = Field(None, description="benchmarks on every checkpoint; null: none")


class RunConfig(Strict):
    """The whole of a run file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$"), called_by] = Field(
        description="of the run, and of its directory"
    )
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    curriculum: CurriculumConfig
    data: DataConfig
    backend: BackendConfig = CpuConfig()
    train: TrainConfig = TrainConfig()
    run_dir: Path | None = Field(None, description="where it is recorded; null: runs/NAME")
    provenance: dict[str, float | int | str | bool] = Field({}, description="where its values come from; recorded")

    @property
    def directory(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    def plan(self) -> Plan:
        """The parameter plan, with this run's weight decay and eps."""
        return self.optimizer.plan_for(self.model)


@dataclass(frozen=True)
class RunFile:
    """A run, the mapping it was read from, and the file's name for messages."""

    config: RunConfig
    source: Config
    path: str

    def where(self, *loc: str) -> str:
        """`FILE: dotted.key`, for an error about that key."""
        return self.source.place(loc)

    def error(self, loc: Sequence[str], message: str) -> ConfigError:
        """The mistake that the key at `loc` holds; to be raised."""
        return mistake(self.source, tuple(loc), message)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a run file. Raises ConfigError, one line, for any mistake in it."""
    source = override(load_yaml(find(path, "runs"), ("models", "curricula", "runs"), rung), overrides)
    source = resolved(source)
    run = RunFile(parse(RunConfig, source.mapping, source), source, str(path))
    curriculum, model, train = run.config.curriculum, run.config.model, run.config.train
    if curriculum.seq_len > model.max_seq_len:
        expected = f"expected at most model.max_seq_len {model.max_seq_len}, got {curriculum.seq_len}"
        raise run.error(("curriculum", "seq_len"), expected)
    if curriculum.global_batch_size % train.micro_batch_size:
        expected = f"expected a divisor of curriculum.global_batch_size {curriculum.global_batch_size}"
        raise run.error(("train", "micro_batch_size"), f"{expected}, got {train.micro_batch_size}")
    _check_paths(run)
    _check_fim(run)
    if run.config.backend.name == "cuda":
        batch = (curriculum.seq_len, curriculum.global_batch_size, train.micro_batch_size)
        check_layout(model, run.config.backend, *batch, run.error)
    return run


def resolved(source: Config) -> Config:
    """The run with all that its file leaves open chosen: what the config.yaml of its run directory will say.

    Paths are sought beside the file that names them, then where the command runs. `model.vocab_size: auto` becomes
    the tokenizer's padded vocabulary, `train.micro_batch_size: auto` as many rows as fit MICRO_BATCH_TOKENS; a key
    left out is auto. Raises ConfigError for a vocabulary that only a missing file would tell.
    """
    for loc in (("data", "corpus"), ("data", "tokenizer", "path")):
        source = _beside(source, loc)
    for loc, choose in ((("model", "vocab_size"), _vocab_size), (("train", "micro_batch_size"), _micro_batch_size)):
        section = source.get(loc[:-1])
        if section is not None and not isinstance(section, dict):
            continue  # which `parse` will say
        if source.get(loc) in (None, "auto") and (chosen := choose(source)) is not None:
            source = source.filled(loc, chosen)
    return source


def _beside(source: Config, loc: tuple) -> Config:
    name, by = source.get(loc), source.where(loc)
    if not isinstance(name, str) or by == COMMAND_LINE or not (file := Path(by).absolute().parent / name).is_file():
        return source
    return source.filled(loc, str(file))


def _vocab_size(source: Config) -> int:
    loc = ("model", "vocab_size")
    tokenizer = parse(DataConfig, source.mapping.get("data", {}), source, ("data",)).tokenizer
    if (found := vocab_size(tokenizer)) is None:
        raise mistake(source, loc, f"auto needs the tokenizer's file, and {tokenizer.path} does not exist")
    return found


def _micro_batch_size(source: Config) -> int | None:
    """Rows that go round in every process's share of a step; None for a run whose sizes are no sizes."""
    batch, length = (source.get(("curriculum", key)) for key in ("global_batch_size", "seq_len"))
    layout = source.get(("backend", "parallel")) or {}
    sizes = batch, length, *((layout.get(key, 1) for key in ("dp", "fsdp", "pp")) if isinstance(layout, dict) else ())
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    dp, fsdp, pp = sizes[2:] or (1, 1, 1)
    share = batch // (dp * fsdp)
    fit = range(1, min(share, MICRO_BATCH_TOKENS // length) + 1)
    return max((n for n in fit if share % n == 0 and share // n % pp == 0), default=1)


def _check_paths(run: RunFile) -> None:
    """Raise ConfigError for an empty path, which would mean the directory that the command runs in."""
    empty = [loc for loc in run.source.origin if run.source.get(loc) == ""]
    held = run.config.model_dump(by_alias=True) if empty else {}
    for loc in empty:
        if isinstance(Config(held, {}).get(loc), Path):
            raise run.error(loc, 'expected a path, got ""')


def _check_fim(run: RunFile) -> None:
    """Raise ConfigError where a stage, be it the last, rearranges documents and the vocabulary has no tokens for it."""
    if run.config.data.tokenizer.added_tokens:
        return
    expected = "expected 0 with data.tokenizer.added_tokens false: FIM needs CrystalCoder's added tokens"
    for i, stage in enumerate(run.config.curriculum.stages):
        at = ("curriculum", "stages", i)
        for name, source in stage.sources.items():
            if source.fim and source.weight != 0:
                raise run.error((*at, "sources", name, "fim"), f"{expected}, got {source.fim:g}")
            applies = source.fim is None and any(fnmatchcase(name, pattern) for pattern in stage.fim.only)
            if applies and stage.fim.rate and source.weight != 0:
                raise run.error((*at, "fim", "rate"), f"{expected}, got {stage.fim.rate:g}")


def _uses_fim(run: RunFile) -> bool:
    """Whether any stage rearranges documents."""
    return any(rate for stage in resolve(run.config.curriculum).stages for rate in stage.fim_rates.values())


def corpus_of(run: RunFile) -> Recipe:
    """The run's corpus recipe. Raises ConfigError naming the run's key when there is none."""
    try:
        return load_recipe(run.config.data.corpus)
    except CrystalError as error:
        if str(error).startswith(f"{run.config.data.corpus}: "):  # the file itself, not something in it
            raise run.error(("data", "corpus"), str(error)) from None
        raise


def check_vocabulary(run: RunFile) -> None:
    """Raise ConfigError where the model does not have the vocabulary that the tokenizer has or will have, or where that
    is none that a stage's FIM can do with."""
    expected, got = vocab_size(run.config.data.tokenizer), run.config.model.vocab_size
    if expected not in (None, got):
        trained = run.config.data.tokenizer.train
        how = f" with data.tokenizer.train.vocab_size {trained.vocab_size}" if trained else ""
        message = f"expected {expected}, the tokenizer's padded vocabulary{how}, got {got}; auto takes it as it is"
        raise run.error(("model", "vocab_size"), message)
    path = run.config.data.tokenizer.path
    if path is not None and path.is_file() and _uses_fim(run):
        tokenizer = Tokenizer.load(path, added_tokens=run.config.data.tokenizer.added_tokens)
        if (reason := no_fim(tokenizer)) is not None:
            raise run.error(("data", "tokenizer", "path"), f"{path}: FIM needs {reason}")


def prepare_run(run: RunFile, console: Console | None = None, repair: bool = True) -> Path:
    """Make the run's token store, unless it is there; returns its directory. Raises ConfigError.

    repair: one that is there and not whole is made again, else refused.
    """
    check_vocabulary(run)
    curriculum = resolve(run.config.curriculum, run.source, corpus_of(run).sources)
    sources = sorted({split_entry(entry)[0] for stage in curriculum.stages for entry in stage.bound})
    return prepare(run.config.data, curriculum.seq_len, sources=sources, where=run.path, console=console, repair=repair)
