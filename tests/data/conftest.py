"""A small tokenizer trained on Python's own library, and the published files when shared/ is there."""

from __future__ import annotations

import inspect
import json
import textwrap

import pytest
from shared_files import shared_file

from crystal.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Source code, one text that needs byte fallback, and one of numbers."""
    return [inspect.getsource(module) for module in (inspect, json, textwrap)] + [
        "naïve café, 你好 😀\n" * 3,
        "in 2023 and 1000 times " * 99,
    ]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """1,000 base ids."""
    return train_tokenizer(texts, 1000, tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="session")
def published() -> Tokenizer:
    """CrystalCoder's tokenizer.json."""
    return Tokenizer.load(shared_file("crystalcoder-tokenizer.json"))
