"""What was found of a checkpoint, on the disk: a JSON file with a digest of itself, which is taken again where it is
undamaged and answers the same question, and made anew where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crystal.checkpoint.seal_file import DIGEST, digest_of, with_digest
from crystal.files import expect_regular, from_json, regular_bytes, write_whole


def kept_or_made(file: Path, about: dict, make: Callable[[], dict]) -> dict[str, Any]:
    """A file's content where it has the same `about`, else `about` and what `make` returns, JSON-ready, written there.

    A file that was changed since, or that an older crystal wrote without a digest, is no answer. Raises OSError, also
    for a directory, a pipe or a device in the file's place: before anything is made.
    """
    expect_regular(file)
    about = json.loads(json.dumps(about))
    if (known := _undamaged(file)) is not None and known.get("about") == about:
        return known
    content = {"about": about} | make()
    write_whole(file, json.dumps(with_digest(content)))
    return content


def _undamaged(file: Path) -> dict | None:
    try:
        content = from_json(regular_bytes(file))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get(DIGEST) != digest_of(content):
        return None
    del content[DIGEST]
    return content
