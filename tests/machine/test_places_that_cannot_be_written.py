"""Read-only caches, stores and run directories: reading needs no lock and no cache, writing says one line."""

import ctypes
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from command import crystal
from dying import CONTEXT
from hostile.checkpoints import SAMPLE

READING = {
    "runs": ("runs", "."),
    "compare": ("compare", "run", "twin"),
    "config": ("config", "run", "train.seed"),
    "generate": ("generate", "run", "--prompt", "the", "--max-new-tokens", "2"),
    "logits": ("logits", "run", "--ids", "ids.npy", "--out", "OUT/logits.npy"),
    "verify": ("data", "verify", "run.yaml"),
    "stats": ("data", "stats", "run.yaml"),
    "show": ("data", "show", "run.yaml", "--step", "2"),
    "where": ("data", "where", "run.yaml", "--step", "2"),
    "schedule": ("schedule", "run.yaml"),
    "prepare": ("prepare", "run.yaml"),
    "export": ("export", "run", "--out", "OUT/hf"),
}
WRITING = {
    "train": (("train", "run.yaml", "--until", "9"), "run"),
    "eval": (("eval", "run", "--suite", "bpb", "--limit", "2"), "run/evals"),
    "other store": (("prepare", "run.yaml", "data.val_fraction=0.2"), "stores"),
    "dynamics": (("analyze", "dynamics", "run"), "run/analysis"),
    "export here": (("export", "run", "--out", "hf"), "hf"),
}


def _drop_capabilities():
    """Root no longer passes over the modes of files: capset(2) of none, for this thread and those it starts."""
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0, os.strerror(ctypes.get_errno())


def _unprivileged(directory, out, environment):
    """In a process of its own: every command, its exit code and what it says, to OUT/said.json."""
    os.environ |= environment
    _drop_capabilities()
    said = {}
    for name, words in (READING | {name: words for name, (words, _) in WRITING.items()}).items():
        done = crystal(*(word.replace("OUT", out) for word in words), cwd=directory)
        said[name] = (done.returncode, done.stdout[:500], done.stderr)
    Path(out, "said.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def said():
    """name → (exit code, stdout, stderr) of the commands in a directory that is closed to writing."""
    there = Path(tempfile.mkdtemp(prefix="crystal-read-only-"))
    out = Path(tempfile.mkdtemp(prefix="crystal-out-"))
    try:
        bed = Path(shutil.copytree(SAMPLE, there / "bed"))
        shutil.copytree(bed / "run", bed / "twin")
        np.save(bed / "ids.npy", np.ones((1, 16), np.int64))
        environment = {"CRYSTAL_CACHE": str(there / "cache"), "HOME": str(there)}
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("CRYSTAL_CACHE", environment["CRYSTAL_CACHE"])
            assert crystal("prepare", "run.yaml", cwd=bed).returncode == 0
        for path in [there, *there.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        process = CONTEXT.Process(target=_unprivileged, args=(str(bed), str(out), environment))
        process.start()
        process.join(120)
        yield json.loads((out / "said.json").read_text())
    finally:
        for path in [there, *there.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(there)
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("name", READING)
def test_reading_needs_neither_lock_nor_cache(said, name):
    code, _, err = said[name]
    assert code == 0, err
    assert "cannot be written" not in err


@pytest.mark.parametrize("name", WRITING)
def test_writing_says_one_line_that_names_the_place(said, name):
    code, _, err = said[name]
    lines = [line for line in err.splitlines() if line.startswith("crystal: ")]
    assert (code, len(lines), "Traceback" in err) == (2, 1, False), err
    assert WRITING[name][1] in lines[0], err
    assert "ermission denied" in lines[0], err
