"""What is wrong with a value, in plain words: `expected a whole number greater than 0, got "x"`.

pydantic says which value of a config it refuses, and its JSON schema says what belongs there. From the two comes one
line for the user, in which none of pydantic's own prose is left.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import pydantic

from crystal.errors import WrongValue

_OWN = ("value_error", "assertion_error")  # a section's own check, which speaks for itself
_TAG = ("union_tag_invalid", "union_tag_not_found")
_PATTERNS = {  # the patterns of our configs; another is shown as it is
    r"^[A-Za-z0-9._-]+$": "a name of letters, digits, '.', '_' and '-'",
    r"^[\w.-]+$": "a name of letters, digits, '.', '_' and '-'",
    "^[0-9a-f]{64}$": "64 hexadecimal digits",
}
_BOUNDS = (
    ("exclusiveMinimum", "greater than {:,}"),
    ("minimum", "of at least {:,}"),
    ("exclusiveMaximum", "less than {:,}"),
    ("maximum", "of at most {:,}"),
)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def explain(cls: type[pydantic.BaseModel], mapping: Any, problem: pydantic.ValidationError) -> tuple[tuple, str]:
    """(the key's path, what is wrong with it) of the mistake in `problem` that is most worth telling."""
    schema = _schema(cls)
    errors = problem.errors(include_url=False)
    # an unknown key first: a typo also makes the right key "missing", which is not the useful half
    error = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    place = _Place(schema, mapping, error)
    if place.in_union:  # of the kinds of value it may be, the one that is right but for its inside says more
        places = [(_Place(schema, mapping, e), e) for e in errors]
        inside = [(p, e) for p, e in places if len(p.loc) > len(place.loc) and p.loc[: len(place.loc)] == place.loc]
        place, error = inside[0] if inside else (place, error)
    loc, message = place.loc, _sentence(place, error)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, WrongValue):
        return (*loc, *cause.loc), message
    if error["type"] in _TAG:
        return (*loc, "name"), message
    return loc, message


@cache
def _schema(cls: type[pydantic.BaseModel]) -> dict:
    return cls.model_json_schema()


def found(value: Any) -> str:
    """A value as a message shows it: JSON, and short."""
    try:
        shown = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        shown = type(value).__name__
    return shown if len(shown) < 60 else shown[:57] + "..."


class _Place:
    """Where an error lies: the user's keys down to it, the value there, and the schema of what belongs there.

    pydantic's path also names the branch of a union that it tried, and the key that a shorthand stands for: neither
    was written by the user.
    """

    def __init__(self, root: dict, mapping: Any, error: dict):
        self.root, self.schema, self.value = root, root, mapping
        self.loc: tuple = ()
        self.in_union = False  # the path ends at a union, with no key of the user's behind it
        self.holder: dict = {}  # the schema of the section or mapping that the place is in
        self.beside: list[str] = []  # the keys that may stand where one is missing or unknown
        path = error["loc"]
        for i, part in enumerate(path):
            absent = error["type"] in ("missing", "extra_forbidden") and i == len(path) - 1
            below = self._below(part)
            self.beside = self.section_keys() if absent else []
            if part == "[key]":
                self.schema = {"type": "string", "pattern": next(iter(self.holder.get("patternProperties", {})), None)}
                self.value, self.loc = self.loc[-1], self.loc[:-1]
            elif tagged := self._tagged(part):
                self.schema = tagged
            elif absent or _holds(self.value, part):
                self.holder, self.in_union = self._branch("object"), False
                self.loc = (*self.loc, part)
                self.schema, self.value = below or {}, None if absent else self.value[part]
            elif len(self._branches()) > 1:
                self.in_union = True
            else:
                self.schema = below or {}

    def section_keys(self) -> list[str]:
        """The keys of the section at this place."""
        return [*self._branch("object").get("properties", {})]

    def names(self) -> list[str]:
        """The names of the sections that may stand at this place, of which one is chosen by its `name`."""
        return [branch["properties"]["name"]["const"] for branch in self._branches()]

    def _branches(self) -> list[dict]:
        """What a union here is of, without null; of anything else nothing."""
        schema = _resolved(self.schema, self.root)
        branches = [_resolved(s, self.root) for s in schema.get("anyOf", schema.get("oneOf", ()))]
        return [branch for branch in branches if branch.get("type") != "null"]

    def _branch(self, kind: str) -> dict:
        """The schema here, or of a union that branch of it which is of this JSON type."""
        return next((b for b in self._branches() if b.get("type") == kind), _resolved(self.schema, self.root))

    def _tagged(self, tag: Any) -> dict | None:
        named = (b for b in self._branches() if b.get("properties", {}).get("name", {}).get("const") == tag)
        return next(named, None)

    def _below(self, part: Any) -> dict | None:
        node = self._branch("array" if isinstance(part, int) else "object")
        if isinstance(part, int):
            firsts = node.get("prefixItems", ())
            return firsts[part] if part < len(firsts) else node.get("items")
        return node.get("properties", {}).get(part, _values(node))


def _holds(value: Any, part: Any) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int) and 0 <= part < len(value)


def _resolved(schema: dict, root: dict) -> dict:
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _sentence(place: _Place, error: dict) -> str:
    kind, value = error["type"], place.value
    if kind in _OWN:
        return str(error["ctx"]["error"])
    if kind == "extra_forbidden":
        known = f" (known: {', '.join(place.beside)})" if place.beside else ""
        return f"unknown key{nearest(place.loc[-1], place.beside)}{known}"
    if kind == "missing":
        return "expected a value, none given"
    if kind in _TAG:
        got = value.get("name") if isinstance(value, dict) else value
        return f"expected {_alternatives(map(repr, place.names()))}, got {found(got)}"
    if kind == "json_invalid":
        return "expected text that UTF-8 can hold, found half of a surrogate pair"
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, got {found(value)}"
    return f"expected {describe(place.schema, place.root)}, got {found(value)}"


def describe(schema: dict, root: dict) -> str:
    """What a JSON schema allows, in words. root: the whole schema, which holds the definitions."""
    return _alternatives(dict.fromkeys(_options(_resolved(schema, root), root)))


def _options(schema: dict, root: dict) -> list[str]:
    branches = schema.get("anyOf", schema.get("oneOf"))
    if branches:
        return [option for branch in branches for option in _options(_resolved(branch, root), root)]
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return [repr(v) if isinstance(v, str) else json.dumps(v) for v in values]
    kind = schema.get("type")
    if kind == "boolean":
        return ["true", "false"]
    if kind in ("integer", "number"):
        return [("a whole number" if kind == "integer" else "a number") + _range(schema)]
    if kind == "string":
        return [_text(schema)]
    if kind == "array":
        return [_list(schema, root)]
    if kind == "object":
        values = _values(schema)
        return ["a mapping of keys" + (f", each with {describe(values, root)}" if values else "")]
    return ["null" if kind == "null" else "a value"]


def _values(schema: dict) -> dict | None:
    """The schema of a mapping's values, whatever their keys are called; None for a section."""
    values = next(iter(schema.get("patternProperties", {}).values()), schema.get("additionalProperties"))
    return values if isinstance(values, dict) else None


def _range(schema: dict) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:,} to {schema['maximum']:,}"
    bounds = [words.format(schema[key]) for key, words in _BOUNDS if key in schema]
    return " " + " and ".join(bounds) if bounds else ""


def _text(schema: dict) -> str:
    if schema.get("format") == "path":
        return "a path"
    if pattern := schema.get("pattern"):
        return _PATTERNS.get(pattern, f"text that matches {pattern}")
    return "text that is not empty" if schema.get("minLength") else "text"


def _list(schema: dict, root: dict) -> str:
    items = schema.get("prefixItems")
    each = describe((items or [schema.get("items", {})])[0], root)
    if items and all(item == items[0] for item in items):
        return f"a list of {len(items)}, each {each}"
    return f"a list{' of at least one' if schema.get('minItems') else ''}, each {each}"


def _alternatives(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
