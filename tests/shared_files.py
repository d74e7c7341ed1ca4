"""Files that others published, in ../shared/data where that is there."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_file(name: str) -> Path:
    """A file of ../shared/data, or a skip that says it is not there."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not on this machine")
    return SHARED / name
