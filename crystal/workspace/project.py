"""`crystal init`: a recipe, a curriculum and a run file for one's own text, short and commented, ready to train."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from crystal.config import MAX_NAME, RESERVED
from crystal.config.bounded_yaml import shortened
from crystal.data.corpus.sniff import Found, is_code, sources_of
from crystal.errors import ConfigError
from crystal.files import write_whole

FILES = ("corpus.yaml", "curriculum.yaml", "run.yaml")
SEQ_LEN, BATCH = 256, 16  # tokens of a sequence, sequences of a step: what the demo trains with
BYTES_PER_TOKEN = 3.5  # of a small vocabulary, roughly
EPOCHS, FEWEST, MOST = 2, 60, 800  # passes over the text at most; steps at least and at most: minutes on two cores
SMALLEST = 20_000  # bytes of text that a vocabulary can be trained on
SAMPLE = {"english": 24_600_000, "python": 14_900_000, "javascript": 8_300_000, "html": 2_700_000, "css": 1_100_000}
PEAK_LR = 0.012  # CrystalCoder's, which muP carries to any width
LEAST_WEIGHT = 0.02


def init(directory: Path, data: Sequence[Path], name: str | None) -> dict:
    """Write the three files into a directory. Returns what was found and written.

    data: files and directories of the user's text; none: the sample corpus. Raises ConfigError, having written
    nothing, where one of the files is there already or there is no text.
    """
    for file in FILES:
        if (directory / file).exists():
            raise ConfigError(f"{directory / file}: is there already; name another directory", file=directory / file)
    sources, passed_over = sources_of(data) if data else ({}, {})
    sizes = {source: sum(f.size for f in found) for source, found in sources.items()} or SAMPLE
    if sum(sizes.values()) < SMALLEST:
        raise ConfigError(f"--data: expected {SMALLEST:,} bytes of text or more, found {sum(sizes.values()):,}")
    name = _checked(name) if name else _plain(directory.resolve().name)
    steps = max(FEWEST, min(MOST, round(EPOCHS * sum(sizes.values()) / BYTES_PER_TOKEN / (SEQ_LEN * BATCH))))
    texts = {
        "curriculum.yaml": _curriculum(sizes, steps),
        "run.yaml": _run(name, "corpus.yaml" if data else "sample", sum(sizes.values()), steps),
    }
    if data:
        texts = {"corpus.yaml": _corpus(name, sources, directory)} | texts
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            write_whole(directory / file, text)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written: {error.strerror}", file=directory) from None
    run = directory / "run.yaml"
    return {
        "directory": str(directory),
        "files": [str(directory / file) for file in texts],
        "sources": {s: {"bytes": sizes[s], "entries": [asdict(f) for f in sources.get(s, ())]} for s in sizes},
        "passed_over": dict(passed_over),
        "steps": steps,
        "commands": [
            f"crystal train {run} --dry-run",
            f"crystal train {run}",
            f'crystal generate runs/{name} --prompt "The " --temperature 0.8',
        ],
    }


def _checked(name: str) -> str:
    """A run's name that was asked for. Raises ConfigError."""
    if _plain(name) != name:
        kinds = "letters, digits, '.', '_' and '-'"
        message = f"expected {kinds}, the first no '.' or '-', {MAX_NAME} at most, and no file's name"
        raise ConfigError(f"--name: {message}, got {shortened(name)!r}")
    return name


def _plain(text: str) -> str:
    """A text as a name that run files and recipes take."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("-.")[:MAX_NAME] or "mine"
    return plain.replace(".", "-") if plain.lower() in RESERVED else plain


def _quoted(text: str) -> str:
    """A text as YAML, in one line."""
    return yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True).strip()


def _corpus(name: str, sources: dict[str, list[Found]], directory: Path) -> str:
    lines = [
        "# What there is to train on: sources, each made of entries, which are read in order (docs/own-data.md).",
        f"name: {_quoted(name)}",
        "sources:",
    ]
    for source, found in sources.items():
        lines += [f"  {source}:", "    entries:"]
        for entry in found:
            inside = Path(entry.files).is_relative_to(directory.resolve())
            files = os.path.relpath(entry.files, directory.resolve()) if inside else entry.files
            lines.append(f"      - files: {_quoted(files)}")
            lines += [f"        {key}: {_quoted(value)}" for key, value in entry.keys.items()]
            lines.append("        skip_bad: true          # rows without text are passed over, and counted")
            lines.append("        license: NOASSERTION    # its SPDX name, recorded with every document")
    return "\n".join(lines) + "\n"


def _weights(sizes: dict[str, int]) -> dict[str, float]:
    """Shares by size, none below LEAST_WEIGHT, that add up to 1."""
    whole = sum(sizes.values())
    raised = {source: max(size / whole, LEAST_WEIGHT) for source, size in sizes.items()}
    return _rounded({source: share / sum(raised.values()) for source, share in raised.items()}, 4)


def _rounded(shares: dict[str, float], digits: int) -> dict[str, float]:
    """Shares in so many digits that still add up to 1: the largest takes what rounding leaves."""
    found = {source: round(share, digits) for source, share in shares.items()}
    largest = max(found, key=found.get)
    return found | {largest: round(found[largest] + 1 - sum(found.values()), digits)}


def _curriculum(sizes: dict[str, int], steps: int) -> str:
    code, prose = ({s: n for s, n in sizes.items() if is_code(s) == wanted} for wanted in (True, False))
    lines = [
        "# What is trained on when. A stage has a share of each source, a learning rate in lines, and a rate of FIM",
        "# (fill in the middle: pieces of code are swapped so that the model learns to complete gaps).",
        "curriculum:",
        f"  seq_len: {SEQ_LEN}             # tokens of a sequence",
        f"  global_batch_size: {BATCH}    # sequences of a step",
        "  stages:",
    ]
    if code and prose:  # CrystalCoder's manner: prose, then both, then mostly code at a low rate
        both = {s: w * 0.37 for s, w in _weights(prose).items()} | {s: w * 0.63 for s, w in _weights(code).items()}
        last = {s: w * 0.17 for s, w in _weights(prose).items()} | {s: w * 0.83 for s, w in _weights(code).items()}
        third = max(steps * 35 // 100, 20)
        lines += _stage("text", third, PEAK_LR, _weights(prose))
        lines += _stage("text-and-code", max(steps * 45 // 100, 20), PEAK_LR * 0.73, both, fim=(0.9, list(code)))
        lines += _stage("code", max(steps * 20 // 100, 20), PEAK_LR / 6, last, fim=(0.3, list(code)), fresh=True)
    else:
        lines += _stage("all", steps, PEAK_LR, _weights(sizes), fim=(0.5, list(code)) if code else None)
    return "\n".join(lines) + "\n"


def _stage(
    name: str, steps: int, peak: float, weights: dict[str, float], fim: tuple | None = None, fresh: bool = False
) -> list[str]:
    warm_up = max(2, steps // 20)
    lines = [
        f"    - name: {name}",
        f"      steps: {steps}",
        f"      lr: [{{from: 0.0, to: {peak:.6g}, steps: {warm_up}}}, "
        f"{{from: {peak:.6g}, to: {peak / 10:.6g}, steps: {steps - warm_up}}}]",
    ]
    if fim:
        lines.append(f"      fim: {{rate: {fim[0]:g}, only: [{', '.join(fim[1])}]}}")
    if fresh:
        lines.append("      carry: [weights]       # the optimizer starts afresh")
    shares = _rounded(weights, 6)
    return [*lines, "      sources:", *(f"        {source}: {share:g}" for source, share in shares.items())]


def _run(name: str, corpus: str, size: int, steps: int) -> str:
    pieces = max(400, min(4000, size // 1000 // 100 * 100))
    return "\n".join(
        [
            "# A model of CrystalCoder's kind at laptop size. `crystal train` this file; `crystal config` explains it.",
            "extends: [crystalcoder-w128-l4, curriculum.yaml]   # a rung of the ladder: width 128, 4 layers",
            f"name: {_quoted(name)}          # the run is recorded in runs/NAME",
            "model:",
            "  vocab_size: auto         # the tokenizer's",
            "data:",
            f"  corpus: {corpus}" + ("      # sought beside this file" if corpus.endswith(".yaml") else ""),
            f"  tokenizer: {{train: {{vocab_size: {pieces}}}}}",
            "  val_fraction: 0.03       # of the documents, held out",
            "train:",
            f"  eval_every: {max(steps // 10, 10)}",
            "  keep_checkpoints: 2      # besides the end of each stage",
            "",
        ]
    )
