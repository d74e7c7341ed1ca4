"""What every checkpoint is asked: which sequences, k and l, and how often the run had read each when."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crystal.analysis.extraction import Extracted
from crystal.analysis.sequences import Sequence, chunks, from_files, from_run, held_out
from crystal.analysis.trace_input import open_run
from crystal.errors import ConfigError
from crystal.files import sha256_of
from crystal.training.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1  # of the answers' files


@dataclass(frozen=True)
class Settings:
    """k, l: tokens given, and asked for. chunks: equal parts of the run's steps; each: rows drawn from every one."""

    k: int = 32
    l: int = 32  # noqa: E741
    chunks: int = 10
    each: int = 1000
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.k < 1 or self.l < 1:
            raise ConfigError(f"--k, --l: expected at least 1 each, got {self.k} and {self.l}")

    @property
    def length(self) -> int:
        return self.k + self.l


@dataclass(frozen=True)
class Scores:
    """One checkpoint's answers, in the order of the sequences."""

    step: int
    trained: list[Extracted]
    held_out: list[Extracted]


class Question:
    """The sequences of a run's steps, and held-out ones; or those of files.

    run: a run directory, None for a checkpoint outside of one; rows: files to take instead of the run's steps.
    Raises ConfigError where there is neither, and what `open_run` and `from_files` raise.
    """

    def __init__(
        self, run: Path | None, rows: Several[Path], settings: Settings, vocab_size: int, console: Console | None
    ):
        self.settings, self.rows = settings, list(rows)
        self.ledger: Ledger | None = None
        self.held_out: list[Sequence] = []
        if rows:
            self.chunks, self.trained = from_files(rows, settings.length, vocab_size, settings.each, settings.seed)
        elif run is not None:
            self.ledger, _ = open_run(run, console)
            self.chunks = chunks(self.ledger.curriculum.steps, settings.chunks)
            self.trained = from_run(self.ledger, settings.length, self.chunks, settings.each, settings.seed)
            self.held_out = held_out(self.ledger, settings.length, settings.each, settings.seed, self.trained)
        else:
            raise ConfigError("--rows: expected files of rows, as the checkpoint is in no run directory", key="--rows")

    @property
    def name(self) -> str:
        """What its files are called."""
        of = ["rows", *(path.stem for path in self.rows)] if self.rows else []
        return "-".join(["memorization", f"k{self.settings.k}", f"l{self.settings.l}", *of])

    @cached_property
    def facts(self) -> dict:
        """What the answers depend on, beside the checkpoint."""
        s = self.settings
        facts = {"format": FORMAT, "k": s.k, "l": s.l, "each": s.each, "seed": s.seed}
        if self.ledger is None:
            return facts | {"rows": {str(path): sha256_of(path) for path in self.rows}}
        facts |= {"store": self.ledger.store.manifest["fingerprint"], "steps": self.ledger.curriculum.steps}
        return facts | {"run_seed": self.ledger.batches.seed, "chunks": s.chunks}

    @cached_property
    def readings(self) -> dict[tuple[str, int], list[int]]:
        """(source, row) → the steps that read it in the run, past or to come."""
        rows = sorted({(s.source, s.index) for s in self.trained})
        return {key: [step for step, _, _ in self.ledger.sightings(key[0], [key[1]])] for key in rows}

    def times_seen(self, sequence: Sequence, step: int) -> int:
        """How often the run had read its row up to a step."""
        return sum(at <= step for at in self.readings[sequence.source, sequence.index])

    def seen(self, sequence: Sequence, step: int) -> bool:
        """Whether the step that it was drawn from is past; of a file nothing is known, and all count."""
        return sequence.step is None or sequence.step <= step
