"""A stand-in for the confinement, for tests whose programs are harmless: each in a Python of its own."""

import subprocess
import sys

import pytest

import crystal.evaluation.code_tasks as code_tasks
from crystal.errors import ConfigError
from crystal.evaluation.confine import Confinement, Outcome


def run_plainly(programs, limits=None, unsafe=False, workers=None, done=lambda: None):
    outcomes = []
    for program in programs:
        ran = subprocess.run(
            [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False, timeout=20
        )
        status = "failed" if ran.returncode else "passed"
        outcomes.append(Outcome(status, (ran.stderr.strip().splitlines() or [""])[-1], 0.1))
    return outcomes


@pytest.fixture
def plainly(monkeypatch):
    """Programs run, unconfined, in any place where the tests do; the list of what has been run."""
    ran = []

    def run(programs, *args, **named):
        ran.extend(programs)
        return run_plainly(programs, *args, **named)

    monkeypatch.setattr(code_tasks, "run_programs", run)
    monkeypatch.setattr(code_tasks, "confinement", lambda: Confinement({"for": "tests"}, True, ()))
    return ran


@pytest.fixture
def unconfined(monkeypatch):
    """A machine that can confine nothing: `run_programs` refuses, as it does where the kernel grants too little."""

    def refuse(programs, limits=None, unsafe=False, workers=None, done=lambda: None):
        assert not programs, "it had programs to run"
        if not unsafe:
            raise ConfigError("programs cannot be confined here: they would reach the network")
        return []

    monkeypatch.setattr(code_tasks, "run_programs", refuse)
    monkeypatch.setattr(code_tasks, "confinement", lambda: Confinement({}, False, ("the network",)))
