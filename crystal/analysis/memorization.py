"""What a run's checkpoints have memorized: every checkpoint asked for the ends of rows that it was trained on.

    OUT/memorization-k32-l32-step-NNNNNNN.json   a checkpoint: every sequence with its step, row, source, score, first
                                                 mismatch and log-probability, and the extracted ones with their text,
                                                 documents and steps
    OUT/memorization-k32-l32.json                the summary, which the command prints
    OUT/memorization-k32-l32-*.png               LLM360's figures 7 (scores), 8 (chunks) and 9 (correlation)

A checkpoint that is there with the same settings is not asked again. Beside the rows stand held-out rows, which no step
has seen: what a model gets right of those it did not memorize.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crystal import checkpoint
from crystal.analysis.extraction import Extracted, extract, samples_needed
from crystal.analysis.kept import kept_or_made
from crystal.analysis.memorization_figures import distinct, summary
from crystal.analysis.memorization_plots import plot_chunks, plot_correlation, plot_scores
from crystal.analysis.question import Question, Scores, Settings
from crystal.analysis.sequences import Sequence as Tokens
from crystal.analysis.sequences import documents_of
from crystal.errors import ConfigError
from crystal.files import cannot_write, sha256_of, write_whole
from crystal.inference.load import fitting_dtype, load_decoder, model_config_of, tokenizer_of
from crystal.output.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 20  # extracted sequences in the summary
_OF_SEQUENCE = ("source", "index", "chunk", "step", "row", "epoch", "fim")
_OF_ANSWER = ("matches", "first", "logprob")


def memorization(
    checkpoints: Mapping[int, Path],
    run: Path | None,
    out: Path,
    settings: Settings,
    rows: Sequence[Path] = (),
    console: Console | None = None,
) -> dict:
    """Ask every checkpoint (directories by step), write what it says to `out`, and summarize; JSON-ready.

    Raises ConfigError, DataError, CheckpointError and RunError, each in one line.
    """
    vocab_size = min(model_config_of(checkpoint.read(directory)).vocab_size for directory in checkpoints.values())
    question = Question(run, rows, settings, vocab_size, console)
    try:
        out.mkdir(parents=True, exist_ok=True)
        scored, texts, files = {}, {}, {}
        count = len(question.trained) + len(question.held_out)
        with Bar(console, "asking", len(checkpoints) * count, unit="sequences", lines=20) as bar:
            for step, directory in checkpoints.items():
                files[step] = out / f"{question.name}-step-{step:07d}.json"
                bar.what = f"step {step}"
                content = _of_checkpoint(question, directory, step, files[step], bar)
                scored[step], texts[step] = _scores(content), content["extracted"]
                bar.reach(count * len(scored))
        result = _result(question, checkpoints, scored, texts)
        for own, file in zip(result["checkpoints"], files.values(), strict=True):
            own["file"] = str(file)
        result["pictures"] = _pictures(question, scored, out, run)
        write_whole(out / f"{question.name}.json", json.dumps(result, indent=1))
    except OSError as error:
        raise cannot_write(out, error, "the results") from None
    return result


def _of_checkpoint(question: Question, directory: Path, step: int, file: Path, bar: Bar) -> dict:
    """What is there already, or asked now and written."""
    opened = checkpoint.read(directory)
    dtype = fitting_dtype(opened, question.settings.dtype)
    about = question.facts | {
        "checkpoint_sha256": sha256_of(directory / checkpoint.SEAL),
        "dtype": str(dtype).removeprefix("torch."),
    }

    def make() -> dict:
        device = question.settings.device
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        began = time.monotonic()
        scores = ask(question, opened, step, dtype, device, bar.advance)
        return {
            "step": step,
            "seconds": round(time.monotonic() - began, 3),
            "sequences": _columns(question.trained, scores.trained),
            "held_out": _columns(question.held_out, scores.held_out),
            "extracted": extracted(question, scores, tokenizer_of(opened)),
        }

    return kept_or_made(file, about, make)


def ask(
    question: Question,
    opened: checkpoint.Checkpoint,
    step: int,
    dtype: torch.dtype,
    device: str,
    done: Callable[[int], None],
) -> Scores:
    """One checkpoint, all sequences."""
    model, _ = load_decoder(opened, dtype, device)
    most = model.config.max_seq_len + 1
    if question.settings.length > most:
        raise ConfigError(f"--k, --l: expected at most {most} together, the model's, got {question.settings.length}")
    tokenizer = tokenizer_of(opened)
    eos = getattr(tokenizer, "eos_id", None)
    eos = eos if isinstance(eos, int) else None
    both = [s.tokens for s in (*question.trained, *question.held_out)]
    found = extract(model, both, question.settings.k, eos, done)
    return Scores(step, found[: len(question.trained)], found[len(question.trained) :])


def _columns(sequences: Sequence[Tokens], found: Sequence[Extracted]) -> dict[str, list]:
    columns = {key: [getattr(s, key) for s in sequences] for key in _OF_SEQUENCE}
    return columns | {key: [getattr(e, key) for e in found] for key in _OF_ANSWER}


def _scores(content: Mapping) -> Scores:
    """What a file says of a checkpoint."""
    columns = [[content[part][key] for key in _OF_ANSWER] for part in ("sequences", "held_out")]
    return Scores(content["step"], *([Extracted(*row) for row in zip(*part, strict=True)] for part in columns))


def extracted(question: Question, scores: Scores, tokenizer) -> list[dict]:
    """The sequences that the checkpoint gives whole, of those it had seen; each text once, the least likely by chance
    (the most different tokens) first."""
    k, length = question.settings.k, question.settings.length
    found: dict[tuple[int, ...], dict] = {}
    for sequence, score in zip(question.trained, scores.trained, strict=True):
        if score.matches < question.settings.l or not question.seen(sequence, scores.step):
            continue
        if sequence.tokens in found:
            continue
        own = {"chunk": question.chunks[sequence.chunk].name, "source": sequence.source, "index": sequence.index}
        if question.ledger is not None:
            steps = [at for at in question.readings[sequence.source, sequence.index] if at <= scores.step]
            own |= {"step": sequence.step, "row": sequence.row, "fim": sequence.fim, "steps_of_row": steps}
            own["documents"] = documents_of(question.ledger, sequence, length)
        halves = {"prompt": sequence.tokens[:k], "continuation": sequence.tokens[k:]}
        if tokenizer is not None and question.ledger is not None:
            own |= {name: tokenizer.decode(ids) for name, ids in halves.items()}
        else:  # ids of another vocabulary, for all that is known
            own |= {f"{name}_ids": list(ids) for name, ids in halves.items()}
        own |= {
            "distinct_tokens": len(set(sequence.tokens[k:])),
            "logprob": round(score.logprob, 4),
            "samples_needed": {str(p): samples_needed(score.logprob, p) for p in (0.1, 0.5, 0.9)},
        }
        found[sequence.tokens] = own
    return sorted(found.values(), key=lambda own: -own["distinct_tokens"])


def _result(
    question: Question, checkpoints: Mapping[int, Path], scored: Mapping[int, Scores], texts: Mapping[int, list[dict]]
) -> dict:
    """The summary; its first keys are of the last checkpoint."""
    found = []
    for step, scores in scored.items():
        own = {"step": step, "stage": checkpoint.read(checkpoints[step]).state.get("stage"), "tokens": None}
        if question.ledger is not None:
            curriculum = question.ledger.curriculum
            own["tokens"] = step * curriculum.global_batch_size * curriculum.seq_len
        given = texts[step]
        found.append(own | summary(question, scores) | {"extracted": len(given), "examples": given[:SHOWN]})
    last = found[-1]
    of_run = "the first k + l tokens of a row as the step trained on it, FIM applied"
    of_files = "the first k + l ids of each row of the files, taken as ids of the model's own vocabulary"
    return {
        "k": question.settings.k,
        "l": question.settings.l,
        "score_mean": last["seen"]["score_mean"],
        "extractible": last["seen"]["extractible"],
        "chunks": last["chunks"],
        "verdict": last["against_held_out"]["said"],
        "about": question.facts,
        "sequence": of_run if question.ledger is not None else of_files,
        "sampling": "p_z at temperature 1 from the whole vocabulary",
        "checkpoints": found,
    }


def _pictures(question: Question, scored: Mapping[int, Scores], out: Path, run: Path | None) -> list[str]:
    asked, chunks = question.settings.l, question.chunks
    title = f"{(run or out.parent).resolve().name}: k = {question.settings.k}, l = {asked}"
    pairs = {step: list(zip(question.trained, scores.trained, strict=True)) for step, scores in scored.items()}
    held_out = {step: [e.matches for e in scores.held_out] for step, scores in scored.items()}
    seen = {
        step: [e.matches for _, e in distinct([pair for pair in own if question.seen(pair[0], step)])]
        for step, own in pairs.items()
    }
    both = {step: [e.matches if question.seen(s, step) else None for s, e in own] for step, own in pairs.items()}
    by_chunk = {
        step: [[e.matches for s, e in own if s.chunk == number] for number in range(len(chunks))]
        for step, own in pairs.items()
    }
    paths = [out / f"{question.name}-{name}.png" for name in ("scores", "chunks", "correlation")]
    plot_scores(seen, held_out, asked, title, paths[0])
    plot_chunks(by_chunk, chunks, held_out, asked, title, paths[1])
    if len(scored) > 1:
        plot_correlation(both, title, paths[2])
    return [str(path) for path in paths[: 3 if len(scored) > 1 else 2]]
