"""What is traced: a text, a file's, or what a checkpoint writes; and the run whose training data is searched."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.analysis.lookup import Engine, Index
from crystal.analysis.span_loss import span_losses
from crystal.analysis.trace import MIN_TOKENS, find_spans, marked, query_ids, span_facts
from crystal.checkpoint import Checkpoint, locate, read, steps
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, DataError, RunError
from crystal.files import from_json, regular_bytes
from crystal.inference.generate import generate_texts
from crystal.inference.load import load_tokenizer
from crystal.run import load_run
from crystal.training.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint writes what is traced."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


def trace(
    source: str,
    run: str | None = None,
    prompts: Sequence[str] = (),
    sampling: Sampling = Sampling(),
    min_tokens: int = MIN_TOKENS,
    documents: int = 5,
    loss: bool = True,
    engine: Engine = "own",
    console: Console | None = None,
) -> list[dict]:
    """Trace a text, a text file, or what a checkpoint (or a run's latest) writes after each prompt; JSON-ready.

    run: a run directory or file whose training data is searched; None: the checkpoint's own run, or else the only one
    in runs/. loss: whether spans are scored before and after they were first seen. What the run reads after the traced
    checkpoint, or after its newest one where a text is traced, is listed apart. Raises CrystalError.
    """
    checkpoint = _checkpoint(source, prompts)
    text = None if checkpoint else _text(source)
    own_run = checkpoint.directory.absolute().parent.parent if checkpoint else None
    name = run or _default_run(own_run)
    ledger, directory = open_run(name, console)
    index = Index.open(ledger.store, name, engine)
    queries: list[tuple[list[int], dict]] = []
    until = max(steps(directory / "checkpoints"), default=0)
    if checkpoint:
        written_by = load_tokenizer(checkpoint)
        if not isinstance(written_by, Tokenizer):
            wanted = f"expected the tokenizer of {ledger.store.directory}, got one of another kind"
            raise DataError(f"{checkpoint.directory}: {wanted}")
        ledger.store.check_tokenizer(written_by)
        if own_run.resolve() == directory.resolve():
            until = int(checkpoint.state.get("step", until))
        told = {"checkpoint": {"path": str(checkpoint.directory), "step": checkpoint.state.get("step")}}
        for prompt, ids in zip(prompts, _written(checkpoint, prompts, sampling, written_by, console), strict=True):
            queries.append((ids, {"query": written_by.decode(ids), **told, "prompt": prompt}))
    else:
        ids = query_ids(ledger.batches.tokenizer, index, text)
        queries.append((ids, {"query": text, "checkpoint": None, "prompt": None}))
    results = []
    for ids, asked in queries:
        spans = find_spans(ledger, index, ids, min_tokens, documents, until)
        facts = [span_facts(span, until) for span in spans]
        losses = span_losses(ledger, directory, spans, until, console) if loss else {}
        for s, span in enumerate(facts):
            for m, match in enumerate(span["matches"]):
                match["loss"] = losses.get((s, m))
        results.append(
            asked
            | {
                "run": str(directory),
                "until": until,
                "tokens": len(ids),
                "covered": len({i for span in spans for i in range(span.start, span.stop)}),
                "min_tokens": min_tokens,
                "index": {
                    "path": str(index.directory), "tokens": index.tokens, "documents": index.documents,
                    "verified": index.verified, "engine": engine,
                },
                "spans": facts,
                "marked": marked(ledger.batches.tokenizer, asked["query"], ids, spans),
            }
        )  # fmt: skip
    return results


def open_run(run: str | Path, console: Console | None = None) -> tuple[Ledger, Path]:
    """The data of a run directory, or of a run file, and the run's directory.

    Raises RunError for a directory that is no run's, DataError where the run was trained on another store than its
    config makes now, and what `load_run` and `prepare` raise.
    """
    config = Path(run, "config.yaml")
    if os.path.isdir(run) and not config.is_file():
        raise RunError(f"{run}: expected a run directory, config.yaml is not there", file=run)
    loaded = load_run(config if os.path.isdir(run) else run)
    directory = Path(run) if os.path.isdir(run) else loaded.config.directory
    ledger = Ledger(loaded, console)
    trained_on = _recorded_store(directory)
    if trained_on not in (None, ledger.store.manifest["fingerprint"]):
        raise DataError(
            f"{directory}: the run was trained on the token store {trained_on[:16]}…, its data now makes "
            f"{ledger.store.manifest['fingerprint'][:16]}…", file=directory,
        )  # fmt: skip
    return ledger, directory


def _recorded_store(directory: Path) -> str | None:
    """The fingerprint of the store that a run was made from; None where it has not begun, or does not say."""
    try:
        return str(from_json(regular_bytes(directory / "manifest.json"))["data"]["store"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checkpoint(source: str, prompts: Sequence[str]) -> Checkpoint | None:
    """The checkpoint that `source` is, or a run's latest; None for a text."""
    if not os.path.isdir(source):
        if prompts:
            raise ConfigError(f"--prompt: expected a checkpoint or run directory to write from, got {source[:60]!r}")
        return None
    if not prompts:
        raise ConfigError(f"{source}: expected --prompt, a text for the checkpoint to go on from", key="--prompt")
    return read(locate(Path(source)))


def _text(source: str) -> str:
    text = source
    if os.path.isfile(source):
        try:
            text = io.StringIO(regular_bytes(Path(source)).decode(), newline=None).read()
        except OSError as error:
            raise DataError(f"{source}: cannot be read: {error.strerror}", file=source) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: expected UTF-8 text, got another byte at {error.start}", file=source) from None
    elif os.path.exists(source) and not os.path.isdir(source):
        raise DataError(f"{source}: expected a file with a text, it is a pipe or a device", file=source)
    elif os.sep in source and not any(map(str.isspace, source)):
        raise ConfigError(f"{source}: no such file or directory; put a text without spaces in a file to trace it")
    if not text.strip():
        what = "got an empty one" if text is source else f"{source} has none"
        raise ConfigError(f"expected a text to trace, {what}")
    return text


def _default_run(own_run: Path | None) -> str:
    if own_run is not None:
        if not (own_run / "config.yaml").is_file():
            raise ConfigError(f"--run: expected one, the checkpoint is not in a run directory ({own_run})", key="--run")
        return os.path.relpath(own_run) if own_run.is_relative_to(Path.cwd()) else str(own_run)
    runs = sorted(path.parent for path in Path("runs").glob("*/config.yaml"))
    if len(runs) != 1:
        there = ", ".join(map(str, runs[:5])) or "none"
        raise ConfigError(f"--run: expected one, as runs/ does not hold exactly one run: {there}", key="--run")
    return str(runs[0])


def _written(
    checkpoint: Checkpoint, prompts: Sequence[str], sampling: Sampling, tokenizer: Tokenizer, console: Console | None
) -> list[list[int]]:
    """The new tokens after each prompt, without the end token."""
    results = generate_texts(
        checkpoint.directory, prompts, None, sampling.max_new_tokens, sampling.temperature, seed=sampling.seed,
        console=console,
    )  # fmt: skip
    return [[i for i in result["tokens"] if i != tokenizer.eos_id] for result in results]
