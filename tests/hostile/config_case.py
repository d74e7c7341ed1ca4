"""One hostile config: the files of a small project, some of them changed, and what the commands make of them."""

import tempfile
from functools import cache
from pathlib import Path

from hostile.case import Case, Outcome, command, judged

from crystal.curriculum.resolve import resolve
from crystal.run import check_vocabulary, corpus_of, load_run
from crystal.workspace.config_keys import run_keys

RUN = """\
extends: [crystalcoder-w64-l2, base.yaml]
name: own
model: {vocab_size: auto}
curriculum:
  seq_len: 32
  global_batch_size: 12
  bind: {text*: {english: 0.5, python: 0.5}, code: python}
  stages:
    - {name: one, steps: 10, lr: [{from: 0.01, to: 0.01}], sources: {text-a: 1.0}}
    - name: two
      steps: 20
      lr: [{from: 0.0, to: 0.01, steps: 4}, {to: 0.001, steps: 16}]
      fim: {rate: 0.9, only: [code]}
      sources: {text-b: {weight: 0.25, subset: 0.0-0.5}, code: 0.75}
provenance: {note: mine}
"""
BASE = """\
data: {corpus: corpus.yaml, tokenizer: {train: {vocab_size: 300}}, dir: stores}
train: {eval_every: 5, keep_checkpoints: 2, evaluate: {suite: proxy}}
run_dir: out
"""
CORPUS = """\
name: tiny
sources:
  english: {entries: [{files: english.jsonl, license: MIT}]}
  python:
    filter: code
    entries: [{package: "pypi:six==1.16.0", license: MIT, include: "[.]py$", exclude: tests}]
"""
SWEEP = """\
name: tiny
run: run.yaml
family: crystalcoder
parametrization: mup
base_d_model: 32
widths: [32, 64]
depths: [1]
steps: 3
search: {lr: {log2: [-8.0, -4.0], step: 2.0}}
"""
FILES = {"run.yaml": RUN, "base.yaml": BASE, "corpus.yaml": CORPUS, "sweep.yaml": SWEEP}
EITHER = ("refused", "fine")


def case(kind: str, name: object, *words: str, files: dict | None = None, expected=("refused",), read=None) -> Case:
    """A case: the files, some of them changed, and the words behind RUN. read: what reads them instead."""

    def run(directory: Path) -> Outcome:
        write(directory, files or {})
        if read:
            return judged(read(directory))
        file = directory / "run.yaml"
        return judged(command("train", file, *words, "--dry-run", instead=lambda: on_paper(file, words)))

    return Case(kind, str(name)[:120], run, expected)


def write(directory: Path, changed: dict[str, str | bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (FILES | changed).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def on_paper(file: Path, words: tuple[str, ...] = ()) -> None:
    """All that `crystal train` reads of configs before it makes anything."""
    run = load_run(file, words)
    check_vocabulary(run)
    resolve(run.config.curriculum, run.source, corpus_of(run).sources)


@cache
def keys() -> list:
    """Every key of the run above that holds one value."""
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), {})
        found = run_keys(load_run(Path(directory) / "run.yaml"))
    return [k for k in found if not k.key.startswith("provenance")]


def sections() -> list[str]:
    """Every key of it that holds others."""
    parts = [k.place.split(".") for k in keys()]
    return sorted({".".join(p[:n]) for p in parts for n in range(1, len(p))} - {"provenance"})
