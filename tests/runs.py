"""A small real run for the tests: local jsonl files, a tiny CrystalCoder, three stages in a few seconds."""

import json
import os
import random
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from rich.console import Console

from crystal.run import load_run
from crystal.training.start import start

WORDS = {
    "english": "the of and to in a is that for it as was with be by on not he his but at are this have".split(),
    "python": [*"def return import self for in if else None True class print range len ( ) : = + [ ]".split(), "\n"],
    "html": "<p> </p> <div> </div> <a href= > </a> <h1> </h1> class id body head title".split(),
}


def write_run(corpus: Path, directory: Path, **changes) -> Path:
    """Write the corpus and its recipe under `corpus`, RUN.yaml under `directory`; dotted `changes` go into the run.

    Returns the path of RUN.yaml; its run directory is directory/run.
    """
    rng = random.Random(0)
    for source, words in WORDS.items():
        lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(60, 240)))}) for _ in range(160)]
        (corpus / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "name": "tiny",
        "sources": {s: {"entries": [{"files": f"{s}.jsonl", "license": "CC0-1.0"}]} for s in WORDS},
    }
    (corpus / "corpus.yaml").write_text(yaml.safe_dump(recipe))

    def stage(name, steps, peak, sources, **more):
        lr = [{"from": 0.0, "to": peak, "steps": 2}, {"from": peak, "to": peak / 10, "steps": steps - 2}]
        return {"name": name, "steps": steps, "lr": lr, "sources": sources, "checkpoint_every": 4} | more

    run = {
        "extends": "crystalcoder-proxy",
        "name": "tiny",
        "run_dir": str(directory / "run"),
        "model": {"d_model": 32, "n_heads": 2, "d_ff": 85, "n_layers": 2, "vocab_size": 352, "max_seq_len": 64},
        "curriculum": {
            "name": "tiny", "seq_len": 32, "global_batch_size": 8,
            "stages": [
                stage("english", 10, 0.01, {"english": 1.0}),
                stage("code", 12, 0.008, {"english": 0.4, "python": 0.6}, fim={"rate": 0.9}),
                stage("web", 8, 0.002, {"python": 0.5, "html": 0.5}, fim={"rate": 0.3}, carry=["weights"]),
            ],
        },
        "data": {
            "corpus": str(corpus / "corpus.yaml"), "val_fraction": 0.1,
            "tokenizer": {"train": {"vocab_size": 320, "bytes_per_source": 20000}}, "dir": str(corpus / "stores"),
        },
        "train": {"micro_batch_size": 4, "eval_every": 5, "eval_rows": 4},
    }  # fmt: skip
    for key, value in changes.items():
        node = run
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def long_run(make_run) -> Path:
    """A run whose first stage ends too late to matter, and that saves and validates only when it ends."""
    never = {"train.checkpoint_every": 100000, "train.eval_every": 100000, "train.eval_rows": 1}
    path = make_run(**never, **{"train.micro_batch_size": 4})
    run = yaml.safe_load(path.read_text())
    run["curriculum"]["stages"][0]["steps"] = 50000
    path.write_text(yaml.safe_dump(run))
    return path


def whole_run(corpus: Path, directory: Path, **changes) -> Path:
    """The run from one end to the other with one thread, for a file of tests to share: its run directory."""
    path = write_run(corpus, directory, **changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.dict(os.environ, CRYSTAL_CACHE=str(corpus / "cache")):
        outcome = start(load_run(path), None, None, Console(quiet=True, stderr=True))
    torch.set_num_threads(threads)
    assert outcome.step == 30
    return outcome.directory
