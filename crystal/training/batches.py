"""Order + store + FIM → the micro-batches of a step.

A step's batch is a pure function of (curriculum, seed, step): which rows comes from the order, and each row's FIM
draws its own random numbers from (seed, stage, source, epoch, index). So any process can make any step's batch at
any time, a restart needs only the step's number, and the next batch is made in a thread while this one trains.

A run may be told to learn nothing from some sources or documents (`train.without`). Their rows keep their places, so
every other row comes at the same step as ever; their labels weigh nothing, and the mean is over the rows that are left.
A step of which nothing is left has a loss and a gradient of 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from crystal.backends.base import MicroBatch
from crystal.curriculum.config import split_entry
from crystal.curriculum.stages import Curriculum, Stage
from crystal.data.fim import fim_row, no_fim
from crystal.data.order import StageOrder
from crystal.data.store import TokenStore
from crystal.errors import ConfigError


class Batches:
    """Micro-batches of any step of a curriculum, and of validation."""

    def __init__(
        self,
        curriculum: Curriculum,
        store: TokenStore,
        seed: int,
        micro_batch_size: int,
        without: Sequence[str] = (),
    ):
        """without: sources, and ids of documents, whose rows count nothing; raises ConfigError for an unknown one."""
        self.curriculum, self.store, self.seed = curriculum, store, seed
        self.micro_batch_size = micro_batch_size
        self.part, self.parts = 0, 1  # which part of each step's rows this process takes, of how many
        self.tokenizer = store.tokenizer()
        fim = any(rate for stage in curriculum.stages for rate in stage.fim_rates.values())
        if fim and (reason := no_fim(self.tokenizer)):
            raise ConfigError(f"{self.tokenizer.path}: FIM needs {reason}")
        self.sources = sorted({split_entry(entry)[0] for stage in curriculum.stages for entry in stage.bound})
        self._orders: dict[int, StageOrder] = {}
        self._sources_without = frozenset(name for name in without if name in store.sources)
        self._rows_without = {
            (source, index)
            for document in without
            if document not in self._sources_without
            for source, rows in store.occurrences(document)
            for index in rows
        }

    def order(self, stage: Stage) -> StageOrder:
        """The stage's order, made when first asked for."""
        if stage.index not in self._orders:
            rows = {source: self.store.rows(source) for source in self.sources}
            self._orders[stage.index] = stage.order(rows, self.seed)
        return self._orders[stage.index]

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of global step `step` (from 0); of several processes, those of this one's rows."""
        stage = self.curriculum.stage_at(step)
        sequences = self.order(stage).sequences(step - stage.first_step)
        share = len(sequences) // self.parts
        own = sequences[self.part * share : (self.part + 1) * share]
        counted = sum(not self.left_out(source, index) for source, _, index in sequences)
        rows = [self._counted(self.row(stage, *sequence), *sequence) for sequence in own]
        return [
            self._stack(rows[i : i + self.micro_batch_size], weight=1 / (max(counted, 1) * stage.seq_len))
            for i in range(0, len(rows), self.micro_batch_size)
        ]

    def left_out(self, source: str, index: int) -> bool:
        """Whether a row counts nothing in the loss."""
        return source in self._sources_without or (source, index) in self._rows_without

    def _counted(self, row: tuple[np.ndarray, np.ndarray, int], source: str, epoch: int, index: int):
        """A row with none of its labels scored, where it is left out."""
        tokens, mask, number = row
        return (tokens, np.zeros_like(mask), number) if self.left_out(source, index) else row

    def ahead(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """`step(first)` … `step(last)`, each made while the one before is in use."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.step, first) if first <= last else None
            for step in range(first, last + 1):
                batch = coming.result()
                coming = pool.submit(self.step, step + 1) if step < last else None
                yield batch

    def validation(self, rows: int) -> Iterator[MicroBatch]:
        """`rows` held-out rows of every source, spread over all it has, as they are (no FIM), a source at a time.

        Each of several processes gets as many: where the rows do not go round, one that counts nothing is added.
        """
        for source in self.sources:
            have = self.store.rows(source, "val")
            count = min(rows, have)
            held = []
            for i in range(self.part, -(-count // self.parts) * self.parts, self.parts):
                row, mask, number = self._plain(source, min(i, count - 1) * have // count, "val")
                held.append((row, mask & (i < count), number))
            count = len(held)
            for i in range(0, count, self.micro_batch_size):
                yield self._stack(held[i : i + self.micro_batch_size], weight=1.0)

    def row(self, stage: Stage, source: str, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """A row as the stage trains on it, FIM applied: (tokens [S+1], mask of scored labels [S], source number)."""
        row, mask, number = self._plain(source, index, "train")
        rate = stage.fim_rates.get(source, 0.0)
        if rate:
            key = f"{self.seed}:{stage.name}:{source}:{epoch}:{index}".encode()
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:16], "little"))
            row, mask = fim_row(row, self.tokenizer, rate, stage.spm_rate, rng)
        return row, mask, number

    def _plain(self, source: str, index: int, split: str) -> tuple[np.ndarray, np.ndarray, int]:
        row = self.store.row(source, index, split)
        return row, np.ones(len(row) - 1, dtype=bool), self.sources.index(source)

    def _stack(self, rows: Iterable[tuple[np.ndarray, np.ndarray, int]], weight: float) -> MicroBatch:
        tokens, masks, sources = zip(*rows, strict=True)
        tokens_BT = torch.from_numpy(np.stack(tokens).astype(np.int64))
        ids_BT = tokens_BT[:, :-1].contiguous()
        ended_BT = ids_BT == self.tokenizer.eos_id
        return MicroBatch(
            ids_BT=ids_BT,
            labels_BT=tokens_BT[:, 1:].contiguous(),
            weights_BT=torch.from_numpy(np.stack(masks)).float() * weight,
            sources_B=torch.tensor(sources),
            documents_BT=ended_BT.cumsum(1) - ended_BT.long(),
        )
