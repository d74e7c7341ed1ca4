"""The keys of a run: value, origin, type, default and meaning of each; and the JSON schema of a run file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import pydantic
from pydantic_core import to_jsonable_python

from crystal.config import COMMAND_LINE
from crystal.errors import ConfigError
from crystal.output.config_messages import describe, nearest
from crystal.run import RunConfig, RunFile

AUTO = (("model", "vocab_size"), ("train", "micro_batch_size"))  # which a run that is read has a number for


@dataclass(frozen=True)
class Key:
    """One key of a run, resolved. default is None where `required`."""

    key: str  # dotted; items of a list by their name, where that leads to them
    place: str  # the same, items of a list by position
    value: Any
    origin: str  # the file that set it, `command line`, or `default`
    type: str
    default: Any
    required: bool
    description: str


def run_keys(run: RunFile, wanted: str | None = None) -> list[Key]:
    """All keys of a run in the order of its sections, or the key `wanted`, or those of the section `wanted`.

    Raises ConfigError for one that there is not, with the nearest that there is.
    """
    found = list(_section(run, run.config, (), ()))
    if wanted is None:
        return found
    chosen = [k for k in found if any(f"{name}.".startswith(f"{wanted}.") for name in (k.key, k.place))]
    if chosen:
        return chosen
    names = list(dict.fromkeys(_with_sections(found)))
    ends = [name for name in names if name.endswith(f".{wanted}")]  # a key's own name, without its section
    hint = f"; did you mean '{ends[0]}'?" if ends else nearest(wanted, names)
    raise ConfigError(f"{run.path}: {wanted}: unknown key{hint}", file=run.path, key=wanted)


def _with_sections(keys: list[Key]) -> Iterator[str]:
    for name in (name for key in keys for name in (key.key, key.place)):
        words = name.split(".")
        yield from (".".join(words[:end]) for end in range(1, len(words) + 1))


def _section(run: RunFile, section: pydantic.BaseModel, loc: tuple, shown: tuple) -> Iterator[Key]:
    """The keys of a section. loc: its place in the file; shown: the same with names for positions."""
    schema = _schema(type(section))
    for name, field in type(section).model_fields.items():
        word = field.alias or name
        yield from _value(run, getattr(section, name), schema["properties"][word], schema, (*loc, word), (*shown, word))


def _value(run: RunFile, value: Any, field: dict, root: dict, loc: tuple, shown: tuple) -> Iterator[Key]:
    """The key at `loc`, or those below it. field: its JSON schema, whose definitions are in root."""
    if isinstance(value, pydantic.BaseModel):
        yield from _section(run, value, loc, shown)
    elif isinstance(value, tuple) and value and isinstance(value[0], pydantic.BaseModel):
        for i, item in enumerate(value):
            yield from _section(run, item, (*loc, i), (*shown, _item_name(value, i)))
    elif isinstance(value, dict) and value:
        mapping = next(part for part in field.get("anyOf", [field]) if part.get("type") == "object")
        each = {"description": field.get("description", ""), **mapping["additionalProperties"]}
        for word, item in value.items():
            yield from _value(run, item, each, root, (*loc, word), (*shown, word))
    else:
        auto = loc in AUTO
        default = "auto" if auto else field.get("default")
        required, plain = not auto and "default" not in field, to_jsonable_python(value)
        yield Key(
            key=".".join(map(str, shown)),
            place=".".join(map(str, loc)),
            value=plain,
            origin=_origin(run, loc, not required and plain == default),
            type=describe(field, root) + (" or 'auto'" if auto else ""),
            default=default,
            required=required,
            description=field.get("description") or _meaning(field, root),
        )


@cache
def _schema(section: type[pydantic.BaseModel]) -> dict:
    return section.model_json_schema()


def _meaning(field: dict, root: dict) -> str:
    """What an optional section that is not there would be: the first line of its docstring."""
    names = [part["$ref"].rpartition("/")[2] for part in field.get("anyOf", [field]) if "$ref" in part]
    return root["$defs"][names[0]].get("description", "").partition("\n")[0] if names else ""


def _item_name(items: tuple, position: int) -> str | int:
    """An item's `name`, as overrides take it, where it has one that leads to it alone; else its position."""
    names = [getattr(item, "name", None) for item in items]
    name = names[position]
    plain = isinstance(name, str) and name and "." not in name and not name.isdecimal() and names.count(name) == 1
    return name if plain else position


def _origin(run: RunFile, loc: tuple, is_default: bool) -> str:
    """The file that set the key at `loc`, itself or by a shorter form of its section: `sources: {english: 1.0}`."""
    origins, node = run.source.origin, run.source.mapping
    set_at, depth = node, 0
    for end, word in enumerate(loc, 1):
        if loc[:end] not in origins:
            break
        node = node[word]
        set_at, depth = node, end
    short_form = not isinstance(set_at, dict | list)
    if depth == len(loc) or (short_form and depth and not is_default):
        return COMMAND_LINE if origins[loc[:depth]].startswith(COMMAND_LINE) else origins[loc[:depth]]
    return "default"


def as_dict(run: RunFile, keys: list[Key]) -> dict:
    """The keys, JSON-ready."""
    return {"run": run.path, "keys": {k.key: {n: v for n, v in asdict(k).items() if n != "key"} for k in keys}}


def schema() -> dict:
    """The JSON schema of a run file, for editors that complete YAML.

    A file may leave out what another one that it extends says, so no key of a mapping is required, not even the one
    that says which of several sections it is. Items of a list, which is replaced whole, keep what they require.
    """
    whole = RunConfig.model_json_schema(by_alias=True)
    definitions, items = whole["$defs"], set(_items(whole))
    for section in (whole, *(definitions[name] for name in definitions if name not in items)):
        section.pop("required", None)
        for key in section["properties"].values():
            if "oneOf" in key:
                key["anyOf"] = key.pop("oneOf")
                key.pop("discriminator", None)
    for section, key in AUTO:
        number = definitions[whole["properties"][section]["$ref"].rpartition("/")[2]]["properties"][key]
        bounds = {word: number.pop(word) for word in ("type", "exclusiveMinimum")}
        number |= {"anyOf": [bounds, {"const": "auto"}], "default": "auto"}
    name = {"type": "string"}
    extends = {
        "anyOf": [name, {"type": "array", "items": name}],
        "description": "files that this one is merged onto: a path from here, or a packaged file (runs/demo)",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "crystal run file",
        "properties": {"extends": extends, **whole["properties"]},
    }


def _items(node: Any, in_list: bool = False) -> Iterator[str]:
    """Names of the sections that stand in lists."""
    if isinstance(node, list):
        yield from (name for part in node for name in _items(part, in_list))
    elif isinstance(node, dict):
        if in_list and "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for word, part in node.items():
            yield from _items(part, word == "items" or (in_list and word == "anyOf"))
