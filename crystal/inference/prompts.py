"""Prompts from a file, for batched generation."""

from __future__ import annotations

from pathlib import Path

from crystal.errors import DataError
from crystal.files import from_json, regular_bytes


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .jsonl file: a string a line, or an object with a `prompt`; empty lines are none.

    Raises DataError naming the file and line.
    """
    try:
        lines = regular_bytes(path).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = from_json(line)
        except ValueError:
            value = None
        value = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise DataError(f'{path}: line {number}: expected a JSON string, or an object with a "prompt"')
        prompts.append(value)
    if not prompts:
        raise DataError(f"{path}: expected a prompt a line, there is none")
    return prompts
