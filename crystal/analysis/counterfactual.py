"""What a run would not know without a source or some documents: the run beside its twin, which trained without them.

The twin is the same run, but the rows of that source, or that hold one of those documents, count nothing in the loss
(`train.without`). They keep their places, so order, steps, seeds and learning rates are the same, and so are all other
rows, at the same steps: nothing else differs.

Counterfactual memorization (Zhang et al. 2021, arXiv 2112.12938) is, for a sequence, the expected performance of models
that trained on it less that of models that did not. Here it is one pair of models, so a sequence's own difference is
noisy; the mean over sequences is what is told, with its interval. Three groups of sequences:
  left out   of rows that the run trained on and the twin did not
  kept       of rows that both trained on: what else is different, as each run goes its own way
  held out   of validation rows of the left-out sources: what a source teaches in general
A mean of `left out` above `held out` is memorization of the rows themselves; held-out rows are plain, so they are set
against those left-out rows that FIM did not change. `kept` rows have a share in it too where much is left out: the twin
learns from fewer rows a step, and may know the rest less well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console

from crystal import checkpoint
from crystal.analysis.extraction import Extracted, extract
from crystal.analysis.intervals import mean_difference, mean_interval
from crystal.analysis.question import Settings
from crystal.analysis.sequences import Sequence as Tokens
from crystal.analysis.sequences import chunks, documents_of, from_run, held_out, rows_of_step
from crystal.analysis.trace_input import open_run
from crystal.errors import CheckpointError, ConfigError, DataError, RunError
from crystal.files import regular_bytes, write_whole
from crystal.inference.load import end_tokens, fitting_dtype, load_decoder, load_tokenizer
from crystal.output.progress import Bar
from crystal.run import RunFile, load_run
from crystal.training.ledger import Ledger
from crystal.training.start import start

if TYPE_CHECKING:
    from collections.abc import Callable

GROUPS = ("left_out", "kept", "held_out")
_TRIED = 50  # left-out rows that are looked at for each wanted one: a run may read few of a large source


def counterfactual(
    run: Path, step: int, without: str, out: Path, settings: Settings, console: Console | None = None
) -> dict:
    """Train the twin up to `step` (or take what is there of it), and compare both there; JSON-ready.

    without: a source of the run, or a file with an id of a document a line. At most settings.each sequences a group.
    Writes OUT/memorization-counterfactual-NAME.json and .png. Raises ConfigError, DataError, CheckpointError, RunError.
    """
    ledger, _ = open_run(run, console)
    names, label = _names(ledger, without)
    twin = twin_of(run, names, label)
    groups = _groups(ledger, names, step, settings)
    if not groups["left_out"]:
        raise ConfigError(f"--counterfactual: {without}: the run has read none of its rows up to step {step}")
    trained = _trained(twin, run, step, console)
    answers = {}
    everything = [s for name in GROUPS for s in groups[name]]
    with Bar(console, "asking", 2 * len(everything), unit="sequences", lines=10) as bar:
        for name, directory in (("run", run / "checkpoints"), ("twin", trained / "checkpoints")):
            bar.what = f"the {name}"
            at = checkpoint.step_directory(directory, step)
            answers[name] = _ask(checkpoint.read(at), everything, settings, bar.advance)
    result = {
        "run": str(run), "twin": str(trained), "step": step, "without": label, "documents": _listed(ledger, names),
        "k": settings.k, "l": settings.l, "seed": settings.seed,
    }  # fmt: skip
    parts, begin = {}, 0
    for name in GROUPS:
        end = begin + len(groups[name])
        parts[name] = list(zip(groups[name], answers["run"][begin:end], answers["twin"][begin:end], strict=True))
        begin = end
    result |= _compared(parts, settings.l)
    result["sequences"] = [_described(ledger, own, settings) for own in parts["left_out"]]
    file = out / f"memorization-counterfactual-{label}.json"
    result |= {"file": str(file), "pictures": [str(file.with_suffix(".png"))]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(result))
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror or error}") from None
    from crystal.analysis.counterfactual_plots import plot_differences

    plot_differences({name: _differences(parts[name], settings.l) for name in GROUPS}, result, file.with_suffix(".png"))
    return result


def twin_of(run: Path, names: Sequence[str], label: str) -> RunFile:
    """The run file of the twin: RUN's own config, but for `train.without` and its directory, beside RUN.

    Raises ConfigError for a run that has a `without` already.
    """
    opened = load_run(run / "config.yaml")
    config = opened.config
    if config.train.without:
        raise ConfigError(f"{run}: train.without: expected none, this run is a twin itself", key="train.without")
    name = f"{config.name}-without-{label}"
    directory = run.resolve().with_name(f"{run.resolve().name}-without-{label}")
    changes = {
        "name": name,
        "run_dir": directory,
        "train": config.train.model_copy(update={"without": tuple(names), "evaluate": None}),
        "provenance": config.provenance | {"twin_of": config.name, "without": label},
    }
    return dataclasses.replace(opened, config=config.model_copy(update=changes), path=str(run / "config.yaml"))


def _names(ledger: Ledger, without: str) -> tuple[list[str], str]:
    """What `train.without` is to say, and a short name for it."""
    if without in ledger.store.sources:
        return [without], without
    file = Path(without)
    if not file.is_file():
        known = ", ".join(ledger.store.sources)
        raise ConfigError(
            f"--counterfactual: expected a source of the run ({known}) or a file of document ids, got {without!r}",
            key="--counterfactual",
        )
    try:
        ids = [line.strip() for line in regular_bytes(file).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{file}: cannot be read: {why}", file=file) from None
    if not ids:
        raise DataError(f"{file}: expected an id of a document a line, it is empty", file=file)
    for number, name in enumerate(ids, 1):
        with _naming(file, number):
            ledger.store.occurrences(name)
    ids = sorted(set(ids))
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:8]
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in file.stem)
    return ids, f"{stem}-{digest}"


@contextlib.contextmanager
def _naming(file: Path, line: int):
    try:
        yield
    except ConfigError as error:
        raise DataError(f"{file}: line {line}: {error}", file=file) from None


class _LeftOut:
    """The rows that `train.without` leaves out, by number; those of a whole source are never listed."""

    def __init__(self, ledger: Ledger, names: Sequence[str]):
        self.source = names[0] if names[0] in ledger.store.sources else None
        owners = [] if self.source else [found for name in names for found in ledger.store.occurrences(name)]
        self.rows = sorted({(source, index) for source, own in owners for index in own})
        self._known = set(self.rows)
        self.count = ledger.store.rows(self.source) if self.source else len(self.rows)

    def __getitem__(self, number: int) -> tuple[str, int]:
        return (self.source, number) if self.source else self.rows[number]

    def holds(self, source: str, index: int) -> bool:
        return source == self.source or (source, index) in self._known


def _listed(ledger: Ledger, names: Sequence[str]) -> list[str]:
    """The documents' ids; none where a whole source is left out."""
    return [] if names[0] in ledger.store.sources else list(names)


def _groups(ledger: Ledger, names: Sequence[str], step: int, settings: Settings) -> dict[str, list[Tokens]]:
    """The sequences of each group, at most settings.each, drawn by the seed."""
    rng = np.random.default_rng(settings.seed)
    gone = _LeftOut(ledger, names)
    left_out: list[Tokens] = []
    tried = min(gone.count, _TRIED * settings.each)
    for number in rng.choice(gone.count, tried, replace=False).tolist() if gone.count else ():
        if len(left_out) == settings.each:
            break
        source, index = gone[number]
        first = next((at for at, _, _ in ledger.sightings(source, [index]) if at <= step), None)
        if first is not None:
            left_out.append(_as_read(ledger, settings.length, first, source, index))
    some = from_run(ledger, settings.length, chunks(step, 1), 4 * settings.each, settings.seed)
    kept = list({s.tokens: s for s in some if not gone.holds(s.source, s.index)}.values())
    kept = [kept[i] for i in sorted(rng.permutation(len(kept))[: settings.each].tolist())]
    held = held_out(ledger, settings.length, settings.each, settings.seed, left_out)
    return {"left_out": left_out, "kept": kept, "held_out": held}


def _as_read(ledger: Ledger, length: int, step: int, source: str, index: int) -> Tokens:
    """A row as step `step` read it."""
    stage = ledger.curriculum.stage_at(step - 1)
    batch = ledger.batches.order(stage).sequences(step - 1 - stage.first_step)
    place = next(i for i, (name, _, row) in enumerate(batch) if (name, row) == (source, index))
    return rows_of_step(ledger, length, step, [place], None)[0]


def _trained(twin: RunFile, run: Path, step: int, console: Console | None) -> Path:
    """The twin's directory, trained up to the step; what is there is gone on with. Raises what training raises."""
    directory = twin.config.directory
    if step in checkpoint.steps(directory / "checkpoints"):
        recorded = load_run(directory / "config.yaml").config.train.without
        if tuple(recorded) != tuple(twin.config.train.without):
            raise ConfigError(f"{directory}: expected the twin without the same rows; move it away to train it anew")
        return directory
    outcome = start(twin, None, step, console or Console(quiet=True, stderr=True), like=run)
    if outcome.interrupted:  # saved; as if the signal had come outside of training
        raise KeyboardInterrupt
    if step not in checkpoint.steps(directory / "checkpoints"):
        raise CheckpointError(f"{directory}: expected a checkpoint of step {step}; remove what is later in it")
    return directory


def _ask(
    opened: checkpoint.Checkpoint, sequences: Sequence[Tokens], settings: Settings, done: Callable[[int], None]
) -> list[Extracted]:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    model, _ = load_decoder(opened, fitting_dtype(opened, settings.dtype), device)
    ends = end_tokens(opened, load_tokenizer(opened))
    return extract(model, [s.tokens for s in sequences], settings.k, ends[0] if ends else None, done)


def _differences(own: Sequence[tuple[Tokens, Extracted, Extracted]], asked: int) -> list[float]:
    """Score of the run less score of the twin, of each sequence."""
    return [(a.matches - b.matches) / asked for _, a, b in own]


def _compared(parts: Mapping[str, Sequence[tuple[Tokens, Extracted, Extracted]]], asked: int) -> dict:
    """The mean of every group, and of left-out sequences above held-out ones; with 95 % intervals."""
    score = {name: _differences(own, asked) for name, own in parts.items()}
    nats = {name: [(a.logprob - b.logprob) / asked for _, a, b in own] for name, own in parts.items()}
    groups = {
        name: {
            "n": len(own),
            "score": _told(mean_interval(score[name])),
            "nats_per_token": _told(mean_interval(nats[name])),
            "extractible": [sum(answer.matches == asked for answer in column) for column in _columns(own)],
        }
        for name, own in parts.items()
    }
    plain = [i for i, (sequence, _, _) in enumerate(parts["left_out"]) if not sequence.fim]
    above = {
        name: _told(mean_difference([own["left_out"][i] for i in plain], own["held_out"]))
        for name, own in (("score", score), ("nats_per_token", nats))
    }
    return {"groups": groups, "left_out_above_held_out": above | {"n": len(plain)}, "said": _said(above)}


def _columns(own: Sequence[tuple[Tokens, Extracted, Extracted]]) -> tuple[list[Extracted], list[Extracted]]:
    """The run's answers, and the twin's."""
    return [a for _, a, _ in own], [b for _, _, b in own]


def _said(above: dict) -> str:
    if above["score"] is None:
        return "not judged: too few sequences to compare with held-out ones"
    told = {name for name, own in above.items() if own["interval"][0] > 0}
    if told == set(above):
        return "memorized: the run gives left-out rows more than it would without them, beyond what held-out rows gain"
    if told:
        return f"memorized by one measure, {told.pop()}: left-out rows gain more than held-out rows do"
    return "at the baseline: left-out rows gain no more than held-out rows do"


def _told(values: tuple[float, float, float] | None) -> dict | None:
    if values is None:
        return None
    middle, low, high = (round(x, 6) for x in values)
    return {"mean": middle, "interval": [low, high] if low == low else None}


def _described(ledger: Ledger, own: tuple[Tokens, Extracted, Extracted], settings: Settings) -> dict:
    """A left-out sequence: where it was read, and what either model gives of it."""
    sequence, a, b = own
    return {
        "step": sequence.step, "row": sequence.row, "source": sequence.source, "index": sequence.index,
        "fim": sequence.fim, "documents": [d["document"] for d in documents_of(ledger, sequence, settings.length)],
        "score": [a.matches / settings.l, b.matches / settings.l],
        "nats_per_token": [-a.logprob / settings.l, -b.logprob / settings.l],
        "difference": (a.matches - b.matches) / settings.l,
    }  # fmt: skip
