"""What an evaluation task is: items, what a model is asked about each of them, and numbers over the answers.

A task knows no run, no file of results and no other process: `evaluate.py` asks it about parts of its items, in any
order and on any machine, and gives all answers back to it at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from crystal.checkpoint import Checkpoint
from crystal.data.tokenizer import Tokenizer
from crystal.inference.load import PlainTokenizer, end_tokens, load_decoder, load_tokenizer
from crystal.output.progress import Bar
from crystal.zoo.decoder import Decoder


@dataclass(frozen=True)
class Metric:
    """A number over a task's items. stderr: its standard error over items; chance: what guessing would give.
    None: there is none."""

    value: float
    stderr: float | None
    chance: float | None = None

    @property
    def at_chance(self) -> bool:
        """Whether guessing explains it: chance lies within its 95 % interval."""
        if self.chance is None or self.stderr is None:
            return False
        return abs(self.value - self.chance) <= 1.96 * self.stderr


@dataclass(frozen=True)
class Subject:
    """A checkpoint under evaluation. start: ids before every text (BOS, or none); ends: ids at which writing ends.
    run: its run directory, None for a checkpoint that stands alone."""

    decoder: Decoder
    tokenizer: Tokenizer | PlainTokenizer
    start: tuple[int, ...]
    ends: tuple[int, ...]
    checkpoint: Path
    run: Path | None = None

    @classmethod
    def of(
        cls,
        opened: Checkpoint,
        run: Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Subject:
        """A checkpoint's model and tokenizer, loaded. Raises CheckpointError as `load_decoder` and `load_tokenizer`."""
        decoder, _ = load_decoder(opened, dtype, device)
        tokenizer = load_tokenizer(opened)
        has_bos = opened.state.get("bos", True) and hasattr(tokenizer, "bos_id")
        start = (tokenizer.bos_id,) if has_bos else ()
        return cls(decoder, tokenizer, start, end_tokens(opened, tokenizer), opened.directory, run)


class Task(Protocol):
    """A benchmark with everything that fixes its numbers, its items read. part: how many items are worth a file of
    their own, for others to share in and to go on from: some minutes of work."""

    name: str
    part: int

    def facts(self) -> dict:
        """JSON-ready: what its numbers depend on (shots, prompts' form, samples, temperature, seed) and where its items
        are from: package or file, version, sha256, licence. Two results may be compared when these are equal."""

    def ids(self) -> Sequence[str]:
        """The name of every item, in their order."""

    def texts(self) -> Iterator[tuple[str, str]]:
        """(id, text) of every item as a person would read it: the question and its right answer, no examples before
        it. For what looks for items in a corpus."""

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """What the model answers to the items with these numbers: one JSON-ready dict each, in their order, with `id`.
        bar: advanced by one an item."""

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        """Numbers over the answers to some or all items; the first is the one to plot."""
