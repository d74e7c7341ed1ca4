"""The overtrained run that most tests of analysis ask about."""

import pytest
from overtrained import shared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return shared_run(tmp_path_factory)


@pytest.fixture
def cache(run, monkeypatch):
    monkeypatch.setenv("CRYSTAL_CACHE", str(run.parent / "cache"))
