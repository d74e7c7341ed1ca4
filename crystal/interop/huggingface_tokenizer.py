"""Which of a published directory's tokenizer files a checkpoint goes by, and what it says of them.

`tokenizer.model` first: a tokenizer.json that transformers made from it may split runs of spaces otherwise. A file
that cannot be used stands in nobody's way: the next one counts, and a note says so. A json that is no vocabulary of
LLaMA's kind is good for generation only.

CrystalCoder's 22 added tokens are there when a file of the directory lists them, or in LLM360's own form: not
because a padded vocabulary would have room for them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from crystal.data.tokenizer import ADDED_TOKENS, Tokenizer, foreign_token
from crystal.errors import CheckpointError, CrystalError
from crystal.files import from_json, regular_bytes
from crystal.inference.load import PlainTokenizer
from crystal.interop.huggingface_read import read_json

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
"""Kept beside the weights as they are, for whoever exports them again."""


@dataclass(frozen=True)
class Chosen:
    """The tokenizer of a directory: files to keep, what the checkpoint's state says, lines for people."""

    files: list[Path] = field(default_factory=list)
    state: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose(directory: Path, form: str, vocab_size: int) -> Chosen:
    """The first tokenizer file that can be used; without one, none, and why.

    form: the directory's, llama or crystalcoder; vocab_size: the model's. Raises CheckpointError for a companion file
    that is not JSON.
    """
    listed, notes, usable = _listed(directory), [], {}
    for path in _those_of(directory, TOKENIZERS):
        try:
            usable[path] = Tokenizer.load(path, added_tokens=False)
        except CrystalError as error:
            reason = str(error).removeprefix(f"{path}: ")
            if path.suffix == ".json" and (plain := _plain(path)) is not None:
                usable[path] = plain
            else:
                notes.append(f"{path.name}: left out: {reason}")
    # a model file does not know tokens that were added to it; a json beside it does
    order = sorted(usable, key=lambda path: _foreign(usable[path], listed) is not None)
    for path in order:
        tokenizer = usable[path]
        size = tokenizer.vocab_size if isinstance(tokenizer, PlainTokenizer) else tokenizer.n_base
        if size > vocab_size:
            notes.append(f"{path.name}: left out: expected at most the model's {vocab_size} ids, it has {size}")
            del usable[path]
            continue
        notes += [f"{path.name}: {note}" for note in tokenizer.notes]
        if foreign := _foreign(tokenizer, listed):
            notes.append(f"{path.name}: does not know the added token {foreign}")
        state = {"tokenizer": path.name, "bos": _begins(directory, form)}
        if isinstance(tokenizer, PlainTokenizer):
            state |= {"tokenizer_kind": "plain", "bos": False}  # what begins a text is put there by the file itself
        else:
            room = tokenizer.n_base + len(ADDED_TOKENS) <= vocab_size
            own = any(i >= tokenizer.n_base for i in listed) and not foreign
            state["added_tokens"] = room and (own or (form == "crystalcoder" and not foreign))
            state["tokenizer_kind"] = "llama"
        break
    else:
        return Chosen(_companions(directory), {}, notes)
    return Chosen(sorted(usable) + _companions(directory), state, notes)


def _those_of(directory: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of these names that a directory has."""
    return [expect_inside(directory, name) for name in names if os.path.lexists(directory / name)]


def expect_inside(directory: Path, name: str) -> Path:
    """A file of a directory, which is to be copied. Raises CheckpointError where it is none, or a link that leads
    out of it.

    Within are also the `blobs` beside the `snapshots` of Hugging Face's own cache, which its links lead to.
    """
    path, home = directory / name, directory.resolve()
    homes = [home, home.parents[1] / "blobs"] if len(home.parents) > 1 and home.parent.name == "snapshots" else [home]
    if not path.exists():
        raise CheckpointError(f"{path}: expected a file, it is a link to nothing")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, it is none")
    if not any(path.resolve().is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(f"{path}: expected a file of this directory, it is a link to one elsewhere; copy it here")
    return path


def _plain(path: Path) -> PlainTokenizer | None:
    try:
        return PlainTokenizer(path, None)
    except CrystalError:
        return None


def _foreign(tokenizer: Tokenizer | PlainTokenizer, listed: dict[int, str]) -> str | None:
    if isinstance(tokenizer, PlainTokenizer):
        return None
    return foreign_token({i: name for i, name in listed.items() if i >= tokenizer.n_base}, tokenizer.n_base)


def _listed(directory: Path) -> dict[int, str]:
    """Added tokens by id, from each file that may list them."""
    found: dict[int, str] = {}
    try:
        if (path := directory / "tokenizer.json").is_file():
            for token in _mapping(path).get("added_tokens") or []:
                found[int(token["id"])] = token["content"]
        if (path := directory / "tokenizer_config.json").is_file():
            for i, token in (read_json(path).get("added_tokens_decoder") or {}).items():
                found[int(i)] = token["content"]
        if (path := directory / "added_tokens.json").is_file():
            found |= {int(i): name for name, i in read_json(path).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected added tokens with their ids: {error}") from None
    return found


def _mapping(path: Path) -> dict:
    """A tokenizer.json's mapping, empty where it is none: whoever loads it says so."""
    try:
        mapping = from_json(regular_bytes(path))
    except ValueError:
        return {}
    return mapping if isinstance(mapping, dict) else {}


def _begins(directory: Path, form: str) -> bool:
    """Whether a text starts with BOS: as tokenizer.json's own template has it, else as `add_bos_token` says, else yes,
    as in LLaMA's own code.

    LLM360's tokenizer class adds it whatever the template says, and so CrystalCoder was trained.
    """
    config = directory / "tokenizer_config.json"
    mapping = read_json(config) if config.is_file() else {}
    class_ = str(mapping.get("tokenizer_class", ""))
    published = class_.startswith("CrystalCoder") or (form == "crystalcoder" and not mapping)
    spec = _mapping(directory / "tokenizer.json") if (directory / "tokenizer.json").is_file() else {}
    if spec and not published:
        return "<s>" in json.dumps(_first(spec.get("post_processor")))
    said = mapping.get("add_bos_token")
    return said if isinstance(said, bool) else True


def _first(post_processor: object) -> object:
    """What a post-processor puts first, in whichever of its steps is a template."""
    if not isinstance(post_processor, dict):
        return None
    if post_processor.get("type") == "Sequence":
        return [_first(step) for step in post_processor.get("processors") or []]
    return (post_processor.get("single") or [None])[0]


def _companions(directory: Path) -> list[Path]:
    return _those_of(directory, COMPANIONS)
