"""How a run learned, from its record and its checkpoints: losses, norms, tokens, gradient noise.

    OUT/dynamics-step-NNNNNNN.json   a checkpoint: weight norms by role, surprisals of held-out tokens, noise scale
    OUT/dynamics.json                all of it: curves of the record, token learning curves
    OUT/dynamics-*.png               loss, norms, tokens, noise

A checkpoint that is there with the same settings is not asked again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from crystal import checkpoint
from crystal.analysis.gradient_noise import noise_scale
from crystal.analysis.kept import kept_or_made
from crystal.analysis.token_curves import Surprisals, by_rank, curves, surprisals
from crystal.analysis.trace_input import open_run
from crystal.analysis.weight_norms import weight_norms
from crystal.backends.base import MicroBatch
from crystal.errors import ConfigError
from crystal.files import cannot_write, sha256_of, write_whole
from crystal.inference.load import load_decoder
from crystal.output.progress import Bar
from crystal.training.ledger import Ledger
from crystal.training.metrics import read_metrics

if TYPE_CHECKING:
    from rich.console import Console

    from crystal.zoo.decoder import Decoder

_POINTS = 1000  # of a curve of the record in dynamics.json
_RANKED_STEPS = 64  # whose rows say how often tokens stand in training
_MICRO_TOKENS = 8192  # of held-out rows that go through the model together


@dataclass(frozen=True)
class Settings:
    """rows: held-out rows of every source. noise_rows: training rows for the noise scale, 0: none; in `blocks` blocks
    of batches of noise_small rows."""

    rows: int = 32
    noise_rows: int = 64
    noise_small: int = 2
    blocks: int = 8

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"--rows: expected at least 1, got {self.rows}", key="--rows")
        least = 2 * self.noise_small * self.blocks
        if self.noise_rows and self.noise_rows < least:
            raise ConfigError(f"--noise-rows: expected 0, or at least {least}, got {self.noise_rows}")


def dynamics(
    checkpoints: Mapping[int, Path], run: Path, out: Path, settings: Settings, console: Console | None = None
) -> dict:
    """What a run's record and checkpoints (directories by step) say of how it learned; JSON-ready.

    Raises ConfigError, DataError, CheckpointError and RunError, each in one line.
    """
    ledger, _ = open_run(run, console)
    record = recorded(run)
    steps = sorted(checkpoints)
    work = sum(min(settings.rows, ledger.store.rows(source, "val")) for source in ledger.batches.sources)
    found: list[dict] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Bar(console, "reading", len(steps) * (work + settings.noise_rows), unit="rows", lines=20) as bar:
            before = None
            for number, step in enumerate(steps, 1):
                bar.what = f"step {step}"
                file = out / f"dynamics-step-{step:07d}.json"
                found.append(_of_checkpoint(ledger, checkpoints[step], step, before, settings, file, bar))
                bar.reach(number * (work + settings.noise_rows))
                before = checkpoints[step]
        result = _result(ledger, record, found, run)
        result["pictures"] = _pictures(ledger, record, result, out, run)
        result["file"] = str(out / "dynamics.json")
        write_whole(out / "dynamics.json", json.dumps(result))
    except OSError as error:
        raise cannot_write(out, error, "the results") from None
    return result


def recorded(run: Path) -> list[dict]:
    """The run's metrics.jsonl by step; a step made again after a kill counts as it was made last."""
    records: dict[int, dict] = {}
    for record in read_metrics(run):
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records[record["step"]] = records.get(record["step"], {}) | record
    return [records[step] for step in sorted(records)]


def _of_checkpoint(
    ledger: Ledger, directory: Path, step: int, before: Path | None, settings: Settings, file: Path, bar: Bar
) -> dict:
    """{about, step, weights, surprisals, noise}, read or made."""
    opened, then = checkpoint.read(directory), checkpoint.read(before) if before else None
    seals = [sha256_of(path / checkpoint.SEAL) if path else None for path in (directory, before)]
    about = {"checkpoint_sha256": seals[0], "before_sha256": seals[1], "settings": asdict(settings)}

    def make() -> dict:
        decoder, _ = load_decoder(opened)
        held_out = _held_out(ledger, settings.rows)
        own = surprisals(decoder, held_out, ledger.batches.sources)
        bar.advance(sum(len(batch.ids_BT) for batch in held_out))
        return {
            "step": step,
            "stage": opened.state.get("stage"),
            "weights": weight_norms(opened, then),
            "surprisals": {"tokens": own.tokens, "sources": own.sources},
            "noise": _noise(ledger, decoder, step, settings, bar),
        }

    return kept_or_made(file, about, make)


def _held_out(ledger: Ledger, rows: int) -> list[MicroBatch]:
    """Validation rows as training validates them, but as many together as _MICRO_TOKENS hold."""
    batches = ledger.batches
    size, batches.micro_batch_size = batches.micro_batch_size, max(_MICRO_TOKENS // ledger.store.seq_len, 1)
    try:
        return list(batches.validation(rows))
    finally:
        batches.micro_batch_size = size


def _noise(ledger: Ledger, decoder: Decoder, step: int, settings: Settings, bar: Bar) -> dict | None:
    """Over the rows of the steps that follow the checkpoint; at the run's end over those of the last steps, which the
    model has trained on."""
    if not settings.noise_rows:
        return None
    batch = ledger.curriculum.global_batch_size
    needed = -(-settings.noise_rows // batch)
    first = min(step, max(ledger.curriculum.steps - needed, 0))  # from 0: the step after the checkpoint is `step`
    rows = []
    for at in range(first, min(first + needed, ledger.curriculum.steps)):
        stage = ledger.curriculum.stage_at(at)
        for source, epoch, index in ledger.batches.order(stage).sequences(at - stage.first_step):
            rows.append(ledger.batches.row(stage, source, epoch, index))
    if len(rows) < settings.noise_rows:
        return {"sequences": None, "said": f"the run has {len(rows)} rows in all, too few", "trained_on": True}
    rows = rows[: settings.noise_rows]
    small = [_small(ledger, rows[i : i + settings.noise_small]) for i in range(0, len(rows), settings.noise_small)]
    small = [one for one in small if len(one.ids_BT) == settings.noise_small]
    found = noise_scale(decoder, small, settings.blocks, bar.advance)
    return found | {"rows": len(rows), "trained_on": first < step, "batch": batch}


def _small(ledger: Ledger, rows: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> MicroBatch:
    """Rows as a batch of their own, weighed as the run weighs its own batches."""
    tokens_BT = torch.from_numpy(np.stack([tokens for tokens, _, _ in rows]).astype(np.int64))
    ids_BT = tokens_BT[:, :-1].contiguous()
    ended_BT = ids_BT == ledger.batches.tokenizer.eos_id
    masks_BT = torch.from_numpy(np.stack([mask for _, mask, _ in rows])).float()
    sources_B = torch.tensor([source for _, _, source in rows])
    documents_BT = ended_BT.cumsum(1) - ended_BT.long()
    return MicroBatch(ids_BT, tokens_BT[:, 1:].contiguous(), masks_BT / ids_BT.numel(), sources_B, documents_BT)


def _result(ledger: Ledger, record: Sequence[dict], found: Sequence[dict], run: Path) -> dict:
    curriculum, tokenizer = ledger.curriculum, ledger.batches.tokenizer
    each = curriculum.global_batch_size * curriculum.seq_len
    own = {c["step"]: Surprisals.read(c["surprisals"]) for c in found}
    learned = curves(own, by_rank(_trained_tokens(ledger)), ledger.store.manifest["tokenizer"]["vocab_size"])
    for token in learned["tokens"]:
        token["text"] = tokenizer.decode([token["id"]])
    keys = ("step", "stage", "weights", "noise")
    return {
        "run": str(run),
        "record": {
            "loss": _curve(record, lambda r: r.get("loss")),
            "grad_norm": _curve(record, lambda r: r.get("grad_norm")),
            "source_loss": _by_source(record, "source_loss"),
            "val_loss": _by_source(record, "val_loss"),
        },
        "checkpoints": [{key: c[key] for key in keys} | {"tokens": c["step"] * each} for c in found],
        "learned": learned,
    }


def _trained_tokens(ledger: Ledger) -> Counter:
    """How often tokens stand in the rows of steps spread over the run, as the steps trained on them."""
    counts: Counter = Counter()
    steps = ledger.curriculum.steps
    for at in sorted({steps * i // _RANKED_STEPS for i in range(_RANKED_STEPS)}):
        stage = ledger.curriculum.stage_at(at)
        for source, epoch, index in ledger.batches.order(stage).sequences(at - stage.first_step)[:64]:
            row, mask, _ = ledger.batches.row(stage, source, epoch, index)
            counts.update(row[1:][mask].tolist())
    return counts


def _curve(record: Sequence[dict], of) -> dict:
    """{steps, values, first, last, least}; at most _POINTS of them, each the mean of those around it."""
    points = [(r["step"], of(r)) for r in record if isinstance(of(r), int | float) and math.isfinite(of(r))]
    if not points:
        return {"steps": [], "values": [], "first": None, "last": None, "least": None}
    parts = np.array_split(np.array(points, float), min(_POINTS, len(points)))
    return {
        "steps": [round(float(part[-1, 0])) for part in parts],
        "values": [float(part[:, 1].mean()) for part in parts],
        "first": points[0][1],
        "last": points[-1][1],
        "least": min(value for _, value in points),
    }


def _by_source(record: Sequence[dict], key: str) -> dict[str, dict]:
    sources = sorted({source for r in record for source in r.get(key) or {}})
    return {source: _curve(record, lambda r, s=source: (r.get(key) or {}).get(s)) for source in sources}


def _pictures(ledger: Ledger, record: Sequence[dict], result: dict, out: Path, run: Path) -> list[str]:
    from crystal.analysis.dynamics_plots import plot_loss, plot_noise, plot_norms, plot_tokens

    name, paths = run.resolve().name, {n: out / f"dynamics-{n}.png" for n in ("loss", "norms", "tokens", "noise")}
    plot_loss(result["record"], ledger.curriculum, name, paths["loss"])
    plot_norms(result["record"], result["checkpoints"], ledger.curriculum, name, paths["norms"])
    plot_tokens(result["learned"], ledger.curriculum, name, paths["tokens"])
    if any((c["noise"] or {}).get("sequences") for c in result["checkpoints"]):
        plot_noise(result["checkpoints"], ledger.curriculum, name, paths["noise"])
    else:
        del paths["noise"]
    return [str(path) for path in paths.values()]
