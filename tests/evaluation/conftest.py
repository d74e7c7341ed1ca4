"""Items of a test's own."""

import json

import pytest

from crystal.evaluation.items import Items


@pytest.fixture
def own(tmp_path):
    """own(name, rows) → Items of a directory with that file, and those written before."""

    def write(name, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Items(tmp_path)

    return write
