"""A small run that was really trained, as the subject of an evaluation; made once for a session."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
from runs import whole_run

from crystal.checkpoint import locate, read
from crystal.evaluation.task import Subject

_made: dict[Path, Path] = {}


def subject_of(checkpoint: Path, run: Path | None = None) -> Subject:
    return Subject.of(read(locate(checkpoint)), run)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Its run directory."""
    if corpus not in _made:
        _made[corpus] = whole_run(corpus, tmp_path_factory.mktemp("evaluated"))
    with patch.dict(os.environ, CRYSTAL_CACHE=str(corpus / "cache")):
        yield _made[corpus]


@pytest.fixture(scope="module")
def subject(run):
    return subject_of(run, run)
