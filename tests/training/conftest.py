"""Small real runs, prepared once a session and shared through the cache."""

import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A directory with the tiny corpus, whose store and tokenizer the runs of a session share."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def make_run(corpus, tmp_path, monkeypatch):
    """make_run(**changes) → the path of a run file whose run directory is the test's own."""
    from runs import write_run

    monkeypatch.setenv("CRYSTAL_CACHE", str(corpus / "cache"))
    return lambda **changes: write_run(corpus, tmp_path, **changes)


@pytest.fixture
def train():
    """train(path, *overrides, stage=None, until=None) → Outcome, in this process."""
    from crystal.run import load_run
    from crystal.training.start import start

    def run(path, *overrides, stage=None, until=None):
        return start(load_run(path, overrides), stage, until, Console(quiet=True, stderr=True))

    return run
