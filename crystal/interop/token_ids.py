"""Begin and end tokens, by id, through import and export: as a directory gives them, one or several, none invented.

A checkpoint's state has `bos_id`, `eos_id` and `pad_id` just where the directory says something: a number, a list of
numbers, or null for "none". `generation_config.json` counts before `config.json`, as for transformers' `generate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crystal.config.bounded_yaml import shortened
from crystal.errors import ConfigError
from crystal.interop.huggingface_read import read_json

_KEYS = {"bos_id": "bos_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id"}
GENERATION = "generation_config.json"


def imported(directory: Path) -> dict[str, int | list[int] | None]:
    """What goes into a checkpoint's state. Raises ConfigError naming the file and key for what is no token id."""
    state: dict = {}
    for file in ("config.json", GENERATION):
        mapping = read_json(directory / file) if (directory / file).is_file() else {}
        for ours, theirs in _KEYS.items():
            if theirs not in mapping or (mapping[theirs] is None and ours in state):
                continue
            if not _is_ids(mapping[theirs], -1 if ours == "pad_id" else 0):  # LLaMA was published with a pad of -1
                wanted = "expected a token id, a list of them or null"
                raise ConfigError(f"{directory / file}: {theirs}: {wanted}, got {shortened(repr(mapping[theirs]), 60)}")
            state[ours] = mapping[theirs]
    return state


def exported(state: dict, tokenizer: Any | None) -> dict[str, int | list[int] | None]:
    """`bos_token_id`, `eos_token_id` and what else is known, for a config.json.

    tokenizer: whose begin and end tokens count where the state says nothing, as in a run's own checkpoint. None of
    either: null, because transformers takes 1 and 2 for a LLaMA's where its config.json is silent.
    """
    ids = {theirs: state[ours] for ours, theirs in _KEYS.items() if ours in state}
    imported_from = "imported_from" in state
    for ours, theirs in list(_KEYS.items())[:2]:
        if theirs not in ids:
            ids[theirs] = None if imported_from or tokenizer is None else getattr(tokenizer, ours, None)
    return ids


def first(ids: int | list[int] | None) -> int | None:
    """Of several, the first, for formats that know one."""
    return ids[0] if isinstance(ids, list) else ids


def begins(state: dict, ids: dict[str, int | list[int] | None]) -> bool:
    """Whether a text starts with the begin token. ids: as `exported` gives them."""
    return bool(state.get("bos", True)) and ids.get("bos_token_id") is not None


def _is_ids(value: Any, least: int) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_id(v, least) for v in value)
    return value is None or _is_id(value, least)


def _is_id(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 31
