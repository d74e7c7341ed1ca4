"""Shared settings (few threads, hypothesis without deadlines), and small real runs that share one prepared corpus."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the choices that are made by measuring, pinned: torch's products, bf16 where a run does not say
os.environ.setdefault("CRYSTAL_TUNING", os.path.join(os.path.dirname(__file__), "tuning.json"))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: the workers share the cores

import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

# what nohup and a shell's `&` ignore is ignored by whatever is started here too, and many tests send it
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

# workers that share the cores have one thread each: more would wait for one another, most of all on a busy machine
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
settings.register_profile("crystal", deadline=None, max_examples=50)
settings.load_profile("crystal")


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


@pytest.fixture
def crystal(capsys, monkeypatch):
    """crystal(*words) → (exit code, stdout, stderr), in this process."""
    from crystal.cli.main import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["crystal", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run
