"""Which token sequences are asked about: of the steps that trained on them, held out from training, or a file's.

A run's steps are cut into equal chunks and rows are drawn from each. A sequence is the first k + l tokens of a row as
the step trained on it, FIM applied: what the model saw, not what the store holds. Amber's chunks are files of rows; 360
chunks of a run with its 274,320 steps are the same cut.

Held-out sequences are windows of k + l tokens of validation rows, one behind the other. A training row begins anywhere
in a document, and so does a window, so both are cut alike. Sources have the shares that they have in the training
sequences, as far as the windows reach. They are plain: no FIM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crystal.errors import ConfigError, DataError
from crystal.files import from_json, open_regular
from crystal.training.ledger import Ledger


@dataclass(frozen=True)
class Sequence:
    """tokens: k + l ids. chunk: its number, from 0, None for held-out ones. step, row: where it was trained on (from 1,
    and from 0). index: of the stored row, or the line of a file from 1. fim: whether FIM changed its tokens."""

    tokens: tuple[int, ...]
    source: str
    index: int
    chunk: int | None = None
    step: int | None = None
    row: int | None = None
    epoch: int | None = None
    fim: bool = False


@dataclass(frozen=True)
class Chunk:
    """A part of what was trained on: steps first … last of a run (from 1), or a file (steps None)."""

    name: str
    first: int | None
    last: int | None


def chunks(steps: int, count: int) -> list[Chunk]:
    """`count` equal parts of a run's steps. Raises ConfigError where there are fewer steps, or no part is asked for."""
    if not 1 <= count <= steps:
        raise ConfigError(f"--chunks: expected 1 to {steps}, the run's steps, got {count}", key="--chunks")
    edges = [steps * i // count for i in range(count + 1)]
    return [Chunk(str(i), edges[i] + 1, edges[i + 1]) for i in range(count)]


def from_run(ledger: Ledger, length: int, parts: Several[Chunk], each: int, seed: int) -> list[Sequence]:
    """`each` rows drawn from every chunk (all where it has fewer), `length` tokens of each; in the order of steps.

    The draw from a chunk depends on the seed and the chunk's steps alone. Raises ConfigError for rows that are shorter.
    """
    if length > ledger.store.seq_len + 1:
        raise ConfigError(f"--k, --l: expected at most {ledger.store.seq_len + 1} together, a row, got {length}")
    batch = ledger.curriculum.global_batch_size
    found = []
    for number, chunk in enumerate(parts):
        places = (chunk.last - chunk.first + 1) * batch
        rng = np.random.default_rng([seed, chunk.first, chunk.last])
        drawn = sorted(rng.choice(places, min(each, places), replace=False).tolist())
        by_step: dict[int, list[int]] = {}
        for place in drawn:
            by_step.setdefault(chunk.first + place // batch, []).append(place % batch)
        for step, rows in by_step.items():
            found += rows_of_step(ledger, length, step, rows, number)
    return found


def rows_of_step(ledger: Ledger, length: int, step: int, rows: Several[int], chunk: int | None) -> list[Sequence]:
    """Rows of a step (from 1), by their places in its batch, as it trained on them."""
    stage = ledger.curriculum.stage_at(step - 1)
    sequences = ledger.batches.order(stage).sequences(step - 1 - stage.first_step)
    found = []
    for place in rows:
        source, epoch, index = sequences[place]
        tokens = ledger.batches.row(stage, source, epoch, index)[0][:length]
        fim = bool((tokens != ledger.store.row(source, index)[:length]).any())
        found.append(Sequence(tuple(tokens.tolist()), source, index, chunk, step, place, epoch, fim))
    return found


def held_out(ledger: Ledger, length: int, count: int, seed: int, like: Several[Sequence]) -> list[Sequence]:
    """About `count` windows of validation rows, with the shares that sources have in `like`; fewer of a source that has
    too few."""
    per_row = (ledger.store.seq_len + 1) // length
    have = {source: ledger.store.rows(source, "val") * per_row for source in ledger.store.sources}
    shares = Counter(s.source for s in like if have[s.source])
    total = sum(shares.values())
    if not total:
        return []
    found = []
    for source, n in sorted(shares.items()):
        wanted = min(max(round(count * n / total), 1), have[source])
        rng = np.random.default_rng([seed, *source.encode()])
        for place in sorted(rng.choice(have[source], wanted, replace=False).tolist()):
            index, window = divmod(place, per_row)
            tokens = ledger.store.row(source, index, "val")[window * length : (window + 1) * length]
            found.append(Sequence(tuple(tokens.tolist()), source, index))
    return found


def from_files(
    paths: Several[Path], length: int, vocab_size: int, each: int, seed: int
) -> tuple[list[Chunk], list[Sequence]]:
    """`each` rows drawn from every .jsonl file, a chunk a file; a line has `token_ids`, as Amber's data, or `prompt`
    and `continuation`, as Analysis360's rows; and may have a `source`.

    Raises DataError naming file and line for anything else, too few ids, or ids that the model has not.
    """
    found = []
    for chunk, path in enumerate(paths):
        try:
            with open_regular(path) as file:
                lines = file.read().decode().splitlines()
        except (OSError, UnicodeDecodeError, MemoryError) as error:
            short = "it does not fit into memory" if isinstance(error, MemoryError) else "it is not UTF-8"
            why = getattr(error, "strerror", None) or short
            raise DataError(f"{path}: cannot be read: {why}", file=path) from None
        rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise DataError(f"{path}: expected a row a line, it is empty", file=path)
        drawn = np.random.default_rng([seed, chunk]).choice(len(rows), min(each, len(rows)), replace=False)
        rows = [rows[i] for i in sorted(drawn.tolist())]
        for number, line in rows:
            ids, source = _row(line, f"{path}: line {number}", path)
            if len(ids) < length:
                raise DataError(f"{path}: line {number}: expected {length} ids, k + l, got {len(ids)}", file=path)
            if wrong := [i for i in ids[:length] if not 0 <= i < vocab_size]:
                expected = f"expected ids from 0 to {vocab_size - 1}, the model's, got {wrong[0]}"
                raise DataError(f"{path}: line {number}: {expected}", file=path)
            found.append(Sequence(tuple(ids[:length]), source, number, chunk))
    return [Chunk(path.stem, None, None) for path in paths], found


def _row(line: str, where: str, path: Path) -> tuple[list[int], str]:
    try:
        row = from_json(line)
        ids = row["token_ids"] if "token_ids" in row else [*row["prompt"], *row["continuation"]]
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        expected = "expected an object with token_ids, or with prompt and continuation, of integers"
        raise DataError(f"{where}: {expected}", file=path) from None
    return ids, str(row.get("source") or path.stem)


def documents_of(ledger: Ledger, sequence: Sequence, length: int) -> list[dict]:
    """The documents that its row's first `length` tokens are of: {document, path, license}. A row that FIM changed has
    other lengths; then all of the row's."""
    listed = ledger.store.documents_in_row(sequence.source, sequence.index)
    if not sequence.fim and listed:
        step = ledger.store.seq_len if ledger.store.overlap else ledger.store.seq_len + 1
        end = sequence.index * step + length
        listed = [document for document in listed if document["start"] < end]
    return [{"document": d["id"], "path": d["path"], "license": d["license"]} for d in listed]
