"""Real llama.cpp on a GGUF file: logits, greedy tokens and token ids, through the build that xllamacpp ships."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crystal.errors import RunError
from crystal.output.interrupts import child

INSTALL = "pip install xllamacpp"
_CHILD = Path(__file__).with_name("llama_child.py")


@dataclass(frozen=True)
class Answers:
    """What an engine says. logits: fp32 [T, V] of each row; greedy: the ids that follow the prompt; tokens: of each
    text, None where there is no tokenizer, or nothing was asked of it."""

    logits: list[np.ndarray]
    greedy: list[int]
    tokens: list[list[int]] | None


def library() -> Path | None:
    """llama.cpp's shared library in the xllamacpp package, or None where that is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.origin:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("xllamacpp*.so"))), None)


def ask(
    model: Path,
    rows: Sequence[Sequence[int]],
    texts: Sequence[str] = (),
    prompt: Sequence[int] = (),
    greedy: int = 0,
    cache: str = "fp32",
) -> Answers:
    """What llama.cpp says of a GGUF file, in a process of its own.

    rows: token ids whose logits are wanted; texts: to tokenize; prompt, greedy: to continue by so many tokens; cache:
    fp32 or fp16 keys and values. Raises RunError with llama.cpp's last words when it fails, or is not installed.
    """
    found = library()
    if found is None:
        raise RunError(f"llama.cpp is not there: {INSTALL}")
    work = {
        "library": str(found),
        "model": str(Path(model).absolute()),
        "rows": [list(map(int, row)) for row in rows],
        "texts": list(texts),
        "prompt": list(map(int, prompt)),
        "greedy": greedy,
        "cache": cache,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as aside:
        out = Path(aside, "answers.npz")
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with child([sys.executable, "-P", str(_CHILD), str(out)], **pipes) as process:
            _, said = process.communicate(json.dumps(work).encode())
        if process.returncode or not out.is_file():
            lines = said.decode(errors="replace").strip().splitlines()
            raise RunError(f"llama.cpp: {lines[-1] if lines else f'its process ended with {process.returncode}'}")
        with np.load(out) as answers:
            return Answers(
                [answers[f"logits_{i}"] for i in range(len(rows))],
                answers["greedy"].tolist(),
                [answers[f"tokens_{i}"].tolist() for i in range(len(texts))] if texts else None,
            )
